"""Nameless masks from DINO: the patch tokens of an image, clustered by k-means (PixelCLIP, section 4.1).

B images, P patches, D width, h w token grid.
"""

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from pixelclip.kmeans import kmeans
from pixelclip.weights import check_fit, check_tensors, named, read_weights

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

_ANCHORS = ("cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.norm1.weight", "norm.weight")
_HEAD_WIDTH = 64


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
