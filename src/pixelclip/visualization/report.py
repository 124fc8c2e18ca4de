"""Write a self-contained report.html: images with CLIP, PixelCLIP and truth, IoU per class, loss curve, concept gallery."""

import base64
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

import jinja2
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import BaseModel, Field

from pixelclip.data.images import colour_labels, encode_jpeg, fitted, palette
from pixelclip.storage.files import read_json, write_atomically
from pixelclip.tracking.journal import CURVES, read_points
from pixelclip.visualization.pictures import GALLERY, Example
from pixelclip.workflow.provenance import flatten, read_provenance
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
    """
    template = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    source = resources.files("pixelclip").joinpath("assets/report.html.j2").read_text(encoding="utf-8")
    provenance = read_provenance(model / PROVENANCE)
    page = template.from_string(source).render(
        name=name,
        protocol=protocol,
        metrics={key.rpartition("/")[0]: value for key, value in metrics.items()},
        rows=sorted(per_class, key=lambda row: (row["iou"] is None, -(row["iou"] or 0))),
        examples=[_example(example, classes) for example in examples],
        colours=[f"rgb({r},{g},{b})" for r, g, b in palette(len(classes)).tolist()],
        curve=_curve(model / CURVES),
        gallery=_gallery(model, words),
        settings=flatten(provenance),
        revision=provenance["revision"],
        version=provenance["version"],
    )
    write_atomically(path, page)


def _data_uri(image: Image.Image) -> str:
    return "data:image/jpeg;base64," + base64.b64encode(encode_jpeg(image, quality=88)).decode()


def _example(example: Example, classes: list[str]) -> dict[str, Any]:
    size = fitted(example.image.size, _PICTURE)

    def label_uri(labels: NDArray[np.integer]) -> str:
        colours = colour_labels(labels, len(classes))
        return _data_uri(Image.fromarray(colours).resize(size, Image.Resampling.NEAREST))

    assert example.clip is not None  # a report always compares
    present = np.unique(np.concatenate([m.ravel() for m in (example.truth, example.ours, example.clip)]))
    return {
        "image": _data_uri(example.image.resize(size)),
        "clip": label_uri(example.clip),
        "ours": label_uri(example.ours),
        "truth": label_uri(example.truth),
        "legend": [(int(i), classes[i]) for i in present if i < len(classes)],
    }


def _curve(path: Path) -> dict[str, Any] | None:
    """Scale the loss curve to the points of a 600 x 180 drawing."""
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
    return {"points": polyline, "low": low, "high": high, "last": losses[-1], "steps": steps[-1]}


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
