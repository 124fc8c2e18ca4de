"""STAGE evaluate: a PixelCLIP and the CLIP it came from on one labelled set, with one classifier (method.md, "Inference").

Another CLIP (`evaluate.clip`) is measured with the classifier of its own text tower: the two speak other languages.
Started by torchrun, the processes share the images. B images, T towers, K classes, C embedding width, H W image.
"""

import json
import shutil
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pixelclip import evaluate_clip
from pixelclip.backbone import Backbone
from pixelclip.benchmarks import LabelledSet, open_labelled
from pixelclip.checkpoint import Clip, Model, backbone_of, load_clip, load_model
from pixelclip.clip_sources import clip_folder
from pixelclip.config import EvaluateClipConfig, EvaluateConfig
from pixelclip.download import here
from pixelclip.measure import Counted, measure, metrics_of, per_class
from pixelclip.protocol import (
    PROTOCOL,
    check_masks,
    check_sides,
    in_words,
    inputs_of,
    label_of,
    protocol_of,
    sets_of,
)
from pixelclip.ranks import ProcessGroup, init_process_group
from pixelclip.report import Example, write_report
from pixelclip.stage import METRICS, PROVENANCE, Metrics, Stage, describe
from pixelclip.storage import read_json, write_atomically, write_json
from pixelclip.tally import CLIP, OURS
from pixelclip.text import TEMPLATES, TextTower, classifier
from pixelclip.tracking import Run

REPORT, PER_CLASS, TABLE = "report.html", "per_class.json", "table.txt"
CONFUSION = "confusion.json"
STATE = "state"
"""Folder in the unfinished result: counts and examples, from which a killed run continues."""
_SHOWN_CLASSES = 10  # of a confusion matrix that one can still read


def run(model: Path, labelled: Path | str, out: Path, config: EvaluateConfig, clip_evaluation: Path | None = None) -> Metrics:
    """Measures a model and its CLIP on a labelled set and writes the report; an interrupted run continues.

    Started by torchrun, all processes count one result, and only the first writes it.

    Args:
        model: model folder.
        labelled: labelled set, a folder or `s3://bucket/folder`.
        out: folder to make: metrics, `table.txt`, `per_class.json`, `confusion.json`, `protocol.json`, `report.html`.
        config: settings.
        clip_evaluation: what `evaluate_clip` made of the model's CLIP and this set; without it CLIP is measured here, too.

    Returns:
        `miou/NAME`, `miou_clip/NAME`, `gain/NAME`, `pixel_accuracy/NAME`, ... in points; `image_recall_clip/NAME` in 0..1;
        for protocol masks `mask_accuracy/NAME` too. NAME ends with what is not the paper's: `.slide`, `.masks`,
        `.masks-given`, ...

    Raises:
        ValueError: unusable model, CLIP, labelled set or masks, CLIP evaluated otherwise, or MLflow unreachable.
    """
    with init_process_group(config.device) as ranks:
        return _run(model, here(labelled), out, config, ranks, clip_evaluation)


