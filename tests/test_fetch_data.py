"""Fetch data by git revision from real DVC repositories: content, identity and every kind of failure."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import services, tiny
from helpers.fake_data import write_files
from helpers.git_server import git_server
from pixelclip.config import FetchDataConfig
from pixelclip.fetch_data import about, run
from pixelclip.storage.files import digest, read_json
from pixelclip.workflow.stage import describe

IMAGES = {"a/1.jpg": b"one", "a/2.jpg": b"two", "3.jpg": b"three" * 1000}
PLAIN = {"readme.txt": b"hello", "conf/x.yaml": b"x: 1", "conf/deep/y.yaml": b"y: 2"}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    base = tmp_path_factory.mktemp("dvc")
    tiny.dvc_repository(base / "repo", str(base / "remote"), {"data/images": IMAGES, "one.bin": {"": b"1" * 100}}, PLAIN)
    return base


@pytest.fixture
def repo(made, tmp_path) -> Path:
    """Create a repository as on a cluster: no cache, only commits and the remote."""
    shutil.copytree(made, tmp_path / "dvc")
    repo = tmp_path / "dvc" / "repo"
    config = repo / ".dvc" / "config"
    config.write_text(config.read_text().replace(str(made), str(tmp_path / "dvc")))
    shutil.rmtree(repo / ".dvc" / "cache")
    tiny.git(repo, "commit", "-qam", "elsewhere")
    tiny.git(repo, "tag", "-f", "v1")
    return repo


def fetched(folder: Path) -> dict[str, bytes]:
    names = ("metrics.json", "provenance.json")
    files = [path for path in folder.rglob("*") if path.is_file() and path.name not in names]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def commit(repo: Path) -> str:
    return tiny.git(repo, "rev-parse", "HEAD")


def test_folder_tracked_by_dvc(repo, tmp_path):
    out = tmp_path / "out"
    metrics = run(str(repo), out, FetchDataConfig(path="data/images", revision="v1"))
    assert fetched(out) == IMAGES
    size = sum(len(content) for content in IMAGES.values())
    # DVC's own MD5 of a folder is that of a JSON list of its files, in DVC's order.
    listed = [{"md5": hashlib.md5(IMAGES[name]).hexdigest(), "relpath": name} for name in sorted(IMAGES)]
    md5 = hashlib.md5(json.dumps(listed, sort_keys=True).encode()).hexdigest() + ".dir"
    assert f"md5: {md5}" in (repo / "data" / "images.dvc").read_text()
    assert about(out) == {"git_sha": commit(repo), "path": "data/images", "md5": md5, "nfiles": 3, "size": size}
    assert metrics == read_json(out / "metrics.json") == {"files": 3.0, "bytes": float(size)}
    assert read_json(out / "provenance.json")["source"] == about(out) | {"repo": str(repo)}


@pytest.mark.parametrize("url", ["file://{}", "{}/", "{}/.git/.."])
def test_repository_by_url(repo, tmp_path, url):
    run(url.format(repo), tmp_path / "out", FetchDataConfig(path="data/images", revision=commit(repo)))
    assert fetched(tmp_path / "out") == IMAGES


@pytest.mark.parametrize(
    ("path", "content"),
    [
        ("one.bin", {"one.bin": b"1" * 100}),
        ("data/images/a", {"1.jpg": b"one", "2.jpg": b"two"}),
        ("data/images/a/1.jpg", {"1.jpg": b"one"}),
        ("conf", {"x.yaml": b"x: 1", "deep/y.yaml": b"y: 2"}),
        ("conf/", {"x.yaml": b"x: 1", "deep/y.yaml": b"y: 2"}),
        ("readme.txt", {"readme.txt": b"hello"}),
        ("data", {f"images/{name}": content for name, content in IMAGES.items()} | {".gitignore": b"/images\n"}),
    ],
)
def test_files_parts_of_folders_and_files_in_git(repo, tmp_path, path, content):
    out = tmp_path / "out"
    run(str(repo), out, FetchDataConfig(path=path))
    assert fetched(out) == content
    source = about(out)
    seen = {name: data for name, data in content.items() if not name.startswith(".")}
    assert (source["nfiles"], source["size"]) == (len(seen), sum(map(len, seen.values())))
    if len(content) == 1:
        assert source["md5"] == hashlib.md5(*content.values()).hexdigest()
    else:
        assert source["md5"] == digest(write_files(tmp_path / "same", content))["md5"]


def test_revision_is_the_committed_state(repo, tmp_path):
    from dvc.repo import Repo

    old = commit(repo)
    (repo / "data" / "images" / "4.jpg").write_bytes(b"four")
    with Repo(str(repo)) as opened:
        opened.add([str(repo / "data" / "images")])
        opened.push()
    tiny.git(repo, "commit", "-qam", "more")
    (repo / "data" / "images" / "5.jpg").write_bytes(b"not committed")
    new = IMAGES | {"4.jpg": b"four"}
    revisions = {old: IMAGES, old[:10]: IMAGES, "v1": IMAGES, "main": new, "HEAD": new}
    for number, (revision, expected) in enumerate(revisions.items()):
        for start in ("", "file://"):
            out = tmp_path / f"{number}{start[:4]}"
            run(f"{start}{repo}", out, FetchDataConfig(path="data/images", revision=revision))
            assert fetched(out) == expected, (revision, start)
    assert about(tmp_path / "0")["git_sha"] == about(tmp_path / "2")["git_sha"] == old
    assert about(tmp_path / "3")["git_sha"] == commit(repo) != old


def test_same_commit_is_reused_and_another_is_rejected(repo, tmp_path, capsys):
    out, config = tmp_path / "out", FetchDataConfig(path="data/images", revision="main")
    first = run(str(repo), out, config)
    before = (out / "provenance.json").read_bytes()
    assert run(str(repo), out, config) == first
    assert "reused" in capsys.readouterr().out
    old = commit(repo)
    tiny.git(repo, "commit", "-q", "--allow-empty", "-m", "next")
    with pytest.raises(ValueError, match=f"commit {old} → {commit(repo)}"):
        run(str(repo), out, config)
    assert (out / "provenance.json").read_bytes() == before


def test_next_stage_records_the_source(repo, tmp_path):
    run(str(repo), tmp_path / "out", FetchDataConfig(path="data/images"))
    described = describe(tmp_path / "out")
    assert described["provenance"]["source"]["git_sha"] == commit(repo)
    assert (described["num_files"], described["md5"]) == (3, digest(write_files(tmp_path / "same", IMAGES))["md5"])


def test_fetched_stage_output_keeps_its_provenance(tmp_path):
    before = {"stage": "masks", "settings": {}, "inputs": {}, "version": "0.1.0", "revision": "abc"}
    before["output"] = {"md5": "m" * 32, "num_files": 1, "size": 3}
    files = {"000.tar": b"tar", "provenance.json": json.dumps(before).encode(), "metrics.json": b"{}"}
    tiny.dvc_repository(tmp_path / "repo", str(tmp_path / "remote"), {"masks": files}, {})
    run(str(tmp_path / "repo"), tmp_path / "out", FetchDataConfig(path="masks"))
    there = read_json(tmp_path / "out" / "provenance.json")
    assert there["inputs"]["made"]["provenance"] == before
    assert there["stage"] == "fetch_data" and there["output"]["num_files"] == 1
    assert read_json(tmp_path / "out" / "metrics.json") == {"files": 3.0, "bytes": float(sum(map(len, files.values())))}


def test_data_with_a_reserved_file_name_is_rejected(tmp_path):
    tiny.dvc_repository(tmp_path / "repo", str(tmp_path / "remote"), {"set": {"metrics.json": b"{}", "a": b"a"}}, {})
    with pytest.raises(ValueError, match=r"set at .*: contains metrics\.json, a file name that pixelclip reserves"):
        run(str(tmp_path / "repo"), tmp_path / "out", FetchDataConfig(path="set"))
    assert not (tmp_path / "out").exists()


def refusal(repo: object, out: Path, **settings: str) -> str:
    with pytest.raises(ValueError, match=r".") as refused:
        run(str(repo), out, FetchDataConfig(**({"path": "data/images"} | settings)))
    assert not out.exists()
    message = str(refused.value)
    assert "\n" not in message
    return message


def test_missing_repository_revision_and_path_are_named(repo, tmp_path):
    out = tmp_path / "out"
    assert f"{repo}: there is no revision 'v9' (fetch_data.revision)" in refusal(repo, out, revision="v9")
    assert "there is no revision" in refusal(f"file://{repo}", out, revision="v9")
    assert "there is no revision" in refusal(repo, out, revision="0" * 40)
    message = refusal(repo, out, path="data/imagse")
    assert (
        f"{repo}: data/imagse at {commit(repo)[:12]}: there is no such path (fetch_data.path); data contains images" in message
    )
    assert "there is no such path (fetch_data.path); the repository contains conf, data, one.bin" in refusal(
        repo, out, path="nope"
    )
    for nowhere in (tmp_path / "none", tmp_path, f"file://{tmp_path}/none"):
        assert f"{nowhere}: not a readable git repository" in refusal(nowhere, out)


def test_unreachable_repository_is_named_without_its_token(tmp_path):
    (port,) = services.free_ports(1)
    message = refusal(f"http://user:geheim@127.0.0.1:{port}/data.git", tmp_path / "out")
    assert message.startswith(f"http://127.0.0.1:{port}/data.git: not a readable git repository")
    assert "geheim" not in message


def object_of(repo: Path, content: bytes) -> Path:
    md5 = hashlib.md5(content).hexdigest()
    return repo.parent / "remote" / "files" / "md5" / md5[:2] / md5[2:]


def test_file_missing_in_the_remote_is_named_and_the_others_are_kept(repo, tmp_path):
    kept = object_of(repo, b"two").read_bytes()
    object_of(repo, b"two").unlink()
    message = refusal(repo, tmp_path / "out")
    assert (
        f"{repo}: data/images at {commit(repo)[:12]}: " in message
        and "data/images/a/2.jpg is missing from the DVC remote" in message
    )
    object_of(repo, b"two").write_bytes(kept)
    run(str(repo), tmp_path / "out", FetchDataConfig(path="data/images"))
    assert fetched(tmp_path / "out") == IMAGES


def test_damaged_file_is_named_and_rejected(repo, tmp_path):
    damaged = object_of(repo, b"two")
    damaged.chmod(0o644)
    damaged.write_bytes(b"twX")
    assert "data/images/a/2.jpg is damaged in the DVC remote (MD5 mismatch: expected " in refusal(repo, tmp_path / "out")


def test_missing_remote(repo, tmp_path):
    shutil.rmtree(repo.parent / "remote")
    assert "the DVC remote cannot be read" in refusal(repo, tmp_path / "out")


def test_killed_fetch_leaves_nothing_and_resumes(repo, tmp_path, capsys):
    out = tmp_path / "out"
    code = """
