"""Decode, convert and colour images; compared with Pillow and numpy."""

import colorsys
import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from helpers.fake_data import bomb, encoded, pixels, turned
from pixelclip.data.images import (
    MAX_PIXELS,
    colour_labels,
    decode_image,
    encode_jpeg,
    file_orientation,
    image_size,
    open_image,
    palette,
    resize_shortest_edge,
    to_rgb,
    turn_upright,
)


@pytest.mark.parametrize("data", [b"", b"no image", encoded(pixels(40, 30))[:-200], encoded(pixels(40, 30), "PNG")[:-60]])
def test_incomplete_or_invalid_image_is_rejected(data: bytes, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unreadable image"):
        decode_image(data)
    with pytest.raises(ValueError, match="unreadable image"):
        decode_image(data, shrink=2)
    (tmp_path / "bad é.jpg").write_bytes(data)
    with pytest.raises(ValueError, match=r"bad é\.jpg: unreadable image"):
        open_image(tmp_path / "bad é.jpg")


@pytest.mark.parametrize("size", [(8, 15), (64, 80), (65, 79)])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_only_jpegs_are_shrunk_while_decoding(size: tuple[int, int], mode: str) -> None:
    image = Image.new("RGB", size, (200, 100, 50)).convert(mode)
    for shrink in (1, 2, 4, 8):
        found = decode_image(encoded(image, quality=95), shrink=shrink)
        assert found.size == tuple(-(-edge // shrink) for edge in size)
        assert found.mode == mode
        assert np.abs(np.asarray(found, int) - np.asarray(image, int)[0, 0]).max() <= 3
        assert decode_image(encoded(image, "TIFF"), shrink=shrink).size == size
    assert image_size(encoded(image)) == size


def huge(edge: int) -> bytes:
    """Create a PNG whose header states edge x edge pixels, without pixel data."""
    header = struct.pack(">IIBBBBB", edge, edge, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")]
    data = [struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(data)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("edge", [10_000, 20_000])  # Pillow's defaults warn about the first and reject the second
def test_oversized_image_is_rejected_before_decoding(edge: int) -> None:
    assert image_size(huge(edge)) == (edge, edge)
    with pytest.raises(ValueError, match=rf"^image: {edge} x {edge} pixels; at most 16000000 are allowed$"):
        decode_image(huge(edge), max_pixels=16_000_000)


@pytest.mark.parametrize("kind", ["ICO", "ICNS", "EPS", "TIFF"])
def test_image_that_hides_its_size_is_rejected_before_decoding(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for plugin in ("PngImagePlugin.PngImageFile", "TiffImagePlugin.TiffImageFile", "EpsImagePlugin.EpsImageFile"):
        monkeypatch.setattr(f"PIL.{plugin}.load", lambda image: pytest.fail("decoded"))
    size = "1001 x 1001 pixels; at most 1000000 are allowed"
    with pytest.raises(ValueError, match=f"^image: {size}$" if kind == "TIFF" else "cannot identify image file; formats are"):
        decode_image(bomb(kind, 1001), max_pixels=1_000_000)


def test_tile_larger_than_its_image_is_decoded_within_the_limit() -> None:
    assert decode_image(bomb("TIFF", 1000), max_pixels=1_000_000).size == (16, 16)


@pytest.mark.parametrize("kind", ["AVIF", "EPS", "ICO", "ICNS", "JPEG2000", "PPM", "PSD", "TGA", "WMF"])
@pytest.mark.parametrize("seed", range(3))
def test_damaged_files_of_other_formats_are_not_parsed(kind: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the parsers of the allowed formats run, whatever the bytes claim."""
    Image.init()
    monkeypatch.setitem(Image.OPEN, kind, (lambda *_: pytest.fail("parsed"), lambda _: True))
    with pytest.raises(ValueError, match="unreadable image"):
        decode_image(np.random.default_rng(seed).bytes(500))


@pytest.mark.parametrize("kind", ["BMP", "GIF", "JPEG", "MPO", "PNG", "TIFF", "WEBP"])
def test_allowed_formats_are_decoded(kind: str) -> None:
    options = {"save_all": True, "append_images": [Image.new("RGB", (9, 8))]} if kind == "MPO" else {}
    image = decode_image(encoded(Image.new("RGB", (9, 8), (200, 100, 50)), kind, **options))
    assert (image.size, image.format) == ((9, 8), kind)
    assert np.abs(np.asarray(to_rgb(image), int) - (200, 100, 50)).max() <= 3


def test_limit_of_the_environment_guards_every_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"^image: 15812 x 15812 pixels; at most 250000000 .*\(PIXELCLIP_MAX_PIXELS\)$"):
        decode_image(huge(15_812))
    with pytest.raises(ValueError, match=r"^image: 15812 x 15812 pixels"):
        file_orientation(huge(15_812))  # for which Pillow would decode a PNG
    (tmp_path / "a.png").write_bytes(encoded(pixels(8, 9), "PNG"))
    monkeypatch.setenv(MAX_PIXELS, "71")
    message = r"a\.png: image: 9 x 8 pixels; at most 71 are allowed \(PIXELCLIP_MAX_PIXELS\)$"
    with pytest.raises(ValueError, match=message):
        open_image(tmp_path / "a.png")
    monkeypatch.setenv(MAX_PIXELS, "72")
    assert open_image(tmp_path / "a.png").size == (9, 8)
    for text in ("0", "-1", "1e6", "many", "²"):
        monkeypatch.setenv(MAX_PIXELS, text)
        with pytest.raises(ValueError, match=rf"PIXELCLIP_MAX_PIXELS must be a positive whole number \(found '{text}'\)"):
            open_image(tmp_path / "a.png")


@pytest.mark.filterwarnings("error")
def test_large_image_is_decoded() -> None:
    large = Image.new("1", (16_000, 12_000), 1)  # one bit per pixel
    assert decode_image(encoded(large, "PNG")).size == large.size


def test_missing_file_is_reported(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none\.jpg: no such file"):
        open_image(tmp_path / "none.jpg")


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
@pytest.mark.parametrize(("orientation", "turns"), [(1, 0), (3, 2), (6, 3), (8, 1)])
def test_open_image_applies_exif_orientation(tmp_path: Path, kind: str, orientation: int, turns: int) -> None:
    stored = pixels(8, 12)
    path = tmp_path / f"image.{kind}"
    path.write_bytes(encoded(stored, kind, exif=turned(orientation)))
    assert np.array_equal(np.asarray(open_image(path)), np.rot90(stored, turns))


def test_open_image_converts_to_rgb(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encoded(np.full((4, 4), 0x8040, np.uint16), "PNG"))
    assert np.unique(np.asarray(open_image(tmp_path / "a.png"))).tolist() == [0x80]
    (tmp_path / "b.tif").write_bytes(encoded(np.ones((4, 4), np.float32), "TIFF"))
    with pytest.raises(ValueError, match=r"b\.tif: .*found 32"):
        open_image(tmp_path / "b.tif")


def test_damaged_exif_is_rejected() -> None:
    exif = turned(6)
    exif[0x010F] = "maker"
    good = encoded(pixels(8, 12), "WEBP", exif=exif)
    at = good.index(b"EXIF") + 8
    with pytest.raises(ValueError, match="unreadable EXIF"):
        turn_upright(decode_image(good[:at] + b"\xffM" + good[at + 2 :]))


def test_16_bit_images_keep_their_upper_8_bits() -> None:
    tones = np.arange(0, 65536, 16, dtype=np.uint16).reshape(64, 64)
    found = np.asarray(to_rgb(decode_image(encoded(tones, "PNG"))))
    assert np.array_equal(found, np.repeat((tones // 256).astype(np.uint8)[..., None], 3, axis=2))


@pytest.mark.parametrize("kind", [np.int32, np.float32])
def test_32_bit_images_are_rejected(kind: type) -> None:
    with pytest.raises(ValueError, match="expected 8 or 16 bits per channel, found 32"):
        to_rgb(Image.fromarray(np.ones((4, 4), kind)))


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "CMYK", "P", "1"])
def test_every_mode_is_encoded_as_an_rgb_jpeg(mode: str) -> None:
    source = Image.new("RGB", (16, 16), (255, 255, 255)).convert(mode)
    jpeg = Image.open(io.BytesIO(encode_jpeg(source, 95)))
    assert (jpeg.format, jpeg.mode, jpeg.size) == ("JPEG", "RGB", (16, 16))
    assert np.asarray(jpeg).min() > 250


@pytest.mark.parametrize("bits", [10, 12, 14, 16])
def test_16_bit_images_are_scaled_by_the_bits_in_use(bits: int) -> None:
    tones = np.linspace(0, 2**bits - 1, 64 * 64).astype(np.uint16).reshape(64, 64)
    for kind in ("PNG", "TIFF"):
        found = np.asarray(to_rgb(decode_image(encoded(tones, kind))))
        assert np.array_equal(found[..., 0], tones >> (bits - 8)) and found.max() == 255


def test_8_bit_values_in_16_bits_are_kept() -> None:
    tones = np.arange(256, dtype=np.uint16).reshape(16, 16)
    assert np.array_equal(np.asarray(to_rgb(decode_image(encoded(tones, "PNG"))))[..., 1], tones)


def colour_png(values: np.ndarray) -> bytes:
    """Encode 16-bit colours [H, W, 2 to 4], which Pillow cannot write."""
    height, width, channels = values.shape
    header = struct.pack(">IIBBBBB", width, height, 16, {2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    data = [struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(data)


@pytest.mark.parametrize("channels", [2, 3, 4])
def test_16_bit_colours_with_12_bits_in_use_are_rejected(channels: int) -> None:
    values = np.random.default_rng(0).integers(0, 1 << 16, (5, 6, channels))
    values[..., : 3 : 1 if channels != 2 else 2][0, 0] = 65535
    if channels != 3:
        values[..., -1] = 65535
    colours = values[..., : channels - (channels != 3)]
    found = np.asarray(to_rgb(decode_image(colour_png(values))))
    assert np.array_equal(found, np.broadcast_to(colours >> 8, (5, 6, 3)))
    values[..., : colours.shape[-1]] >>= 4
    with pytest.raises(ValueError, match="16-bit colours of which at most 12 bits are in use"):
        decode_image(colour_png(values))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA"])
def test_transparent_pixels_are_blended_with_white(mode: str) -> None:
    colours, alpha = pixels(8, 9), np.random.default_rng(1).integers(0, 256, (8, 9)).astype(np.uint8)
    alpha[:2], alpha[2:4] = 0, 255
    source = Image.fromarray(colours).convert(mode.removesuffix("A") if mode != "RGBA" else "RGB")
    opaque = np.asarray(source.convert("RGB"), float)
    image = source.convert(mode)
    image.putalpha(Image.fromarray(alpha))
    found = np.asarray(to_rgb(image), float)
    share = alpha[..., None] / 255
    assert np.abs(found - (share * opaque + (1 - share) * 255)).max() <= 1
    assert (found[:2] == 255).all() and (found[2:4] == opaque[2:4]).all()


@pytest.mark.parametrize("mode", ["P", "L", "RGB"])
def test_transparent_colour_becomes_white(mode: str) -> None:
    source = Image.fromarray(pixels(8, 8)).convert(mode)
    hidden = source.getpixel((3, 3))
    image = decode_image(encoded(source, "PNG", transparency=hidden))
    expected = np.where((np.asarray(source) == hidden).reshape(8, 8, -1).all(-1, keepdims=True), 255, source.convert("RGB"))
    assert np.array_equal(np.asarray(to_rgb(image)), expected)


def test_palette_colours_are_distinct() -> None:
    colours = palette(171)
    assert len(np.unique(colours, axis=0)) == 171
    assert np.array_equal(palette(5), colours[:5])
    for colour in colours[:12]:
        _, saturation, value = colorsys.rgb_to_hsv(*colour / 255)
        assert min(abs(saturation - 0.55), abs(saturation - 0.95)) < 0.01
        assert min(abs(value - 0.95), abs(value - 0.65)) < 0.01


def test_labels_are_coloured_and_others_are_black() -> None:
    labels = np.array([[0, 2, 255], [3, 1, 2]])
    painted = colour_labels(labels, 3)
    colours = palette(3)
    assert painted.shape == (2, 3, 3)
    assert np.array_equal(painted[0, 1], colours[2]) and np.array_equal(painted[1, 1], colours[1])
    assert not painted[0, 2].any() and not painted[1, 0].any()


@pytest.mark.parametrize(
    ("size", "shortest", "longest", "expected"),
    [
        ((640, 480), 640, 2560, (853, 640)),  # 853.33
        ((427, 640), 640, 2560, (640, 959)),  # 959.25
        ((20, 10), 5, 0, (10, 5)),
        ((60, 2600), 640, 2560, (59, 2560)),  # limited: 59.08
        ((60, 2600), 640, 0, (640, 27733)),
        ((1, 9000), 640, 2560, (1, 2560)),  # never below one pixel
        ((7, 7), 14, 14, (14, 14)),
    ],
)
def test_shortest_edge_is_resized_up_to_the_longest(size, shortest, longest, expected):
    assert resize_shortest_edge(Image.new("L", size), shortest, longest).size == expected


def test_resize_to_half_averages_with_the_weights_of_a_triangle():
    """An antialiased bilinear filter that halves a row weights its four nearest pixels 1, 3, 3, 1 of 8."""
    row = np.random.default_rng(0).integers(0, 256, 32)
    image = Image.fromarray(np.broadcast_to(row[None, :, None], (32, 32, 3)).astype(np.uint8))
    resized = np.asarray(resize_shortest_edge(image, 16, 16))[8]
    weights = np.array([1, 3, 3, 1])
    expected = [(row[2 * i - 1 : 2 * i + 3] * weights).sum() / 8 for i in range(1, 15)]
    np.testing.assert_allclose(resized[1:15, 1], expected, atol=0.51)


def test_zero_keeps_the_image():
    image = Image.new("P", (30, 20))
    assert resize_shortest_edge(image, 0, 10) is image
