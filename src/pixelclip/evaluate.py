"""STAGE evaluate: compare PixelCLIP with the CLIP it was trained from on a labelled set, using the same classifier.

A different CLIP (`evaluate.clip`) is evaluated with the classifier of its own text tower, because the embedding spaces differ.
"""

import shutil
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from pixelclip.config import EvaluateConfig
from pixelclip.data.labelled_images import LabelledSet
from pixelclip.data.labelled_sets import open_labelled
from pixelclip.distributed import ProcessGroup, init_process_group
from pixelclip.evaluation.clip_baseline import check_baseline, load_baseline, resolve_config
from pixelclip.evaluation.confusion import CLIP, OURS
from pixelclip.evaluation.evaluator import (
    STATE_FOLDER,
    TowerEvaluation,
    absent_classes,
    compute_metrics,
    evaluate_towers,
    name_metrics,
    per_class_iou,
)
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
from pixelclip.models.backbone import Backbone
from pixelclip.models.checkpoint import Clip, Model, backbone_of, load_clip, load_model
from pixelclip.models.clip_sources import check_trained_from
from pixelclip.models.text import TEMPLATES, TextTower, classifier, nearest_names
from pixelclip.registry.model_card import PER_CLASS, SEGMENTATIONS, model_card
from pixelclip.storage.download import local_path
from pixelclip.storage.files import read_json, write_atomically, write_json
from pixelclip.tracking.description import evaluation_metrics
from pixelclip.tracking.run import Run
from pixelclip.tracking.server import artifact_address, run_url
from pixelclip.visualization.charts import confusion_chart
from pixelclip.visualization.pictures import examples_of, segmentation_picture
from pixelclip.visualization.report import write_report
from pixelclip.workflow.provenance import flatten, read_provenance
from pixelclip.workflow.stage import METRICS, PROVENANCE, Metrics, Stage, describe

REPORT, TABLE = "report.html", "table.txt"
CONFUSION, CONFUSION_CHART = "confusion.json", "confusion.png"
_CHART_CLASSES = 25
_SEGMENTATIONS = 6  # examples in the picture for MLflow and the model card
_CONFUSION_CLASSES = 10  # more rows are unreadable in the KFP dashboard


def run(model: Path, labelled: Path | str, out: Path, config: EvaluateConfig, clip_evaluation: Path | None = None) -> Metrics:
    """Evaluate a model and its CLIP on a labelled set and write the report; an interrupted run resumes.

    Under torchrun the processes share the images, and the main process writes the result.

    Args:
        model: model folder.
        labelled: labelled set, a folder or `s3://bucket/folder`.
        out: output folder: metrics, `table.txt`, `per_class.json`, `confusion.json`, `confusion.png`,
            `protocol.json`, `segmentations.jpg`, `report.html`.
        config: settings.
        clip_evaluation: output of `evaluate_clip` for the model's CLIP and this set; if None, CLIP is evaluated too.

    Returns:
        `miou/NAME`, `miou_clip/NAME`, `gain/NAME`, `pixel_accuracy/NAME`, ... in points; `image_recall_clip/NAME` in 0..1;
        for protocol masks also `mask_accuracy/NAME`. NAME ends with any deviation from the paper's protocol: `.slide`,
        `.masks`, `.masks-given`, ...

    Raises:
        ValueError: unusable model, CLIP, labelled set or masks, an evaluation of CLIP under different conditions, or MLflow
            unreachable.
    """
    with init_process_group(config.device) as group:
        return _run(model, local_path(labelled), out, config, group, clip_evaluation)


def _run(
    model: Path, labelled: Path, out: Path, config: EvaluateConfig, group: ProcessGroup, clip_evaluation: Path | None
) -> Metrics:
    loaded = load_model(model)
    spec = config.clip or loaded.config["clip"]["spec"]
    dataset = open_labelled(labelled, config.kind, names=config.names)
    resolved = resolve_config(spec, labelled, config, loaded.side, loaded.residual)
    check_masks(dataset, config)
    inputs: dict[str, dict[str, Any]] = {}
    if group.is_main:
        inputs = {"model": describe(model), **describe_inputs(labelled, dataset, resolved)}
        inputs |= {"clip_evaluation": describe(clip_evaluation)} if clip_evaluation else {}
    inputs = group.broadcast_object(inputs)
    stage = Stage("evaluate", out, inputs, config)
    if group.broadcast_object(stage.finished):
        return group.broadcast_object(stage.reuse() if group.is_main else {})
    if not config.clip and "clip" in inputs:
        advice = "; to compare with it anyway, set evaluate.clip"
        check_trained_from(spec, inputs["clip"]["md5"], model, loaded.config["clip"]["md5"], advice)
    check_sides(backbone_of(loaded), resolved)
    clip: Clip | Path = clip_evaluation or load_clip(spec)
    if isinstance(clip, Clip):
        check_sides(Backbone(clip.model.visual, loaded.residual), resolved)
    else:
        check_baseline(clip, resolved, inputs)
    with stage if group.is_main else nullcontext():
        protocol = protocol_of(resolved)
        tracked = _attach(model, stage, protocol) if group.is_main else None
        if tracked:
            print(f"evaluate: {len(dataset)} images, {describe_protocol(protocol)}, {group.device}", flush=True)
        evaluation, words = _evaluate(loaded, clip, dataset, resolved, group, stage.folder / STATE_FOLDER)
        values = compute_metrics(evaluation.counts, len(dataset), config.protocol == "masks", labelled)
        metrics = name_metrics(values, metric_label(protocol))
        if group.is_main and config.kind == "folder" and (warning := absent_classes(dataset, evaluation.counts)):
            print(f"evaluate: WARNING: {warning}", flush=True)
        if tracked:
            _write(stage.folder, model, dataset, protocol, metrics, evaluation, words, run_url(tracked.client, tracked.run_id))
            # Benchmarks and other protocols share the run, so each has its own folder of files.
            below = "" if (config.kind, metric_label(protocol)) == ("folder", resolved.name) else metric_label(protocol)
            _track(tracked, model, stage.folder, metric_label(protocol), metrics, below)
            tracked.finish()
            shutil.rmtree(stage.folder / STATE_FOLDER)
            stage.finish(metrics, files=["metrics.json", PER_CLASS, PROTOCOL])
        return metrics


