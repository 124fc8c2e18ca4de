"""STAGE evaluate_clip: plain CLIP on a labelled set, once for all models that are trained from it (method.md, "Inference").

`evaluate` takes the result instead of running CLIP's tower, and then says the same as if it had run both. The settings are
those of section `evaluate`. Started by torchrun, the processes share the images. K classes, H W image.
"""

import io
import shutil
import zipfile
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from pixelclip import __version__
from pixelclip.backbone import Backbone, Residual
from pixelclip.benchmarks import open_labelled
from pixelclip.checkpoint import load_clip
from pixelclip.config import EvaluateClipConfig, EvaluateConfig
from pixelclip.download import here
from pixelclip.measure import Maps, measure, metrics_of
from pixelclip.protocol import (
    PROTOCOL,
    check_masks,
    check_sides,
    conditions_of,
    in_words,
    inputs_of,
    label_of,
    name_of,
    protocol_of,
    sets_of,
)
from pixelclip.ranks import ProcessGroup, init_process_group
from pixelclip.stage import METRICS, PROVENANCE, Metrics, Stage
from pixelclip.storage import read_json, write_atomically, write_json
from pixelclip.tally import CLIP, Tally, packed
from pixelclip.text import TEMPLATES, TextTower, classifier

COUNTS, MAPS = "counts.npz", "maps.npz"
_STAGE = "evaluate_clip"
_STATE = "state"


def run(clip: str, labelled: Path | str, out: Path, config: EvaluateConfig, side: int, residual: Residual) -> Metrics:
    """Measures a CLIP on a labelled set; an interrupted run continues.

    Args:
        clip: the CLIP that models are trained from, as setting `train.clip` says it; `evaluate.clip` goes before it.
        labelled: labelled set, a folder or `s3://bucket/folder`.
        out: folder to make: metrics, `counts.npz`, `maps.npz` (label maps of a report's pictures), `protocol.json`.
        config: settings.
        side: side in pixels of what the models see; `evaluate.side` goes before it.
        residual: of the models' last block, see `Backbone`.

    Returns:
        `miou_clip/NAME`, `pixel_accuracy_clip/NAME`, ... in points; `image_recall_clip/NAME` in 0..1; NAME as of `evaluate`.

    Raises:
        ValueError: unusable CLIP, labelled set or masks.
    """
    with init_process_group(config.device) as ranks:
        return _run(clip, here(labelled), out, config, side, residual, ranks)


def run_all(clip: str, labelled: Sequence[str], out: Path, config: EvaluateConfig, side: int, residual: Residual) -> Metrics:
    """Measures a CLIP on several labelled sets, each into a folder of its own below `out`; one alone goes into `out` itself.

    Args and errors are those of `run`, and for `labelled` those of `sets_of`.
    """
    sets = sets_of(labelled, config)
    metrics: Metrics = {}
    with init_process_group(config.device) as ranks:
        for name, (path, chosen) in sets.items():
            metrics |= _run(clip, path, out / name if len(sets) > 1 else out, chosen, side, residual, ranks)
    if ranks.is_main and len(sets) > 1:
        write_json(out / METRICS, metrics)
    return metrics


def settings_of(clip: str, labelled: Path, config: EvaluateConfig, side: int, residual: Residual) -> EvaluateClipConfig:
    """The settings of `evaluate` as they apply to models of a CLIP, a side and a residual."""
    chosen = {"name": name_of(labelled, config), "clip": config.clip or clip, "side": config.side or side}
    return EvaluateClipConfig(**config.model_dump() | chosen, residual=residual)