def _run(
    model: Path, labelled: Path, out: Path, config: EvaluateConfig, ranks: ProcessGroup, clip_evaluation: Path | None
) -> Metrics:
    loaded = load_model(model)
    spec = config.clip or loaded.config["clip"]["spec"]
    dataset = open_labelled(labelled, config.kind)
    settings = evaluate_clip.settings_of(spec, labelled, config, loaded.side, loaded.residual)
    check_masks(dataset, config)
    inputs = ranks.broadcast_object(_inputs(model, labelled, dataset, settings, clip_evaluation) if ranks.is_main else None)
    stage = Stage("evaluate", out, inputs, config)
    if ranks.broadcast_object(stage.finished):
        return ranks.broadcast_object(stage.reuse() if ranks.is_main else {})
    trained_from, weights = loaded.config["clip"]["md5"], inputs.get("clip")
    if not config.clip and weights and trained_from and weights["md5"] != trained_from:
        raise ValueError(
            f"{clip_folder(spec)}: is not the CLIP that {model} was trained from (other md5); name it by evaluate.clip"
        )
    check_sides(backbone_of(loaded), settings)
    of_clip: Clip | Path = clip_evaluation or load_clip(spec)
    if isinstance(of_clip, Clip):
        check_sides(Backbone(of_clip.model.visual, loaded.residual), settings)
    else:
        evaluate_clip.check(of_clip, settings, inputs)
    with stage if ranks.is_main else nullcontext():
        protocol = protocol_of(settings)
        tracked = _attach(model, stage, protocol) if ranks.is_main else None
        found, words = _measure(loaded, of_clip, dataset, settings, ranks, stage.folder / STATE)
        figures = metrics_of(found.tally, len(dataset), config.protocol == "masks", labelled)
        metrics = {f"{key}/{label_of(protocol)}": value for key, value in figures.items()}
        if tracked:
            _write(stage.folder, model, dataset, protocol, metrics, found, words)
            tracked.values(metrics)
            # Of the benchmarks and the other protocols none must replace another's files in the one run.
            below = None if (config.kind, label_of(protocol)) == ("folder", settings.name) else label_of(protocol)
            for file in (REPORT, PER_CLASS, PROTOCOL, CONFUSION):
                tracked.artifact(stage.folder / file, below)
            tracked.finish()
            shutil.rmtree(stage.folder / STATE)
            stage.finish(metrics, files=["metrics.json", PER_CLASS, PROTOCOL])
        return metrics


def _measure(
    model: Model,
    of_clip: Clip | Path,
    dataset: LabelledSet,
    settings: EvaluateClipConfig,
    ranks: ProcessGroup,
    state: Path,
) -> tuple[Counted, list[list[tuple[str, float]]]]:
    """What was counted of both towers, and for every concept the nearest class names with their cosines.

    The image tower was trained towards the model's own text tower, which its prompts are for, too; no other serves them.
    """
    together = isinstance(of_clip, Clip) and _differ_by_images_alone(of_clip, model.clip)
    text, classes = _classifier(model.clip, dataset, settings, ranks)
    words = _nearest_words(model, text, classes, dataset.classes)
    towers = {OURS: backbone_of(model)}
    if isinstance(of_clip, Clip) and together:
        towers[CLIP] = Backbone(of_clip.model.visual, model.residual)
    found = measure(towers, model.clip, classes, dataset, settings, ranks, state)
    if together:
        return found, words
    if isinstance(of_clip, Clip):
        towers = {CLIP: Backbone(of_clip.model.visual, model.residual)}
        _, classes = _classifier(of_clip, dataset, settings, ranks)
        counted = measure(towers, of_clip, classes, dataset, settings, ranks, state / "clip")
        return Counted(found.tally.joined(counted.tally), found.maps | counted.maps, found.pictures), words
    tally, maps = evaluate_clip.load(of_clip, len(classes))
    try:
        return Counted(found.tally.joined(tally), {**found.maps, CLIP: maps}, found.pictures), words
    except ValueError as error:
        raise ValueError(f"{of_clip}: {error}") from None


def _differ_by_images_alone(clip: Clip, other: Clip) -> bool:
    """Whether two CLIPs give the same classifier and see images alike, so that both can be measured in one pass."""

    def rest(one: Clip) -> tuple[Any, ...]:
        return one.mean, one.std, one.side, one.model_cfg.get("text_cfg"), one.model_cfg.get("quick_gelu")

    mine, others = clip.model.state_dict(), other.model.state_dict()
    names = [name for name in mine if not name.startswith("visual.")]
    return rest(clip) == rest(other) and all(name in others and torch.equal(mine[name], others[name]) for name in names)


def _classifier(
    clip: Clip, dataset: LabelledSet, settings: EvaluateClipConfig, ranks: ProcessGroup
) -> tuple[TextTower, Tensor]:
    text = TextTower(clip.model).to(ranks.device).eval()
    return text, classifier(text, dataset.classes, TEMPLATES[settings.templates])


