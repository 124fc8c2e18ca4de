"""Write a self-contained report.html: images with CLIP, PixelCLIP and truth, IoU per class, loss curve, concept gallery."""

import base64
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

import jinja2
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import BaseModel, Field

from pixelclip.config import BEST
from pixelclip.data.images import colour_labels, encode_jpeg, fitted, palette
from pixelclip.storage.files import read_json, write_atomically
from pixelclip.tracking.journal import CURVES, read_points
from pixelclip.visualization.charts import row_percent
from pixelclip.visualization.pictures import GALLERY, UNLABELLED, Example
from pixelclip.workflow.provenance import data, flatten, read_provenance, source, used_settings
from pixelclip.workflow.stage import PROVENANCE, Metrics

_PICTURE = (320, 1280)  # maximum width and height of a picture


class _Picture(BaseModel):
    file: str
    cosine: float
    box: Annotated[list[int], Field(min_length=4, max_length=4)] | None = None


class _Concept(BaseModel):
    concept: int
    masks: int
    best: list[_Picture]


def write_report(
    path: Path,
    *,
    name: str,
    protocol: str,
    metrics: Metrics,
    per_class: list[dict[str, Any]],
    examples: list[Example],
    classes: list[str],
    model: Path,
    words: list[list[tuple[str, float]]],
    confusion: Mapping[str, Any],
    run: str = "",
) -> None:
    """Write the report.

    Args:
        path: HTML file.
        name: label of the labelled set in metrics.
        protocol: one-line description of the evaluation protocol.
        metrics: as in `metrics.json`.
        per_class: rows of `per_class.json`.
        examples: one row of pictures each.
        classes: class names.
        model: model folder, for its provenance and, if present, its curves and gallery.
        words: nearest class names of every concept, with their cosines.
        confusion: confusion matrix of PixelCLIP, see `ConfusionMatrix.largest`.
        run: MLflow run, its address or ID.
    """
    template = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    source = resources.files("pixelclip").joinpath("assets/report.html.j2").read_text(encoding="utf-8")
    provenance = read_provenance(model / PROVENANCE)
    page = template.from_string(source).render(
        name=name,
        protocol=protocol,
        metrics=_of(metrics, name),
        best=_of(metrics, f"{name}{BEST}"),
        rows=sorted(per_class, key=lambda row: (row["iou"] is None, -(row["iou"] or 0))),
        examples=[_example(example, classes) for example in examples],
        colours=[f"rgb({r},{g},{b})" for r, g, b in palette(len(classes)).tolist()] + ["#000"],
        confusion=zip(confusion["classes"], row_percent(confusion).tolist(), strict=True),
        predicted=confusion["classes"],
        curve=_curve(model / CURVES),
        gallery=_gallery(model, words),
        settings=used_settings(provenance),
        facts=_facts(model, provenance, run),
    )
    write_atomically(path, page)


def _of(metrics: Metrics, name: str) -> Metrics:
    """Return the metrics of a label, without it."""
    return {key.removesuffix(f"/{name}"): value for key, value in metrics.items() if key.partition("/")[2] == name}


def _facts(model: Path, provenance: Mapping[str, Any], run: str) -> list[tuple[str, str]]:
    """Return when the report was written, and the run, model, code and data it is about."""
    clip = flatten(provenance).get("train.clip", "")
    facts = [
        ("written", datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")),
        ("MLflow run", run),
        ("model", f"{model.resolve().name}, md5 {provenance['output']['md5']}{f', from CLIP {clip}' if clip else ''}"),
        ("code", f"pixelclip {provenance['version']}, revision {provenance['revision']}"),
    ]
    for data_name, described in data(provenance).items():
        fetched = source(described)
        origin = f"{fetched['repo']} at {fetched['git_sha'][:12]}" if fetched.get("repo") else described["path"]
        facts.append((f"training data: {data_name}", f"{origin}, md5 {described['md5']}"))
    return [(fact, text) for fact, text in facts if text]


def _data_uri(image: Image.Image) -> str:
    return "data:image/jpeg;base64," + base64.b64encode(encode_jpeg(image, quality=88)).decode()


def _example(example: Example, classes: list[str]) -> dict[str, Any]:
    size = fitted(example.image.size, _PICTURE)

    def label_uri(labels: NDArray[np.integer]) -> str:
        colours = colour_labels(labels, len(classes))
        return _data_uri(Image.fromarray(colours).resize(size, Image.Resampling.NEAREST))

    assert example.clip is not None  # a report always compares
    maps = [m for m in (example.truth, example.ours, example.clip, example.best) if m is not None]
    present = np.unique(np.concatenate([m.ravel() for m in maps]))
    unlabelled = [(len(classes), UNLABELLED)] if present[-1] >= len(classes) else []
    return {
        "image": _data_uri(example.image.resize(size)),
        "clip": label_uri(example.clip),
        "ours": label_uri(example.ours),
        "best": None if example.best is None else label_uri(example.best),
        "truth": label_uri(example.truth),
        "legend": [(int(i), classes[i]) for i in present if i < len(classes)] + unlabelled,
    }


def _curve(path: Path) -> dict[str, Any] | None:
    """Scale the loss curve to the points of a 600 x 180 drawing, with four labelled lines in each direction."""
    if not path.is_file():
        return None
    lines = read_points(path)
    points = [(line["step"], line["metrics"]["train/loss"]) for line in lines if "train/loss" in line["metrics"]]
    if len(points) < 2:
        return None
    steps, losses = zip(*points, strict=True)
    low, high = min(losses), max(losses)
    scaled = [(600 * s / steps[-1], 180 - 180 * (v - low) / ((high - low) or 1)) for s, v in points]
    polyline = " ".join(f"{x:.1f},{y:.1f}" for x, y in scaled)
    parts = [part / 4 for part in range(5)]
    rows = [(180 * part, high - part * (high - low)) for part in parts]
    columns = [(600 * part, round(steps[-1] * part)) for part in parts]
    return {"points": polyline, "rows": rows, "columns": columns}


def _gallery(model: Path, words: list[list[tuple[str, float]]]) -> list[dict[str, Any]]:
    if not (model / GALLERY).is_file():
        return []
    entries = read_json(model / GALLERY, list[_Concept])
    names = {best["file"] for entry in entries for best in entry["best"]}
    files = {name: Image.open(model / name).convert("RGB") for name in names if (model / name).is_file()}
    concepts = []
    for entry in entries:
        shown = [best for best in entry["best"] if best["file"] in files]
        # Models of pixelclip 0.2 have one file per picture and no boxes.
        pictures = [(files[best["file"]].crop(best.get("box")), best["cosine"]) for best in shown]
        embedded = [(_data_uri(picture), cosine) for picture, cosine in pictures]
        concepts.append({**entry, "pictures": embedded, "words": words[entry["concept"]]})
    return concepts
