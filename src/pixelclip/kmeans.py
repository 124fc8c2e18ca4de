"""k-means of many images at once, on tensors alone: Lloyd from greedy k-means++, every image by itself.

B images, P points, D width, K clusters, R restarts, T trials; S = B R runs of Lloyd.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

# A squared distance below this share of the squared norms is rounding: the two are one point.
_SAME = 1e-12
_DOUBTFUL = 4096  # points whose distances are computed again at once


@torch.no_grad()
def kmeans(
    points: Tensor,
    k: int,
    seeds: Sequence[int],
    iterations: int = 100,
    restarts: int = 10,
) -> tuple[Tensor, Tensor]:
    """Clusters the points of every image by themselves (Lloyd, from greedy k-means++), all images at once.

    The result of an image depends on its points and its seed, not on its batch. More restarts are never worse.

    Args:
        points: [B, P, D].
        k: clusters wanted; fewer come out where fewer points differ.
        seeds: B integers from 0.
        iterations: at most so many updates of the centres; it ends sooner where no label changes.
        restarts: how many starts the best is taken of.

    Returns:
        Labels [B, P], int64: every image's run from 0 without a gap. Inertia [B], float64: the sum of squared distances of
        the points to the centres that gave the labels.

    Raises:
        ValueError: no points, non-finite points, a count below 1, or another number of seeds than of images.
    """
    if points.ndim != 3 or points.shape[1] == 0 or not points.isfinite().all():
        raise ValueError(f"points are {list(points.shape)}; [B, P, D] with at least one point, all finite, is needed")
    if min(k, iterations, restarts) < 1:
        raise ValueError(f"k, iterations and restarts are {k}, {iterations} and {restarts}; at least 1 is needed")
    if len(seeds) != len(points):
        raise ValueError(f"{len(seeds)} seeds for {len(points)} images; one each is needed")
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
    """Squared distances [B, P, K] of points [B, P, D] with squared norms [B, P, 1] to centres [B, K, D]."""
    scale = norms + centres.square().sum(dim=2)[:, None]
    distances = torch.baddbmm(scale, points, centres.transpose(1, 2), alpha=-2)
    return distances.masked_fill_(distances < _SAME * scale, 0)


def _take(points: Tensor, index: Tensor) -> Tensor:
    """Points [B, N, D] at index [B, N]."""
    return points.gather(1, index[:, :, None].expand(-1, -1, points.shape[2]))


def _start(points: Tensor, norms: Tensor, random: Tensor) -> Tensor:
    """Greedy k-means++: of T points drawn by squared distance, the one that lowers the inertia most.

    Args:
        points: [B, P, D].
        norms: [B, P, 1].
        random: [B, R, K, T], uniform in [0, 1).

    Returns:
        Centres [B, R, K, D]; some coincide where fewer than K points differ.
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
    """Moves the centres of all restarts until no label changes; what a change does not reach is not computed again.

    Args:
        points: [B, P, D], float64.
        norms: [B, P, 1].
        start: [B, R, K, D].
        iterations: at most so many updates of the centres.

    Returns:
        Labels [B, R, P], and inertia [B, R] at the centres that gave them.
    """
    (batch, restarts, k, width), count = start.shape, points.shape[1]
    rows = torch.arange(batch * restarts * k, device=points.device)  # the centres that moved, of S K with S = B R
    centres, sums, sizes = start.reshape(-1, width).clone(), points.new_zeros(len(rows), width), torch.zeros_like(rows)
    labels = torch.full((batch * restarts, count), -1, device=points.device)
    # TF32, where it is allowed, would leave nearly every label in doubt.
    short = points.to(torch.float32 if torch.get_float32_matmul_precision() == "highest" else torch.float64)
    squares = short.new_empty(len(rows), count)  # those of centres at rest stay right
    for step in range(iterations + 1):
        _measure(short, norms, centres, rows, squares)
        runs = torch.unique_consecutive(rows // k)
        found = _nearest(points, norms, centres.view(-1, k, width), squares.view(-1, k, count), runs)
        run, point = (found != labels[runs]).nonzero().unbind(1)
        old, new, run = labels[runs[run], point], found[run, point], runs[run]
        labels[runs] = found
        if step == iterations:
            break
        left = old >= 0
        changed = torch.cat([run * k + new, (run * k + old)[left]])
        gain = torch.cat([torch.ones_like(new), -torch.ones_like(old[left])])
        member = run // restarts * count + point
        changed, order = changed.sort(stable=True)
        moved, changes = torch.unique_consecutive(changed, return_counts=True)
        sizes.index_add_(0, changed, gain[order])
        # In an order of its own every time, as scattering on a GPU would not be.
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


def _measure(short: Tensor, norms: Tensor, centres: Tensor, rows: Tensor, squares: Tensor) -> None:
    """Writes the squared distances [S K, P] of some rows of centres [S K, D] anew, in the precision of points [B, P, D].

    The rows of an image are those of all its restarts, in one matrix product.
    """
    moved = centres[rows]
    lengths = moved.square().sum(dim=1, keepdim=True).to(short.dtype)
    counts = torch.bincount(rows * len(short) // len(centres), minlength=len(short)).tolist()
    parts = zip(short, norms.to(short.dtype), moved.to(short.dtype).split(counts), lengths.split(counts), strict=True)
    squares[rows] = torch.cat([torch.addmm(norm.T + length, part, image.T, alpha=-2) for image, norm, part, length in parts])


def _nearest(points: Tensor, norms: Tensor, centres: Tensor, squares: Tensor, runs: Tensor) -> Tensor:
    """The nearest of the centres [S, K, D] to every point, for some runs A of S: [A, P].

    `squares` [S, K, P] are in short precision. A label that its rounding could change is found again in float64, so that the
    result hangs neither on the batch nor on the device.
    """
    mine = squares[runs]
    first, labels = mine.min(dim=1)
    second = mine.scatter_(1, labels[:, None], math.inf).amin(dim=1)
    image = runs * len(points) // len(centres)
    scale = norms[image, :, 0] + centres[runs].square().sum(dim=2).amax(dim=1, keepdim=True)
    error = (points.shape[2] + 8) * torch.finfo(squares.dtype).eps  # of a difference, as a share of `scale`, at most
    sure = second - first >= error * scale  # not where float32 overflowed
    for doubtful in (~sure).nonzero().split(_DOUBTFUL):
        run, point = doubtful.unbind(1)
        where = (image[run], point)
        exact = _distances(points[where][:, None], norms[where][:, None], centres[runs[run]])
        labels[run, point] = exact[:, 0].argmin(dim=1)
    return labels


def _refill(points: Tensor, norms: Tensor, centres: Tensor, sizes: Tensor, labels: Tensor, runs: Tensor) -> Tensor:
    """Starts the first empty cluster of a run again at the point farthest from its centre, the second at the next.

    Args:
        points: [B, P, D], with `norms` [B, P, 1].
        centres: [S, K, D], which gave the labels [S, P]; written to.
        sizes: [S, K] of the clusters.
        runs: those of S to look at.

    Returns:
        The centres that were set, as numbers below S K.
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
