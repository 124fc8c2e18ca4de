"""Preview of shards with masks: painted masks, skipped samples, images of extreme shapes."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from helpers.fake_data import annotation, encoded, pixels, write_files, write_tar
from pixelclip.visualization import pictures
from pixelclip.visualization.pictures import preview

HEIGHT, WIDTH = 24, 32
JPEG = encoded(pixels(HEIGHT, WIDTH))
HALVES = np.stack([np.add.outer(np.zeros(HEIGHT, int), np.arange(WIDTH)) // 16 == half for half in range(2)])
GOOD = {"jpg": JPEG, "json": annotation(HALVES)}


def shard(path: Path, **samples: dict[str, bytes]) -> Path:
    return write_tar(path, {f"{key}.{kind}": data for key, parts in samples.items() for kind, data in parts.items()})


def test_preview_shows_image_and_coloured_masks(tmp_path):
    shard(tmp_path / "masks" / "0.tar", a=GOOD, without={"jpg": JPEG})
    assert preview(tmp_path / "masks", 5, tmp_path / "preview.jpg") == 1
    with Image.open(tmp_path / "preview.jpg") as image:
        shown = np.asarray(image).astype(int)
    assert shown.shape == (240, 640, 3)
    photo, left, right = shown[120, 20:140], shown[120, 340:460], shown[120, 500:620]
    assert np.abs(left.mean(axis=0) - right.mean(axis=0)).max() > 30 and np.abs(left - photo).mean() > 10
    assert shown[60, 480].min() > 200  # the border between the two


def test_only_needed_shards_are_opened(tmp_path, monkeypatch):
    shard(tmp_path / "masks" / "0.tar", a=GOOD, b=GOOD)
    write_files(tmp_path / "masks", {"1.tar": b"no tar"})
    assert preview(tmp_path / "masks", 2, tmp_path / "preview.jpg") == 2
    with pytest.raises(ValueError, match=r"1\.tar: cannot be read as a tar"):
        preview(tmp_path / "masks", 3, tmp_path / "preview.jpg")


@pytest.mark.parametrize(
    ("bad", "reason"),
    [({"jpg": b"x"}, "unreadable image"), ({"json": b"{"}, "unreadable JSON"), ({"json": annotation(HALVES[:, 1:])}, "32x23")],
    ids=["image", "JSON", "size"],
)
def test_bad_sample_is_reported_and_skipped(tmp_path, capsys, bad, reason):
    shard(tmp_path / "masks" / "0.tar", odd=GOOD | bad, good=GOOD)
    assert preview(tmp_path / "masks", 5, tmp_path / "preview.jpg") == 1
    printed = capsys.readouterr().out
    assert printed.startswith("preview: ") and "0.tar: odd: " in printed and reason in printed
    shard(tmp_path / "masks" / "0.tar", odd=GOOD | bad)
    with pytest.raises(ValueError, match="masks: contains no readable image with masks"):
        preview(tmp_path / "masks", 5, tmp_path / "preview.jpg")


@pytest.mark.parametrize("size", [(1, 60_000), (60_000, 1)])
def test_preview_of_a_strip_is_bounded(tmp_path, size):
    image, mask = encoded(Image.new("RGB", size), "PNG"), np.ones((1, *size[::-1]), bool)
    shard(tmp_path / "masks" / "0.tar", strip={"jpg": image, "json": annotation(mask)})
    preview(tmp_path / "masks", 1, tmp_path / "preview.jpg")
    with Image.open(tmp_path / "preview.jpg") as shown:
        assert shown.width <= 2400 and shown.height <= 240


@pytest.mark.parametrize("size", [(1, 60_000), (60_000, 1)])
def test_thumbnail_of_a_strip_has_the_usual_size(size):
    assert pictures._thumbnail(Image.new("RGB", size), np.ones(size[::-1], bool)).size == (96, 96)
