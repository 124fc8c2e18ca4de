"""Convert images to tensors: RGB in 0..1, normalised, resized to a square. B images, H W pixels."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from pixelclip.data.images import to_rgb

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def to_tensor(image: Image.Image) -> Tensor:
    """Convert an image to float RGB [3, H, W] in 0..1."""
    return torch.from_numpy(np.asarray(to_rgb(image), dtype=np.float32).transpose(2, 0, 1) / 255)


def normalise(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Normalise RGB in 0..1, [..., 3, H, W], with a mean and standard deviation."""
    shape = (3, 1, 1)
    return (images - images.new_tensor(mean).view(shape)) / images.new_tensor(std).view(shape)


def resized_square(
    image: Image.Image, side: int, mean: Sequence[float], std: Sequence[float], device: torch.device | None = None
) -> Tensor:
    """Compute `resize_square(normalise(to_tensor(image)[None], mean, std), side)`: [1, 3, side, side].

    Only the pixels that the interpolation reads are converted and copied to the device.
    """
    whole = np.asarray(to_rgb(image))  # [H, W, 3]
    (first, second, down), (left, right, across) = (_between(length, side) for length in whole.shape[:2])
    pixels = whole[torch.cat([first, second])[:, None], torch.cat([left, right])]  # [2 * side, 2 * side, 3]
    corners = normalise(torch.from_numpy(pixels).to(device).permute(2, 0, 1) / 255, mean, std)
    rows = torch.lerp(corners[:, :side], corners[:, side:], down[:, None].to(corners.device))
    return torch.lerp(rows[..., :side], rows[..., side:], across.to(rows.device))[None]


def _between(length: int, side: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the two neighbouring pixels, and the weight of the second, of each of `side` samples along `length` pixels."""
    at = ((torch.arange(side) + 0.5) * (length / side) - 0.5).clamp_min(0)
    first = at.long().clamp_max(length - 1)
    return first, (first + 1).clamp_max(length - 1), at - first


def resize_square(images: Tensor, side: int) -> Tensor:
    """Resize [B, 3, H, W] to [B, 3, side, side] bilinearly; like the reference without antialiasing, ignoring the aspect."""
    return F.interpolate(images, size=(side, side), mode="bilinear", align_corners=False)
