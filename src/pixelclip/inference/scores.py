"""Cosines of every location with every class, from one view or from windows (PixelCLIP, section 3.4).

B images, K classes, C embedding width, h w feature grid, H W image.
"""

from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from pixelclip.models.backbone import Backbone

_CLASSES_AT_ONCE = 16
_EPSILON = 1e-12  # of F.normalize


def class_scores(backbone: Backbone, images: Tensor, classes: Tensor, feature_grid: int = 64) -> Tensor:
    """Compute the cosine of every location with every class.

    Args:
        backbone: dense features.
        images: [B, 3, H, W], normalised; padded with their last pixels to multiples of the patch size.
        classes: [K, C], unit length.
        feature_grid: features are first resized bilinearly to a grid of this side.

    Returns:
        [B, K, feature_grid, feature_grid].
    """
    features = _to_grid(*_padded_features(backbone, images), feature_grid)
    return torch.einsum("bchw,kc->bkhw", F.normalize(features, dim=1), classes)


_Fraction = tuple[float, float]


def _padded_features(backbone: Backbone, images: Tensor) -> tuple[Tensor, _Fraction]:
    """Compute dense features [B, C, h, w] of the padded image, and the fractions of height and width that are not padding."""
    height, width = images.shape[2:]
    below, beside = (-edge % patch for edge, patch in zip((height, width), backbone.patch_size, strict=True))
    if below or beside:  # otherwise the tower drops partial patches, and features are stretched over the image
        images = F.pad(images, (0, beside, 0, below), mode="replicate")
    return backbone(images), (height / (height + below), width / (width + beside))


def _to_grid(features: Tensor, unpadded: _Fraction, grid: int) -> Tensor:
    """Resize the unpadded part of features [B, C, h, w] bilinearly to a grid: [B, C, grid, grid]."""
    if unpadded == (1, 1):
        return F.interpolate(features, size=(grid, grid), mode="bilinear", align_corners=False)
    centers = (torch.arange(grid, device=features.device, dtype=features.dtype) + 0.5) * (2 / grid)
    rows, columns = torch.meshgrid(*(centers * part - 1 for part in unpadded), indexing="ij")
    points = torch.stack([columns, rows], dim=-1).expand(features.shape[0], -1, -1, -1)
    return F.grid_sample(features, points, mode="bilinear", padding_mode="border", align_corners=False)


def slide_scores(
    backbone: Backbone,
    image: Tensor,
    classes: Tensor,
    crop: int,
    stride: int,
    feature_grid: int = 64,
    windows_at_once: int = 8,
) -> Iterator[Tensor]:
    """Average cosines over overlapping windows, a few classes at a time.

    Each window is scored like an image in `class_scores` and its scores are resized bilinearly to its pixels; a pixel gets the
    mean over its windows. Windows start every `stride` pixels, and the last ones end at the border; an axis shorter than
    `crop` has one window.

    Scores of all classes are kept only at the resolution of the backbone, [windows, K, h, w] (for patches of 16 pixels and a
    crop of three strides, 1/28 of the scores at full size), and scores at full size for a few classes at a time.

    Args:
        backbone: dense features.
        image: [1, 3, H, W], normalised.
        classes: [K, C], unit length.
        crop: side of a window in pixels.
        stride: pixels between windows, at most `crop`.
        feature_grid: see `class_scores`; per window.
        windows_at_once: windows per forward pass.

    Yields:
        [1, k, H, W] for consecutive groups of k classes.
    """
    height, width = min(crop, image.shape[2]), min(crop, image.shape[3])
    corners = [
        (y, x) for y in window_starts(image.shape[2], height, stride) for x in window_starts(image.shape[3], width, stride)
    ]
    windows = [(..., slice(y, y + height), slice(x, x + width)) for y, x in corners]
    window_products: list[Tensor] = []
    norms: list[Tensor] = []
    unpadded = (1.0, 1.0)
    for first in range(0, len(windows), windows_at_once):
        features, unpadded = _padded_features(
            backbone, torch.cat([image[window] for window in windows[first : first + windows_at_once]])
        )
        window_products.append(torch.einsum("bchw,kc->bkhw", features, classes))
        features = _to_grid(features, unpadded, feature_grid)
        norms += features.norm(dim=1, keepdim=True).clamp_min(_EPSILON).split(1)
    products = torch.cat(window_products)
    del window_products  # frees half the memory
    times_covered = image.new_zeros(image.shape[2:])
    for window in windows:
        times_covered[window] += 1
    for chunk in products.split(_CLASSES_AT_ONCE, dim=1):
        total = image.new_zeros(1, chunk.shape[1], *image.shape[2:])
        for window, product, norm in zip(windows, chunk.split(1), norms, strict=True):
            # Interpolation commutes with the product, so features on the grid need not be kept.
            total[window] += resize_scores(_to_grid(product, unpadded, feature_grid) / norm, (height, width))
        yield total / times_covered


def window_starts(length: int, window: int, stride: int) -> list[int]:
    """Return where windows start along an axis: every `stride` pixels; the last one ends at the border."""
    return [*range(0, length - window, stride), length - window]


def resize_shortest(image: Tensor, side: int) -> Tensor:
    """Resize [B, 3, H, W] to a shortest edge of `side` pixels, bilinearly without antialiasing, like `resize_square`."""
    height, width = (max(side, round(edge * side / min(image.shape[2:]))) for edge in image.shape[2:])
    return F.interpolate(image, size=(height, width), mode="bilinear", align_corners=False)


def resize_scores(scores: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize scores [B, K, h, w] bilinearly to the image: [B, K, H, W]."""
    return F.interpolate(scores, size=size, mode="bilinear", align_corners=False)


def best_class(groups: Iterable[Tensor], size: tuple[int, int]) -> Tensor:
    """Return the best class of every pixel [B, H, W], int64, from scores [B, k, h, w] of consecutive groups of classes.

    Scores at full size are kept for one group at a time; ties go to the lowest class.
    """
    best = labels = None
    start = 0
    for group in groups:
        top, index = resize_scores(group, size).max(dim=1)
        if best is None or labels is None:
            best, labels = top, index
        else:
            better = top > best
            best, labels = torch.where(better, top, best), torch.where(better, index + start, labels)
        start += group.shape[1]
    assert labels is not None
    return labels
