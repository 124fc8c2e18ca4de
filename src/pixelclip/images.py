"""Images: decode with errors that say why, to tensors and back, colours for label maps.

B images, H W pixels.
"""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor


def decode_image(data: bytes) -> Image.Image:
    """Decodes an image wholly; raises ValueError for anything unreadable or truncated."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            return image
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"unreadable image: {error}") from None


def open_image(path: Path) -> Image.Image:
    """Opens and decodes an image file, turned upright by its EXIF orientation.

    Raises:
        ValueError: missing, truncated or not an image; the message names the file.
    """
    try:
        return ImageOps.exif_transpose(decode_image(path.read_bytes()))
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def encode_jpeg(image: Image.Image, quality: int) -> bytes:
    """Encodes an image as a baseline RGB JPEG."""
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def to_tensor(image: Image.Image) -> Tensor:
    """An image as float RGB [3, H, W] in 0..1."""
    return torch.from_numpy(np.asarray(image.convert("RGB"), dtype=np.float32).transpose(2, 0, 1) / 255)


def normalise(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Normalises RGB in 0..1, [..., 3, H, W], by CLIP's mean and standard deviation."""
    shape = (3, 1, 1)
    return (images - images.new_tensor(mean).view(shape)) / images.new_tensor(std).view(shape)


def squash(images: Tensor, side: int) -> Tensor:
    """Resizes [B, 3, H, W] to [B, 3, side, side] bilinearly; like the reference, without antialiasing or keeping aspect."""
    return F.interpolate(images, size=(side, side), mode="bilinear", align_corners=False)


def palette(count: int) -> NDArray[np.uint8]:
    """[count, 3] well-spread RGB colours; the first ones do not change when more are asked for."""
    hues = (np.arange(count) * 0.61803398875) % 1  # the golden ratio spreads any number of hues
    saturation, value = 0.55 + 0.4 * ((np.arange(count) // 3) % 2), 0.95 - 0.3 * ((np.arange(count) // 2) % 2)
    sector = hues[:, None] * 6 + np.array([5.0, 3.0, 1.0])
    ramp = np.clip(np.minimum(sector % 6, 4 - sector % 6), 0, 1)
    return np.round(255 * value[:, None] * (1 - saturation[:, None] * ramp)).astype(np.uint8)


def colour_labels(labels: NDArray[np.integer], count: int) -> NDArray[np.uint8]:
    """Paints a label map [H, W] in the palette's colours: [H, W, 3]; labels outside 0..count-1 are black."""
    table = np.concatenate([palette(count), np.zeros((1, 3), np.uint8)])
    return table[np.where((labels >= 0) & (labels < count), labels, count)]