def run_all(
    model: Path, labelled: Sequence[str], out: Path, config: EvaluateConfig, clip_evaluation: Path | None = None
) -> Metrics:
    """Evaluates on several labelled sets, each into a folder of its own below `out`; one alone goes into `out` itself.

    Args:
        model: model folder.
        labelled: see `sets_of`.
        out: folder to make.
        config: settings of all of them.
        clip_evaluation: what `evaluate_clip.run_all` made of the same sets.

    Returns:
        The metrics of all sets, which `out/metrics.json` holds, too.

    Raises:
        ValueError: as `run`; or two sets have one name, or several one given name.
    """
    sets = sets_of(labelled, config)
    if len(sets) == 1:
        ((path, chosen),) = sets.values()
        return run(model, path, out, chosen, clip_evaluation)
    metrics: Metrics = {}
    with init_process_group(config.device) as ranks:  # once: processes that join, leave and join again lose each other
        for name, (path, chosen) in sets.items():
            metrics |= _run(model, path, out / name, chosen, ranks, clip_evaluation and clip_evaluation / name)
    if not ranks.is_main:
        return metrics
    write_json(out / METRICS, metrics)
    lines = [
        f"{key.partition('/')[2]:<24} {metrics[key.replace('miou/', 'miou_clip/')]:>9.1f} {value:>9.1f}"
        for key, value in metrics.items()
        if key.startswith("miou/")
    ]
    print("\n".join([f"{'mIoU':<24} {'CLIP':>9} {'PixelCLIP':>9}", *lines]), flush=True)
    return metrics


def _inputs(
    model: Path, labelled: Path, dataset: LabelledSet, settings: EvaluateClipConfig, clip_evaluation: Path | None
) -> dict[str, dict[str, Any]]:
    inputs = {"model": describe(model), **inputs_of(labelled, dataset, settings.clip, settings)}
    return inputs | ({"clip_evaluation": describe(clip_evaluation)} if clip_evaluation else {})


@torch.no_grad()
def _nearest_words(model: Model, text: TextTower, classes: Tensor, names: list[str]) -> list[list[tuple[str, float]]]:
    """For every concept the three nearest class names."""
    concepts = F.normalize(model.prompts.to(classes.device)(text), dim=-1)
    top = (concepts @ classes.T).topk(min(3, len(names)), dim=-1)
    pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
    return [[(names[i], round(value, 4)) for i, value in zip(*row, strict=True)] for row in pairs]


def _attach(model: Path, stage: Stage, protocol: dict[str, Any]) -> Run:
    tracked = Run.attach(model, stage.folder, read_json(model / PROVENANCE))
    # These need MLflow at once, so they stand before the long work and not between it and its result.
    tracked.params({f"evaluate.{key}": value for key, value in stage.settings.items()})
    # MLflow keeps the first value of a parameter; the tag tells the protocol of every number in the run.
    md5 = {f"labelled.{protocol['name']}.md5": stage.inputs["labelled"]["md5"]}
    tracked.tags(md5 | {f"protocol.{label_of(protocol)}": json.dumps(protocol)})
    tracked.datasets({"inputs": {"labelled": stage.inputs["labelled"]}}, "evaluation")
    return tracked


def table(per_class: list[dict[str, Any]], metrics: Metrics, name: str) -> str:
    """The result as text: IoU per class of CLIP and PixelCLIP, then the means."""

    def cell(value: float | None) -> str:
        return f"{'-' if value is None else format(value, '.1f'):>9}"

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
    found: Counted,
    words: list[list[tuple[str, float]]],
) -> None:
    rows = per_class(dataset.classes, found.tally)
    shown = f"{table(rows, metrics, label_of(protocol))}\n{in_words(protocol)}"
    print(shown, flush=True)
    write_atomically(folder / TABLE, shown + "\n")
    write_json(folder / PER_CLASS, rows)
    write_json(folder / PROTOCOL, protocol)
    write_json(folder / CONFUSION, found.tally.confusions[OURS].largest(dataset.classes, _SHOWN_CLASSES))
    ours, clip = found.maps[OURS], found.maps[CLIP]
    write_report(
        folder / REPORT,
        name=label_of(protocol),
        protocol=in_words(protocol),
        metrics=metrics,
        per_class=rows,
        examples=[Example(image, clip[index], ours[index], truth) for index, (image, truth) in found.pictures.items()],
        classes=dataset.classes,
        model=model,
        words=words,
    )
