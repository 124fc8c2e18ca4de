"""STAGE evaluate: a PixelCLIP and the CLIP it came from on one labelled set, with one classifier (method.md, "Inference").

Started by torchrun, the processes share the images. B images, T towers, K classes, C embedding width, H W image.
"""

import json
import re
import shutil
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from pixelclip.backbone import check_side
from pixelclip.benchmarks import KINDS, LabelledSet, open_labelled
from pixelclip.cache import origin
from pixelclip.checkpoint import Model, backbone_of, clip_folder, load_clip, load_model
from pixelclip.config import EvaluateConfig
from pixelclip.download import here
from pixelclip.measure import Result, measure
from pixelclip.ranks import Ranks, join
from pixelclip.report import write_report
from pixelclip.s3 import is_s3
from pixelclip.sources import describe_shards
from pixelclip.stage import METRICS, PROVENANCE, Metrics, Stage, describe
from pixelclip.storage import digest, read_json, write_atomically, write_json
from pixelclip.tracking import Run

REPORT, PER_CLASS, TABLE, PROTOCOL = "report.html", "per_class.json", "table.txt", "protocol.json"
CONFUSION = "confusion.json"
STATE = "state"
"""Folder in the unfinished result: counts and examples, from which a killed run continues."""
_OPTIONS = {
    "whole": ("side", "feature_grid"),
    "slide": ("slide_side", "crop", "stride", "feature_grid"),
    "masks": ("side", "masks"),
    "given": ("masks_folder",),
    "felzenszwalb": ("felzenszwalb_scale", "felzenszwalb_sigma", "felzenszwalb_min_size"),
}
"""The settings that a protocol, or a kind of its masks, goes by."""


def run(model: Path, labelled: Path | str, out: Path, config: EvaluateConfig) -> Metrics:
    """Measures a model and its CLIP on a labelled set and writes the report; an interrupted run continues.

    Started by torchrun, all processes count one result, and only the first writes it.

    Args:
        model: model folder.
        labelled: labelled set, a folder or `s3://bucket/folder`.
        out: folder to make: metrics, `table.txt`, `per_class.json`, `confusion.json`, `protocol.json`, `report.html`.
        config: settings.

    Returns:
        `miou/NAME`, `miou_clip/NAME`, `gain/NAME`, `pixel_accuracy/NAME`, ... in points; `image_recall_clip/NAME` in 0..1;
        for protocol masks `mask_accuracy/NAME` too. NAME ends with what is not the paper's: `.slide`, `.masks`,
        `.masks-given`, ...

    Raises:
        ValueError: unusable model, CLIP, labelled set or masks, or MLflow unreachable.
    """
    with join(config.device) as ranks:
        return _run(model, here(labelled), out, config, ranks)


def _run(model: Path, labelled: Path, out: Path, config: EvaluateConfig, ranks: Ranks) -> Metrics:
    loaded = load_model(model)
    spec = config.clip or loaded.config["clip"]["spec"]
    dataset = open_labelled(labelled, config.kind)
    name = _name(labelled, config)
    _check_masks(dataset, config)
    inputs = ranks.from_first(_inputs(model, labelled, spec, dataset, config) if ranks.first else None)
    stage = Stage("evaluate", out, inputs, config)
    if ranks.from_first(stage.finished):
        return ranks.from_first(stage.reuse() if ranks.first else {})
    trained_from, weights = loaded.config["clip"]["md5"], inputs.get("clip")
    if not config.clip and weights and trained_from and weights["md5"] != trained_from:
        raise ValueError(
            f"{clip_folder(spec)}: is not the CLIP that {model} was trained from (other md5); name it by evaluate.clip"
        )
    _check_sides(loaded, config)
    with stage if ranks.first else nullcontext():
        protocol = _protocol(loaded, config, name)
        tracked = _attach(model, stage, protocol) if ranks.first else None
        result = measure(loaded, load_clip(spec), dataset, config, ranks, stage.folder / STATE)
        metrics = {f"{key}/{_label(protocol)}": value for key, value in result.metrics.items()}
        if tracked:
            _write(stage.folder, model, dataset, protocol, metrics, result)
            tracked.values(metrics)
            # Of the benchmarks and the other protocols none must replace another's files in the one run.
            below = None if (config.kind, _label(protocol)) == ("folder", name) else _label(protocol)
            for file in (REPORT, PER_CLASS, PROTOCOL, CONFUSION):
                tracked.artifact(stage.folder / file, below)
            tracked.finish()
            shutil.rmtree(stage.folder / STATE)
            stage.finish(metrics, files=["metrics.json", PER_CLASS, PROTOCOL])
        return metrics


