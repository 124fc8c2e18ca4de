"""SIGKILL, SIGTERM and Ctrl-C at moments spread over each stage: the same command gives the result of an undisturbed one.

Every trial checks that nothing is left behind: processes, shared memory, hidden files, open MLflow runs.
"""

import re
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from mlflow import MlflowClient

from helpers import faults, faults_stages
from helpers.faults_stages import stage, statuses, uri
from helpers.processes import wait_until
from helpers.stage_server import Command, StageServer, shared_memory

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(3600),
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy"),  # MLflow's tables under SQLAlchemy 2.1
]
MOMENTS = 10
ENDS_WITHIN = 20.0
SIGNALS = {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 130}


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
@pytest.mark.parametrize("name", faults_stages.STAGES)
def test_interrupted_stage_ends_cleanly_and_continues(made, server, tmp_path, name, number):
    undisturbed = stage(made, name).result(made / name)
    start = time.monotonic()
    trial(made, server, tmp_path / "timed", name, None, 0)
    duration = time.monotonic() - start
    survived, notes = 0, []
    for moment in range(MOMENTS):
        folder = tmp_path / str(moment)
        try:
            ended = trial(made, server, folder, name, number, duration * (moment + 0.5) / MOMENTS)
            assert stage(made, name).result(folder / name) == undisturbed
            survived += 1
            notes.append(ended)
        except AssertionError as error:
            notes.append(f"moment {moment}: {error}")
        shutil.rmtree(folder)
    faults.record(f"{number.name} in {name}", MOMENTS, survived)
    assert survived == MOMENTS, "\n".join(map(str, notes))


def trial(made: Path, server: StageServer, folder: Path, name: str, number: int | None, seconds: float) -> float:
    """Run a stage, interrupt it after some seconds, and run it again; return the seconds from the signal to its end."""
    (folder / "mlflow").mkdir(parents=True)
    shutil.copyfile(made / "mlflow" / "mlflow.db", folder / "mlflow" / "mlflow.db")
    words, log = stage(made, name).command(folder / name), folder / "log"
    memory, took = shared_memory(), 0.0
    if number is not None:
        command = server.start(*words, log=log, MLFLOW_TRACKING_URI=uri(folder))
        time.sleep(seconds)
        at = time.monotonic()
        command.send(number)
        code = command.wait(ENDS_WITHIN)
        took = time.monotonic() - at
        assert wait_until(lambda: not command.processes(), ENDS_WITHIN), "processes are left behind"
        assert wait_until(lambda: shared_memory() <= memory, 1), f"left behind in shared memory: {shared_memory() - memory}"
        assert code in (0, SIGNALS[signal.Signals(number)], -number), f"exit code {code}: {log.read_text()[-1500:]}"
        if number != signal.SIGKILL:
            assert "RUNNING" not in statuses(folder), "an MLflow run is left open"
    command = server.start(*words, log=log, MLFLOW_TRACKING_URI=uri(folder))
    assert command.wait() == 0, log.read_text()[-1500:]
    hidden = [path.name for path in folder.rglob(".*")]
    assert not hidden, f"hidden files are left behind: {hidden}"
    assert wait_until(lambda: not command.processes(), 5), "processes are left behind"
    if number != signal.SIGKILL or name != "train":  # a run that nobody knows yet cannot be closed after SIGKILL
        assert statuses(folder) <= {"FINISHED"}, f"MLflow runs: {statuses(folder)}"
    return took


def test_training_terminated_at_ten_random_moments_has_the_undisturbed_curve(made, server, tmp_path):
    """One training, interrupted again and again; at most one step is repeated each time."""
    words = ["train", "--masks", f"{made}/masks", *faults_stages.TRAINING, "steps=60", "picture_every=0"]

    def start(name: str) -> Command:
        (tmp_path / name / "mlflow").mkdir(parents=True, exist_ok=True)
        folder = tmp_path / name
        return server.start(*words, "--out", str(folder / "train"), log=folder / "log", MLFLOW_TRACKING_URI=uri(folder))

    def lines(name: str, pattern: str) -> list[int]:
        return [int(step) for step in re.findall(pattern, (tmp_path / name / "log").read_text())]

    begun = time.monotonic()
    assert start("undisturbed").wait() == 0
    duration = time.monotonic() - begun
    moments = np.sort(np.random.default_rng().uniform(0, duration, MOMENTS))
    stopped, resumed, log = (
        r"train: stopped by SIGTERM after step (\d+) of 60; ",
        r"resuming after step (\d+)",
        tmp_path / "a/log",
    )
    for number, seconds in enumerate(np.diff(moments, prepend=0.0), 1):
        command = start("a")
        assert wait_until(lambda number=number: log.read_text().count("MLflow run: ") == number), log.read_text()
        time.sleep(seconds)
        command.send(signal.SIGTERM)
        assert command.wait(ENDS_WITHIN) == SIGNALS[signal.SIGTERM], log.read_text()
        assert len(lines("a", stopped)) == number
        assert statuses(tmp_path / "a") == {"KILLED"}
    assert start("a").wait() == 0, log.read_text()
    assert statuses(tmp_path / "a") == {"FINISHED"}
    stops = lines("a", stopped)
    repeated = [stop - start for stop, start in zip(stops, lines("a", resumed), strict=True)]
    assert all(0 <= steps <= 1 for steps in repeated), (stops, repeated)
    result, expected = (faults_stages.training(tmp_path / name / "train") for name in ("a", "undisturbed"))
    assert [step for step, _ in result[1]] == list(range(1, 61)) and result == expected
    for key in ("train/loss", "train/gradient_norm"):  # on the server, too
        assert curve(tmp_path / "a", key) == curve(tmp_path / "undisturbed", key)
    faults.record(f"SIGTERM at {MOMENTS} random moments of one training", MOMENTS, MOMENTS)


def curve(folder: Path, key: str) -> list[tuple[int, float]]:
    client = MlflowClient(uri(folder))
    (run,) = client.search_runs([each.experiment_id for each in client.search_experiments()])
    return [(point.step, point.value) for point in client.get_metric_history(run.info.run_id, key)]
