"""Model card: a page of Markdown about a model, written from its files only.

MLflow shows it with a run and a registered version, and `export` writes it as README.md.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from pydantic import BaseModel, Field

from pixelclip.config import BEST
from pixelclip.evaluation.protocol import describe_protocol, metric_label, read_protocol
from pixelclip.models.checkpoint import read_config
from pixelclip.storage.files import read_json
from pixelclip.workflow.provenance import chain, changed_settings, origins, read_provenance, source
from pixelclip.workflow.stage import PROVENANCE, read_metrics

PER_CLASS = "per_class.json"
"""File of an evaluation with the IoU of every class."""
SEGMENTATIONS = "segmentations.jpg"
"""File of an evaluation with examples: image, CLIP, PixelCLIP, truth. Missing if `evaluate.pictures` is 0."""
_MOST_CLASSES = 20  # rows of the table; of more classes those with the smallest and the largest gain
_NAME, _VALUE = 40, 60  # characters of a class name and of a setting
_SCORES = (("mIoU (%)", "miou"), ("pixel accuracy (%)", "pixel_accuracy"), ("mask accuracy (%)", "mask_accuracy"))
_NOT_STATED = "not stated"
_PAPER = "[PixelCLIP](https://arxiv.org/abs/2409.19846) (NeurIPS 2024)"


class _Row(BaseModel):
    name: str = Field(alias="class")
    iou: float | None
    iou_clip: float | None


def model_card(
    model: Path,
    evaluation: Path | None = None,
    *,
    name: str = "PixelCLIP",
    uri: str = "",
    picture: str = "",
    licence: str = "",
    data_licence: str = "",
) -> str:
    """Return a model card as Markdown, at most about 4,500 characters; paths of machines are shortened to their last part.

    Args:
        model: model folder.
        evaluation: output of `evaluate` for this model; without it the card says that the model is unmeasured.
        name: title.
        uri: how users load the model, such as `models:/NAME/3`; by default the name of the model folder.
        picture: URL or path of an example, relative to the card.
        licence: licence of the weights; empty if not stated.
        data_licence: licence of the training images.

    Raises:
        ValueError: a file is missing or damaged.
    """
    provenance = read_provenance(model / PROVENANCE)
    clip = _short(read_config(model)["clip"]["spec"])
    measured = _measured(evaluation) if evaluation else "This model is unmeasured: it has not been evaluated on a labelled set."
    sections = [
        f"# {name}",
        f"Open-vocabulary segmentation: every pixel of an image gets one of the class names that you pass. The image tower of "
        f"the CLIP `{clip}` was trained with the method of {_PAPER} on images with class-agnostic masks, without class labels.",
        "## Scores",
        measured,
        *([f"![From left to right: image, CLIP, PixelCLIP, truth]({picture})"] if picture else []),
        "## Use",
        _usage(uri or model.name),
        "## Data and licences",
        _data(provenance, licence, data_licence),
        "## Limits",
        _limits(clip, evaluation),
        "## Training",
        _training(provenance),
    ]
    return "\n\n".join(sections) + "\n"


def _short(spec: str) -> str:
    """Return the name of a file, folder or URL; `NAME:FILE` keeps NAME, anything else is unchanged."""
    head, colon, rest = spec.partition(":")
    if colon and "/" in rest and "/" not in head:
        return f"{head}:{PurePosixPath(rest).name}"
    return PurePosixPath(spec).name


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(map(_escaped, line))} |" for line in lines)


def _escaped(text: str) -> str:
    """Escape what Markdown would read as HTML or as the border of a cell."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace("|", "&#124;")


def _rows(evaluation: Path) -> list[dict[str, Any]]:
    """Return the classes with labelled pixels, the largest gain first."""
    file = evaluation / PER_CLASS
    found = read_json(file, list[_Row]) if file.is_file() else []
    return sorted((row for row in found if row["iou"] is not None), key=_gain, reverse=True)


def _gain(row: Mapping[str, Any]) -> float:
    return float(row["iou"] - row["iou_clip"])


