"""Label maps from scores on a small grid, without scores at full size (method.md, "Inference and evaluation").

B images, K classes, h w score grid, H W image; a cell is the pixels between the same four places of the grid. A grid may have
places without a pixel, where an image is smaller than it: r c rows and columns of cells are those with one.
"""

import torch
from torch import Tensor


def label_map(scores: Tensor, size: tuple[int, int]) -> Tensor:
    """The class of every pixel whose bilinearly resized score is highest; a tie goes to the first class.

    Inside a cell a score is a weighted mean of its four corners, with the same weights for all classes. So a class that is
    below another one at all four is nowhere the best there. What is left, mostly one class, is compared pixel by pixel.

    Args:
        scores: [B, K, h, w].
        size: (H, W).

    Returns:
        [B, H, W], int64.
    """
    return torch.stack([_labels(one, size) for one in scores])


def _labels(scores: Tensor, size: tuple[int, int]) -> Tensor:
    (rows, row, of_row, down), (columns, column, of_column, across) = (
        _cells(length, places, scores) for length, places in zip(size, scores.shape[1:], strict=True)
    )
    corners = _corners(scores, rows, columns)  # [4, K, cells]
    possible = corners.new_ones(corners.shape[1:], dtype=torch.bool)
    for rival in (corners.sum(dim=0, keepdim=True).argmax(dim=1), *corners.argmax(dim=1, keepdim=True)):
        beaten = corners.gather(1, rival[None].expand(len(corners), 1, -1))  # [4, 1, cells]
        possible &= (corners >= beaten).any(dim=0)
    count = possible.sum(dim=0)
    # The cells with most classes first, so that those with an n-th one are always the first few.
    count, cells = count.sort(descending=True)
    having = (count[:, None] > torch.arange(int(count[0]), device=count.device)).sum(dim=0).tolist()
    doubtful = having[1] if len(having) > 1 else 0
    classes = possible.T[cells].to(torch.int8).topk(len(having), dim=1).indices  # [cells, n]
    labels = torch.empty(len(cells), len(down[0]) * len(across[0]), dtype=torch.int32, device=scores.device)
    labels[cells] = classes[:, :1].int()
    if doubtful:
        labels[cells[:doubtful]] = _best(corners, cells[:doubtful], classes[:doubtful], having, down, across).flatten(1)
    blocks = labels.view(len(rows), len(columns), len(down[0]), len(across[0]))
    return blocks[row[:, None], column, of_row[:, None], of_column].long()


def _best(corners: Tensor, cells: Tensor, classes: Tensor, having: list[int], down: Tensor, across: Tensor) -> Tensor:
    """The best class of every pixel of some cells, those with most classes first: [cells, rows, columns of a block]."""
    row, column = cells // len(across), cells % len(across)
    down, across = down[row][:, :, None], across[column][:, None]  # [cells, n, 1], [cells, 1, m]
    best = labels = torch.empty(0)
    for number, having_it in enumerate(having):
        some = slice(0, min(having_it, len(cells)))
        name = classes[some, number]
        a, b, c, d = (corner[:, None, None] for corner in corners[:, name, cells[some]])
        upper, lower = a + (b - a) * across[some], c + (d - c) * across[some]
        value = upper + (lower - upper) * down[some]  # [cells, n, m]
        name = name.int()[:, None, None].expand_as(value)
        if number == 0:
            best, labels = value, name.clone()
            continue
        better = (value > best[some]) | ((value == best[some]) & (name < labels[some]))
        best[some] = torch.where(better, value, best[some])
        labels[some] = torch.where(better, name, labels[some])
    return labels


def _corners(scores: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Scores [K, h, w] at each cell's corners: [4, K, r * c]; the last cells end where they begin."""
    width = scores.shape[2]
    below, right = (rows + 1).clamp_max(scores.shape[1] - 1), (columns + 1).clamp_max(width - 1)
    places = [(line[:, None] * width + place).flatten() for line in (rows, below) for place in (columns, right)]
    return torch.stack([scores.flatten(1).index_select(1, place) for place in places])


def _cells(length: int, places: int, like: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Where pixels fall along one axis (`align_corners=False`).

    Returns:
        The first places [n] of the cells that hold a pixel. Of each pixel its cell's number among those [length], and its own
        number in the cell [length]. How far each cell's pixels are from its first place to the next one [n, largest number of
        pixels in a cell].
    """
    at = ((torch.arange(length, device=like.device, dtype=like.dtype) + 0.5) * (places / length) - 0.5).clamp_min(0)
    place = at.long().clamp_max(places - 1)
    used, cell, counts = place.unique_consecutive(return_inverse=True, return_counts=True)
    number = torch.arange(length, device=like.device) - (counts.cumsum(0) - counts)[cell]
    share = at.new_zeros(len(used), int(counts.max()))
    share[cell, number] = at - place
    return used, cell, number, share
