"""Compute label maps from scores on a small grid, without scores at full size (PixelCLIP, section 3.4).

B images, K classes, h w score grid, H W image. A cell is the set of pixels between the same four grid points. If the image is
smaller than the grid, some cells are empty; r c are the rows and columns of cells with pixels.
"""

import torch
from torch import Tensor


def label_map(scores: Tensor, size: tuple[int, int]) -> Tensor:
    """Return the class with the highest bilinearly resized score at every pixel; ties go to the lowest class.

    Inside a cell a score is a weighted mean of its four corners, with the same weights for all classes. A class that scores
    below another class at all four corners therefore cannot win in the cell. The remaining candidates, usually one class, are
    compared pixel by pixel.

    Args:
        scores: [B, K, h, w].
        size: (H, W).

    Returns:
        [B, H, W], int64.
    """
    return torch.stack([_labels(image_scores, size) for image_scores in scores])


def _labels(scores: Tensor, size: tuple[int, int]) -> Tensor:
    (rows, row, of_row, down), (columns, column, of_column, across) = (
        _cells(length, points, scores) for length, points in zip(size, scores.shape[1:], strict=True)
    )
    corners = _corners(scores, rows, columns)  # [4, K, cells]
    candidates = corners.new_ones(corners.shape[1:], dtype=torch.bool)
    for rival in (corners.sum(dim=0, keepdim=True).argmax(dim=1), *corners.argmax(dim=1, keepdim=True)):
        beaten = corners.gather(1, rival[None].expand(len(corners), 1, -1))  # [4, 1, cells]
        candidates &= (corners >= beaten).any(dim=0)
    count = candidates.sum(dim=0)
    # Sort cells by number of candidates, so that the cells with an n-th candidate are a prefix.
    count, cells = count.sort(descending=True)
    prefix_sizes = (count[:, None] > torch.arange(int(count[0]), device=count.device)).sum(dim=0).tolist()
    contested = prefix_sizes[1] if len(prefix_sizes) > 1 else 0
    classes = candidates.T[cells].to(torch.int8).topk(len(prefix_sizes), dim=1).indices  # [cells, n]
    labels = torch.empty(len(cells), len(down[0]) * len(across[0]), dtype=torch.int32, device=scores.device)
    labels[cells] = classes[:, :1].int()
    if contested:
        best = _best(corners, cells[:contested], classes[:contested], prefix_sizes, down, across)
        labels[cells[:contested]] = best.flatten(1)
    blocks = labels.view(len(rows), len(columns), len(down[0]), len(across[0]))
    return blocks[row[:, None], column, of_row[:, None], of_column].long()


def _best(corners: Tensor, cells: Tensor, classes: Tensor, prefix_sizes: list[int], down: Tensor, across: Tensor) -> Tensor:
    """Return the best class of every pixel in contested cells, sorted as above: [cells, rows, columns of a block]."""
    row, column = cells // len(across), cells % len(across)
    down, across = down[row][:, :, None], across[column][:, None]  # [cells, n, 1], [cells, 1, m]
    best = labels = torch.empty(0)
    for number, num_cells in enumerate(prefix_sizes):
        prefix = slice(0, min(num_cells, len(cells)))
        label = classes[prefix, number]
        a, b, c, d = (corner[:, None, None] for corner in corners[:, label, cells[prefix]])
        upper, lower = a + (b - a) * across[prefix], c + (d - c) * across[prefix]
        value = upper + (lower - upper) * down[prefix]  # [cells, n, m]
        label = label.int()[:, None, None].expand_as(value)
        if number == 0:
            best, labels = value, label.clone()
            continue
        better = (value > best[prefix]) | ((value == best[prefix]) & (label < labels[prefix]))
        best[prefix] = torch.where(better, value, best[prefix])
        labels[prefix] = torch.where(better, label, labels[prefix])
    return labels


def _corners(scores: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Gather scores [K, h, w] at the corners of each cell: [4, K, r * c]; cells beyond the last grid point have size zero."""
    width = scores.shape[2]
    below, right = (rows + 1).clamp_max(scores.shape[1] - 1), (columns + 1).clamp_max(width - 1)
    points = [(row[:, None] * width + column).flatten() for row in (rows, below) for column in (columns, right)]
    return torch.stack([scores.flatten(1).index_select(1, point) for point in points])


def _cells(length: int, points: int, like: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Assign pixels to cells along one axis (`align_corners=False`).

    Returns:
        First grid point of each of the n cells with pixels [n]. Index of each pixel's cell among these [length], and of each
        pixel within its cell [length]. Interpolation weights of the pixels in each cell [n, maximum number of pixels].
    """
    at = ((torch.arange(length, device=like.device, dtype=like.dtype) + 0.5) * (points / length) - 0.5).clamp_min(0)
    point = at.long().clamp_max(points - 1)
    used, cell, counts = point.unique_consecutive(return_inverse=True, return_counts=True)
    number = torch.arange(length, device=like.device) - (counts.cumsum(0) - counts)[cell]
    weights = at.new_zeros(len(used), int(counts.max()))
    weights[cell, number] = at - point
    return used, cell, number, weights
