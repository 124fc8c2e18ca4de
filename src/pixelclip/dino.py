"""Nameless masks from DINO: the patch tokens of an image, clustered by k-means (PixelCLIP, section 4.1).

B images, P points (patches), D width, K clusters, R restarts, T trials, h w token grid.
"""

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from pixelclip.weights import check_fit, check_tensors, named, read_weights

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

_ANCHORS = ("cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.norm1.weight", "norm.weight")
_HEAD_WIDTH = 64
# A squared distance below this share of the squared norms is rounding: the two are one point.
_SAME = 1e-12


def load_dino(path: Path) -> VisionTransformer:
    """Loads a DINO ViT in float32 on the CPU, in eval mode, frozen.

    Args:
        path: `.safetensors`, or `.pth`/`.pt` of which only tensors are opened. Names are timm's, those of Meta's backbone
            files, or those of Meta's full checkpoints, of which the teacher is taken (else the student).

    Raises:
        ValueError: the file is missing, unreadable, would run code, or holds something else.
    """
    try:
        state = _backbone(read_weights(path))
        dino = _empty_vit(state)
    except ValueError as error:
        raise ValueError(f"{path}: {error}; a DINO ViT is expected, as timm or Meta publishes it") from None
    dino.load_state_dict({name: tensor.detach().float() for name, tensor in state.items()}, assign=True)
    return dino.eval().requires_grad_(False)


@torch.no_grad()
def patch_tokens(dino: VisionTransformer, images: Tensor) -> Tensor:
    """The last layer's patch tokens, after the final norm.

    Args:
        dino: of `load_dino`.
        images: [B, 3, H, W], normalised with ImageNet's mean and std; H and W multiples of the patch, in pixels.

    Returns:
        [B, h, w, D] with h = H // patch, w = W // patch.

    Raises:
        ValueError: the images have another shape.
    """
    patch = dino.patch_embed.patch_size[0]
    sides = images.shape[2:]
    if images.ndim != 4 or images.shape[1] != 3 or min(sides) < patch or any(side % patch for side in sides):
        raise ValueError(f"images are {list(images.shape)}; [B, 3, H, W] with H and W multiples of {patch} is needed")
    x = dino.patch_embed(images)  # [B, h, w, D]
    grid = (x.shape[1], x.shape[2])
    x = torch.cat([dino.cls_token.expand(len(x), -1, -1), x.flatten(1, 2)], dim=1) + _resize_position(dino, grid)
    x = dino.norm(dino.blocks(x))  # [B, 1 + P, D]
    return x[:, 1:].unflatten(1, grid)


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
    k = min(k, points.shape[1])
    # In double precision, so that neither TF32 nor the order of sums in a larger batch flips a label.
    points = points.double()
    points = points - points.mean(dim=1, keepdim=True)
    norms = points.square().sum(dim=2, keepdim=True)
    size = (restarts, k, 2 + int(math.log(k)))
    drawn = np.array([np.random.default_rng(seed).random(size) for seed in seeds]).reshape(len(seeds), *size)
    labels = torch.zeros(points.shape[:2], dtype=torch.long, device=points.device)
    inertia = points.new_full((len(points),), math.inf)
    for centres in _start(points, norms, torch.from_numpy(drawn).to(points.device)).unbind(1):
        new_labels, new_inertia = _lloyd(points, norms, centres, iterations)
        better = new_inertia < inertia
        labels = torch.where(better[:, None], new_labels, labels)
        inertia = torch.where(better, new_inertia, inertia)
    used = F.one_hot(labels, k).any(dim=1)  # [B, K]
    return (used.cumsum(dim=1) - 1).gather(1, labels), inertia


def segment(dino: VisionTransformer, images: Tensor, k: int, seeds: Sequence[int]) -> Tensor:
    """Cuts images into clusters of DINO's patch tokens.

    Args:
        dino: of `load_dino`, on the device of the images.
        images: as for `patch_tokens`.
        k: clusters an image; the paper's is 16.
        seeds: one an image.

    Returns:
        [B, h, w], int64: the cluster of every patch, counted from 0 without a gap.

    Raises:
        ValueError: as of `patch_tokens` and `kmeans`.
    """
    tokens = patch_tokens(dino, images)
    labels, _ = kmeans(tokens.flatten(1, 2), k, seeds)
    return labels.unflatten(1, tokens.shape[1:3])


