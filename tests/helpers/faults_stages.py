"""The stages that faults are tried on, their undisturbed results, and what results are compared by."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from helpers.stage_server import StageServer
from pixelclip.storage.files import read_json

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


@pytest.fixture(scope="session")
def server() -> Iterator[StageServer]:
    with StageServer() as server:
        yield server


@pytest.fixture(scope="session")
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
