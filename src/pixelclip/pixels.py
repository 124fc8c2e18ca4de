"""Images as tensors: RGB in 0..1, normalised, squashed to the CLIP's side. B images, H W pixels."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from pixelclip.images import to_rgb


def to_tensor(image: Image.Image) -> Tensor:
    """An image as float RGB [3, H, W] in 0..1."""
    return torch.from_numpy(np.asarray(to_rgb(image), dtype=np.float32).transpose(2, 0, 1) / 255)


def normalise(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Normalises RGB in 0..1, [..., 3, H, W], by CLIP's mean and standard deviation."""
    shape = (3, 1, 1)
    return (images - images.new_tensor(mean).view(shape)) / images.new_tensor(std).view(shape)


def squash(images: Tensor, side: int) -> Tensor:
    """Resizes [B, 3, H, W] to [B, 3, side, side] bilinearly; like the reference, without antialiasing or keeping aspect."""
    return F.interpolate(images, size=(side, side), mode="bilinear", align_corners=False)
