"""Text-aware Laplacian propagation of scores, after the idea of PEARL (arXiv 2603.21528); not the authors' code.

B images, K classes, E = 4 directions of edges, h w score grid, H W image.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from pixelclip.inference.refinement.neighbours import on_grid

_EDGES = ((0, 1), (1, 0), (1, 1), (1, -1))  # each pair of 8-neighbours once
_TINY = 1e-12


@torch.no_grad()
def propagate(
    scores: Tensor, images: Tensor, strength: float, iterations: int = 20, temperature: float = 0.01, classes_at_once: int = 64
) -> Tensor:
    """Smooth scores over a graph of the image: solve (I + strength * L) S = scores, with the graph's Laplacian L.

    Conjugate gradients, preconditioned by the diagonal, start from the scores. The weights of the edges are those of
    `edge_weights`. The solution keeps the mean of every class over an image.

    Args:
        scores: [B, K, h, w], cosines with the classes' texts.
        images: [B, 3, H, W], resized to the grid of the scores.
        strength: weight of the smoothness; 0 returns the scores.
        iterations: of conjugate gradients. With 20 the error on random scores is 0.2 % of their range at strength 10.
        temperature: see `edge_weights`.
        classes_at_once: limits the memory; the result does not depend on it.

    Returns:
        [B, K, h, w] in the type of the scores, computed in float32 or wider.

    Raises:
        ValueError: different numbers of images and scores, or a strength, number of iterations or temperature out of range.
    """
    if len(scores) != len(images):
        raise ValueError(f"propagate: {len(scores)} score maps, but {len(images)} images")
    if not 0 <= strength < float("inf") or iterations < 1 or not temperature > 0:
        raise ValueError(
            "propagate: strength must be at least 0, iterations at least 1 and temperature above 0 "
            f"(found {strength}, {iterations}, {temperature})"
        )
    if not strength:
        return scores
    wide = scores.to(torch.promote_types(scores.dtype, torch.float32))
    weights = edge_weights(wide, on_grid(images, (scores.shape[2], scores.shape[3])).to(wide.dtype), temperature)
    solved = [_solve(chunk, strength * weights, iterations) for chunk in wide.split(classes_at_once, dim=1)]
    return torch.cat(solved, dim=1).to(scores.dtype)


def edge_weights(scores: Tensor, images: Tensor, temperature: float) -> Tensor:
    """Return the weights of the edges between neighbouring cells: similar colour times similar distribution of classes.

    With colour I_i and class distribution p_i = softmax(scores_i / temperature), the weight of an edge is
    exp(-|I_i - I_j|^2 / (2 v)) * sum_k sqrt(p_ik p_jk), where v is the mean of |I_i - I_j|^2 over the edges of the image. So
    colours count relative to the contrast of the image, and cells that the texts tell apart exchange little.

    Args:
        scores: [B, K, h, w].
        images: [B, 3, h, w].
        temperature: of the distributions.

    Returns:
        [B, E, h, w]; edge e of cell (y, x) leads to (y + row, x + column) for the e-th (row, column) of the directions right,
        down, down-right and down-left; zero for edges that leave the grid.
    """
    roots = torch.softmax(scores / temperature, dim=1).sqrt()
    contrasts, similarities = [], []
    for edge in _EDGES:
        contrasts.append((images - _end(images, edge)).square().sum(dim=1))
        similarities.append((roots * _end(roots, edge)).sum(dim=1))
    contrast, similarity = torch.stack(contrasts, dim=1), torch.stack(similarities, dim=1)
    inside = torch.stack([_end(torch.ones_like(contrast[:1, :1]), edge)[0, 0] for edge in _EDGES])
    mean = (contrast * inside).sum(dim=(1, 2, 3), keepdim=True) / inside.sum().clamp_min(1)
    return inside * torch.exp(-contrast / (2 * mean + _TINY)) * similarity


def _end(grid: Tensor, edge: tuple[int, int]) -> Tensor:
    """Return the values [..., h, w] at the ends of the edges that start at each cell; zeros outside the grid."""
    down, right = edge
    height, width = grid.shape[-2:]
    return F.pad(grid, (max(-right, 0), max(right, 0), 0, down))[
        ..., down : down + height, max(right, 0) : max(right, 0) + width
    ]


def _start(grid: Tensor, edge: tuple[int, int]) -> Tensor:
    """Return for every cell the value at the start of the edge that ends there; zeros without one (transpose of `_end`)."""
    down, right = edge
    height, width = grid.shape[-2:]
    return F.pad(grid, (max(right, 0), max(-right, 0), down, 0))[..., :height, max(-right, 0) : max(-right, 0) + width]


def _solve(scores: Tensor, weights: Tensor, iterations: int) -> Tensor:
    pairs = [(edge, weights[:, number : number + 1]) for number, edge in enumerate(_EDGES)]
    back = [_start(weight, edge) for edge, weight in pairs]
    diagonal = 1 + sum((weight + other for (_, weight), other in zip(pairs, back, strict=True)), start=torch.zeros(()))

    def product(x: Tensor) -> Tensor:
        total = diagonal * x
        for (edge, weight), other in zip(pairs, back, strict=True):
            total.addcmul_(weight, _end(x, edge), value=-1).addcmul_(other, _start(x, edge), value=-1)
        return total

    def dot(a: Tensor, b: Tensor) -> Tensor:
        return (a * b).sum(dim=(2, 3), keepdim=True)

    x = scores.clone()
    residual = scores - product(x)
    step = residual / diagonal
    size = dot(residual, step)
    for _ in range(iterations):
        moved = product(step)
        rate = size / dot(step, moved).clamp_min(torch.finfo(x.dtype).tiny)
        x.addcmul_(rate, step)
        residual.addcmul_(rate, moved, value=-1)
        scaled = residual / diagonal
        former, size = size, dot(residual, scaled)
        step = scaled + step * (size / former.clamp_min(torch.finfo(x.dtype).tiny))
    return x