def masks_of(dino: VisionTransformer, images: Tensor, visible: Tensor, k: int, seeds: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Masks of training views, on the fly.

    Args:
        dino: of `load_dino`.
        images: [B, 3, H, W], RGB in 0..1; sides that are no multiples of the patch are resized to the nearest.
        visible: [B, H', W'], bool: what CutOut left, on the mask grid.
        k: clusters of an image.
        seeds: one an image.

    Returns:
        Masks [N, H', W'], bool, of more than one pixel, and the image of each [N].
    """
    patch = dino.patch_embed.patch_size[0]
    sides = [max(patch, round(side / patch) * patch) for side in images.shape[2:]]
    images = F.interpolate(images, size=sides, mode="bilinear", align_corners=False, antialias=True)
    mean, std = (torch.tensor(v, device=images.device).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    labels = segment(dino, (images - mean) / std, k, seeds)  # [B, h, w]
    labels = F.interpolate(labels[:, None].float(), size=visible.shape[1:], mode="nearest-exact")[:, 0].long()
    masks = (labels[:, None] == torch.arange(k, device=labels.device)[:, None, None]) & visible[:, None]  # [B, k, H', W']
    large = masks.flatten(2).sum(dim=2) > 1
    return masks[large], large.nonzero()[:, 0]


def _backbone(found: Any) -> dict[str, Tensor]:
    """The backbone's tensors under timm's names, which are Meta's too."""
    if isinstance(found, dict):
        found = next((found[name] for name in ("teacher", "student") if isinstance(found.get(name), dict)), found)
    found = check_tensors(found)
    state = {name.removeprefix("module."): tensor for name, tensor in found.items()}
    if any(name.startswith("backbone.") for name in state):
        state = {name.removeprefix("backbone."): t for name, t in state.items() if not name.startswith("head.")}
    if missing := [name for name in _ANCHORS if name not in state]:
        raise ValueError(f"found {named(state)}, but not {named(missing)}")
    return state


def _empty_vit(state: dict[str, Tensor]) -> VisionTransformer:
    """A ViT without storage whose names and shapes are those of the state dict; ValueError where there is none."""
    position, kernel = state["pos_embed"], state["patch_embed.proj.weight"]
    if position.ndim != 3 or kernel.ndim != 4:
        raise ValueError(f"pos_embed is {list(position.shape)}, patch_embed.proj.weight {list(kernel.shape)}")
    width, patch, grid = len(kernel), kernel.shape[-1], math.isqrt(max(position.shape[1] - 1, 0))
    heads = max(width // _HEAD_WIDTH, 1)
    if min(width, patch, grid) < 1 or width % heads or grid**2 + 1 != position.shape[1]:
        raise ValueError(f"width {width}, patch {patch} and {position.shape[1]} positions fit no ViT with a square grid")
    with torch.device("meta"):  # neither memory nor random numbers for weights that are replaced at once
        dino = VisionTransformer(
            img_size=grid * patch,
            patch_size=patch,
            num_classes=0,
            embed_dim=width,
            depth=len({name.split(".")[1] for name in state if name.startswith("blocks.")}),
            num_heads=heads,
            qkv_bias=True,
            dynamic_img_size=True,
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
        )
    check_fit(state, dino.state_dict())
    return dino


def _resize_position(dino: VisionTransformer, grid: tuple[int, int]) -> Tensor:
    """The position embedding [1, 1 + h * w, D] for a grid (h, w), as Meta's code resizes it."""
    position, native = dino.pos_embed, dino.patch_embed.grid_size
    if grid == native:
        return position
    maps = position[:, 1:].transpose(1, 2).unflatten(2, native)  # [1, D, h0, w0]
    # timm would antialias, with another cubic kernel even for larger grids. Meta does not, and adds a tenth of a patch that
    # stays in the scale; the published features are made so.
    scale = ((grid[0] + 0.1) / native[0], (grid[1] + 0.1) / native[1])
    maps = F.interpolate(maps, scale_factor=scale, mode="bicubic")
    return torch.cat([position[:, :1], maps.flatten(2).transpose(1, 2)], dim=1)


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


def _lloyd(points: Tensor, norms: Tensor, centres: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    """Moves centres [B, K, D] until no label changes: labels [B, P] and inertia [B]."""
    k = centres.shape[1]
    distance, labels = _distances(points, norms, centres).min(dim=2)
    inertia, final = distance.sum(dim=1), labels.clone()
    active = torch.arange(len(points), device=points.device)
    for _ in range(iterations):
        # A sum by one-hot product and not by scattering, whose order on a GPU is a matter of chance.
        members = F.one_hot(labels, k).to(points.dtype)  # [B, P, K]
        count = members.sum(dim=1)  # [B, K]
        means = (members.transpose(1, 2) @ points) / count.clamp_min(1)[:, :, None]
        # The first empty cluster starts again at the farthest point, the second at the next.
        empty = count == 0
        farthest = distance.topk(k, dim=1)
        rank = (empty.cumsum(dim=1) - 1).clamp_min(0)
        again = empty & (farthest.values.gather(1, rank) > 0)
        centres = torch.where(empty[:, :, None], centres, means)
        centres = torch.where(again[:, :, None], _take(points, farthest.indices.gather(1, rank)), centres)
        distance, new_labels = _distances(points, norms, centres).min(dim=2)
        moved = again.any(dim=1) | (new_labels != labels).any(dim=1)
        labels = new_labels
        final[active], inertia[active] = labels, distance.sum(dim=1)
        if 2 * int(moved.sum()) <= len(moved):  # images at rest leave; not one by one, for the points are copied
            active, labels, distance, centres = active[moved], labels[moved], distance[moved], centres[moved]
            points, norms = points[moved], norms[moved]
            if not len(active):
                break
    return final, inertia
