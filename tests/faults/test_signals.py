"""SIGKILL, SIGTERM and Ctrl-C at moments spread over each stage: the same command gives the result of an undisturbed one.

Every trial checks that nothing is left behind: processes, shared memory, hidden files, open MLflow runs.
"""

import json
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from helpers import faults
from helpers.processes import wait_until
from helpers.stage_server import StageServer, shared_memory
from pixelclip.storage.files import read_json

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(3600),
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy"),  # MLflow's tables under SQLAlchemy 2.1
]
MOMENTS = 10
ENDS_WITHIN = 20.0
SIGNALS = {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 130}
SMALL = [
    "clip=toy",
    "side=48",
    "shortest_edge=64",
    "longest_edge=96",
    "crop=48",
    "concepts=8",
    "device=cpu",
    "precision=float32",
]
TRAINING = [*SMALL, "steps=12", "batch_size=4", "workers=1", "log_every=1", "checkpoint_every=5", "picture_every=6"]
EVALUATION = ["batch_size=2", "checkpoint_every=2", "device=cpu", "pictures=3"]


@dataclass
class Stage:
    """A command and what its result is compared by."""

    words: list[str]
    result: Callable[[Path], Any]

    def command(self, out: Path) -> list[str]:
        return [self.words[0], "--out", str(out), *self.words[1:]]


@pytest.fixture(scope="module")
def server() -> Iterator[StageServer]:
    with StageServer() as server:
        yield server


@pytest.fixture(scope="module")
def made(server, tmp_path_factory) -> Path:
    """The undisturbed results of all stages."""
    base = tmp_path_factory.mktemp("faults")
    (base / "mlflow").mkdir()
    for name in ("toy", *STAGES):
        command = server.start(*stage(base, name).command(base / name), log=base / "log", MLFLOW_TRACKING_URI=uri(base))
        assert command.wait() == 0, (base / "log").read_text()[-2000:]
    return base


def uri(folder: Path) -> str:
    return f"sqlite:///{folder / 'mlflow' / 'mlflow.db'}"


def output(folder: Path) -> Any:
    """Return what later stages identify a result by, and its metrics."""
    return read_json(folder / "provenance.json")["output"], read_json(folder / "metrics.json")


def training(folder: Path) -> Any:
    lines = [json.loads(line) for line in (folder / "curves.jsonl").read_text().splitlines()]
    curves = [(line["step"], {key: v for key, v in line["metrics"].items() if "second" not in key}) for line in lines]
    return output(folder), curves


def registration(folder: Path) -> Any:
    registered = read_json(folder / "registration.json")
    return registered["role"], registered["reason"]


STAGES: dict[str, Callable[[Path], Stage]] = {
    "shards": lambda base: Stage(["shards", "--images", f"{base}/toy/images", "images_per_shard=16"], output),
    "masks": lambda base: Stage(["masks", "--shards", f"{base}/shards", "workers=1", "felzenszwalb_min_size=20"], output),
    "train": lambda base: Stage(["train", "--masks", f"{base}/masks", *TRAINING], training),
    "evaluate_clip": lambda base: Stage(
        ["evaluate_clip", "--labelled", f"{base}/toy/toy", "clip=toy", "side=48", *EVALUATION], output
    ),
    "evaluate": lambda base: Stage(
        ["evaluate", "--model", f"{base}/train", "--labelled", f"{base}/toy/toy", *EVALUATION], output
    ),
    "register": lambda base: Stage(
        ["register", "--model", f"{base}/train", "--evaluation", f"{base}/evaluate", "name=demo"], registration
    ),
}


def stage(base: Path, name: str) -> Stage:
    if name == "toy":
        return Stage(["toy", "train_scenes=40", "test_scenes=12", "side=64"], output)
    return STAGES[name](base)


def statuses(folder: Path) -> set[str]:
    client = MlflowClient(uri(folder))
    experiments = [each.experiment_id for each in client.search_experiments()]
    return {run.info.status for run in client.search_runs(experiments)}


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
@pytest.mark.parametrize("name", STAGES)
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
