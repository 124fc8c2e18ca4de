"""The result of a prediction, its pictures and its settings, without torch. K classes, h w score grid, H W image."""

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from pixelclip.config import EvaluateConfig
from pixelclip.data.images import colour_labels, palette, to_rgb, turn_upright
from pixelclip.inference.fonts import typeset
from pixelclip.settings import build
from pixelclip.storage.files import read_json

INFERENCE = "inference.json"
"""File in a registered model with the settings of its evaluation that a prediction uses."""
_LONGEST_EDGE = 16384  # of an overlay: the legend of a very long strip would take gigabytes
_LEGEND_ENTRIES, _LEGEND_CHARACTERS = 100, 60


@dataclass(frozen=True)
class Prediction:
    """`labels` [H, W] are indices into `classes`; `scores` [K, h, w] are cosines on a grid over the image."""

    labels: NDArray[np.uint16]
    scores: NDArray[np.float32]
    classes: list[str]


def inference_settings(folder: Path) -> EvaluateConfig:
    """Return the settings of a model folder's evaluation that a prediction uses; the defaults if it is not registered.

    Raises:
        ValueError: `inference.json` is damaged.
    """
    file = folder / INFERENCE
    return build(EvaluateConfig, read_json(file, dict[str, Any]) if file.is_file() else {}, str(file))


def label_image(labels: NDArray[np.uint16]) -> Image.Image:
    """Convert a label map to an 8-bit image if the values fit, else to a 16-bit image."""
    return Image.fromarray(labels.astype(np.uint8) if labels.max(initial=0) < 256 else labels)


def palette_image(labels: NDArray[np.uint16], count: int) -> Image.Image:
    """Convert a label map to an image whose pixels are class indices and whose palette has the colours of `overlay`.

    Args:
        labels: [H, W].
        count: number of classes; more than a palette's 256 give `label_image`.
    """
    image = label_image(labels)
    if image.mode == "L" and count <= 256:
        image.putpalette(palette(count).tobytes())  # the mode is now P
    return image


def png(image: Image.Image) -> bytes:
    """Encode an image as PNG."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def blend(photo: NDArray[np.uint8], colours: NDArray[np.uint8], opacity: float) -> Image.Image:
    """Blend a photo [H, W, 3] with colours [H, W, 3] of an opacity from 0 to 1."""
    mixed = photo.astype(np.float32) * (1 - opacity) + colours.astype(np.float32) * opacity
    return Image.fromarray(np.round(mixed).astype(np.uint8))


def overlay(image: Image.Image, prediction: Prediction, opacity: float = 0.55) -> Image.Image:
    """Blend the image with its label colours and add a legend of the predicted classes, largest first.

    Edges are limited to 16,384 pixels, the legend to 100 classes, and names to 60 characters.
    """
    photo = np.asarray(to_rgb(turn_upright(image)))
    picture = blend(photo, colour_labels(prediction.labels, len(prediction.classes)), opacity)
    picture.thumbnail((_LONGEST_EDGE, _LONGEST_EDGE))
    counts = np.bincount(prediction.labels.ravel(), minlength=len(prediction.classes))
    present = [int(i) for i in np.argsort(-counts, kind="stable") if counts[i]]
    limit = _LEGEND_CHARACTERS
    names = [name if len(name) <= limit else f"{name[: limit - 1]}…" for name in prediction.classes]
    entries = [(i, f"{names[i]}  {100 * counts[i] / counts.sum():.0f} %") for i in present[:_LEGEND_ENTRIES]]
    return with_legend(picture, entries, palette(len(prediction.classes)))


def with_legend(picture: Image.Image, entries: list[tuple[int, str]], colours: NDArray[np.uint8], size: int = 0) -> Image.Image:
    """Add a legend below a picture: each entry is an index into `colours` [N, 3] and a name; `size` of the letters.

    A name in a script that no font has is written as `#index`.
    """
    size = size or max(12, min(picture.height // 18, 40))
    texts = typeset(entries, size)
    row, column = round(size * 1.6), round(max(font.getlength(text) for text, font in texts)) + 3 * size
    columns = max(1, picture.width // column)
    rows = -(-len(entries) // columns)
    canvas = Image.new("RGB", (max(picture.width, column), picture.height + rows * row + size // 2), "white")
    canvas.paste(picture, (0, 0))
    draw = ImageDraw.Draw(canvas)
    for position, ((index, _), (text, font)) in enumerate(zip(entries, texts, strict=True)):
        left = (position % columns) * column + size // 2
        top = picture.height + size // 2 + (position // columns) * row
        draw.rectangle((left, top, left + size, top + size), fill=tuple(int(v) for v in colours[index]))
        draw.text((left + size * 1.5, top - size * 0.1), text, fill="black", font=font)
    return canvas