def _evaluate(
    model: Model, clip: Clip | Path, dataset: LabelledSet, config: EvaluateConfig, group: ProcessGroup, state: Path
) -> tuple[TowerEvaluation, list[list[tuple[str, float]]]]:
    """Evaluate both towers, and find the nearest class names of every concept with their cosines.

    The model is always evaluated with its own text tower, with which its image tower and prompts were trained.
    """
    one_pass = isinstance(clip, Clip) and _differ_by_image_tower_only(clip, model.clip)
    text, classes = _classifier(model.clip, dataset, config, group)
    words = nearest_names(model.prompts.to(classes.device)(text), classes, dataset.classes, 3)
    towers = {OURS: backbone_of(model)}
    if isinstance(clip, Clip) and one_pass:
        towers[CLIP] = Backbone(clip.model.visual, model.residual)
    evaluation = evaluate_towers(towers, model.clip, classes, dataset, config, group, state)
    if one_pass:
        return evaluation, words
    if isinstance(clip, Clip):
        towers = {CLIP: Backbone(clip.model.visual, model.residual)}
        _, classes = _classifier(clip, dataset, config, group)
        other = evaluate_towers(towers, clip, classes, dataset, config, group, state / "clip")
        counts, maps = other.counts, other.label_maps[CLIP]
    else:
        counts, maps = load_baseline(clip, len(classes), config)
    try:
        merged = evaluation.counts.merge(counts)
        if maps.keys() != evaluation.examples.keys():
            raise ValueError(f"has label maps of the images {[*maps]}, expected {[*evaluation.examples]}")
    except ValueError as error:
        raise ValueError(f"{clip if isinstance(clip, Path) else config.clip}: {error}") from None
    return TowerEvaluation(merged, {**evaluation.label_maps, CLIP: maps}, evaluation.examples), words


def _differ_by_image_tower_only(clip: Clip, other: Clip) -> bool:
    """Return whether two CLIPs have the same classifier and preprocessing, so that one pass can evaluate both."""
    same = (clip.mean, clip.std, clip.side) == (other.mean, other.std, other.side)
    same &= all(clip.model_cfg.get(key) == other.model_cfg.get(key) for key in ("text_cfg", "quick_gelu"))
    tensors, others = clip.model.state_dict(), other.model.state_dict()
    names = [name for name in tensors if not name.startswith("visual.")]
    return same and all(name in others and torch.equal(tensors[name], others[name]) for name in names)


def _classifier(clip: Clip, dataset: LabelledSet, config: EvaluateConfig, group: ProcessGroup) -> tuple[TextTower, Tensor]:
    text = clip.text_tower().to(group.device).eval()
    return text, classifier(text, dataset.classes, TEMPLATES[config.templates])


def run_all(
    model: Path, labelled: Sequence[str], out: Path, config: EvaluateConfig, clip_evaluation: Path | None = None
) -> Metrics:
    """Evaluate on several labelled sets, each in its own folder below `out`; a single set uses `out` itself.

    Arguments, metrics and errors are those of `run` and, for `labelled`, of `parse_labelled_sets`; `clip_evaluation` is the
    output of `evaluate_clip.run_all` for the same sets.
    """
    sets = parse_labelled_sets(labelled, config)
    metrics: Metrics = {}
    with init_process_group(config.device) as group:  # once, because a process group cannot be reliably left and joined again
        for name, (path, set_config) in sets.items():
            folder = name if len(sets) > 1 else "."
            metrics |= _run(model, path, out / folder, set_config, group, clip_evaluation and clip_evaluation / folder)
    if len(sets) == 1 or not group.is_main:
        return metrics
    write_json(out / METRICS, metrics)
    lines = [
        f"{key.partition('/')[2]:<24} {metrics[key.replace('miou/', 'miou_clip/')]:>9.1f} {value:>9.1f}"
        for key, value in metrics.items()
        if key.startswith("miou/")
    ]
    print("\n".join([f"{'mIoU':<24} {'CLIP':>9} {'PixelCLIP':>9}", *lines]), flush=True)
    return metrics


