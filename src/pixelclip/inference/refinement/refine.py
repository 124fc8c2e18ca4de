"""Scores of one photo from its views, refined; the one path of predictions and evaluations. K classes, N masks, h w grid."""

from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from pixelclip.config import Refinement
from pixelclip.data.images import resize_shortest_edge, to_rgb
from pixelclip.data.tensors import resized_square, to_tensor
from pixelclip.inference.refinement.pamr import pamr
from pixelclip.inference.refinement.propagation import propagate
from pixelclip.inference.refinement.segments import segments_on_grid, vote, vote_masks
from pixelclip.inference.refinement.views import view_scores
from pixelclip.inference.scores import class_scores, resize_scores
from pixelclip.models.backbone import Backbone

_MAX_ASPECT = 4
"""Largest ratio of rows and columns of a score grid, which limits its size."""


@dataclass(frozen=True)
class View:
    """What a model sees of a photo.

    Args:
        side: side in pixels of the square to which the single view is resized.
        window: side of a window in pixels.
        feature_grid: see `class_scores`.
        shortest_edge, longest_edge: first resize of the single view in pixels, see `resize_shortest_edge`.
        mean, std: normalisation of the pixels.
    """

    side: int
    window: int
    feature_grid: int
    shortest_edge: int
    longest_edge: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


@torch.no_grad()
def photo_scores(
    backbone: Backbone, photo: Image.Image, classes: Tensor, view: View, refinement: Refinement, masks: Tensor | None = None
) -> Tensor:
    """Compute the scores of a photo: views, then propagation, PAMR and the vote within segments, as far as they are set.

    Args:
        backbone: dense features.
        photo: any mode and size, upright.
        classes: [K, C], unit length.
        view: what the model sees.
        refinement: settings.
        masks: [N, H, W], bool, of the photo's size, for segments `given`.

    Returns:
        [1, K, h, w]: `view.feature_grid` cells squared without refinement, else cells of about the photo's aspect ratio.

    Raises:
        ValueError: segments `given` without masks.
    """
    if refinement.segments == "given" and masks is None:
        raise ValueError("segments given: expected masks, found none")
    if not refinement.steps:
        return _single(backbone, photo, classes, view, False)
    size = grid_size(photo.size, refinement.score_grid)
    if refinement.scales:
        scores = view_scores(
            backbone, photo, classes, view.window, size, refinement.scales, refinement.flip, view.mean, view.std
        )
    else:
        scores = resize_scores(_single(backbone, photo, classes, view, refinement.flip), size)
    if refinement.propagation or refinement.pamr_iterations:
        small = to_rgb(photo).resize(size[::-1], Image.Resampling.BILINEAR)  # with antialiasing
        pixels = to_tensor(small)[None].to(scores.device)
        scores = propagate(scores, pixels, refinement.propagation)
        scores = pamr(scores, pixels, refinement.pamr_iterations)
    if refinement.segments == "felzenszwalb":
        from pixelclip.mask_generators.felzenszwalb import felzenszwalb

        segments = felzenszwalb(
            photo, refinement.felzenszwalb_scale, refinement.felzenszwalb_sigma, refinement.felzenszwalb_min_size
        )
        scores = vote(scores, segments_on_grid(segments, size).to(scores.device))
    if masks is not None and refinement.segments == "given":
        on_grid = (
            torch.cat([segments_on_grid(mask.numpy(), size) for mask in masks.cpu()])
            if len(masks)
            else masks.new_zeros(0, *size)
        )
        scores = vote_masks(scores, on_grid.bool().to(scores.device))
    return scores


def grid_size(photo: tuple[int, int], shortest: int) -> tuple[int, int]:
    """Return rows and columns of the grid over a photo (width, height) with `shortest` cells along its shortest edge."""
    rows, columns = (min(round(edge * shortest / min(photo)), _MAX_ASPECT * shortest) for edge in reversed(photo))
    return rows, columns


def _single(backbone: Backbone, photo: Image.Image, classes: Tensor, view: View, flip: bool) -> Tensor:
    resized = resize_shortest_edge(photo, view.shortest_edge, view.longest_edge)
    pixels = resized_square(resized, view.side, view.mean, view.std, classes.device)
    scores = class_scores(backbone, pixels, classes, view.feature_grid)
    if flip:
        scores = 0.5 * (scores + class_scores(backbone, pixels.flip(3), classes, view.feature_grid).flip(3))
    return scores
