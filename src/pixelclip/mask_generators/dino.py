"""Class-agnostic masks from DINO: k-means clusters of an image's patch tokens (PixelCLIP, section 4.1)."""

import math
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from pixelclip.config import MasksConfig
from pixelclip.data.annotations import annotate
from pixelclip.data.dataset import Batch
from pixelclip.data.images import cell_centres
from pixelclip.data.tensors import IMAGENET_MEAN, IMAGENET_STD, normalise, resized_square
from pixelclip.distributed import pick_device, pick_precision
from pixelclip.mask_generators import Generate
from pixelclip.mask_generators.kmeans import kmeans
from pixelclip.models.backbone import check_multiple
from pixelclip.models.weights import check_fit, check_tensors, named, read_weights

_ANCHORS = ("cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.norm1.weight", "norm.weight")
_HEAD_WIDTH = 64


def load_generator(weights: Path, config: MasksConfig) -> Generate:
    """Load DINO on the configured device.

    Raises:
        ValueError: as `load_dino`, or `masks.dino_side` is not a multiple of the patch size.
    """
    device = pick_device(config.device)
    pick_precision("float32", device)  # earlier work in this process may have enabled TF32
    dino = load_dino(weights).to(device)
    check_multiple("masks.dino_side", config.dino_side, dino.patch_embed.patch_size[0])

    def generate(batch: list[tuple[str, Image.Image]]) -> Iterator[dict[str, Any]]:
        views = [resized_square(image, config.dino_side, IMAGENET_MEAN, IMAGENET_STD, device) for _, image in batch]
        seeds = [zlib.crc32(f"{config.seed} {key}".encode()) for key, _ in batch]
        labels = segment(dino, torch.cat(views), config.dino_clusters, seeds).cpu().numpy()  # [B, h, w]
        for (key, image), small in zip(batch, labels, strict=True):
            large = small[cell_centres(image.height, small.shape[0])][:, cell_centres(image.width, small.shape[1])]
            yield annotate((large == number for number in np.unique(large)), image.size, key)

    return generate


def load_dino(path: Path) -> VisionTransformer:
    """Load a DINO ViT in float32 on the CPU, frozen and in eval mode.

    Args:
        path: `.safetensors`, or `.pth`/`.pt` of which only tensors are loaded. Names may be timm's or Meta's; of Meta's full
            checkpoints the teacher is used, else the student.

    Raises:
        ValueError: the file is missing, unreadable, contains code, or is not a DINO ViT.
    """
    try:
        state = _backbone(read_weights(path))
        dino = _empty_vit(state)
    except ValueError as error:
        raise ValueError(f"{path}: {error}; expected a DINO ViT as published by timm or Meta") from None
    dino.load_state_dict({name: tensor.detach().float() for name, tensor in state.items()}, assign=True)
    return dino.eval().requires_grad_(False)


@torch.no_grad()
def patch_tokens(dino: VisionTransformer, images: Tensor) -> Tensor:
    """Compute the patch tokens of the last layer, after the final norm.

    Args:
        dino: from `load_dino`.
        images: [B, 3, H, W], normalised with ImageNet's mean and std; H and W multiples of the patch size.

    Returns:
        [B, h, w, D]: images, grid of patches (h = H // patch, w = W // patch), width.
    """
    x = dino.patch_embed(images)  # [B, h, w, D]
    grid = (x.shape[1], x.shape[2])
    x = torch.cat([dino.cls_token.expand(len(x), -1, -1), x.flatten(1, 2)], dim=1) + _resize_position(dino, grid)
    x = dino.norm(dino.blocks(x))  # [B, 1 + P, D]
    return x[:, 1:].unflatten(1, grid)


def segment(dino: VisionTransformer, images: Tensor, k: int, seeds: Sequence[int]) -> Tensor:
    """Segment images by clustering DINO's patch tokens.

    Args:
        dino: from `load_dino`, on the device of the images.
        images: as for `patch_tokens`.
        k: clusters per image, 16 in the paper.
        seeds: one per image.

    Returns:
        Cluster of every patch [B, h, w], int64, numbered from 0 without gaps.

    Raises:
        ValueError: as `kmeans`.
    """
    tokens = patch_tokens(dino, images)
    labels, _ = kmeans(tokens.flatten(1, 2), k, seeds)
    return labels.unflatten(1, tokens.shape[1:3])


