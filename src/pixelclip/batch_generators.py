"""Mask generators that need weights and a device, as functions from a batch of images to annotation documents.

Torch and the models are imported only when a generator is loaded: worker processes of the masks stage import this module.
"""

import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pixelclip.annotations import annotate
from pixelclip.config import MasksConfig
from pixelclip.images import nearest

Generate = Callable[[list[tuple[str, Image.Image]]], Iterable[dict[str, Any]]]
"""Keys and images of a batch -> their annotation documents."""


def sam_generator(weights: Path, config: MasksConfig) -> Generate:
    """Load SAM on the configured device."""
    from pixelclip.ranks import pick_device, pick_precision
    from pixelclip.sam import SamGenerator
    from pixelclip.sam_weights import load_sam

    prefix = "sam_"
    settings = {name.removeprefix(prefix): value for name, value in config.model_dump().items() if name.startswith(prefix)}
    device = pick_device(config.device)
    settings["precision"] = pick_precision(config.sam_precision, device)
    generator = SamGenerator(load_sam(weights).to(device), **settings)

    def generate(batch: list[tuple[str, Image.Image]]) -> Iterator[dict[str, Any]]:
        for (key, image), entries in zip(batch, generator([np.asarray(image) for _, image in batch]), strict=True):
            yield {**annotate([], image.size, key), "annotations": entries}

    return generate


def dino_generator(weights: Path, config: MasksConfig) -> Generate:
    """Load DINO on the configured device.

    Raises:
        ValueError: `masks.dino_side` is not a multiple of the patch size.
    """
    import torch

    from pixelclip.dino import IMAGENET_MEAN, IMAGENET_STD, load_dino, segment
    from pixelclip.pixels import resized_square
    from pixelclip.ranks import pick_device, pick_precision

    device = pick_device(config.device)
    pick_precision("float32", device)  # earlier work in this process may have enabled TF32
    dino = load_dino(weights).to(device)
    if config.dino_side % (patch := dino.patch_embed.patch_size[0]):
        raise ValueError(f"masks.dino_side {config.dino_side} is not a multiple of this DINO's patch size {patch}")

    def generate(batch: list[tuple[str, Image.Image]]) -> Iterator[dict[str, Any]]:
        views = [resized_square(image, config.dino_side, IMAGENET_MEAN, IMAGENET_STD, device) for _, image in batch]
        seeds = [zlib.crc32(f"{config.seed} {key}".encode()) for key, _ in batch]
        labels = segment(dino, torch.cat(views), config.dino_clusters, seeds).cpu().numpy()  # [B, h, w]
        for (key, image), small in zip(batch, labels, strict=True):
            large = small[nearest(image.height, small.shape[0])][:, nearest(image.width, small.shape[1])]
            yield annotate((large == number for number in np.unique(large)), image.size, key)

    return generate
