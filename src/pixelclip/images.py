"""Images: decode with errors that say why, encode, colours for label maps. H W pixels."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")

# Pillow warns above 89 megapixels and refuses above 179. A user's own scans and aerial pictures may have more; what strangers
# send is checked by its header before it is decoded (`max_pixels`). Pillow has this for the whole process or not at all.
Image.MAX_IMAGE_PIXELS = None


def decode_image(data: bytes, max_pixels: int | None = None, shrink: int = 1) -> Image.Image:
    """Decodes an image wholly.

    Args:
        data: of an image file.
        max_pixels: an image that says to have more is not decoded.
        shrink: 2, 4 or 8 decode a JPEG of at least as many pixels an edge at that part of its size, rounded up, in less
            time; other files come whole.

    Raises:
        ValueError: the image is unreadable, truncated or too large.
    """
    with _opened(data) as image:
        too_large = max_pixels is not None and image.width * image.height > max_pixels
        if not too_large:
            if shrink > 1:
                image.draft(image.mode, (max(1, image.width // shrink), max(1, image.height // shrink)))
            image.load()
    if too_large:
        raise ValueError(f"image: {image.width} x {image.height} pixels; at most {max_pixels} are allowed")
    return image


def image_size(data: bytes) -> tuple[int, int]:
    """Width and height as the header of an image file says them; raises ValueError as `decode_image` does."""
    with _opened(data) as image:
        return image.size


@contextmanager
def _opened(data: bytes) -> Iterator[Image.Image]:
    try:
        with Image.open(io.BytesIO(data)) as image:
            yield image
    except Exception as error:  # on damaged files Pillow's parsers raise nearly anything
        reason = str(error).partition(" <_io.")[0]  # without the address of our own buffer
        raise ValueError(f"unreadable image: {reason}") from None


def turn_upright(image: Image.Image) -> Image.Image:
    """Turns an image by its EXIF orientation; raises ValueError for EXIF data that cannot be read."""
    try:
        return ImageOps.exif_transpose(image)
    except Exception as error:  # as above
        raise ValueError(f"unreadable EXIF data: {error}") from None


def to_rgb(image: Image.Image) -> Image.Image:
    """An image as 8-bit RGB; of 16 bits the upper 8 are kept, where Pillow would clip everything to white.

    Raises:
        ValueError: 32-bit pixels, whose range is unknown.
    """
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError(f"8 or 16 bits a channel are needed, found 32 (mode {image.mode})")
    if image.mode == "P":
        image = image.convert("RGBA")  # Pillow warns about a straight way for palettes with transparency
    return image if image.mode == "RGB" else image.convert("RGB")


def open_image(path: Path) -> Image.Image:
    """Opens and decodes an image file as RGB, turned upright by its EXIF orientation.

    Raises:
        ValueError: missing, truncated or not an image; the message names the file.
    """
    try:
        return to_rgb(turn_upright(decode_image(path.read_bytes())))
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def encode_jpeg(image: Image.Image, quality: int) -> bytes:
    """Encodes an image as a baseline RGB JPEG."""
    buffer = io.BytesIO()
    to_rgb(image).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def fitted(size: tuple[int, int], box: tuple[int, int]) -> tuple[int, int]:
    """The largest (width, height) in a box with the aspect of `size`; at least one pixel each, whatever the aspect."""
    scale = min(box[0] / size[0], box[1] / size[1])
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def nearest(count: int, size: int) -> NDArray[np.int64]:
    """Where `count` samples along `size` pixels are taken, one in the middle of each of `count` equal cells."""
    return ((np.arange(count) + 0.5) * size / count).astype(np.int64)


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
