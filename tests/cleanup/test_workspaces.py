"""Workspaces: what is one, what must stay, and its deletion."""

import fcntl
import math
import os
from pathlib import Path

import pytest

from helpers.gc_store import OLD, age, output, unfinished
from pixelclip.cleanup import workspaces
from pixelclip.cleanup.named import Named
from pixelclip.cleanup.workspaces import items
from pixelclip.config import ShardsConfig
from pixelclip.storage.files import read_json
from pixelclip.workflow.provenance import UNFINISHED, read_unfinished
from pixelclip.workflow.stage import Stage, describe


def found(*roots: Path, named: Named | None = None) -> dict[str, str]:
    """Return path and reason of every workspace."""
    return {str(Path(item.name).relative_to(roots[0])): item.kept for item in items(roots, named or Named())}


def test_workspaces_outputs_and_local_runs_are_items(tmp_path):
    output(tmp_path / "one" / "shards")
    output(tmp_path / "team" / "two" / "fetch_data" / "images" / "images")
    (tmp_path / "team" / "two" / "pipeline.log").write_text("log")
    output(tmp_path / "masks")
    unfinished(tmp_path / "train")
    output(tmp_path / "root" / "own-2026-11-28-10-00-00-123456" / "shards" / "data")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_bytes(b"photo")
    (tmp_path / "link").symlink_to(tmp_path / "one")
    (tmp_path / "mlflow.db").write_bytes(b"database")
    partial = next(path.name for path in tmp_path.glob(".train.*"))
    names = {"one", "team/two", "masks", partial, "root/own-2026-11-28-10-00-00-123456"}
    assert found(tmp_path) == dict.fromkeys(names, "")


def test_workspace_with_files_of_others_stays(tmp_path):
    output(tmp_path / "one" / "shards")
    (tmp_path / "one" / "notes.txt").write_text("mine")
    output(tmp_path / "two" / "shards")
    (tmp_path / "two" / "link").symlink_to(tmp_path)
    assert found(tmp_path) == {
        "one": "contains notes.txt, which pixelclip did not write",
        "two": "contains link, which pixelclip did not write",
    }


def later(path: Path, seconds: float) -> None:
    """Write a file some time after the result that it is put into."""
    path.parent.mkdir(exist_ok=True)
    path.write_text("later")
    when = next(path.parents[1].rglob("provenance.json")).stat().st_mtime + seconds
    os.utime(path, (when, when))


def test_result_that_a_person_changed_stays(tmp_path):
    later(output(tmp_path / "maps" / "predictions", "predict") / "labels" / "a.png", 61)
    later(output(tmp_path / "export" / "train", "train") / "model.onnx", 61)
    later(output(tmp_path / "journal" / "train", "train") / "run.json", 61)  # its curves were sent later
    later(output(tmp_path / "slow" / "shards") / "000001.tar", 50)
    assert found(tmp_path) == {
        "maps": "contains predictions/labels/a.png, which is newer than the result that it belongs to",
        "export": "contains train/model.onnx, which is newer than the result that it belongs to",
        "journal": "",
        "slow": "",
    }
    assert {item.kept for item in items([tmp_path], Named(), tolerance=math.inf)} == {""}


def test_stages_inside_a_result_are_not_changes_of_it(tmp_path):
    model = age(output(tmp_path / "one" / "train", "train"), OLD)
    output(model / "evaluation", "evaluate")
    unfinished(model / "predictions")
    assert found(tmp_path) == {"one": ""}


def test_files_of_pixelclip_count_only_beside_outputs(tmp_path):
    sweep = tmp_path / "one" / "sweep"
    output(tmp_path / "one" / "masks", "masks")
    output(sweep / "row" / "seed-1" / "model", "train")
    for name in ("table.md", "runs.csv", "sweep.png", "best.yaml", "search.json", "run.json"):
        (sweep / name).write_text(name)
    output(tmp_path / "one" / "evaluate" / "voc", "evaluate")
    (tmp_path / "one" / "evaluate" / "metrics.json").write_text("{}")
    (tmp_path / "one" / "report.html").write_text("report")
    assert found(tmp_path) == {"one": ""}
    (tmp_path / "one" / "paper").mkdir()
    (tmp_path / "one" / "paper" / "report.html").write_text("mine")
    assert found(tmp_path) == {"one": "contains paper/report.html, which pixelclip did not write"}