def _measured(evaluation: Path) -> str:
    protocol, metrics = read_protocol(evaluation), read_metrics(evaluation)
    label = metric_label(protocol)
    images = metrics.get(f"images/{label}", 0.0)
    scores = [
        [title, f"{metrics[f'{key}_clip/{label}']:.1f}", f"{metrics[f'{key}/{label}']:.1f}"]
        for title, key in _SCORES
        if f"{key}/{label}" in metrics and f"{key}_clip/{label}" in metrics
    ]
    scores += [["gain in mIoU (points)", "", f"{metrics[f'gain/{label}']:+z.1f}"]] if f"gain/{label}" in metrics else []
    best = [f"{key}{tower}/{label}{BEST}" for key, tower in (("miou", "_clip"), ("miou", ""), ("gain", ""))]
    if all(key in metrics for key in best):
        clip, ours, gain = (metrics[key] for key in best)
        scores += [["mIoU (%), quality=best", f"{clip:.1f}", f"{ours:.1f}"], ["gain, quality=best", "", f"{gain:+z.1f}"]]
    text = f"On `{label}`, {images:.0f} images, with the same class names for both. Protocol: {describe_protocol(protocol)}."
    parts = [text, _table(["", "CLIP", "PixelCLIP"], scores)]
    if rows := _rows(evaluation):
        half = _MOST_CLASSES // 2
        shown = rows if len(rows) <= _MOST_CLASSES else rows[:half] + rows[-half:]
        which = "" if shown == rows else f", of {len(rows)} classes the {half} with the largest and with the smallest gain"
        cells = [[row["class"][:_NAME], f"{row['iou_clip']:.1f}", f"{row['iou']:.1f}", f"{_gain(row):+z.1f}"] for row in shown]
        parts += [f"IoU (%) per class{which}:", _table(["class", "CLIP", "PixelCLIP", "gain"], cells)]
    return "\n\n".join(parts)


def _usage(uri: str) -> str:
    return (
        f'```\npixelclip predict photo.jpg --classes "dog|puppy,grass" --model {uri} --out labels.png\n```\n\n'
        f'```python\nimport pixelclip\nmodel = pixelclip.load("{uri}")\nmodel("photo.jpg", ["dog", "grass"]).labels\n```'
    )


def _data(provenance: Mapping[str, Any], licence: str, data_licence: str) -> str:
    rows = []
    for name, described, stage in origins(provenance):
        fetched = source(described)
        origin = f"{_short(fetched['repo'])} at {fetched['git_sha'][:12]}" if fetched.get("repo") else _short(described["path"])
        files = f"{described['num_files']:,}" if "num_files" in described else ""
        rows.append([f"{name} (read by {stage})", origin, files, f"`{described['md5']}`"])
    table = _table(["input", "origin", "files", "md5"], rows)
    weights, images = (_escaped(" ".join(text.split())[:_NAME]) or _NOT_STATED for text in (licence, data_licence))
    return f"Licence of the weights: {weights}. Licence of the training images: {images}.\n\n{table}"


def _limits(clip: str, evaluation: Path | None) -> str:
    lines = [
        "The model always chooses one of the given classes; add a class such as `background` for everything else.",
        "It knows the words and the biases of its CLIP. Check it on your own labelled images before you rely on it.",
    ]
    if clip == "toy":
        lines.append("Its CLIP is the toy CLIP of pixelclip: it knows only the words of painted scenes, not photographs.")
    worse = [row["class"][:_NAME] for row in reversed(_rows(evaluation)) if _gain(row) < 0] if evaluation else []
    if worse:
        classes = "1 class" if len(worse) == 1 else f"{len(worse)} classes"
        named = _escaped(", ".join(worse[:10])) + (", ..." if len(worse) > 10 else "")
        lines.append(f"It is worse than CLIP on {classes}, the worst first: {named}.")
    return "\n".join(f"- {line}" for line in lines)


def _training(provenance: Mapping[str, Any]) -> str:
    finished = f", {provenance['finished'][:10]}" if "finished" in provenance else ""
    lines = [
        f"pixelclip {provenance['version']}, revision `{provenance['revision']}`{finished}.",
        "",
        "Settings that differ from the defaults, which are the paper's:",
        "",
    ]
    for stage in reversed(list(chain(provenance))):
        changed = changed_settings(stage)
        texts = (_short(value) if isinstance(value, str) else str(value) for value in changed.values())
        shown = (f"{name}={text[:_VALUE]}" for name, text in zip(changed, texts, strict=True))
        lines.append(f"- {stage['stage']}: {_escaped(', '.join(shown)) or 'none'}")
    return "\n".join(lines)
