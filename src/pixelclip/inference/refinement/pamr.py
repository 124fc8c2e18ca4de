"""Pixel-adaptive mask refinement (Araslanov and Roth, "Single-Stage Semantic Segmentation from Image Labels", CVPR 2020).

B images, K classes, N neighbours, h w score grid, H W image.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from pixelclip.inference.refinement.neighbours import offsets, on_grid, shifted

DILATIONS = (1, 2, 4, 8)
_SHARPNESS = 0.1  # of the reference implementation: differences are divided by this fraction of the local deviation
_EPSILON = 1e-8
_CLASSES_AT_ONCE = 16  # few enough for the scores of a 128 x 128 grid to stay in the CPU's cache


@torch.no_grad()
def pamr(
    scores: Tensor,
    images: Tensor,
    iterations: int = 10,
    dilations: Sequence[int] = DILATIONS,
    classes_at_once: int = _CLASSES_AT_ONCE,
) -> Tensor:
    """Replace every score, several times, by a mean over its neighbours that weights those of similar colour.

    Cell i has 8 neighbours j at each dilation. Their weights are softmax_j(mean over RGB of -|I_i - I_j| / (0.1 s_i)), where
    s_i is the standard deviation of the channel over the neighbours and the cell; as in the authors' code the mean over RGB
    comes before the softmax, and the cell itself has no weight. A weight depends neither on the mean nor on the scale of a
    channel, so normalised images give the weights of the original ones.

    Args:
        scores: [B, K, h, w].
        images: [B, 3, H, W], resized to the grid of the scores.
        iterations: number of replacements; 0 returns the scores.
        dilations: distances of the neighbours, in cells.
        classes_at_once: limits the memory; the result does not depend on it.

    Returns:
        [B, K, h, w] in the type of the scores, computed in float32 or wider.

    Raises:
        ValueError: different numbers of images and scores, or an invalid number of iterations or dilation.
    """
    if len(scores) != len(images):
        raise ValueError(f"pamr: {len(scores)} score maps, but {len(images)} images")
    if iterations < 0 or not dilations or min(dilations) < 1:
        raise ValueError(
            "pamr: iterations must be at least 0 and there must be dilations of at least 1 "
            f"(found iterations {iterations}, dilations {[*dilations]})"
        )
    if not iterations:
        return scores
    height, width = scores.shape[2:]
    border = max(dilations)
    row_length = width + 2 * border
    # A neighbour is a constant number of values away in a padded grid, so that one long run of values is read per neighbour.
    # Runs cross the padding between rows, where weights are zero.
    weights = affinities(on_grid(images, (height, width)), dilations)
    length = (height - 1) * row_length + width
    weights = F.pad(weights, (0, 2 * border)).flatten(2)[..., :length].unsqueeze(2)  # [B, N, 1, length]
    first = border * row_length + border
    starts = [first + row * row_length + column for row, column in offsets(dilations)]
    refined = []
    for chunk in scores.split(classes_at_once, dim=1):
        values = chunk.to(torch.promote_types(chunk.dtype, torch.float32))
        for _ in range(iterations):
            padded = F.pad(values, (border,) * 4, mode="replicate").flatten(2)
            total = values.new_zeros(*values.shape[:2], height * row_length)
            inside = total[..., :length]
            for number, start in enumerate(starts):
                inside.addcmul_(padded[..., start : start + length], weights[:, number])
            values = total.unflatten(2, (height, row_length))[..., :width]
        refined.append(values.to(scores.dtype))
    return torch.cat(refined, dim=1)


def affinities(images: Tensor, dilations: Sequence[int] = DILATIONS) -> Tensor:
    """Return the weights of the neighbours of every cell, see `pamr`.

    Args:
        images: [B, 3, h, w], on the grid.
        dilations: distances of the neighbours, in cells.

    Returns:
        [B, N, h, w] with N = 8 x number of dilations, in the order of `offsets`; sums to 1 over N.
    """
    steps = offsets(dilations)
    neighbours = torch.stack([*shifted(images, steps)], dim=2)  # [B, 3, N, h, w]
    # The reference counts the cell itself once per dilation.
    itself = images.unsqueeze(2)
    deviation = torch.cat([neighbours, itself.expand(-1, -1, len(dilations), -1, -1)], dim=2).std(dim=2, keepdim=True)
    distance = (neighbours - itself).abs() / (_SHARPNESS * deviation + _EPSILON)
    return torch.softmax(-distance.mean(dim=1), dim=1)