import os, signal, sys
from pathlib import Path
from pixelclip import fetch_data
from pixelclip.config import FetchDataConfig
arrived, fetch_data._AT_ONCE = [], 1
def md5(path, real=fetch_data.file_md5):
    arrived.append(path)
    return os.kill(os.getpid(), signal.SIGKILL) if len(arrived) == 2 else real(path)
fetch_data.file_md5 = md5
fetch_data.run(sys.argv[1], Path(sys.argv[2]), FetchDataConfig(path="data/images"))
"""
    killed = subprocess.run([sys.executable, "-c", code, str(repo), str(out)])
    assert killed.returncode == -9
    assert not out.exists()
    shutil.rmtree(repo.parent / "remote" / "files" / "md5" / hashlib.md5(b"one").hexdigest()[:2])  # already fetched
    run(str(repo), out, FetchDataConfig(path="data/images"))
    assert "continues an interrupted run" in capsys.readouterr().out
    assert fetched(out) == IMAGES


def test_dvc_in_a_subfolder_of_the_repository(tmp_path):
    from dvc.repo import Repo

    write_files(tmp_path / "repo", {"team/images/1.jpg": b"one", "readme.txt": b"hello"})
    tiny.git(tmp_path / "repo", "init", "-q", "-b", "main")
    with Repo.init(str(tmp_path / "repo" / "team"), subdir=True) as opened:
        with opened.config.edit() as config:
            config["core"] = {"remote": "store"}
            config["remote"] = {"store": {"url": str(tmp_path / "remote")}}
        opened.add([str(tmp_path / "repo" / "team" / "images")])
        opened.push()
    tiny.git(tmp_path / "repo", "add", "-A")
    tiny.git(tmp_path / "repo", "commit", "-qm", "team")
    shutil.rmtree(tmp_path / "repo" / "team" / ".dvc" / "cache")
    for number, start in enumerate(("", "file://")):
        out = tmp_path / f"out{number}"
        run(f"{start}{tmp_path}/repo", out, FetchDataConfig(path="team/images"))
        assert fetched(out) == {"1.jpg": b"one"}
        assert about(out)["md5"].endswith(".dir")


def test_no_clone_is_left(repo, tmp_path, monkeypatch):
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    code = "import sys; from pixelclip.cli.app import main; main()"
    words = ["fetch_data", "--repo", f"file://{repo}", "--out", str(tmp_path / "out"), "path=data/images", "revision=v1"]
    subprocess.run([sys.executable, "-c", code, *words], check=True, env=os.environ | {"TMPDIR": str(temporary)})
    assert fetched(tmp_path / "out") == IMAGES
    assert list(temporary.iterdir()) == []


@pytest.fixture
def remote(s3, tmp_path) -> str:
    """Return a prefix for this test on the S3 server."""
    return f"s3://dvc/{tmp_path.name}"


@pytest.mark.services
def test_data_over_s3(s3, remote, tmp_path, monkeypatch):
    big = {"images/big.bin": os.urandom(20 << 20), "images/small.jpg": b"small"}  # the first in several parts
    sha = tiny.dvc_repository(tmp_path / "repo", remote, {"data": big}, {})
    shutil.rmtree(tmp_path / "repo" / ".dvc" / "cache")
    assert s3.client().list_objects_v2(Bucket="dvc", Prefix=tmp_path.name)["KeyCount"] == 3  # two files and their list
    url = f"file://{tmp_path}/repo"
    run(url, tmp_path / "out", FetchDataConfig(path="data"))
    assert fetched(tmp_path / "out") == big
    assert about(tmp_path / "out")["git_sha"] == sha

    monkeypatch.delenv("AWS_ENDPOINT_URL")  # the repository may set the endpoint
    config = tmp_path / "repo" / ".dvc" / "config"
    config.write_text(config.read_text() + f"    endpointurl = {s3.endpoint}\n")
    tiny.git(tmp_path / "repo", "commit", "-qam", "endpoint")
    run(url, tmp_path / "again", FetchDataConfig(path="data"))
    assert fetched(tmp_path / "again") == big


@pytest.mark.services
def test_files_over_s3_take_one_request_each(s3, remote, tmp_path, monkeypatch):
    from dvc_objects.fs.base import FileSystem

    repo, files = tmp_path / "repo", {f"{number}.jpg": bytes([number]) * 100 for number in range(40)}
    tiny.dvc_repository(repo, remote, {"data/images": files}, {})
    shutil.rmtree(repo / ".dvc" / "cache")
    asked, exists = [], FileSystem.exists
    monkeypatch.setattr(FileSystem, "exists", lambda self, path, *words: asked.append(path) or exists(self, path, *words))
    run(str(repo), tmp_path / "out", FetchDataConfig(path="data/images"))
    assert fetched(tmp_path / "out") == files
    assert len([path for path in asked if tmp_path.name in str(path) and "files/md5" in str(path)]) < 5

    md5 = hashlib.md5(files["1.jpg"]).hexdigest()
    damaged = {"Bucket": "dvc", "Key": f"{tmp_path.name}/files/md5/{md5[:2]}/{md5[2:]}"}
    s3.client().put_object(**damaged, Body=b"other")
    with pytest.raises(ValueError, match=r"1\.jpg is damaged in the DVC remote"):
        run(str(repo), tmp_path / "again", FetchDataConfig(path="data/images"))
    s3.client().put_object(**damaged, Body=files["1.jpg"])
    run(str(repo), tmp_path / "again", FetchDataConfig(path="data/images"))
    assert fetched(tmp_path / "again") == files


@pytest.mark.services
def test_s3_refusal_is_one_clear_line(s3, remote, tmp_path, monkeypatch):
    (port,) = services.free_ports(1)
    repo = tmp_path / "repo"
    tiny.dvc_repository(repo, remote, {"data/images": IMAGES, "one.bin": {"": b"1"}}, {})
    shutil.rmtree(repo / ".dvc" / "cache")
    out, config = tmp_path / "out", repo / ".dvc" / "config"
    for path in ("data/images", "one.bin"):
        with monkeypatch.context() as changed:
            changed.setenv("AWS_ACCESS_KEY_ID", "nobody")
            assert "AWS_ACCESS_KEY_ID" in refusal(repo, out, path=path)
        with monkeypatch.context() as changed:
            changed.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
            assert "AWS_SECRET_ACCESS_KEY" in refusal(repo, out, path=path)
        with monkeypatch.context() as changed:
            for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
                changed.delenv(name)
            changed.setenv("HOME", str(tmp_path))
            assert "AWS_ACCESS_KEY_ID" in refusal(repo, out, path=path)
        with monkeypatch.context() as changed:
            changed.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
            assert f"http://127.0.0.1:{port}" in refusal(repo, out, path=path)
    kept = config.read_text()
    config.write_text(kept.replace("s3://dvc/", "s3://no-such-bucket/"))
    tiny.git(repo, "commit", "-qam", "another bucket")
    for path in ("data/images", "one.bin"):
        assert "bucket" in refusal(repo, out, path=path)
    config.write_text(kept)
    tiny.git(repo, "commit", "-qam", "the bucket")
    md5 = hashlib.md5(b"two").hexdigest()
    s3.client().delete_object(Bucket="dvc", Key=f"{tmp_path.name}/files/md5/{md5[:2]}/{md5[2:]}")
    assert "data/images/a/2.jpg is missing from the DVC remote" in refusal(repo, out)


def test_login_from_git_variables_is_not_recorded(repo, tmp_path, monkeypatch):
    """A Secret sets these variables, see docs/cluster.md."""
    config = FetchDataConfig(path="data/images", revision="v1")
    with git_server(repo, "bot:very-secret") as address:
        monkeypatch.setenv("GIT_CONFIG_COUNT", "1")
        monkeypatch.setenv("GIT_CONFIG_KEY_0", f"url.http://bot:wrong-secret@{address}/.insteadOf")
        monkeypatch.setenv("GIT_CONFIG_VALUE_0", f"http://{address}/")
        with pytest.raises(ValueError, match="not a readable git repository") as refused:
            run(f"http://{address}/data.git", tmp_path / "out", config)
        assert "wrong-secret" not in str(refused.value)
        monkeypatch.setenv("GIT_CONFIG_KEY_0", f"url.http://bot:very-secret@{address}/.insteadOf")
        run(f"http://{address}/data.git", tmp_path / "out", config)
    assert fetched(tmp_path / "out") == IMAGES
    text = (tmp_path / "out" / "provenance.json").read_text()
    assert f"http://{address}/data.git" in text and "very-secret" not in text
