"""Tiny data on which a sweep trains in a second, and sweep files."""

from pathlib import Path
from typing import Any

import numpy as np
import yaml

from helpers import fake_data, tiny
from helpers.training import SMALL


def sweep_data(base: Path) -> tuple[Path, Path, Path]:
    """Write shards with masks, a labelled set and a params.yaml below `base`; return their paths."""
    halves = np.zeros((2, 40, 48), bool)
    halves[0, :, :24] = halves[1, :, 24:] = True
    members = {}
    for number in range(8):
        members[f"{number}.jpg"] = fake_data.encoded(fake_data.pixels(40, 48, number))
        members[f"{number}.json"] = fake_data.annotation(halves)
    fake_data.write_tar(base / "masks" / "0.tar", members)
    clip = tiny.clip_folder(base / "clip")
    tiny.labelled_set(base / "labelled", images=5)
    settings = {
        "train": {**SMALL, "clip": str(clip), "learning_rate_backbone": 0.05, "checkpoint_every": 1, "picture_every": 0},
        "evaluate": {"device": "cpu", "pictures": 1},
    }
    (base / "params.yaml").write_text(yaml.safe_dump(settings))
    return base / "masks", base / "labelled", base / "params.yaml"


def write_sweep(file: Path, **content: Any) -> Path:
    """Write a sweep file."""
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    return file
