"""What the page shows of one photo: the label maps of two models, a legend, and heat maps of single classes."""

import html
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from pixelclip.config import Quality
from pixelclip.data.images import colour_labels, fitted, palette
from pixelclip.inference.loading import Model
from pixelclip.inference.prediction import Prediction, blend

ALL_CLASSES = "all classes"
_LONGEST_EDGE = 1280
"""Pixels of a picture of the page; the label map to download has the size of the photo."""
_HEAT = ("#0b0b3b", "#d1307a", "#fff35c")  # lowest, middle and highest score


@dataclass(frozen=True)
class View:
    """One model's result, kept small: the page holds one for every visitor.

    Attributes:
        labels: [H, W], class indices at the size of the page's picture.
        shares: [K], fraction of the photo's pixels that each class has.
        heat: [K, h, w], cosines on the feature grid, each class from its lowest (0) to its highest (255).
    """

    labels: NDArray[np.uint16]
    shares: NDArray[np.float64]
    heat: NDArray[np.uint8]


@dataclass(frozen=True)
class Comparison:
    """A photo [H, W, 3] at the size of the page, and the results of the models on the left and on the right."""

    photo: NDArray[np.uint8]
    classes: list[str]
    left: View
    right: View


def compare(
    photo: Image.Image, classes: Sequence[str], left: Model, right: Model, quality: Quality = "fast"
) -> tuple[Comparison, Prediction]:
    """Segment a photo with two models, or once if they are the same.

    Args:
        photo: upright, RGB.
        classes: class names.
        left, right: models.
        quality: see `Quality`.

    Returns:
        What the page shows, and the prediction of the right model at the photo's size.

    Raises:
        ValueError: invalid class names.
    """
    prediction = right(photo, classes, quality)
    other = prediction if left is right else left(photo, classes, quality)
    size = photo.size if max(photo.size) <= _LONGEST_EDGE else fitted(photo.size, (_LONGEST_EDGE, _LONGEST_EDGE))
    pixels = np.asarray(photo.resize(size, Image.Resampling.LANCZOS) if size != photo.size else photo)
    return Comparison(pixels, prediction.classes, _view(other, size), _view(prediction, size)), prediction


def _view(prediction: Prediction, size: tuple[int, int]) -> View:
    labels = np.asarray(Image.fromarray(prediction.labels).resize(size, Image.Resampling.NEAREST))
    counts = np.bincount(prediction.labels.ravel(), minlength=len(prediction.classes))
    low, high = (limit(prediction.scores, axis=(1, 2), keepdims=True) for limit in (np.min, np.max))
    heat = np.round(255 * (prediction.scores - low) / np.maximum(high - low, 1e-6)).astype(np.uint8)
    return View(labels, counts / prediction.labels.size, heat)


def pictures(comparison: Comparison, shown: str, opacity: float) -> tuple[Image.Image, Image.Image]:
    """Draw the left and the right picture: the label map over the photo, or the heat map of one class.

    Args:
        comparison: the results.
        shown: `ALL_CLASSES` or the name of a class.
        opacity: of the colours over the photo, 0 to 1.
    """
    views = (comparison.left, comparison.right)
    if shown == ALL_CLASSES:
        layers = [colour_labels(view.labels, len(comparison.classes)) for view in views]
    else:
        index = comparison.classes.index(shown)
        layers = [_heat(view.heat[index], comparison.photo.shape) for view in views]
    left, right = (blend(comparison.photo, layer, opacity) for layer in layers)
    return left, right


def _heat(heat: NDArray[np.uint8], shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """Colour the heat [h, w] of one class: [H, W, 3]."""
    grey = Image.fromarray(heat).resize((shape[1], shape[0]), Image.Resampling.BILINEAR)
    low_colour, middle, high_colour = _HEAT
    return np.asarray(ImageOps.colorize(grey, low_colour, high_colour, mid=middle))


def legend(comparison: Comparison, left: str, right: str) -> str:
    """Return the legend as HTML: the colour and name of every class, and its shares under both models, largest first."""
    colours = palette(len(comparison.classes))
    rows = []
    for index in np.argsort(-(comparison.left.shares + comparison.right.shares), kind="stable"):
        red, green, blue = (int(value) for value in colours[index])
        swatch = f'<span style="display:inline-block;width:1em;height:1em;background:rgb({red},{green},{blue})"></span>'
        shares = "".join(
            f'<td style="text-align:right">{100 * view.shares[index]:.1f} %</td>'
            for view in (comparison.left, comparison.right)
        )
        rows.append(f"<tr><td>{swatch} {html.escape(comparison.classes[index])}</td>{shares}</tr>")
    head = "".join(f'<th style="text-align:right">{html.escape(name)}</th>' for name in (left, right))
    return f'<table style="width:100%"><tr><th style="text-align:left">class</th>{head}</tr>{"".join(rows)}</table>'
