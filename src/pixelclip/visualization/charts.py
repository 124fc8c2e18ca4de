"""Charts of an evaluation."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont
from numpy.typing import NDArray
from PIL import ImageFont

from pixelclip.inference.fonts import replace_missing

_NAME = 24  # characters of a class name


def confusion_chart(path: Path, confusion: Mapping[str, Any], title: str) -> None:
    """Draw a confusion matrix as an image: percent of the labelled pixels of each class (row) by predicted class.

    Args:
        path: PNG file.
        confusion: as returned by `ConfusionMatrix.largest`. A name in a script that the font lacks is shown as `#row`.
        title: title of the chart.
    """
    shares = row_percent(confusion)
    font = ImageFont.truetype(findfont("DejaVu Sans"))  # matplotlib's default
    names = [replace_missing(name[:_NAME], font, row) for row, name in enumerate(confusion["classes"])]
    side = 3 + 0.45 * len(names)
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.add_subplot()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=100)
    axes.set_xticks(range(len(names)), names, rotation=60, ha="right", parse_math=False)
    axes.set_yticks(range(len(names)), names, parse_math=False)
    axes.set_xlabel("predicted")
    axes.set_ylabel("truth")
    axes.set_title(title, parse_math=False)
    for (row, column), share in np.ndenumerate(shares):
        if share >= 1:
            axes.text(
                column, row, f"{share:.0f}", ha="center", va="center", fontsize=8, color="white" if share > 55 else "black"
            )
    figure.savefig(path, dpi=100)


def row_percent(confusion: Mapping[str, Any]) -> NDArray[np.float64]:
    """Return a confusion matrix in percent of each row; rows without pixels are zero."""
    counts = np.asarray(confusion["counts"], np.float64)
    return 100 * counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
