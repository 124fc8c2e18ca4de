"""Stages: interruption, resuming, reuse, locking and provenance."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.fake_data import write_files
from pixelclip.config import MasksConfig
from pixelclip.workflow import stage as stage_module
from pixelclip.workflow.code_version import code_revision
from pixelclip.workflow.stage import Stage, describe


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_files(tmp_path / "in", {"a.bin": b"1"})


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "out"


def make(out: Path, source: Path, **settings: object) -> Stage:
    return Stage("masks", out, {"shards": describe(source)}, MasksConfig(**settings))


def complete(out: Path, source: Path, **settings: object) -> Stage:
    stage = make(out, source, **settings)
    with stage:
        (stage.folder / "0.tar").write_bytes(b"result")
        (stage.folder / "notes.txt").write_bytes(b"aside")
        stage.finish({"images": 1.0}, files=["*.tar"])
    return stage


def test_finished_stage_is_reused(out: Path, source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert not make(out, source).finished
    complete(out, source)
    assert sorted(path.name for path in out.iterdir()) == ["0.tar", "metrics.json", "notes.txt", "provenance.json"]
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    again = make(out, source)
    assert again.finished
    capsys.readouterr()
    assert again.reuse() == {"images": 1.0}
    assert "masks: reused" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("version", "revision", "message"),
    [
        ("0.1.0", "abc", "(same inputs and settings)"),
        ("0.1.0", "def", "(written by version 0.1.0, revision abc; this is version 0.1.0, revision def)"),
        ("0.2.0", "abc", "(written by version 0.1.0, revision abc; this is version 0.2.0, revision abc)"),
    ],
)
def test_result_of_different_code_is_reused_and_both_revisions_are_printed(
    out, source, tmp_path, monkeypatch, capsys, version, revision, message
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(stage_module, "__version__", "0.1.0")
    monkeypatch.setenv("PIXELCLIP_REVISION", "abc")
    complete(out, source)
    before = (out / "provenance.json").read_bytes()
    monkeypatch.setattr(stage_module, "__version__", version)
    monkeypatch.setenv("PIXELCLIP_REVISION", revision)
    again = make(out, source)
    assert again.finished
    capsys.readouterr()
    assert again.reuse() == {"images": 1.0}
    assert capsys.readouterr().out == f"masks: reused deep/out {message}\n"
    assert (out / "provenance.json").read_bytes() == before


def test_interrupted_work_is_not_resumed_by_another_version(out, source, monkeypatch):
    interrupted = make(out, source)
    with interrupted:
        (interrupted.folder / "half.tar").write_bytes(b"half")
    monkeypatch.setattr(stage_module, "__version__", "9.9.9")
    with make(out, source) as stage:
        assert not (stage.folder / "half.tar").exists()
    assert (interrupted.folder / "half.tar").read_bytes() == b"half"


def test_result_with_a_setting_that_no_longer_exists_is_rejected(out, source):
    complete(out, source)
    provenance = json.loads((out / "provenance.json").read_text())
    provenance["settings"]["old_setting"] = 7
    (out / "provenance.json").write_text(json.dumps(provenance))
    with pytest.raises(ValueError, match=r"masks\.old_setting 7 → none"):
        make(out, source)


def test_result_of_another_stage_is_rejected(out, source):
    complete(out, source)
    with pytest.raises(ValueError, match=r"finished result of stage 'masks'.*stage masks → shards"):
        Stage("shards", out, {"shards": describe(source)}, MasksConfig())


def test_output_may_be_an_empty_folder(out: Path, source: Path) -> None:
    out.mkdir(parents=True)
    complete(out, source)
    assert (out / "0.tar").read_bytes() == b"result"


def test_interrupted_stage_leaves_no_output_and_is_resumed(out: Path, source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    killed = make(out, source)

    def interrupt() -> None:
        with killed:
            (killed.folder / "half.tar").write_bytes(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupt()
    assert not out.exists()
    assert "masks: starts" in capsys.readouterr().out
    again = make(out, source)
    assert again.fingerprint == killed.fingerprint
    with again:
        assert (again.folder / "half.tar").read_bytes() == b"half"
    assert "continues an interrupted run" in capsys.readouterr().out


def test_different_settings_or_inputs_use_different_partial_folders(out: Path, source: Path) -> None:
    first = make(out, source)
    other_settings = make(out, source, max_masks=3)
    (source / "a.bin").write_bytes(b"2")
    other_inputs = make(out, source)
    assert len({stage.folder for stage in (first, other_settings, other_inputs)}) == 3


def test_fingerprint_ignores_runtime_settings_and_input_paths(out: Path, source: Path) -> None:
    first = make(out, source, workers=2)
    moved = source.rename(source.with_name("moved"))
    assert make(out, moved, workers=0).fingerprint == first.fingerprint


def test_finished_result_of_different_settings_is_an_error_naming_the_setting(out: Path, source: Path) -> None:
    complete(out, source)
    with pytest.raises(ValueError, match=r"out: contains a finished result .*masks\.max_masks 0 → 3\); remove it"):
        make(out, source, max_masks=3)
    (source / "a.bin").write_bytes(b"2")
    with pytest.raises(ValueError, match="different shards"):
        make(out, source)
    assert (out / "0.tar").read_bytes() == b"result"


def test_foreign_folder_is_rejected_and_unchanged(tmp_path: Path, source: Path) -> None:
    foreign = write_files(tmp_path / "thesis", {"chapter.txt": b"words"})
    with pytest.raises(ValueError, match="thesis: contains files that pixelclip did not create"):
        make(foreign, source)
    with pytest.raises(ValueError, match=r"chapter\.txt: must be a folder"):
        make(foreign / "chapter.txt", source)
    assert [path.read_bytes() for path in foreign.iterdir()] == [b"words"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "thesis"]


def test_missing_input_is_named(out: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="none: no such file or folder"):
        make(out, tmp_path / "none")


def test_second_process_is_rejected_until_the_first_ends(out: Path, source: Path) -> None:
    stage = make(out, source)
    stage.folder.mkdir(parents=True)
    hold = "import fcntl, os, sys; fcntl.flock(os.open(sys.argv[1], 0), fcntl.LOCK_EX); print('held', flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", hold, str(stage.folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match="out: another process is writing this folder"), stage:
            pytest.fail("entered")
        other.communicate("\n")
    with stage:
        assert stage.folder.is_dir()


def test_start_lists_partial_results_of_different_settings_and_keeps_them(out, source, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    left = {}
    for number in (1, 2, 3):
        left[number] = make(out, source, max_masks=number)
        with left[number]:
            (left[number].folder / "half.tar").write_bytes(b"half")
    make(out.with_name("out.other"), source).folder.mkdir()  # of a different result
    (out.parent / ".out.mine.partial").mkdir()
    (out.parent / "other.partial").mkdir()
    capsys.readouterr()
    complete(out, source)
    lines = capsys.readouterr().out.splitlines()
    names = ", ".join(sorted(f"deep/{left[number].folder.name}" for number in (1, 2, 3)))
    assert lines[1:] == [
        f"masks: partial results of other inputs, settings or versions remain; delete them if not needed: {names}"
    ]
    assert all((stage.folder / "half.tar").read_bytes() == b"half" for stage in left.values())


def test_start_is_rejected_while_the_folder_is_written_with_different_settings(out: Path, source: Path) -> None:
    first, second = make(out, source, max_masks=1), make(out, source)
    with first:
        refused = rf"out: another process is writing this folder \(.*{first.folder.name}\); wait for it or"
        with pytest.raises(ValueError, match=refused), second:
            pytest.fail("entered")
        assert [path.name for path in out.parent.iterdir()] == [first.folder.name]
    with second:  # the first ended
        assert second.folder.is_dir()


def test_result_is_kept_if_the_output_folder_was_filled_during_the_run(out: Path, source: Path) -> None:
    stage = make(out, source)
    with stage:
        (stage.folder / "0.tar").write_bytes(b"result")
        write_files(out, {"mine.txt": b"words"})
        with pytest.raises(
            ValueError, match=rf"out: cannot be replaced .*; the finished result is in \S*{stage.folder.name}: move"
        ):
            stage.finish({"images": 1.0}, files=["*.tar"])
    assert (stage.folder / "0.tar").read_bytes() == b"result" and (stage.folder / "provenance.json").is_file()
    assert (out / "mine.txt").read_bytes() == b"words"


def test_full_disk_error_names_the_folder(out: Path, source: Path) -> None:
    stage = make(out, source)
    with pytest.raises(OSError, match="No space left") as full, stage:
        Path("/dev/full").write_text("much")
    assert full.value.filename == str(stage.folder)


def test_disk_that_is_full_at_the_start_leaves_the_folder_free(out: Path, source: Path, monkeypatch) -> None:
    stage = make(out, source)

    def full(path: Path, content: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr("pixelclip.workflow.stage.write_json", full)
        with pytest.raises(OSError, match="No space left") as error, stage:
            pass
    assert error.value.filename == str(stage.folder)
    with make(out, source):  # the lock is free
        pass


def test_provenance_contains_that_of_the_inputs(out: Path, source: Path, tmp_path: Path) -> None:
    first = complete(out, source, max_masks=7)
    complete(tmp_path / "second", out)
    written = json.loads((tmp_path / "second" / "provenance.json").read_text())
    upstream = written["inputs"]["shards"]["provenance"]
    assert upstream["settings"]["max_masks"] == 7
    assert upstream["fingerprint"] == first.fingerprint != written["fingerprint"]
    assert upstream["inputs"]["shards"]["num_files"] == 1
    assert "provenance" not in upstream["inputs"]["shards"]


def test_only_selected_files_identify_a_result(out: Path, source: Path) -> None:
    complete(out, source)
    before = describe(out)
    assert (before["num_files"], before["size"]) == (1, len(b"result"))
    (out / "notes.txt").write_bytes(b"another aside")
    assert describe(out)["md5"] == before["md5"]


def test_non_finite_metrics_leave_no_output(out: Path, source: Path) -> None:
    stage = make(out, source)
    with pytest.raises(ValueError, match="JSON compliant"), stage:
        stage.finish({"loss": float("nan")}, files=["*.tar"])
    assert not out.exists()


def test_revision_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIXELCLIP_REVISION", "abc")
    assert code_revision() == "abc"
