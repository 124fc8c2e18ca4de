"""SIGTERM to a whole pipeline on this machine."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from mlflow import MlflowClient

from helpers import faults

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy"),  # MLflow's tables under SQLAlchemy 2.1
]
ROOT = Path(__file__).parents[2]
SETTINGS = ["steps=10", "train.picture_every=0", "train.device=cpu", "evaluate.device=cpu", "train.batch_size=4"]


def test_terminated_pipeline_saves_what_its_step_has_and_continues(tmp_path):
    pixelclip = [sys.executable, "-m", "pixelclip"]
    paint = [*pixelclip, "toy", "--out", "toy", "train_scenes=60", "test_scenes=20", "side=96"]
    subprocess.run(paint, cwd=tmp_path, check=True, capture_output=True)
    command = [*pixelclip, "pipeline", "run", "--images", "toy/images", "--labelled", "toy/toy", "--out", "run"]
    command += ["--params", str(ROOT / "params.yaml"), *SETTINGS]
    environment = os.environ | {"MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path / 'mlflow.db'}"}

    def run(begun: str) -> str:
        """Run the pipeline, and ask it to end soon after it printed the line `begun`, unless that is empty."""
        with subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True) as process:
            printed = ""
            assert process.stdout
            for line in process.stdout:
                printed += line
                if begun and re.search(begun, line):
                    time.sleep(0.5)
                    process.send_signal(signal.SIGTERM)
                    begun = ""
            process.wait()
            return printed + f"exit code {process.returncode}"

    client = MlflowClient(environment["MLFLOW_TRACKING_URI"])
    printed = run("train: [1-9]0? of 10 steps")
    assert re.search(r"train: stopped by SIGTERM after step \d+ of 10; the same command continues", printed), printed
    assert printed.endswith("pipeline: stopped by SIGTERM; the same command continues\nexit code 143")
    assert [each.info.status for each in client.search_runs(["1"])] == ["KILLED"]
    printed = run("")
    assert "train: resuming after step" in printed and printed.endswith("exit code 0"), printed
    assert [each.info.status for each in client.search_runs(["1"])] == ["FINISHED"]
    faults.record("SIGTERM to a local pipeline", 1, 1)