def _run(
    clip: str, labelled: Path, out: Path, config: EvaluateConfig, side: int, residual: Residual, ranks: ProcessGroup
) -> Metrics:
    settings = settings_of(clip, labelled, config, side, residual)
    dataset = open_labelled(labelled, settings.kind)
    check_masks(dataset, settings)
    inputs = ranks.broadcast_object(inputs_of(labelled, dataset, settings.clip, settings) if ranks.is_main else None)
    stage = Stage(_STAGE, out, inputs, settings)
    if ranks.broadcast_object(stage.finished):
        return ranks.broadcast_object(stage.reuse() if ranks.is_main else {})
    loaded = load_clip(settings.clip)
    tower, protocol = Backbone(loaded.model.visual, residual), protocol_of(settings)
    check_sides(tower, settings)
    with stage if ranks.is_main else nullcontext():
        text = TextTower(loaded.model).to(ranks.device).eval()
        classes = classifier(text, dataset.classes, TEMPLATES[settings.templates])
        found = measure({CLIP: tower}, loaded, classes, dataset, settings, ranks, stage.folder / _STATE, _STAGE)
        figures = metrics_of(found.tally, len(dataset), settings.protocol == "masks", labelled)
        metrics = {f"{key}/{label_of(protocol)}": value for key, value in figures.items()}
        if ranks.is_main:
            print(f"{_STAGE}: mIoU {figures['miou_clip']:.1f} on {label_of(protocol)}; {in_words(protocol)}", flush=True)
            found.tally.position = len(dataset)
            found.tally.save(stage.folder / COUNTS)
            write_atomically(stage.folder / MAPS, packed(**{str(index): labels for index, labels in found.maps[CLIP].items()}))
            write_json(stage.folder / PROTOCOL, protocol)
            shutil.rmtree(stage.folder / _STATE)
            stage.finish(metrics, files=[COUNTS, MAPS, PROTOCOL])
        return metrics


def check(made: Path, settings: EvaluateClipConfig, inputs: Mapping[str, Mapping[str, Any]]) -> None:
    """Checks that an evaluation of CLIP is the one that an evaluation of a model would make.

    Args:
        made: what `run` made.
        settings: of the model's evaluation, see `settings_of`.
        inputs: what it reads, see `inputs_of`.

    Raises:
        ValueError: it is not; the message says all that differs.
    """
    provenance = read_json(made / PROVENANCE)
    if provenance.get("stage") != _STAGE:
        raise ValueError(f"{made}: is no evaluation of CLIP, stage {provenance.get('stage')!r} made it")
    there = _hangs_on(provenance["version"], read_json(made / PROTOCOL), provenance["settings"], provenance["inputs"])
    now = _hangs_on(__version__, protocol_of(settings), settings.model_dump(), inputs)
    keys = dict.fromkeys([*there, *now])
    differs = [f"{key} {there.get(key)!r} there, {now.get(key)!r} here" for key in keys if there.get(key) != now.get(key)]
    if differs:
        raise ValueError(f"{made}: CLIP was evaluated otherwise than this model is: {'; '.join(differs)}")


def _hangs_on(
    version: str, protocol: dict[str, Any], settings: Mapping[str, Any], inputs: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """All that the figures and label maps hang on, by name."""
    md5 = {"md5 of clip": inputs["clip"]["md5"]} if "clip" in inputs else {}
    spec = settings["clip"]
    if "clip" in inputs:  # one file does not say what it is the weights of, a folder does
        spec = spec.partition(":")[0] if inputs["clip"]["num_files"] == 1 else ""
    chosen = {"clip": spec, "residual": settings["residual"], "pictures": settings["pictures"]}
    return {"version": version, **md5, **conditions_of(protocol, inputs), **chosen}


def load(made: Path, num_classes: int) -> tuple[Tally, Maps]:
    """The counts of an evaluation of CLIP, and the label maps of the report's pictures.

    Raises:
        ValueError: they cannot be read.
    """
    tally = Tally.zeros([CLIP], num_classes, 0)
    try:
        tally.load(made / COUNTS)
        with np.load(io.BytesIO((made / MAPS).read_bytes()), allow_pickle=False) as saved:
            return tally, {int(index): saved[index] for index in saved.files}
    except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f"{made}: {COUNTS} and {MAPS} cannot be read: {error}") from None