def test_named_data_stays_by_content_by_parts_and_by_place(tmp_path):
    named = Named()
    copied = output(tmp_path / "copied" / "shards")
    shards = describe(copied)
    masks = {"path": "/tmp/parts", "md5": "of both parts", "num_files": 2, "size": 9}
    part = output(tmp_path / "part" / "masks", "masks", {"shards": shards}, part="1/2", seed=1)
    output(tmp_path / "other" / "masks", "masks", {"shards": shards}, part="1/2", seed=2)
    output(tmp_path / "place" / "images")
    lineage = {
        "stage": "train",
        "settings": {},
        "inputs": {"masks": masks | {"provenance": read_json(part / "provenance.json")}},
    }
    named.add_lineage(lineage, "data of models:/demo/1")
    named.add_place(str(tmp_path / "place" / "images" / "000000.tar"), "data of models:/demo/2")
    assert found(tmp_path, named=named) == {
        "copied": "data of models:/demo/1",
        "part": "data of models:/demo/1",
        "other": "",
        "place": "data of models:/demo/2",
    }


def test_what_an_unfinished_stage_elsewhere_reads_stays(tmp_path):
    masks = output(tmp_path / "old" / "masks")
    own = output(tmp_path / "new" / "masks")
    unfinished(tmp_path / "new" / "train", inputs={"masks": describe(masks), "more": describe(own)})
    folder = next((tmp_path / "new").glob(".train.*"))
    assert found(tmp_path) == {"new": "", "old": f"read by the unfinished {folder}"}


def test_running_stage_stays_until_it_ends(tmp_path):
    age(unfinished(tmp_path / "one" / "train").parent, OLD)
    handle = os.open(next((tmp_path / "one").glob(".train.*")), os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    assert found(tmp_path)["one"].startswith("running: a process is writing .train.")
    os.close(handle)
    (item,) = items([tmp_path], Named())
    assert (item.kept, item.resumable) == ("", True)


def test_stage_records_its_inputs_until_it_has_finished(tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    (images / "a.txt").write_text("a")
    with Stage("shards", tmp_path / "run" / "shards", {"images": describe(images)}, ShardsConfig()) as stage:
        recorded = read_unfinished(stage.folder / UNFINISHED)
        assert recorded["inputs"]["images"]["path"] == str(images)
        assert found(tmp_path)["run"].startswith("running: ")
        stage.finish({}, files=[])
    assert not list((tmp_path / "run").rglob("*.partial"))


def test_deletion_is_complete_after_an_interruption_and_spares_what_changed(tmp_path):
    output(tmp_path / "one" / "shards")
    output(tmp_path / "two" / "shards")
    one, two = items([tmp_path], Named())
    (tmp_path / "two" / "shards" / "new.tar").write_text("new")
    with pytest.raises(ValueError, match="has changed since it was listed"):
        two.delete()
    one.delete()
    assert [path.name for path in tmp_path.iterdir()] == ["two"]
    (tmp_path / "two").rename(tmp_path / ".deleted.0123abcd")
    (leftover,) = items([tmp_path], Named())
    assert leftover.leftover and not leftover.kept
    leftover.delete()
    assert list(tmp_path.iterdir()) == []


def test_stage_that_starts_while_its_workspace_is_deleted_keeps_its_folder(tmp_path, monkeypatch):
    partial = unfinished(tmp_path / "one" / "train")
    output(tmp_path / "one" / "shards")
    (item,) = items([tmp_path], Named())
    scan, handles = workspaces._scan, []

    def start(*arguments):
        content = scan(*arguments)
        handles.append(os.open(partial, os.O_RDONLY))  # as a stage after the comparison
        with pytest.raises(BlockingIOError):
            fcntl.flock(handles[0], fcntl.LOCK_EX | fcntl.LOCK_NB)
        return content

    monkeypatch.setattr(workspaces, "_scan", start)
    item.delete()
    assert handles and not (tmp_path / "one").exists()
    os.close(handles[0])


def test_stage_that_has_finished_since_it_was_listed_is_not_deleted(tmp_path):
    partial = unfinished(tmp_path / "one" / "train")
    (item,) = items([tmp_path], Named())
    partial.rename(tmp_path / "one" / "train")
    with pytest.raises(ValueError, match="has changed since it was listed"):
        item.delete()
    assert (tmp_path / "one" / "train").is_dir()


def test_damaged_provenance_keeps_a_workspace(tmp_path):
    output(tmp_path / "one" / "shards")
    (tmp_path / "one" / "shards" / "provenance.json").write_text("{")
    assert "cannot be read as JSON" in found(tmp_path)["one"]


def test_missing_folder_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no such folder of workspaces"):
        items([tmp_path / "nowhere"], Named())
