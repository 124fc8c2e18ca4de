"""STAGE evaluate_clip: evaluate the original CLIP on a labelled set, once for all models trained from it.

`evaluate` can reuse the result instead of running CLIP's image tower; its metrics are the same either way. The settings are
those of section `evaluate`. Under torchrun the processes share the images.
"""

import shutil
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

from pixelclip.config import EvaluateConfig
from pixelclip.data.labelled_sets import open_labelled
from pixelclip.distributed import ProcessGroup, init_process_group
from pixelclip.evaluation.clip_baseline import BASELINE_STAGE, COUNTS, MAPS, resolve_config, save_baseline
from pixelclip.evaluation.confusion import CLIP
from pixelclip.evaluation.evaluator import STATE_FOLDER, absent_classes, compute_metrics, evaluate_towers, name_metrics
from pixelclip.evaluation.protocol import (
    PROTOCOL,
    check_masks,
    check_sides,
    describe_inputs,
    describe_protocol,
    metric_label,
    parse_labelled_sets,
    protocol_of,
)
from pixelclip.models.backbone import Backbone, Residual
from pixelclip.models.checkpoint import load_clip
from pixelclip.models.text import TEMPLATES, classifier
from pixelclip.storage.download import local_path
from pixelclip.storage.files import write_json
from pixelclip.workflow.stage import METRICS, Metrics, Stage


def run(clip: str, labelled: Path | str, out: Path, config: EvaluateConfig, side: int, residual: Residual) -> Metrics:
    """Evaluate a CLIP on a labelled set; an interrupted run resumes from its last checkpoint.

    Args:
        clip: the CLIP that models are trained from, as in setting `train.clip`; `evaluate.clip` takes precedence.
        labelled: labelled set, a folder or `s3://bucket/folder`.
        out: output folder: metrics, `counts.npz`, `maps.npz` (label maps of the report's pictures), `protocol.json`.
        config: settings.
        side: input side of the models in pixels; `evaluate.side` takes precedence.
        residual: residual of the models' last block, see `Backbone`.

    Returns:
        `miou_clip/NAME`, `pixel_accuracy_clip/NAME`, ... in points; `image_recall_clip/NAME` in 0..1; for NAME see `evaluate`.

    Raises:
        ValueError: unusable CLIP, labelled set or masks.
    """
    with init_process_group(config.device) as group:
        return _run(clip, local_path(labelled), out, config, side, residual, group)


def run_all(clip: str, labelled: Sequence[str], out: Path, config: EvaluateConfig, side: int, residual: Residual) -> Metrics:
    """Evaluate a CLIP on several labelled sets, each in its own folder below `out`; a single set uses `out` itself.

    Arguments and errors are those of `run` and, for `labelled`, of `parse_labelled_sets`.
    """
    sets = parse_labelled_sets(labelled, config)
    metrics: Metrics = {}
    with init_process_group(config.device) as group:
        for name, (path, set_config) in sets.items():
            metrics |= _run(clip, path, out / name if len(sets) > 1 else out, set_config, side, residual, group)
    if group.is_main and len(sets) > 1:
        write_json(out / METRICS, metrics)
    return metrics


def _run(
    clip: str, labelled: Path, out: Path, config: EvaluateConfig, side: int, residual: Residual, group: ProcessGroup
) -> Metrics:
    config = resolve_config(clip, labelled, config, side, residual)
    dataset = open_labelled(labelled, config.kind, names=config.names)
    check_masks(dataset, config)
    inputs = group.broadcast_object(describe_inputs(labelled, dataset, config) if group.is_main else None)
    stage = Stage(BASELINE_STAGE, out, inputs, config)
    if group.broadcast_object(stage.finished):
        return group.broadcast_object(stage.reuse() if group.is_main else {})
    loaded = load_clip(config.clip)
    tower, protocol = Backbone(loaded.model.visual, residual), protocol_of(config)
    check_sides(tower, config)
    with stage if group.is_main else nullcontext():
        text = loaded.text_tower().to(group.device).eval()
        classes = classifier(text, dataset.classes, TEMPLATES[config.templates])
        towers, state = {CLIP: tower}, stage.folder / STATE_FOLDER
        evaluation = evaluate_towers(towers, loaded, classes, dataset, config, group, state, BASELINE_STAGE)
        values = compute_metrics(evaluation.counts, len(dataset), config.protocol == "masks", labelled)
        metrics = name_metrics(values, metric_label(protocol))
        if group.is_main:
            if config.kind == "folder" and (warning := absent_classes(dataset, evaluation.counts)):
                print(f"{BASELINE_STAGE}: WARNING: {warning}", flush=True)
            label, settings = metric_label(protocol), describe_protocol(protocol)
            print(f"{BASELINE_STAGE}: mIoU {values['miou_clip']:.1f} on {label}; {settings}", flush=True)
            evaluation.counts.next_index = len(dataset)
            save_baseline(stage.folder, evaluation)
            write_json(stage.folder / PROTOCOL, protocol)
            shutil.rmtree(state)
            stage.finish(metrics, files=[COUNTS, MAPS, PROTOCOL])
        return metrics
