"""Vote within segments: every cell gets the mean score of its segments. B images, K classes, N masks, h w grid, H W image."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pixelclip.data.images import cell_centres

OUTSIDE = -1
"""Number of a cell without a segment."""


@torch.no_grad()
def vote(scores: Tensor, segments: Tensor) -> Tensor:
    """Replace scores by their means within the segments of a partition.

    Args:
        scores: [B, K, h, w].
        segments: [B, h, w], whole numbers from 0; `OUTSIDE` keeps the score of the cell.

    Returns:
        [B, K, h, w] in the type of the scores, computed in float32 or wider.

    Raises:
        ValueError: the sizes differ, or a number is below `OUTSIDE`.
    """
    if segments.shape != (len(scores), *scores.shape[2:]):
        raise ValueError(f"vote: segments {[*segments.shape]} do not fit scores {[*scores.shape]}")
    if int(segments.min()) < OUTSIDE:
        raise ValueError(f"vote: segments are numbered from 0, or {OUTSIDE} for none (found {int(segments.min())})")
    number = int(segments.max()) + 2  # the first row is for cells outside of all segments
    image = torch.arange(len(scores), device=scores.device)[:, None]
    index = (segments.flatten(1).long() + 1 + number * image).flatten()  # [B * h * w]
    values = scores.to(torch.promote_types(scores.dtype, torch.float32)).flatten(2).transpose(1, 2).flatten(0, 1)
    sums = values.new_zeros(number * len(scores), values.shape[1]).index_add_(0, index, values)
    counts = index.bincount(minlength=len(sums)).clamp_min(1)
    means = (sums / counts[:, None])[index]
    voted = torch.where((segments.flatten() == OUTSIDE)[:, None], values, means)
    return voted.unflatten(0, (len(scores), -1)).transpose(1, 2).unflatten(2, scores.shape[2:]).to(scores.dtype).contiguous()


@torch.no_grad()
def vote_masks(scores: Tensor, masks: Tensor) -> Tensor:
    """Replace scores by their means within the masks of one image, which may overlap or leave cells uncovered.

    A cell in several masks gets the mean of their means, a cell in none keeps its score; empty masks have no effect.

    Args:
        scores: [1, K, h, w].
        masks: [N, h, w], bool.

    Returns:
        [1, K, h, w] in the type of the scores, computed in float32 or wider.

    Raises:
        ValueError: the sizes differ.
    """
    if len(scores) != 1 or masks.shape[1:] != scores.shape[2:]:
        raise ValueError(f"vote_masks: masks {[*masks.shape]} do not fit scores {[*scores.shape]} of one image")
    values = scores[0].to(torch.promote_types(scores.dtype, torch.float32)).flatten(1).T  # [h * w, K]
    inside = masks.flatten(1).to(values.dtype)  # [N, h * w]
    means = inside @ values / inside.sum(dim=1, keepdim=True).clamp_min(1)
    covered = inside.sum(dim=0)[:, None]
    voted = torch.where(covered > 0, inside.T @ means / covered.clamp_min(1), values)
    return voted.T.unflatten(1, scores.shape[2:])[None].to(scores.dtype).contiguous()


def segments_on_grid(segments: NDArray[np.integer], size: Sequence[int]) -> Tensor:
    """Sample a partition [H, W] at the centres of the cells of a grid: [1, h, w], int64."""
    rows, columns = (cell_centres(count, edge) for count, edge in zip(size, segments.shape, strict=True))
    return torch.from_numpy(np.ascontiguousarray(segments[np.ix_(rows, columns)], dtype=np.int64))[None]
