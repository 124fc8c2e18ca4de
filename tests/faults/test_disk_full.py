"""Disks that fill up at several moments of each stage: one clear error line, and the same command with more space continues."""

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from helpers import faults, faults_stages
from helpers.faults_stages import stage, statuses, uri

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy"),  # MLflow's tables under SQLAlchemy 2.1
]
SHARES = (0.0, 0.2, 0.4, 0.6, 0.8, 0.95)
"""Sizes of the disk, relative to what the stage needs."""
_PAGE = 4096


@contextmanager
def disk(folder: Path, size: int) -> Iterator[Path]:
    """Mount a file system of some bytes; skip the test where that is not allowed."""
    folder.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(folder)]
    if shutil.which("mount") is None or (done := subprocess.run(words, capture_output=True, text=True)).returncode:
        pytest.skip("a tmpfs cannot be mounted" + (f": {done.stderr.strip()}" if shutil.which("mount") else ""))
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def used(folder: Path) -> int:
    """Return the bytes that files and folders take on a tmpfs."""
    return sum(-(-path.stat().st_size // _PAGE) * _PAGE if path.is_file() else 0 for path in folder.rglob("*"))


@pytest.mark.parametrize("name", ["toy", *faults_stages.STAGES])
def test_full_disk_is_one_error_and_the_stage_continues_with_more_space(made, server, tmp_path, name):
    undisturbed, needed = stage(made, name).result(made / name), used(made / name)
    failed, notes = 0, []
    for number, share in enumerate(SHARES):
        folder = tmp_path / str(number)
        (folder / "mlflow").mkdir(parents=True)
        shutil.copyfile(made / "mlflow" / "mlflow.db", folder / "mlflow" / "mlflow.db")
        log = folder / "log"
        with disk(folder / "disk", max(_PAGE, int(share * needed))) as full:
            words = stage(made, name).command(full / name)
            try:
                code = server.start(*words, log=log, MLFLOW_TRACKING_URI=uri(folder)).wait()
                if code:
                    failed += 1
                    last = log.read_text().splitlines()[-1]
                    assert code == 2 and "Traceback" not in log.read_text(), log.read_text()[-2000:]
                    assert last.startswith("pixelclip: ") and "No space left on device" in last and str(full) in last, last
                    assert not (full / name / "provenance.json").exists(), "the output is there"
                    assert "RUNNING" not in statuses(folder), "an MLflow run is left open"
                subprocess.run(["mount", "-o", f"remount,size={needed + (64 << 20)}", str(full)], check=True)
                code = server.start(*words, log=log, MLFLOW_TRACKING_URI=uri(folder)).wait()
                assert code == 0, log.read_text()[-2000:]
                assert stage(made, name).result(full / name) == undisturbed
                hidden = [path.name for path in full.rglob(".*")]
                assert not hidden, f"hidden files are left behind: {hidden}"
            except AssertionError as error:
                notes.append(f"{share:.0%} of {needed} bytes: {error}")
    assert failed >= len(SHARES) // 2, f"only {failed} disks were full"
    faults.record(f"disk full in {name}", len(SHARES), len(SHARES) - len(notes))
    assert not notes, "\n".join(notes)
