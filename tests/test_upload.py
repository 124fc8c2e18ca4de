"""Results into a store: whole or not at all, in parts, continued, never over another one. Against moto's server."""

import hashlib
import os
from pathlib import Path

import pytest
from conftest import write_files

from pixelclip import upload as module
from pixelclip.cache import origin
from pixelclip.config import ShardsConfig
from pixelclip.download import local_copy
from pixelclip.s3 import list_below
from pixelclip.stage import Stage, describe
from pixelclip.upload import outbox, upload

PART = 5 << 20  # the smallest that S3 takes


def make(folder: Path, content: str = "a", quality: int = 95, die: bool = False) -> dict[str, float]:
    """A stage with one file."""
    config = ShardsConfig(jpeg_quality=quality)
    stage = Stage("shards", folder, {}, config)
    if stage.finished:
        return stage.reuse()
    with stage:
        write_files(stage.folder, {"0.tar": content.encode(), "deep/er/b.txt": b"b"})
        if die:
            raise KeyboardInterrupt
        return stage.finish({"images": 1.0}, files=["*.tar"])


def below(uri: str) -> dict[str, str]:
    return {one.uri.removeprefix(f"{uri}/"): one.etag for one in list_below(uri)}


@pytest.mark.parametrize("size", [0, 10, PART, 2 * PART, 2 * PART + 7])
def test_what_goes_up_comes_down(bucket, tmp_path, monkeypatch, size):
    monkeypatch.setattr(module, "_PART", PART)
    (tmp_path / "file").write_bytes(content := os.urandom(size))
    upload(tmp_path / "file", "s3://data/some/key")
    assert bucket.get_object(Bucket="data", Key="some/key")["Body"].read() == content
    assert local_copy("s3://data/some/key").read_bytes() == content


def test_an_interrupted_upload_sends_only_the_missing_parts(bucket, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_PART", PART)
    (tmp_path / "file").write_bytes(content := os.urandom(3 * PART))
    begun = bucket.create_multipart_upload(Bucket="data", Key="big")["UploadId"]
    named = {"Bucket": "data", "Key": "big", "UploadId": begun}
    bucket.upload_part(**named, PartNumber=1, Body=content[:PART])
    bucket.upload_part(**named, PartNumber=2, Body=os.urandom(PART))  # of another content: not taken for ours
    sent = []
    monkeypatch.setattr(module, "_base64", lambda md5, before=module._base64: sent.append(md5) or before(md5))
    upload(tmp_path / "file", "s3://data/big")
    assert sent == [hashlib.md5(content[start : start + PART]).digest() for start in (PART, 2 * PART)]
    assert bucket.get_object(Bucket="data", Key="big")["Body"].read() == content
    assert "Uploads" not in bucket.list_multipart_uploads(Bucket="data")


def test_a_damaged_upload_is_noticed(bucket, tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"right")
    monkeypatch.setattr(module, "_md5", lambda file, start, length: hashlib.md5(b"wrong").digest())
    with pytest.raises(ValueError, match=r"file: md5 .* arrived in the store, .* was sent"):
        upload(tmp_path / "file", "s3://data/file")


def test_a_result_stands_there_whole_and_is_reused(bucket, cache, capsys):
    for _ in range(2):
        with outbox("s3://data/runs/shards/") as folder:
            assert make(folder) == {"images": 1.0}
    assert "shards: reused" in capsys.readouterr().out
    assert set(below("s3://data/runs/shards")) == {"0.tar", "deep/er/b.txt", "metrics.json", "provenance.json"}
    copy = local_copy("s3://data/runs/shards")
    assert (copy / "deep" / "er" / "b.txt").read_bytes() == b"b"
    assert origin(copy / "deep" / "er" / "b.txt") == "s3://data/runs/shards/deep/er/b.txt"
    assert describe(copy)["path"] == "s3://data/runs/shards"
    assert describe(copy)["provenance"]["stage"] == "shards"


def test_a_local_result_needs_no_store(tmp_path):
    with outbox(str(tmp_path / "out")) as folder:
        make(folder)
    assert (tmp_path / "out" / "0.tar").is_file()


def test_another_result_is_never_overwritten(bucket, cache):
    with outbox("s3://data/taken") as folder:
        make(folder)
    before = below("s3://data/taken")
    with (
        pytest.raises(ValueError, match=r"holds a finished result .*shards.jpeg_quality 95 → 50"),
        outbox("s3://data/taken") as folder,
    ):
        make(folder, quality=50)
    assert below("s3://data/taken") == before
    bucket.put_object(Bucket="data", Key="foreign/a.txt", Body=b"somebody's")
    with (
        pytest.raises(ValueError, match=r"s3://data/foreign: holds a\.txt, which no finished stage"),
        outbox("s3://data/foreign"),
    ):
        raise AssertionError


def test_the_provenance_goes_last_and_a_second_call_finishes(bucket, cache, monkeypatch):
    sent, send = [], module._upload

    def break_off(client, path, *where):
        if len(sent) == 2:
            raise ValueError("the store is gone")
        sent.append(path.name)
        send(client, path, *where)

    with monkeypatch.context() as patch:
        patch.setattr(module, "_upload", break_off)
        with pytest.raises(ValueError, match="gone"), outbox("s3://data/half") as folder:
            make(folder)
    assert "provenance.json" not in below("s3://data/half") and len(sent) == 2
    monkeypatch.setattr(module, "_upload", lambda client, path, *where: sent.append(path.name) or send(client, path, *where))
    with outbox("s3://data/half") as folder:
        make(folder)
    assert sorted(sent) == ["0.tar", "b.txt", "metrics.json", "provenance.json"] and sent[-1] == "provenance.json"


def test_a_killed_stage_leaves_nothing_there(bucket, cache):
    with pytest.raises(KeyboardInterrupt), outbox("s3://data/killed") as folder:
        make(folder, die=True)
    assert below("s3://data/killed") == {}


def test_several_results_side_by_side_are_reused(bucket, cache, capsys):
    for _ in range(2):
        with outbox("s3://data/many") as folder:
            make(folder / "one")
            make(folder / "two")
    assert capsys.readouterr().out.count("reused") == 2


def test_of_several_processes_the_first_writes(bucket, cache, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with outbox("s3://data/ranks") as folder:
        make(folder)
    assert below("s3://data/ranks") == {}
