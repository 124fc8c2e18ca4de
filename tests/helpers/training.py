"""Shards, a tiny CLIP and settings of short training runs."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from helpers import fake_data, tiny, training
from pixelclip.config import TrainConfig
from pixelclip.models.pixelclip import PixelCLIP

SMALL = {
    "side": 32,
    "shortest_edge": 32,
    "longest_edge": 64,
    "crop": 28,
    "mask_grid": 24,
    "batch_size": 4,
    "concepts": 4,
    "prompt_tokens": 2,
    "learning_rate_backbone": 1e-4,
    "gradient_clip": 1.0,
    "device": "cpu",
    "workers": 0,
    "log_every": 1,
    "precision": "float32",
}


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    """Write twelve images with one mask per quarter."""
    folder, members = tmp_path_factory.mktemp("masks"), {}
    quarters = np.zeros((4, 40, 48), bool)
    for number, (rows, columns) in enumerate(((slice(0, 20), slice(0, 24)), (slice(0, 20), slice(24, 48)))):
        quarters[number, rows, columns] = quarters[number + 2, slice(20, 40), columns] = True
    for number in range(12):
        members[f"{number}.jpg"] = fake_data.encoded(fake_data.pixels(40, 48, number))
        members[f"{number}.json"] = fake_data.annotation(quarters)
    fake_data.write_tar(folder / "000000.tar", members)
    return folder


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    return tiny.clip_folder(tmp_path_factory.mktemp("clip"))


@pytest.fixture
def config(clip, tmp_path, monkeypatch):
    tiny.mlflow_at(monkeypatch, tmp_path / "mlflow")

    def make(**settings) -> TrainConfig:
        return TrainConfig(**{**SMALL, "clip": str(clip), "steps": 6, "checkpoint_every": 2, "picture_every": 3, **settings})

    return make


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["metrics"]["train/loss"] for line in (folder / "curves.jsonl").read_text().splitlines()]


class Killed(BaseException):
    pass


def die() -> None:
    raise Killed


def kill_at(update: int, patch: pytest.MonkeyPatch, kill: Callable[[], None] = die) -> None:
    """Kill the training before the teacher update with this index; steps without masks have none."""
    move, count = PixelCLIP.update_teacher, iter(range(100))

    def move_or_die(self, momentum):
        if next(count) == update:
            kill()
        move(self, momentum)

    patch.setattr(PixelCLIP, "update_teacher", move_or_die)


STEPS = 20


SETTINGS = {
    **training.SMALL,
    "steps": STEPS,
    "batch_size": 5,
    "checkpoint_every": 8,
    "picture_every": 0,
    "max_bad_share": 0.2,
}