def _attach(model: Path, stage: Stage, protocol: dict[str, Any]) -> Run:
    tracked = Run.attach(model, stage.folder, read_provenance(model / PROVENANCE))
    # These calls fail if MLflow is unreachable, so they come before the long computation.
    tracked.params({f"evaluate.{key}": value for key, value in stage.settings.items()})
    # MLflow keeps the first value of a parameter; the artifact protocol.json records the protocol of every metric in the run.
    tracked.tags({f"labelled.{protocol['name']}.md5": stage.inputs["labelled"]["md5"]})
    tracked.datasets({"inputs": {"labelled": stage.inputs["labelled"]}}, "evaluation")
    return tracked


def _track(tracked: Run, model: Path, folder: Path, label: str, metrics: Metrics, below: str) -> None:
    """Send the result of an evaluation to MLflow: metrics, files, pictures, and the model card as the run's description."""
    tracked.values(evaluation_metrics(metrics, read_json(folder / PER_CLASS)))
    for file in (REPORT, PER_CLASS, PROTOCOL, CONFUSION, CONFUSION_CHART, SEGMENTATIONS):
        if (folder / file).is_file():
            tracked.artifact(folder / file, below or None)
    steps = int(flatten(read_provenance(model / PROVENANCE)).get("train.steps", 0))
    picture = ""
    if (folder / SEGMENTATIONS).is_file():
        with Image.open(folder / SEGMENTATIONS) as image:
            tracked.image(image.convert("RGB"), f"segmentations {label}", steps)
        picture = artifact_address(tracked.run_id, f"{below}/{SEGMENTATIONS}".lstrip("/"))
    tracked.note(model_card(model, folder, name=f"Model of this run, evaluated on {label}", picture=picture))


def table(per_class: list[dict[str, Any]], metrics: Metrics, name: str) -> str:
    """Format the result as text: the IoU of CLIP and PixelCLIP per class, then the means."""

    def cell(value: float | None) -> str:
        return f"{'-' if value is None else format(value, 'z.1f'):>9}"

    width = max(12, len(name), *(len(row["class"]) for row in per_class))
    lines = [f"{name:<{width}} {'CLIP':>9} {'PixelCLIP':>9} {'gain':>9}"]
    for row in per_class:
        gain = None if row["iou"] is None else row["iou"] - row["iou_clip"]
        lines.append(f"{row['class']:<{width}} {cell(row['iou_clip'])} {cell(row['iou'])} {cell(gain)}")
    for label, key in (("mIoU", "miou"), ("pixel acc.", "pixel_accuracy"), ("mask acc.", "mask_accuracy")):
        if f"{key}/{name}" not in metrics:
            continue
        ours, clip = metrics[f"{key}/{name}"], metrics[f"{key}_clip/{name}"]
        lines.append(f"{label:<{width}} {cell(clip)} {cell(ours)} {cell(ours - clip)}")
    lines.append(f"image-level recall of CLIP: {metrics[f'image_recall_clip/{name}']:.3f}")
    return "\n".join(lines)


def _write(
    folder: Path,
    model: Path,
    dataset: LabelledSet,
    protocol: dict[str, Any],
    metrics: Metrics,
    evaluation: TowerEvaluation,
    words: list[list[tuple[str, float]]],
    run: str,
) -> None:
    rows = per_class_iou(dataset.classes, evaluation.counts)
    text = f"{table(rows, metrics, metric_label(protocol))}\n{describe_protocol(protocol)}"
    print(text, flush=True)
    write_atomically(folder / TABLE, text + "\n")
    write_json(folder / PER_CLASS, rows)
    write_json(folder / PROTOCOL, protocol)
    write_json(folder / CONFUSION, evaluation.counts.confusions[OURS].largest(dataset.classes, _CONFUSION_CLASSES))
    write_json(folder / METRICS, metrics)
    examples = examples_of(evaluation)
    confusion = evaluation.counts.confusions[OURS].largest(dataset.classes, _CHART_CLASSES)
    confusion_chart(folder / CONFUSION_CHART, confusion, f"PixelCLIP on {metric_label(protocol)}: percent of each true class")
    if examples:
        segmentation_picture(examples[:_SEGMENTATIONS], dataset.classes).save(folder / SEGMENTATIONS, quality=88)
    write_report(
        folder / REPORT,
        name=metric_label(protocol),
        protocol=describe_protocol(protocol),
        metrics=metrics,
        per_class=rows,
        examples=examples,
        classes=dataset.classes,
        model=model,
        words=words,
        confusion=confusion,
        run=run,
    )