def run_all(model: Path, labelled: Sequence[str], out: Path, config: EvaluateConfig) -> Metrics:
    """Evaluates on several labelled sets, each into a folder of its own below `out`; one alone goes into `out` itself.

    Args:
        model: model folder.
        labelled: `FOLDER`, of the kind that the settings say, or `KIND:FOLDER`; a folder may be `s3://bucket/folder`.
        out: folder to make.
        config: settings of all of them.

    Returns:
        The metrics of all sets, which `out/metrics.json` holds, too.

    Raises:
        ValueError: as `run`; or two sets have one name, or several one given name.
    """
    sets: dict[str, tuple[Path, EvaluateConfig]] = {}
    for word in labelled:
        kind, _, folder = word.partition(":")
        chosen = config if kind not in KINDS else config.model_copy(update={"kind": kind})
        path = here(folder if kind in KINDS else word)
        name = _name(path, chosen)
        if name in sets:
            raise ValueError(f"two labelled sets are called {name!r}: {sets[name][0]} and {path}; evaluate them one by one")
        sets[name] = (path, chosen)
    if len(sets) == 1:
        ((path, chosen),) = sets.values()
        return run(model, path, out, chosen)
    metrics: Metrics = {}
    with join(config.device) as ranks:  # once: processes that join, leave and join again lose each other
        for name, (path, chosen) in sets.items():
            metrics |= _run(model, path, out / name, chosen, ranks)
    if not ranks.first:
        return metrics
    write_json(out / METRICS, metrics)
    lines = [
        f"{key.partition('/')[2]:<24} {metrics[key.replace('miou/', 'miou_clip/')]:>9.1f} {value:>9.1f}"
        for key, value in metrics.items()
        if key.startswith("miou/")
    ]
    print("\n".join([f"{'mIoU':<24} {'CLIP':>9} {'PixelCLIP':>9}", *lines]), flush=True)
    return metrics


def _name(labelled: Path, config: EvaluateConfig) -> str:
    name = config.name or (labelled.resolve().name if config.kind == "folder" else config.kind)
    if not re.fullmatch(r"[\w.\- :]+", name):
        raise ValueError(
            f"{labelled}: a metric cannot be called {name!r} in MLflow (letters, digits, _ - . :); set evaluate.name"
        )
    return name


def _label(protocol: dict[str, Any]) -> str:
    """What stands behind the slash of a metric: the set's name, and what is not the paper's protocol.

    Sizes and templates are not in it, so that runs of a sweep compare by one name; the tag `protocol.NAME` tells them.
    """
    masks = f"-{protocol['masks']}" if protocol["masks"] not in (None, "truth") else ""
    other = "" if protocol["protocol"] == "whole" else f".{protocol['protocol']}{masks}"
    return protocol["name"] + other


def _check_masks(dataset: LabelledSet, config: EvaluateConfig) -> None:
    if config.protocol != "masks" or config.masks != "given":
        return
    if not is_s3(config.masks_folder) and not Path(config.masks_folder).exists():
        raise ValueError(f"evaluate.masks_folder {config.masks_folder}: no such folder")
    stems: dict[str, Path] = {}
    for image, _ in dataset.pairs:
        if (other := stems.setdefault(image.stem, image)) != image:
            raise ValueError(f"masks are found by the image's name, but two are called {image.stem}: {other} and {image}")


def _check_sides(model: Model, config: EvaluateConfig) -> None:
    backbone = backbone_of(model)
    check_side("evaluate.side", config.side or model.side, backbone)
    if config.protocol == "slide":
        check_side("evaluate.crop", config.crop, backbone)
        if config.slide_side:
            check_side("evaluate.slide_side", config.slide_side, backbone)


def _inputs(
    model: Path,
    labelled: Path,
    spec: str,
    dataset: LabelledSet,
    config: EvaluateConfig,
) -> dict[str, dict[str, Any]]:
    if config.kind == "folder":
        described = describe(labelled)
    else:  # as published a benchmark holds its training images too, which are not read
        read = {file for pair in dataset.pairs for file in pair}
        described = {"path": origin(labelled), **digest(labelled, read)}
    inputs = {"model": describe(model), "labelled": described}
    if weights := clip_folder(spec):
        inputs["clip"] = describe(weights)
    if config.protocol == "masks" and config.masks == "given":
        inputs["masks"] = describe_shards(config.masks_folder)
    return inputs


def _protocol(model: Model, config: EvaluateConfig, name: str) -> dict[str, Any]:
    """How the numbers come about; None for what the protocol does not go by."""
    used = {*_OPTIONS[config.protocol], *(_OPTIONS.get(config.masks, ()) if config.protocol == "masks" else ())}
    settings = config.model_dump() | {"name": name, "side": config.side or model.side}
    always = {key: settings[key] for key in ("name", "kind", "protocol", "templates")}
    return always | {key: settings[key] if key in used else None for options in _OPTIONS.values() for key in options}


def _in_words(protocol: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in protocol.items() if key != "name" and value is not None)


def _attach(model: Path, stage: Stage, protocol: dict[str, Any]) -> Run:
    tracked = Run.attach(model, stage.folder, read_json(model / PROVENANCE))
    # These need MLflow at once, so they stand before the long work and not between it and its result.
    tracked.params({f"evaluate.{key}": value for key, value in stage.settings.items()})
    # MLflow keeps the first value of a parameter; the tag tells the protocol of every number in the run.
    md5 = {f"labelled.{protocol['name']}.md5": stage.inputs["labelled"]["md5"]}
    tracked.tags(md5 | {f"protocol.{_label(protocol)}": json.dumps(protocol)})
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
    result: Result,
) -> None:
    shown = f"{table(result.per_class, metrics, _label(protocol))}\n{_in_words(protocol)}"
    print(shown, flush=True)
    write_atomically(folder / TABLE, shown + "\n")
    write_json(folder / PER_CLASS, result.per_class)
    write_json(folder / PROTOCOL, protocol)
    write_json(folder / CONFUSION, result.confusion)
    write_report(
        folder / REPORT,
        name=_label(protocol),
        protocol=_in_words(protocol),
        metrics=metrics,
        per_class=result.per_class,
        examples=result.examples,
        classes=dataset.classes,
        model=model,
        words=result.words,
    )