def masks_of(dino: VisionTransformer, images: Tensor, visible: Tensor, k: int, seeds: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Generate masks of training views on the fly.

    Args:
        dino: from `load_dino`.
        images: [B, 3, H, W], RGB in 0..1; H and W multiples of the patch size.
        visible: [B, H', W'], bool, on the mask grid: False where CutOut erased the image.
        k: clusters per image.
        seeds: one per image.

    Returns:
        Masks of more than one pixel [N, H', W'], bool, and the image index of each mask [N].
    """
    labels = segment(dino, normalise(images, IMAGENET_MEAN, IMAGENET_STD), k, seeds)  # [B, h, w]
    labels = F.interpolate(labels[:, None].float(), size=visible.shape[1:], mode="nearest-exact")[:, 0].long()
    masks = (labels[:, None] == torch.arange(k, device=labels.device)[:, None, None]) & visible[:, None]  # [B, k, H', W']
    large = masks.flatten(2).sum(dim=2) > 1
    return masks[large], large.nonzero()[:, 0]


def _backbone(checkpoint: Any) -> dict[str, Tensor]:
    """Return the backbone's tensors under the names that timm and Meta's code share."""
    if isinstance(checkpoint, dict):
        networks = (checkpoint[name] for name in ("teacher", "student") if isinstance(checkpoint.get(name), dict))
        checkpoint = next(networks, checkpoint)
    state = {name.removeprefix("module."): tensor for name, tensor in check_tensors(checkpoint).items()}
    if any(name.startswith("backbone.") for name in state):
        state = {name.removeprefix("backbone."): t for name, t in state.items() if not name.startswith("head.")}
    if missing := [name for name in _ANCHORS if name not in state]:
        raise ValueError(f"found {named(state)}, but not {named(missing)}")
    return state


def _empty_vit(state: dict[str, Tensor]) -> VisionTransformer:
    """Build a ViT on the meta device with the shapes of a state dict; raise ValueError if no ViT fits."""
    position, kernel = state["pos_embed"], state["patch_embed.proj.weight"]
    if position.ndim != 3 or kernel.ndim != 4:
        raise ValueError(f"pos_embed is {list(position.shape)}, patch_embed.proj.weight {list(kernel.shape)}")
    width, patch, grid = len(kernel), kernel.shape[-1], math.isqrt(max(position.shape[1] - 1, 0))
    heads = max(width // _HEAD_WIDTH, 1)
    if min(width, patch, grid) < 1 or width % heads or grid**2 + 1 != position.shape[1]:
        raise ValueError(f"width {width}, patch {patch} and {position.shape[1]} positions do not fit a ViT with a square grid")
    with torch.device("meta"):  # no memory or random numbers for weights that are replaced anyway
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
    """Resize the position embedding to a grid (h, w) like Meta's code: [1, 1 + h * w, D]."""
    position, native = dino.pos_embed, dino.patch_embed.grid_size
    if grid == native:
        return position
    maps = position[:, 1:].transpose(1, 2).unflatten(2, native)  # [1, D, h0, w0]
    # Meta's code, which computed the published features, does not antialias and adds a tenth of a patch to the scale. timm
    # antialiases and uses a different cubic kernel, even for larger grids.
    scale = ((grid[0] + 0.1) / native[0], (grid[1] + 0.1) / native[1])
    maps = F.interpolate(maps, scale_factor=scale, mode="bicubic")
    return torch.cat([position[:, :1], maps.flatten(2).transpose(1, 2)], dim=1)


def masks_of_batch(dino: VisionTransformer, batch: Batch, clusters: int, seed: int) -> Batch:
    """Replace the masks of a training batch by DINO's masks of its crops; the old masks mark the visible pixels."""
    if batch.crops is None:  # no readable image
        return batch
    visible = batch.masks.new_zeros(len(batch.weak), *batch.masks.shape[1:])
    visible[batch.image_index] = batch.masks
    seeds = [int(np.random.SeedSequence([seed, 3, position]).generate_state(1)[0]) for position in batch.sample_indices]
    masks, index = masks_of(dino, batch.crops / 255, visible, clusters, seeds)
    return replace(batch, masks=masks, image_index=index, counts=None, crops=None)
