"""Average the scores of windows of several scales, and of mirrored images, on one grid.

N windows, K classes, C embedding width, h w score grid, H W image, p q feature grid of a window.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from pixelclip.data.images import to_rgb
from pixelclip.data.tensors import normalise, to_tensor
from pixelclip.models.backbone import Backbone

_OVERLAP = 0.25  # of neighbouring windows, in sides, at least
_WINDOWS_AT_ONCE = 32


@torch.no_grad()
def view_scores(
    backbone: Backbone,
    photo: Image.Image,
    classes: Tensor,
    side: int,
    size: tuple[int, int],
    scales: Sequence[float],
    flip: bool,
    mean: Sequence[float],
    std: Sequence[float],
) -> Tensor:
    """Average the scores of windows over several sizes of a photo.

    Args:
        backbone: dense features.
        photo: any mode and size.
        classes: [K, C], unit length.
        side: side of a window in pixels.
        size: (h, w), the grid of the result.
        scales: longest edges of the resized photo, in sides of a window, each at least 1. Its shortest edge is at least one
            side, so a square photo needs the most windows, and a long one is squeezed less than in the single view.
        flip: also score the mirrored photo.
        mean, std: normalisation of the pixels.

    Returns:
        Cosines [1, K, h, w]: for every cell the mean over its windows, then over scales and mirror images.
    """
    total = classes.new_zeros(1, len(classes), *size)
    for scale in scales:
        # Not rounded up: a pixel more than the scale may need another row of windows.
        width, height = (max(side, int(edge * scale * side / max(photo.size))) for edge in photo.size)
        resized = to_rgb(photo).resize((width, height), Image.Resampling.BILINEAR)  # with antialiasing
        pixels = normalise(to_tensor(resized)[None].to(classes.device), mean, std)
        total += window_scores(backbone, pixels, classes, side, size, flip)
    return total / len(scales)


@torch.no_grad()
def window_scores(
    backbone: Backbone,
    pixels: Tensor,
    classes: Tensor,
    side: int,
    size: tuple[int, int],
    flip: bool = False,
) -> Tensor:
    """Average cosines over overlapping windows of one image, on a grid.

    As few windows as possible are spread evenly, so that neighbours overlap by at least a quarter.

    The features of a window are interpolated bilinearly at the centres of the cells that it contains, as `class_scores` does,
    and compared there with the classes.

    Args:
        backbone: dense features.
        pixels: [1, 3, H, W], normalised; H and W are at least `side`.
        classes: [K, C], unit length.
        side: side of a window in pixels.
        size: (h, w), the grid.
        flip: average with the scores of the mirrored image.

    Returns:
        [1, K, h, w].
    """
    height, width = pixels.shape[2:]
    corners = [(top, left) for top in spread_windows(height, side) for left in spread_windows(width, side)]
    views = [pixels, pixels.flip(3)] if flip else [pixels]
    total = classes.new_zeros(len(views), len(classes), *size)
    count = classes.new_zeros(len(views), 1, *size)
    windows = [(view, top, left) for view in range(len(views)) for top, left in corners]
    for first in range(0, len(windows), _WINDOWS_AT_ONCE):
        chunk = windows[first : first + _WINDOWS_AT_ONCE]
        crops = torch.cat([views[view][..., top : top + side, left : left + side] for view, top, left in chunk])
        for (view, top, left), features in zip(chunk, backbone(crops), strict=True):
            # A mirrored window is scored where its pixels are in the image.
            left = width - side - left if view else left
            features = features.flip(2) if view else features
            rows, down = _inside(top, side, height, size[0], features.shape[1], features)
            columns, across = _inside(left, side, width, size[1], features.shape[2], features)
            cells = torch.einsum("yp,cpq,xq->cyx", down, features, across)
            total[view, :, rows, columns] += torch.einsum("cyx,kc->kyx", F.normalize(cells, dim=0), classes)
            count[view, :, rows, columns] += 1
    return (total / count).mean(dim=0, keepdim=True)


def spread_windows(length: int, side: int) -> list[int]:
    """Return where windows start along an axis of at least one side: evenly spread, the first and last at the borders."""
    gaps = math.ceil((length - side) / ((1 - _OVERLAP) * side))
    return [round(number * (length - side) / max(gaps, 1)) for number in range(gaps + 1)]


def _inside(start: int, side: int, length: int, cells: int, points: int, like: Tensor) -> tuple[slice, Tensor]:
    """Return the cells of an axis whose centres a window contains, and their interpolation matrix [cells, points]."""
    centres = (torch.arange(cells, dtype=torch.float64) + 0.5) * (length / cells)
    inside = ((centres >= start) & (centres < start + side)).nonzero()[:, 0]
    if not len(inside):
        return slice(0, 0), like.new_zeros(0, points)
    at = ((centres[inside] - start) * (points / side) - 0.5).clamp(0, points - 1)
    first = at.long().clamp_max(max(points - 2, 0))
    weight = at - first
    matrix = torch.zeros(len(inside), points, dtype=torch.float64)
    matrix[torch.arange(len(inside)), first] = 1 - weight
    if points > 1:
        matrix[torch.arange(len(inside)), first + 1] = weight
    return slice(int(inside[0]), int(inside[-1]) + 1), matrix.to(like)
