"""Resize learned position embeddings to the grid of an image."""

import torch
import torch.nn.functional as F
from torch import Tensor


def resize_position(position: Tensor, native: tuple[int, int], grid: tuple[int, int], prefix: int) -> Tensor:
    """Resize a position embedding bicubically, without antialiasing, as the reference implementation does.

    Args:
        position: [prefix + h0 * w0, D].
        native: its grid (h0, w0).
        grid: the new grid (h, w).
        prefix: number of leading positions outside the grid, such as the class token's, which are kept.

    Returns:
        [prefix + h * w, D].
    """
    if grid == native:
        return position
    maps = position[prefix:].T.unflatten(1, native)[None]  # [1, D, h0, w0]
    maps = F.interpolate(maps, size=grid, mode="bicubic", align_corners=False)
    return torch.cat([position[:prefix], maps[0].flatten(1).T])
