"""Mask features by the transposed bilinear map, and literally: upsampled features averaged mask by mask."""

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.case import Case
from bench.train_step import GRID, MASKS, blobs
from pixelclip.models.clustering import pool_masks

IMAGES, CHANNELS, PLACES = 2, 512, 20


def literal(features: Tensor, masks: Tensor, image_index: Tensor) -> Tensor:
    """Pool as tests/helpers/reference.py does, with one boolean gather per mask."""
    large = F.interpolate(features, size=masks.shape[1:], mode="bilinear", align_corners=False)
    return F.normalize(
        torch.stack([large[i][:, m].mean(dim=1) for m, i in zip(masks, image_index.tolist(), strict=True)]), dim=1
    )


def by_product(features: Tensor, masks: Tensor, image_index: Tensor) -> Tensor:
    """Pool with one matrix product per image; this is an additional baseline, `make(by_product)`."""
    large = F.interpolate(features, size=masks.shape[1:], mode="bilinear", align_corners=False).flatten(2)  # [B, C, H * W]
    flat = masks.flatten(1).to(features.dtype)
    return F.normalize(torch.cat([flat[image_index == i] @ large[i].T for i in range(len(features))]), dim=1)


def same(theirs: Tensor, ours: Tensor) -> str:
    """Compare unit vectors entry by entry."""
    difference = (theirs - ours).abs().max().item()
    assert difference < 2e-6, difference
    return f"entries of unit vectors within {difference:.0e}"


def make(baseline=literal) -> Case:  # type: ignore[no-untyped-def]
    """Create the comparison."""
    generator = torch.Generator().manual_seed(2)
    features = torch.randn(IMAGES, CHANNELS, PLACES, PLACES, generator=generator)
    masks = blobs(generator, IMAGES * MASKS)
    index = torch.arange(IMAGES).repeat_interleave(MASKS)
    counts = [MASKS] * IMAGES
    return Case(
        what=f"{IMAGES} images, {MASKS} masks each, C {CHANNELS}, {PLACES}x{PLACES} positions, grid {GRID}",
        baseline=lambda: baseline(features, masks, index),
        ours=lambda: pool_masks(features, masks, index, counts),
        same=same,
        rounds=9,
    )
