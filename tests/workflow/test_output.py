"""Outputs of stages in a store are complete or absent, reused, and never overwritten; tested on moto's server."""

from pathlib import Path

import pytest

from helpers.fake_data import write_files
from pixelclip.config import ShardsConfig
from pixelclip.storage import upload
from pixelclip.storage.cache import origin
from pixelclip.storage.download import local_copy
from pixelclip.storage.s3 import list_below
from pixelclip.workflow.output import output_folder
from pixelclip.workflow.stage import Stage, describe


def make(folder: Path, content: str = "a", quality: int = 95, die: bool = False) -> dict[str, float]:
    """Run a stage that writes two files."""
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


def test_uploaded_result_is_complete_and_reused(bucket, cache, capsys):
    for _ in range(2):
        with output_folder("s3://data/runs/shards/") as folder:
            assert make(folder) == {"images": 1.0}
    assert "shards: reused" in capsys.readouterr().out
    assert set(below("s3://data/runs/shards")) == {"0.tar", "deep/er/b.txt", "metrics.json", "provenance.json"}
    copy = local_copy("s3://data/runs/shards")
    assert (copy / "deep" / "er" / "b.txt").read_bytes() == b"b"
    assert origin(copy / "deep" / "er" / "b.txt") == "s3://data/runs/shards/deep/er/b.txt"
    assert describe(copy)["path"] == "s3://data/runs/shards"
    assert describe(copy)["provenance"]["stage"] == "shards"


def test_local_output_needs_no_store(tmp_path):
    with output_folder(str(tmp_path / "out")) as folder:
        make(folder)
    assert (tmp_path / "out" / "0.tar").is_file()


def test_different_result_is_not_overwritten(bucket, cache):
    with output_folder("s3://data/taken") as folder:
        make(folder)
    before = below("s3://data/taken")
    with (
        pytest.raises(ValueError, match=r"contains a finished result .*shards.jpeg_quality 95 → 50"),
        output_folder("s3://data/taken") as folder,
    ):
        make(folder, quality=50)
    assert below("s3://data/taken") == before
    bucket.put_object(Bucket="data", Key="foreign/a.txt", Body=b"somebody's")
    with (
        pytest.raises(ValueError, match=r"s3://data/foreign: contains a\.txt, which no finished stage of pixelclip wrote"),
        output_folder("s3://data/foreign"),
    ):
        raise AssertionError


def test_provenance_is_uploaded_last_and_a_second_call_sends_the_rest(bucket, cache, monkeypatch):
    sent, send, broken = [], upload._upload, True

    def record(client, path, *where):
        if broken and len(sent) == 2:
            raise ValueError("the store is gone")
        sent.append(path.name)
        send(client, path, *where)

    monkeypatch.setattr(upload, "_upload", record)
    with pytest.raises(ValueError, match="gone"), output_folder("s3://data/half") as folder:
        make(folder)
    assert "provenance.json" not in below("s3://data/half") and len(sent) == 2
    broken = False
    with output_folder("s3://data/half") as folder:
        make(folder)
    assert sorted(sent) == ["0.tar", "b.txt", "metrics.json", "provenance.json"] and sent[-1] == "provenance.json"


def test_killed_stage_uploads_nothing(bucket, cache):
    with pytest.raises(KeyboardInterrupt), output_folder("s3://data/killed") as folder:
        make(folder, die=True)
    assert below("s3://data/killed") == {}


def test_several_results_below_one_prefix_are_reused(bucket, cache, capsys):
    for _ in range(2):
        with output_folder("s3://data/many") as folder:
            make(folder / "one")
            make(folder / "two")
    assert capsys.readouterr().out.count("reused") == 2


def test_only_the_main_process_uploads(bucket, cache, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with output_folder("s3://data/ranks") as folder:
        make(folder)
    assert below("s3://data/ranks") == {}
