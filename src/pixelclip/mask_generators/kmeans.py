"""Batched k-means: greedy k-means++ and Lloyd's algorithm, independently for every image.

B images, P points, D width, K clusters, R restarts, T trials; S = B R runs of Lloyd's algorithm.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

# Squared distances below this fraction of the squared norms are rounding errors of identical points.
_SAME = 1e-12
_DOUBTFUL = 4096  # points recomputed at once


@torch.no_grad()
def kmeans(points: Tensor, k: int, seeds: Sequence[int], iterations: int = 100, restarts: int = 10) -> tuple[Tensor, Tensor]:
    """Cluster the points of every image independently, all images at once.

    The result of an image depends on its points and its seed, not on its batch. More restarts never increase the inertia.

    Args:
        points: [B, P, D].
        k: number of clusters; fewer if there are fewer distinct points.
        seeds: one non-negative integer per image.
        iterations: maximum number of centre updates; stops early when no label changes.
        restarts: number of initialisations; the result with the lowest inertia is returned.

    Returns:
        Labels [B, P], int64, numbered from 0 without gaps in every image. Inertia [B], float64: sum of squared distances of
        the points to the centres that determined the labels.

    Raises:
        ValueError: no points, or non-finite points.
    """
    if points.ndim != 3 or points.shape[1] == 0 or not points.isfinite().all():
        raise ValueError(f"points are {list(points.shape)}, expected finite [B, P, D] with at least one point")
    if not len(points):
        return points.new_zeros(points.shape[:2], dtype=torch.long), points.new_zeros(0, dtype=torch.float64)
    k = min(k, points.shape[1])
    points = points.to(torch.float64, copy=True)
    points -= points.mean(dim=1, keepdim=True)
    norms = points.square().sum(dim=2, keepdim=True)
    size = (restarts, k, 2 + int(math.log(k)))
    drawn = np.array([np.random.default_rng(seed).random(size) for seed in seeds])
    start = _start(points, norms, torch.from_numpy(drawn).to(points.device))
    labels, inertia = _lloyd(points, norms, start, iterations)
    inertia, best = inertia.min(dim=1)
    labels = _take(labels, best[:, None])[:, 0]
    used = F.one_hot(labels, k).any(dim=1)  # [B, K]
    return (used.cumsum(dim=1) - 1).gather(1, labels), inertia


def _distances(points: Tensor, norms: Tensor, centres: Tensor) -> Tensor:
    """Compute squared distances [B, P, K] of points [B, P, D] with squared norms [B, P, 1] to centres [B, K, D]."""
    scale = norms + centres.square().sum(dim=2)[:, None]
    distances = torch.baddbmm(scale, points, centres.transpose(1, 2), alpha=-2)
    return distances.masked_fill_(distances < _SAME * scale, 0)


def _take(points: Tensor, index: Tensor) -> Tensor:
    """Gather points [B, N, D] at index [B, N]."""
    return points.gather(1, index[:, :, None].expand(-1, -1, points.shape[2]))


def _start(points: Tensor, norms: Tensor, random: Tensor) -> Tensor:
    """Initialise by greedy k-means++: of T points drawn by squared distance, take the best one by inertia.

    `random` [B, R, K, T] is uniform in [0, 1). Returns centres [B, R, K, D]; some coincide if fewer than K points are distinct.
    """
    last = points.shape[1] - 1
    first, *others = random.unbind(2)
    chosen = [(first[:, :, 0] * (last + 1)).long().clamp_max(last)]  # each [B, R]
    nearest = _distances(points, norms, _take(points, chosen[0]))  # [B, P, R]
    for draw in others:
        mass = nearest.cumsum(dim=1).transpose(1, 2).contiguous()  # [B, R, P]
        drawn = torch.searchsorted(mass, draw * mass[:, :, -1:], right=True).clamp_max(last)  # [B, R, T]
        distances = _distances(points, norms, _take(points, drawn.flatten(1)))
        reached = torch.minimum(nearest[:, :, :, None], distances.unflatten(2, drawn.shape[1:]))  # [B, P, R, T]
        best = reached.sum(dim=1).argmin(dim=2, keepdim=True)  # [B, R, 1]
        chosen.append(drawn.gather(2, best)[:, :, 0])
        nearest = reached.gather(3, best[:, None].expand(-1, last + 1, -1, -1))[:, :, :, 0]
    index = torch.stack(chosen, dim=2)  # [B, R, K]
    return _take(points, index.flatten(1)).unflatten(1, index.shape[1:])


def _lloyd(points: Tensor, norms: Tensor, start: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    """Move the centres [B, R, K, D] until no label changes; recompute only distances of moved centres.

    Returns labels [B, R, P], and inertia [B, R] at the centres that determined them.
    """
    (batch, restarts, k, width), count = start.shape, points.shape[1]
    rows = torch.arange(batch * restarts * k, device=points.device)  # moved centres, as indices into S K (S = B R)
    centres, sums, sizes = start.reshape(-1, width).clone(), points.new_zeros(len(rows), width), torch.zeros_like(rows)
    labels = torch.full((batch * restarts, count), -1, device=points.device)
    # With TF32 nearly every label would have to be recomputed.
    short = points.to(torch.float32 if torch.get_float32_matmul_precision() == "highest" else torch.float64)
    squares = short.new_empty(len(rows), count)  # rows of unmoved centres stay valid
    for step in range(iterations + 1):
        _update_squares(short, norms, centres, rows, squares)
        runs = torch.unique_consecutive(rows // k)
        nearest = _nearest(points, norms, centres.view(-1, k, width), squares.view(-1, k, count), runs)
        run, point = (nearest != labels[runs]).nonzero().unbind(1)
        old, new, run = labels[runs[run], point], nearest[run, point], runs[run]
        labels[runs] = nearest
        if step == iterations:
            break
        left = old >= 0
        changed = torch.cat([run * k + new, (run * k + old)[left]])
        gain = torch.cat([torch.ones_like(new), -torch.ones_like(old[left])])
        member = run // restarts * count + point
        changed, order = changed.sort(stable=True)
        moved, changes = torch.unique_consecutive(changed, return_counts=True)
        sizes.index_add_(0, changed, gain[order])
        # The order of summation is fixed, unlike in scattering on a GPU.
        sums[moved] += F.embedding_bag(
            torch.cat([member, member[left]])[order],
            points.flatten(0, 1),
            changes.cumsum(0) - changes,
            mode="sum",
            per_sample_weights=gain[order].to(points.dtype),
        )
        again = _refill(points, norms, centres.view(-1, k, width), sizes.view(-1, k), labels, runs)
        moved = moved[sizes[moved] > 0]
        centres[moved] = sums[moved] / sizes[moved, None]
        rows = torch.cat([moved, again]).sort().values
        if not len(rows):
            break
    labels = labels.view(batch, restarts, count)
    pairs = zip(centres.view(batch, restarts, k, width).unbind(1), labels.unbind(1), strict=True)
    inertia = [_distances(points, norms, mine).gather(2, own[:, :, None]).sum(dim=(1, 2)) for mine, own in pairs]
    return labels, torch.stack(inertia, dim=1)


def _update_squares(short: Tensor, norms: Tensor, centres: Tensor, rows: Tensor, squares: Tensor) -> None:
    """Recompute the squared distances [S K, P] of some rows of centres [S K, D], in the precision of points [B, P, D].

    One matrix product per image covers all its restarts.
    """
    moved = centres[rows]
    lengths = moved.square().sum(dim=1, keepdim=True).to(short.dtype)
    counts = torch.bincount(rows * len(short) // len(centres), minlength=len(short)).tolist()
    parts = zip(short, norms.to(short.dtype), moved.to(short.dtype).split(counts), lengths.split(counts), strict=True)
    squares[rows] = torch.cat([torch.addmm(norm.T + length, part, image.T, alpha=-2) for image, norm, part, length in parts])


def _nearest(points: Tensor, norms: Tensor, centres: Tensor, squares: Tensor, runs: Tensor) -> Tensor:
    """Find the nearest of the centres [S, K, D] to every point, for a selection A of the S runs: [A, P].

    `squares` [S, K, P] may be float32. Labels that rounding could change are recomputed in float64, so the result depends
    neither on the batch nor on the device.
    """
    mine = squares[runs]
    first, labels = mine.min(dim=1)
    second = mine.scatter_(1, labels[:, None], math.inf).amin(dim=1)
    image = runs * len(points) // len(centres)
    scale = norms[image, :, 0] + centres[runs].square().sum(dim=2).amax(dim=1, keepdim=True)
    error = (points.shape[2] + 8) * torch.finfo(squares.dtype).eps  # upper bound of a difference's error, relative to `scale`
    sure = second - first >= error * scale  # False if float32 overflowed
    for doubtful in (~sure).nonzero().split(_DOUBTFUL):
        run, point = doubtful.unbind(1)
        where = (image[run], point)
        exact = _distances(points[where][:, None], norms[where][:, None], centres[runs[run]])
        labels[run, point] = exact[:, 0].argmin(dim=1)
    return labels


def _refill(points: Tensor, norms: Tensor, centres: Tensor, sizes: Tensor, labels: Tensor, runs: Tensor) -> Tensor:
    """Restart the empty clusters of each run at its points farthest from their centres.

    `centres` [S, K, D] determined the `labels` [S, P] and are updated in place; `sizes` [S, K] are the points per cluster.
    Returns the indices of the restarted centres among S K.
    """
    rows = [runs[:0]]
    for run in runs[(sizes[runs] == 0).any(dim=1)].tolist():
        image = run * len(points) // len(centres)
        own = _distances(points[image, None], norms[image, None], centres[run, None])[0].gather(1, labels[run, :, None])
        empty = (sizes[run] == 0).nonzero()[:, 0]
        far, where = own[:, 0].topk(len(empty))
        centres[run, empty[far > 0]] = points[image, where[far > 0]]
        rows.append(run * centres.shape[1] + empty[far > 0])
    return torch.cat(rows)
