"""Passwords, tokens and signatures that a user puts into URLs: none stays in a file, a database, an artifact or a message."""

import json
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from urllib.parse import urlsplit

import open_clip
import pytest
import yaml
from mlflow import MlflowClient
from safetensors.torch import save

from helpers import command_line, random_dino, tiny
from helpers.fake_data import encoded, pixels
from helpers.git_server import git_server
from helpers.json_server import served
from helpers.mlflow_runs import mlflow_on_sqlite
from helpers.services import running
from helpers.training import SMALL
from pixelclip.storage.files import read_json
from pixelclip_pipelines.run import compile_to

pixelclip = command_line.pixelclip
SECRETS = ("geheim-git", "geheim-weights", "geheim-mlflow")
CLIP = "tiny-pixelclip"


@pytest.fixture
def weights(monkeypatch):
    """URLs of a CLIP and a DINO on a server that requires a token."""
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, CLIP, tiny.CLIP_CONFIG)
    files = {"/clip.safetensors": save(tiny.clip_state()), "/dino.safetensors": save(random_dino.weights())}

    class Guarded(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            """Log nothing."""

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            url = urlsplit(self.path)
            body = files[url.path] if url.query == f"X-Amz-Signature={SECRETS[1]}" else b""
            self.send_response(200 if body else 403)
            self.send_header("ETag", '"1"')
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

    with served(Guarded) as address:
        yield {name: f"{address}/{name}.safetensors?X-Amz-Signature={SECRETS[1]}" for name in ("clip", "dino")}


@pytest.fixture(params=["database", pytest.param("server", marks=pytest.mark.services)])
def tracking(request, monkeypatch, tmp_path):
    """A tracking URI with a password, in its query or its login."""
    tiny.mlflow_at(monkeypatch, tmp_path / "mlflow")
    if request.param == "database":
        # SQLite ignores the parameter. Files are stored below the current folder.
        yield f"sqlite:///file:{tmp_path}/mlflow/mlflow.db?uri=true&password={SECRETS[2]}"
        return
    server = mlflow_on_sqlite(tmp_path / "server")
    with running(server.server):
        server.server.wait()
        yield server.uri.replace("://", f"://bot:{SECRETS[2]}@")


@pytest.fixture
def repository(tmp_path):
    """A data repository with a login in its URL."""
    images = {f"{number}.png": encoded(pixels(40, 48, number), "PNG") for number in range(6)}
    tiny.dvc_repository(tmp_path / "data", str(tmp_path / "remote"), {"images": images}, {"a.txt": b"a"})
    with git_server(tmp_path / "data", f"bot:{SECRETS[0]}") as address:
        yield f"http://bot:{SECRETS[0]}@{address}/data.git"


def leaks(folder: Path) -> list[str]:
    """Return every file below a folder, and every file name, that contains a secret."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    assert paths
    return [f"{path}: {secret}" for path in paths for secret in SECRETS if secret.encode() in bytes(path) + path.read_bytes()]


def test_no_secret_is_left_behind_by_a_run(pixelclip, tracking, repository, weights, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking)
    monkeypatch.setenv("PIXELCLIP_CACHE", str(tmp_path / "cache"))
    tiny.labelled_set(tmp_path / "set")
    clip = f"{CLIP}:{weights['clip']}"
    small = {name: value for name, value in SMALL.items() if name != "side"} | {"steps": 2, "side": 32, "dino_side": 20}
    train = [f"{name}={json.dumps(value) if not isinstance(value, str) else value}" for name, value in small.items()]
    dino = ["generator=dino", f"weights={weights['dino']}", "dino_side=20", "dino_clusters=3", "workers=0", "device=cpu"]
    commands = [
        ["fetch_data", "--repo", repository, "--out", "images", "path=images"],
        ["shards", "--images", "images", "--out", "shards"],
        ["masks", "--shards", "shards", "--out", "masks", *dino],
        ["train", "--masks", "masks", "--out", "model", f"clip={clip}", f"dino={weights['dino']}", "dino_clusters=3", *train],
        ["evaluate_clip", "--labelled", "set", "--out", "clip_evaluation", "--clip", clip, "--side", 32, "device=cpu"],
        ["evaluate", "--model", "model", "--labelled", "set", "--out", "evaluation", f"clip={clip}", "device=cpu"],
        ["register", "--model", "model", "--evaluation", "evaluation", "--out", "registered", "name=secret", "min_gain=-100"],
        ["lineage", "models:/secret@champion"],
        ["lineage", "models:/secret@champion", "--json"],
        ["doctor"],
    ]
    shown = ""
    for words in commands:
        code, out, err = pixelclip(*words)
        shown += out + err
        assert code == 0 or words == ["doctor"], err
    repeated = pixelclip(*[word.replace(SECRETS[1], "another") if isinstance(word, str) else word for word in commands[0]])
    assert "fetch_data: reused images" in repeated[1]
    compile_to(tmp_path / "pipeline.yaml")

    assert [secret for secret in SECRETS if secret in shown] == []
    assert leaks(tmp_path) == []
    client = MlflowClient(tracking)
    (run,) = client.search_runs([client.get_experiment_by_name("pixelclip").experiment_id])
    stored = json.dumps([run.to_dictionary(), *(vars(version) for version in client.search_model_versions())], default=str)
    assert [secret for secret in SECRETS if secret in stored] == []
    assert run.data.params["train.clip"] == clip.partition("?")[0]
    assert run.data.tags["data.images.repo"] == repository.replace(f"bot:{SECRETS[0]}@", "")
    client.download_artifacts(run.info.run_id, "", str(tmp_path / "back"))
    assert leaks(tmp_path / "back") == []
    written = [read_json(tmp_path / file)["tracking_uri"] for file in ("model/run.json", "registered/registration.json")]
    assert len(set(written)) == 1 and "://" in written[0]


WRONG = [
    ["fetch_data", "--repo", "https://bot:p@ss/geheim-git@host.invalid/data.git", "--out", "o"],
    ["fetch_data", "--repo", "https://bot:geheim-git/p@host.invalid:77/data.git", "--out", "o"],
    ["fetch_data", "--repo", "https://geheim-git@127.0.0.1:1/data.git", "--out", "o"],
    ["masks", "--shards", "s3://", "--out", "o", "weights=https://h/x?sig=geheim-weights"],
    ["masks", "--shards", "https://bot:geheim-weights@h/x", "--out", "o"],
    ["masks", "--shards", "https://bot:p/geheim-weights@h/x", "--out", "o"],
    ["train", "--masks", "gs://bot:geheim-weights@h/x", "--out", "o"],
    ["train", "--masks", "m", "--out", "o", "concept_names=https://h/x?sig=geheim-weights"],
    ["evaluate", "--model", "ftp://bot:geheim@weights@h/x", "--labelled", "s", "--out", "o"],
    ["evaluate", "--model", "http://127.0.0.1:1/x?sig=geheim-weights", "--labelled", "s", "--out", "o"],
    ["promote", "secret", "1"],
    ["lineage", "models:/secret@champion"],
    ["pipeline", "compile", "--out", "p.yaml", "--cluster", "https://bot:geheim-git@h/c"],
    ["pipeline", "submit", "--endpoint", "http://bot:geheim-git@127.0.0.1:1", "--images", "i", "--labelled", "l"],
    ["pipeline", "submit", "--endpoint", "http://bot:p/geheim-git@127.0.0.1:1", "--images", "i", "--labelled", "l"],
    ["pipeline", "submit", "--images", "i", "--labelled", "l", "--repo", "https://bot:p@ss/geheim-git@h/data.git"],
    ["pipeline", "submit", "--images", "i", "--labelled", "l", "train.clip=RN50:https://h/x?sig=geheim-weights"],
    ["pipeline", "submit", "--images", "i", "--labelled", "l", "masks.weights=https://bot:geheim-weights@h/x"],
    ["pipeline", "status", "x", "--endpoint", "ftp://bot:geheim-git@h"],
]


@pytest.mark.parametrize("words", WRONG, ids=lambda words: " ".join(words)[:60].translate({ord(each): None for each in "/:@?"}))
@pytest.mark.parametrize("uri", ["http://bot:geheim-mlflow@127.0.0.1:1", "http://bot:p@ss/geheim-mlflow@127.0.0.1:1"])
def test_errors_show_no_secret(pixelclip, words, uri, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setattr("pixelclip.storage.download._WAITS", ())
    code, out, err = pixelclip(*words)
    assert code == 2 and "geheim" not in out + err and len(err.splitlines()) == 1


def test_settings_with_a_secret_are_not_compiled_into_a_sweep(pixelclip, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    row = {"train.clip": "RN50:https://host/clip.pt?sig=geheim-weights"}
    Path("sweep.yaml").write_text(yaml.safe_dump({"rows": {"a": row}, "seeds": [0]}))
    code, out, err = pixelclip("pipeline", "compile-sweep", "sweep.yaml", "--out", "p.yaml")
    assert code == 2 and "train.clip RN50:https://host/clip.pt contains credentials or a query" in err
    assert "geheim" not in out + err and not Path("p.yaml").exists()
