"""Labelled sets: read as they are, and every fault names the file, what was found and what is allowed."""

from pathlib import Path

import numpy as np
import pytest
from conftest import encoded, pixels, write_files
from PIL import Image

from pixelclip.benchmarks import IGNORE, open_folder, read_classes

LABELS = np.array([[0, 1, 2], [255, 2, 0]], np.uint8)
FILES = {
    "classes.txt": b"road\nsky, heaven\n grass \n\n",
    "images/a.jpg": encoded(pixels(2, 3)),
    "labels/a.png": encoded(LABELS, "PNG"),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_files(tmp_path / "set", FILES)


def test_a_set_is_read_as_it_is(folder: Path) -> None:
    write_files(folder, {"images/sub/b.PNG": encoded(pixels(2, 3).copy(), "PNG"), "labels/sub/b.png": encoded(LABELS, "PNG")})
    opened = open_folder(folder)
    assert opened.classes == ["road", "sky, heaven", "grass"]
    assert [image.relative_to(folder / "images").as_posix() for image, _ in opened.pairs] == ["a.jpg", "sub/b.PNG"]
    image, labels = opened.read(1)
    assert np.array_equal(np.asarray(image), pixels(2, 3))
    assert np.array_equal(labels, LABELS)


def test_a_palette_label_map_gives_its_indices(folder: Path) -> None:
    label = Image.fromarray(LABELS)
    label.putpalette([200, 10, 10] * 256)
    (folder / "labels" / "a.png").write_bytes(encoded(label, "PNG"))
    assert np.array_equal(open_folder(folder).read(0)[1], LABELS)


def test_an_image_is_read_upright(folder: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    (folder / "images" / "a.jpg").write_bytes(encoded(pixels(3, 2), exif=exif))
    assert open_folder(folder).read(0)[0].size == (3, 2)


@pytest.mark.parametrize(
    ("missing", "said"),
    [
        ("images", "set: is no labelled set, images/ is missing"),
        ("labels", "set: is no labelled set, labels/ is missing"),
        ("classes.txt", r"classes\.txt: class names, one a line, cannot be read"),
        ("labels/a.png", r"set: 1 images have no label map, the first is .*labels/a\.png"),
        ("images/a.jpg", "images: holds no image"),
    ],
)
def test_a_missing_part_is_named(folder: Path, missing: str, said: str) -> None:
    (folder / missing).rename(folder / "away")
    with pytest.raises(ValueError, match=said):
        open_folder(folder)


@pytest.mark.parametrize("value", [3, 100, 254])
def test_a_label_out_of_range_names_file_value_and_what_is_allowed(folder: Path, value: int) -> None:
    labels = LABELS.copy()
    labels[0, 0] = value
    (folder / "labels" / "a.png").write_bytes(encoded(labels, "PNG"))
    with pytest.raises(ValueError, match=rf"labels/a\.png: label {value} found, allowed are 0 to 2 .* and {IGNORE}"):
        open_folder(folder).read(0)


@pytest.mark.parametrize(
    ("label", "said"),
    [
        (encoded(LABELS.T.copy(), "PNG"), r"label map of size \(2, 3\), its image a\.jpg has \(3, 2\)"),
        (encoded(pixels(2, 3), "PNG"), "mode L or P.* found mode RGB"),
        (encoded(LABELS.astype(np.uint16), "PNG"), "found mode I;16"),
        (encoded(Image.new("1", (3, 2)), "PNG"), "found mode 1"),
        (b"", "unreadable image"),
        (encoded(LABELS, "PNG")[:-30], "unreadable image"),
    ],
)
def test_an_unusable_label_map_is_named(folder: Path, label: bytes, said: str) -> None:
    (folder / "labels" / "a.png").write_bytes(label)
    with pytest.raises(ValueError, match=rf"labels/a\.png: .*{said}"):
        open_folder(folder).read(0)


def test_an_unreadable_image_is_named(folder: Path) -> None:
    (folder / "images" / "a.jpg").write_bytes(FILES["images/a.jpg"][:-50])
    with pytest.raises(ValueError, match=r"images/a\.jpg: unreadable image"):
        open_folder(folder).read(0)


def test_an_image_of_unknown_range_is_named(folder: Path) -> None:
    (folder / "images" / "a.jpg").write_bytes(encoded(np.ones((2, 3), np.float32), "TIFF"))
    with pytest.raises(ValueError, match=r"images/a\.jpg: .*found 32"):
        open_folder(folder).read(0)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "empty"),
        (b"\n \n", "empty"),
        (b"road\n\nsky\n", "blank class name at position 2"),
        (b"road\n , \nsky\n", "blank class name at position 2"),
        (b"road\nsky\n road\n", "found twice: 'road'"),
        (b"stra\xdfe\n", "cannot be read"),
    ],
)
def test_bad_class_names_are_named(tmp_path: Path, content: bytes, said: str) -> None:
    path = write_files(tmp_path, {"classes.txt": content}) / "classes.txt"
    with pytest.raises(ValueError, match=rf"classes\.txt: .*{said}"):
        read_classes(path)


def test_a_byte_order_mark_is_no_part_of_the_first_name(tmp_path: Path) -> None:
    path = write_files(tmp_path, {"classes.txt": b"\xef\xbb\xbfroad\r\nstra\xc3\x9fe\r\n"}) / "classes.txt"
    assert read_classes(path) == ["road", "straße"]


def test_more_classes_than_8_bits_hold_are_refused(folder: Path) -> None:
    (folder / "classes.txt").write_text("\n".join(f"class{i}" for i in range(255)))
    assert len(open_folder(folder).classes) == 255
    (folder / "classes.txt").write_text("\n".join(f"class{i}" for i in range(256)))
    with pytest.raises(ValueError, match=r"classes\.txt: 256 classes, 8-bit label maps hold at most 255"):
        open_folder(folder)
