"""Shifted views of grids. B images, K channels, h w grid."""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

Offset = tuple[int, int]
AROUND: tuple[Offset, ...] = ((-1, -1), (-1, 0), (-1, 1), (0, -1), (0, 1), (1, -1), (1, 0), (1, 1))
"""Rows and columns from a cell to its 8 neighbours."""


def offsets(dilations: Sequence[int]) -> list[Offset]:
    """Return the offsets of the 8 neighbours at every dilation."""
    return [(row * dilation, column * dilation) for dilation in dilations for row, column in AROUND]


def shifted(grid: Tensor, steps: Sequence[Offset]) -> Iterator[Tensor]:
    """Yield [B, K, h, w] with the neighbour of every cell at each offset; beyond the border its last cells are repeated."""
    height, width = grid.shape[2:]
    border = max(abs(step) for offset in steps for step in offset)
    padded = F.pad(grid, (border,) * 4, mode="replicate")
    for row, column in steps:
        yield padded[..., border + row : border + row + height, border + column : border + column + width]


def on_grid(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize images [B, 3, H, W] bilinearly, with antialiasing, to a grid: [B, 3, h, w], in float32 or wider."""
    images = images.to(torch.promote_types(images.dtype, torch.float32))
    if images.shape[2:] == size:
        return images
    return F.interpolate(images, size=size, mode="bilinear", align_corners=False, antialias=True)
