"""Evaluation of the original CLIP, saved once and reused for every model that was trained from it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel

from pixelclip.config import EvaluateClipConfig, EvaluateConfig
from pixelclip.evaluation.confusion import CLIP, EvaluationCounts, read_npz, to_npz
from pixelclip.evaluation.evaluator import LabelMaps, TowerEvaluation, tower_names
from pixelclip.evaluation.protocol import conditions_of, metric_name, protocol_of, read_protocol
from pixelclip.models.backbone import Residual
from pixelclip.storage.files import read_json, write_atomically
from pixelclip.workflow.provenance import read_provenance
from pixelclip.workflow.stage import PROVENANCE

COUNTS, MAPS = "counts.npz", "maps.npz"
BASELINE_STAGE = "evaluate_clip"


def resolve_config(clip: str, labelled: Path, config: EvaluateConfig, side: int, residual: Residual) -> EvaluateClipConfig:
    """Fill in the settings that depend on the labelled set and the model: name, CLIP, side, window and residual.

    `evaluate.clip` and `evaluate.side` take precedence over the CLIP and the side of the model's training.
    """
    resolved = {"name": metric_name(labelled, config), "clip": config.clip or clip, "side": config.side or side}
    if config.best or config.scales:  # otherwise there are no windows, and the result does not depend on their side
        resolved["window"] = config.window or side
    return EvaluateClipConfig(**config.model_dump() | resolved, residual=residual)


def save_baseline(folder: Path, evaluation: TowerEvaluation) -> None:
    """Write confusion counts and the label maps of the report's pictures."""
    evaluation.counts.save(folder / COUNTS)
    write_atomically(folder / MAPS, to_npz(**{str(index): labels for index, labels in evaluation.label_maps[CLIP].items()}))


def load_baseline(folder: Path, num_classes: int, config: EvaluateConfig) -> tuple[EvaluationCounts, LabelMaps]:
    """Load what `save_baseline` wrote.

    Raises:
        ValueError: a file is missing or damaged.
    """
    counts = EvaluationCounts.zeros(tower_names([CLIP], config), num_classes, 0)
    counts.load(folder / COUNTS)
    maps = read_npz(folder / MAPS)
    for index, labels in maps.items():
        if not index.isdecimal() or labels.dtype != np.uint16 or labels.ndim != 2:
            found = f"{index} is {labels.dtype}{[*labels.shape]}"
            raise ValueError(f"{folder / MAPS}: {found}, expected label maps uint16[H, W], named by index")
    return counts, {int(index): labels for index, labels in maps.items()}


class _Settings(BaseModel):
    clip: str
    residual: str
    pictures: int


class _Baseline(BaseModel):
    settings: _Settings


def check_baseline(folder: Path, config: EvaluateClipConfig, inputs: Mapping[str, Mapping[str, Any]]) -> None:
    """Check that a saved CLIP evaluation, by any code version, is comparable with the current evaluation.

    Args:
        folder: output of stage `evaluate_clip`.
        config, inputs: of the current evaluation, see `resolve_config` and `describe_inputs`.

    Raises:
        ValueError: they differ; the message lists every difference.
    """
    provenance = read_provenance(folder / PROVENANCE)
    if provenance["stage"] != BASELINE_STAGE:
        raise ValueError(f"{folder}: expected the output of {BASELINE_STAGE}, found that of {provenance['stage']!r}")
    read_json(folder / PROVENANCE, _Baseline)
    saved = _conditions(read_protocol(folder), provenance["settings"], provenance["inputs"])
    expected = _conditions(protocol_of(config), config.model_dump(), inputs)
    keys = [key for key in dict.fromkeys([*saved, *expected]) if saved.get(key) != expected.get(key)]
    if keys:
        found, needed = ({key: repr(each[key]) if key in each else "none" for key in keys} for each in (saved, expected))
        differences = "; ".join(f"{key} is {found[key]}, expected {needed[key]}" for key in keys)
        raise ValueError(f"{folder}: this evaluation of CLIP does not match the evaluation of the model: {differences}")


def _conditions(protocol: dict[str, Any], settings: Mapping[str, Any], inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return all conditions that determine the metrics and label maps of CLIP, except for the code."""
    spec, md5 = settings["clip"], {}
    if "clip" in inputs:  # a folder names its architecture itself; for a single weight file it is part of the spec
        spec = spec.partition(":")[0] if inputs["clip"]["num_files"] == 1 else ""
        md5 = {"md5 of clip": inputs["clip"]["md5"]}
    other = {"clip": spec, "residual": settings["residual"], "pictures": settings["pictures"]}
    return md5 | conditions_of(protocol, inputs) | other
