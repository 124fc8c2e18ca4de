"""Decode and encode images, and colour label maps."""

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from pixelclip.storage.files import no_such

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff")
HEIC_SUFFIXES = (".heic", ".heif", ".avif")
HEIC_ADVICE = (
    "HEIC, HEIF and AVIF are not read: convert them to JPEG, for example with `heif-convert -q 95 photo.heic photo.jpg`; "
    "an iPhone takes JPEGs with Settings > Camera > Formats > Most Compatible"
)
_HEIC_BRANDS = (b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1", b"avif", b"avis")
_PNG = b"\x89PNG\r\n\x1a\n"

MAX_PIXELS = "PIXELCLIP_MAX_PIXELS"
"""Environment variable with the maximum number of pixels of an image that is decoded."""
_DEFAULT_MAX_PIXELS = 250_000_000
# The formats of IMAGE_SUFFIXES, and GIF, which is often stored as .jpg. Pillow's others include containers that state the size
# of a preview (ICO, ICNS) and EPS, for which it starts Ghostscript.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")
_TILE_WIDTH, _TILE_LENGTH = 322, 323  # tags of TIFF

# Pillow warns above 89 megapixels and fails above 179, process-wide. A user's own scans and aerial images may be larger;
# `decode_image` has its own limit.
Image.MAX_IMAGE_PIXELS = None


def decode_image(data: bytes, max_pixels: int | None = None, shrink: int = 1) -> Image.Image:
    """Decode an image completely.

    Args:
        data: an image file.
        max_pixels: reject an image with more pixels, before decoding; by default PIXELCLIP_MAX_PIXELS.
        shrink: 2, 4 or 8 decodes a JPEG faster at 1/2, 1/4 or 1/8 of its size, rounded up, if its edges have at least as
            many pixels; other formats are decoded at full size.

    Raises:
        ValueError: the image is unreadable, truncated or too large, or its 16-bit colours use at most 12 bits, of which
            Pillow would keep the upper 4.
    """
    limit = _limit() if max_pixels is None else max_pixels
    if data.startswith(_PNG):
        with _opened(data) as image:
            image.verify()  # load() does not compare the checksums of the pixels
    with _opened(data) as image:
        width, height = _decoded_size(image)
        too_large = width * height > limit
        if not too_large:
            if shrink > 1:
                image.draft(image.mode, (max(1, image.width // shrink), max(1, image.height // shrink)))
            image.load()
    if too_large:
        hint = f" ({MAX_PIXELS})" if max_pixels is None else ""
        raise ValueError(f"image: {width} x {height} pixels; at most {limit} are allowed{hint}")
    colours = {"RGB": 3, "RGBA": 3, "LA": 1}.get(image.mode, 0)
    is_16_bit = image.format == "PNG" and data[24] == 16  # bit depth in IHDR
    if is_16_bit and colours and np.asarray(image)[..., :colours].max() < 16:
        raise ValueError("16-bit colours of which at most 12 bits are in use; save it with 8 bits per channel")
    return image


def _limit() -> int:
    text = os.environ.get(MAX_PIXELS) or str(_DEFAULT_MAX_PIXELS)
    if not (text.isascii() and text.isdigit() and int(text)):
        raise ValueError(f"{MAX_PIXELS} must be a positive whole number (found {text!r})")
    return int(text)


def _decoded_size(image: Image.Image) -> tuple[int, int]:
    """Return the width and height that Pillow decodes: libtiff decodes whole tiles, which may exceed the image."""
    tags = getattr(image, "tag_v2", {})
    tile = [int(tags.get(tag, 1)) for tag in (_TILE_WIDTH, _TILE_LENGTH)]
    return max(image.width, tile[0]), max(image.height, tile[1])


def image_size(data: bytes) -> tuple[int, int]:
    """Read width and height from the header of an image file; raise ValueError like `decode_image`."""
    with _opened(data) as image:
        return image.size


@contextmanager
def _opened(data: bytes) -> Iterator[Image.Image]:
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            yield image
    except UnidentifiedImageError:
        if data[4:8] == b"ftyp" and data[8:12] in _HEIC_BRANDS:
            raise ValueError(f"unreadable image: {HEIC_ADVICE}") from None
        raise ValueError(f"unreadable image: cannot identify image file; formats are {', '.join(FORMATS)}") from None
    except Exception as error:  # Pillow's parsers raise many kinds of errors on damaged files
        reason = str(error).partition(" <_io.")[0]  # drop the address of the buffer
        raise ValueError(f"unreadable image: {reason}") from None


def check_upright(turn: int, beside: str) -> None:
    """Reject an image that its EXIF orientation turns or mirrors: what is stored beside it may fit either version.

    Args:
        turn: EXIF orientation.
        beside: what is stored beside the image, for the error.

    Raises:
        ValueError: the orientation is not 1.
    """
    if turn != 1:
        raise ValueError(f"EXIF orientation {turn} turns this image, but not its {beside}; store the pixels upright")


def file_orientation(data: bytes) -> int:
    """Return the EXIF orientation of an image file, from its header if possible; raise ValueError like `decode_image`."""
    with _opened(data) as image:
        if image.format != "PNG":
            return orientation_of(image)
    return orientation_of(decode_image(data))  # Pillow decodes a PNG to find EXIF data, which may follow the pixels


def orientation_of(image: Image.Image) -> int:
    """Return the EXIF orientation of a decoded image, 1 (upright) to 8."""
    orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    return int(orientation) if orientation in range(1, 9) else 1


def turn_upright(image: Image.Image) -> Image.Image:
    """Rotate an image by its EXIF orientation; raise ValueError for unreadable EXIF data."""
    try:
        return ImageOps.exif_transpose(image)
    except Exception as error:  # see _opened
        raise ValueError(f"unreadable EXIF data: {error}") from None


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image to 8-bit RGB.

    Of 16-bit values the upper 8 bits are kept, where Pillow would clip to white. Cameras and scanners also store 10, 12 or
    14 bits in them: the highest value in the image tells. Transparent pixels are blended with white, as viewers do.

    Raises:
        ValueError: 32-bit pixels, whose range is unknown.
    """
    if image.mode.startswith("I;16"):
        values = np.asarray(image)
        bits = next(bits for bits in (8, 10, 12, 14, 16) if values.max() < 1 << bits)
        return Image.fromarray((values >> (bits - 8)).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError(f"expected 8 or 16 bits per channel, found 32 (mode {image.mode})")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def open_image(path: Path, beside: str = "") -> Image.Image:
    """Open an image file as RGB, rotated by its EXIF orientation.

    Args:
        path: an image file.
        beside: pixel-wise data of the image, such as "labels". If the orientation keeps the size of the image, the data may
            belong to the stored or to the turned image, which is an error.

    Raises:
        ValueError: missing, truncated, not an image, or see `beside`.
    """
    try:
        data = path.read_bytes()
        image = decode_image(data)
        turn = orientation_of(image) if beside else 1
        upright = turn_upright(image)
        if upright.size == image.size:
            check_upright(turn, beside)
        return to_rgb(upright)
    except FileNotFoundError:
        raise ValueError(no_such(path, "file")) from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: {getattr(error, 'strerror', error)}") from None


def encode_jpeg(image: Image.Image, quality: int) -> bytes:
    """Encode an image as a baseline RGB JPEG."""
    buffer = io.BytesIO()
    to_rgb(image).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def fitted(size: tuple[int, int], box: tuple[int, int]) -> tuple[int, int]:
    """Return the (width, height) of an image scaled to fit a box with its aspect ratio kept; at least one pixel each."""
    scale = min(box[0] / size[0], box[1] / size[1])
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def resize_shortest_edge(image: Image.Image, shortest: int, longest: int) -> Image.Image:
    """Resize an image to a shortest edge, bilinearly with antialiasing, as detectron2's `ResizeShortestEdge` does.

    Args:
        image: any mode that `to_rgb` accepts; the result is RGB.
        shortest: shortest edge in pixels, larger or smaller than the image's; 0 returns the image unchanged.
        longest: limit of the longest edge in pixels, which makes the shortest edge smaller; 0 for no limit.
    """
    if not shortest:
        return image
    short = min(image.size)
    edges = [shortest if edge == short else edge * (shortest / short) for edge in image.size]
    if longest and max(edges) > longest:
        shrink = longest / max(edges)
        edges = [edge * shrink for edge in edges]
    width, height = (max(1, int(edge + 0.5)) for edge in edges)
    return to_rgb(image).resize((width, height), Image.Resampling.BILINEAR)


def cell_centres(count: int, size: int) -> NDArray[np.int64]:
    """Return the pixels at the centres of `count` equal cells along `size` pixels."""
    return ((np.arange(count) + 0.5) * size / count).astype(np.int64)


def palette(count: int) -> NDArray[np.uint8]:
    """Return well-spread RGB colours [count, 3]; a longer palette starts with the same colours."""
    hues = (np.arange(count) * 0.61803398875) % 1  # multiples of the golden ratio are spread evenly for any count
    saturation, value = 0.55 + 0.4 * ((np.arange(count) // 3) % 2), 0.95 - 0.3 * ((np.arange(count) // 2) % 2)
    sector = hues[:, None] * 6 + np.array([5.0, 3.0, 1.0])
    ramp = np.clip(np.minimum(sector % 6, 4 - sector % 6), 0, 1)
    return np.round(255 * value[:, None] * (1 - saturation[:, None] * ramp)).astype(np.uint8)


def colour_labels(labels: NDArray[np.integer], count: int) -> NDArray[np.uint8]:
    """Colour a label map [H, W] with the palette: [H, W, 3]; labels outside 0..count-1 are black."""
    table = np.concatenate([palette(count), np.zeros((1, 3), np.uint8)])
    return table[np.where((labels >= 0) & (labels < count), labels, count)]
