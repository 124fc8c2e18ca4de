"""Training samples and batches."""

from dataclasses import replace

import numpy as np
import torch

from helpers.fake_data import annotation
from pixelclip.data.annotations import parse_annotation
from pixelclip.data.rle import RunMasks
from pixelclip.data.views import Views

PLAIN = Views(
    side=32, mask_grid=32, shortest_edge=64, longest_edge=1000, crop=32, color_jitter=False, flip=False, strong_view=False,
    cutout_min=0.1, cutout_max=0.5, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0),
)  # fmt: skip


FULL = replace(PLAIN, color_jitter=True, flip=True, strong_view=True, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4))


def blobs(height: int, width: int, count: int = 5, seed: int = 0) -> np.ndarray:
    """Create overlapping masks [N, H, W] of 4-pixel squares."""
    coarse = np.random.default_rng(seed).random((count, -(-height // 4), -(-width // 4))) < 0.5
    return coarse.repeat(4, 1).repeat(4, 2)[:, :height, :width]


def in_runs(masks: np.ndarray) -> RunMasks:
    return parse_annotation(annotation(masks), masks.shape[:0:-1])[1]


def batch() -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(3)
    weak, strong = torch.randn(2, 2, 3, 32, 32, generator=generator)
    return weak, strong, torch.rand(6, 24, 24, generator=generator) < 0.3, torch.tensor([0, 0, 0, 1, 1, 1])
