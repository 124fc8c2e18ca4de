"""Progress without a terminal: plain lines, their times, and what they say."""

import contextlib
import fcntl
import json
import logging
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from pixelclip.storage import progress
from pixelclip.storage.progress import count, track

INPUTS = Path(__file__).parents[1] / "fixtures" / "kfp" / "executor_input"


class Clock:
    """A clock that a test moves."""

    now = 100.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def lines_of(capsys):
    said = capsys.readouterr()
    assert said.out == "" and "\r" not in said.err
    return said.err.splitlines()


def test_slow_work_prints_a_line_every_30_seconds(clock, capsys):
    for _ in track(range(1000), "masks", "image"):
        clock.now += 2.5
        if clock.now > 200:
            break
    assert lines_of(capsys) == [
        "masks: 12 of 1000 images (1 %), 0.4 images/s, 0:41:10 left",
        "masks: 24 of 1000 images (2 %), 0.4 images/s, 0:40:40 left",
        "masks: 36 of 1000 images (4 %), 0.4 images/s, 0:40:10 left",
    ]


def test_fast_work_prints_a_line_every_5_percent_and_a_summary(clock, capsys):
    for _ in track(range(400), "train", "step"):
        clock.now += 0.1
    lines = lines_of(capsys)
    assert len(lines) == 21 and lines[0] == "train: 20 of 400 steps (5 %), 10 steps/s, 0:00:38 left"
    assert lines[-2:] == [
        "train: 400 of 400 steps (100 %), 10 steps/s, 0:00:00 left",
        "train: 400 steps in 0:00:40, 10 steps/s",
    ]


def test_very_fast_work_prints_at_most_a_line_a_second(clock, capsys):
    for _ in track(range(1000), "shards", "image"):
        clock.now += 0.001
    assert lines_of(capsys) == [
        "shards: 1000 of 1000 images (100 %), 1e+03 images/s, 0:00:00 left",
        "shards: 1000 images in 0:00:01, 1e+03 images/s",
    ]


def test_values_are_shown_and_images_per_second_replace_the_rate(clock, capsys):
    for _ in (bar := track(range(50, 100), "train", "step", total=100, start=50)):
        clock.now += 10
        bar.show(loss="0.1250", images_s="32.0")
    lines = lines_of(capsys)
    assert lines[0] == "train: 53 of 100 steps (53 %), loss 0.1250, 32.0 images/s, 0:07:50 left"
    assert lines[-1] == "train: 100 steps in 0:08:20, loss 0.1250, 32.0 images/s"


def test_bytes_and_an_unknown_total(clock, capsys):
    with count(None, "s3://b/k", "B") as bar:
        for _ in range(4):
            clock.now += 10
            bar.update(1 << 20)
    assert lines_of(capsys) == ["s3://b/k: 3 MiB, 102 KiB/s", "s3://b/k: 4 MiB in 0:00:40, 102 KiB/s"]


def test_failed_or_hidden_work_prints_no_summary(clock, capsys):
    with pytest.raises(ZeroDivisionError):
        [1 / number for number in track([1, 0], "x", "step")]
    list(track(range(10), "x", "step", enabled=False))
    list(track([], "x", "step", total=5, start=5))
    assert lines_of(capsys) == []


def test_terminal_shows_a_bar():
    """Run in a pseudo-terminal, where a bar redraws its line."""
    parent, child = pty.openpty()
    fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("4H", 24, 120, 0, 0))  # lines and columns
    code = "from pixelclip.storage.progress import track\nfor _ in track(range(3), 'shards', 'image'): pass"
    subprocess.run([sys.executable, "-c", code], stderr=child, check=True)
    os.close(child)
    said = ""
    with contextlib.suppress(OSError):  # at the end of a pseudo-terminal
        while data := os.read(parent, 10_000):
            said += data.decode()
    os.close(parent)
    assert "\r" in said and "shards: 100%" in said and "3/3" in said


def test_redirected_stage_prints_lines(tmp_path):
    """A real process whose output goes to a file, as in a container."""
    log = tmp_path / "log"
    with log.open("w") as file:
        words = ["toy", "--out", str(tmp_path / "toy"), "train_scenes=20", "test_scenes=10"]
        subprocess.run([sys.executable, "-m", "pixelclip", *words], stdout=file, stderr=file, check=True)
    text = log.read_text()
    assert "\r" not in text
    assert re.search(r"^toy: 30 scenes in 0:00:\d\d, [\d.e+]+ scenes/s$", text, re.MULTILINE)


def run_component(component, given, tmp_path):
    """Run a component as KFP's launcher does: its source, KFP's executor and KFP's input, in a process of its own."""
    (executor,) = component.pipeline_spec.deployment_spec["executors"].values()
    command = [*executor["container"]["command"], *executor["container"]["args"]]
    (source,) = [word for word in command if "def " in word]
    module = tmp_path / "component.py"
    module.write_text(source)
    words = ["--component_module_path", str(module), "--executor_input", json.dumps(given), "--function_to_execute"]
    return subprocess.run(
        [sys.executable, "-m", "kfp.dsl.executor_main", *words, component.name.replace("-", "_")],
        env={**os.environ, "_KFP_RUNTIME": "true"},
        capture_output=True,
        text=True,
    )


def given_to_shards(tmp_path, images):
    given = json.loads((INPUTS / "shards.json").read_text())
    (artifact,) = given["inputs"]["artifacts"]["images"]["artifacts"]
    artifact["metadata"]["location"] = str(images)
    given["inputs"]["parameterValues"]["workspace"] = ""
    text = json.dumps(given["outputs"]).replace("/gcs/", f"{tmp_path}/").replace("minio://", f"{tmp_path}/")
    given["outputs"] = json.loads(text)
    given["outputs"]["outputFile"] = str(tmp_path / "executor_output.json")
    return given


def test_bad_input_is_one_line_in_a_step_of_kfp(tmp_path):
    from pixelclip_components.shards.component import shards

    done = run_component(shards, given_to_shards(tmp_path, "/no/such/folder"), tmp_path)
    assert done.returncode and done.stderr == "pixelclip: /no/such/folder: no such folder of images\n"


def test_other_errors_keep_their_traceback_in_a_step_of_kfp(tmp_path):
    code = "import pixelclip_pipelines\nraise KeyError('x')"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "_KFP_RUNTIME": "true"}, capture_output=True, text=True
    )
    assert done.returncode == 1 and "Traceback" in done.stderr and done.stderr.endswith("KeyError: 'x'\n")


def test_log_of_kfps_executor_has_no_lines_of_open_clip(caplog):
    """KFP's executor shows INFO of the root logger, on which open_clip logs."""
    from pixelclip.models.checkpoint import load_clip

    with caplog.at_level(logging.INFO):
        logging.info("ours")
        load_clip("toy")
    assert [entry.getMessage() for entry in caplog.records] == ["ours"]
