"""Masks from label maps against naive loops; every image without label map is named."""

import json
from pathlib import Path

import numpy as np
import pytest
from pycocotools import mask as rle

from helpers.fake_data import encoded, pixels, read_tar, write_files, write_tar
from pixelclip.config import MasksConfig
from pixelclip.masks import run

HEIGHT, WIDTH = 12, 16
RANDOM = np.random.default_rng(4)
LABELS = {f"im.age{n}": RANDOM.choice([0, 0, 2, 3, 255], (HEIGHT, WIDTH)).astype(np.uint8) for n in range(3)}


@pytest.fixture
def labelled(tmp_path: Path) -> Path:
    files = {f"images/sub/{name}.jpg": encoded(pixels(HEIGHT, WIDTH)) for name in LABELS}
    files |= {f"labels/sub/{name}.png": encoded(labels, "PNG") for name, labels in LABELS.items()}
    return write_files(tmp_path / "set", files | {"classes.txt": b"a\nb\nc\nd\n"})


def shards(folder: Path, size: tuple[int, int] = (HEIGHT, WIDTH), **more: bytes) -> Path:
    """Write shards with the keys of stage `shards`, which have no dots."""
    members = {f"deep/{name.replace('.', '_')}.jpg": encoded(pixels(*size)) for name in LABELS}
    write_tar(folder / "0.tar", members | {f"{key}.jpg": data for key, data in more.items()})
    return folder


def config(labelled: Path, **settings: object) -> MasksConfig:
    return MasksConfig(**{"generator": "labels", "labels_folder": str(labelled), "workers": 0} | settings)


def written(out: Path, name: str) -> set[bytes]:
    """Decode the masks of a sample independently."""
    document = json.loads(read_tar(out / "0.tar")[f"deep/{name.replace('.', '_')}.json"])
    masks = [rle.decode(entry["segmentation"]).astype(bool) for entry in document["annotations"]]
    assert [entry["area"] for entry in document["annotations"]] == [mask.sum() for mask in masks]
    assert not any(key.startswith(("category", "label", "class")) for entry in document["annotations"] for key in entry)
    assert len({mask.tobytes() for mask in masks}) == len(masks)
    return {mask.tobytes() for mask in masks}


def flood_fill(labels: np.ndarray) -> set[bytes]:
    """Find the 8-connected components of equal labels pixel by pixel."""
    masks, seen = set(), np.zeros(labels.shape, bool)
    for start in np.ndindex(labels.shape):
        if seen[start] or labels[start] == 255:
            continue
        mask, stack = np.zeros(labels.shape, bool), [start]
        while stack:
            y, x = stack.pop()
            inside = 0 <= y < labels.shape[0] and 0 <= x < labels.shape[1]
            if inside and not mask[y, x] and labels[y, x] == labels[start]:
                mask[y, x] = True
                stack += [(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
        seen |= mask
        masks.add(mask.tobytes())
    return masks


@pytest.mark.parametrize("unit", ["class", "component"])
def test_masks_equal_a_naive_loop(labelled: Path, tmp_path: Path, unit: str) -> None:
    metrics = run(shards(tmp_path / "in"), tmp_path / "out", config(labelled, labels_unit=unit))
    total = 0
    for name, labels in LABELS.items():
        by_class = {(labels == value).tobytes() for value in (0, 2, 3)}
        expected = flood_fill(labels) if unit == "component" else by_class
        assert written(tmp_path / "out", name) == expected
        total += len(expected)
    assert metrics == {"images": 3.0, "masks": float(total), "masks_per_image": total / 3, "bad_images": 0.0}


@pytest.mark.parametrize("unit", ["class", "component"])
def test_label_map_follows_a_shrunk_image(labelled: Path, tmp_path: Path, unit: str) -> None:
    """Shrunk by stage `shards` and again by stage `masks`: 16x12 to 9x7 to 5x4 pixels."""
    run(shards(tmp_path / "in", (7, 9)), tmp_path / "out", config(labelled, labels_unit=unit, shortest_edge=4))
    for name, labels in LABELS.items():
        small = np.array([[labels[int((y + 0.5) * 3), int((x + 0.5) * 16 / 5)] for x in range(5)] for y in range(4)])
        by_class = {(small == value).tobytes() for value in set(small.flat) - {255}}
        assert written(tmp_path / "out", name) == (flood_fill(small) if unit == "component" else by_class)


@pytest.mark.parametrize(
    "size", [(WIDTH, HEIGHT), (HEIGHT, WIDTH - 3), (HEIGHT + 3, WIDTH + 4)], ids=["turned", "cut", "larger"]
)
def test_image_of_another_shape_is_rejected(labelled: Path, tmp_path: Path, size: tuple[int, int]) -> None:
    with pytest.raises(
        ValueError, match=rf"deep/im_age0: label map has size \(16, 12\), but the image has \({size[1]}, {size[0]}"
    ):
        run(shards(tmp_path / "in", size), tmp_path / "out", config(labelled))


def test_every_image_without_label_map_is_named(labelled: Path, tmp_path: Path) -> None:
    photo = encoded(pixels(HEIGHT, WIDTH))
    source = shards(tmp_path / "in", other=photo, another=photo)
    with pytest.raises(ValueError, match=r"(?s)2 of 5 samples.*other: no label map in .*set\n.*another: no label map"):
        run(source, tmp_path / "out", config(labelled))
    metrics = run(source, tmp_path / "out", config(labelled, max_bad_share=0.5))
    assert (metrics["images"], metrics["bad_images"]) == (3.0, 2.0)
    bad = json.loads((tmp_path / "out" / "0.summary.json").read_text())["bad"]
    assert [line.partition(": ")[2].partition(":")[0] for line in bad] == ["other", "another"]


def test_image_with_ignored_pixels_only_is_reported(labelled: Path, tmp_path: Path) -> None:
    write_files(labelled, {"labels/sub/im.age1.png": encoded(np.full((HEIGHT, WIDTH), 255, np.uint8), "PNG")})
    with pytest.raises(ValueError, match=r"1 of 3 .*\n.*deep/im_age1: no mask found"):
        run(shards(tmp_path / "in"), tmp_path / "out", config(labelled))


def test_folder_of_other_images_fails_early(labelled: Path, tmp_path: Path) -> None:
    write_tar(tmp_path / "in" / "0.tar", {"other.jpg": encoded(pixels(HEIGHT, WIDTH))})
    with pytest.raises(ValueError, match=r"masks\.labels_folder .*set: no label map of other, and none of any other of the 1"):
        run(tmp_path / "in", tmp_path / "out", config(labelled))


def test_images_of_the_same_name_are_rejected(labelled: Path, tmp_path: Path) -> None:
    again = {"images/im.age1.jpg": encoded(pixels(HEIGHT, WIDTH)), "labels/im.age1.png": encoded(LABELS["im.age1"], "PNG")}
    with pytest.raises(ValueError, match=r"two images are named im\.age1: .*/images/im\.age1\.jpg and .*/images/sub/im\.age1"):
        run(shards(tmp_path / "in"), tmp_path / "out", config(write_files(labelled, again)))


def test_training_split_of_a_benchmark_is_used(tmp_path: Path) -> None:
    """COCO-Stuff as unpacked, with shards of both splits: only training images have masks."""
    folder = tmp_path / "coco"
    for split, value in (("train", 181), ("val", 0)):
        labels = np.full((HEIGHT, WIDTH), value, np.uint8)
        write_files(folder, {f"{split}2017/{split}.jpg": encoded(pixels(HEIGHT, WIDTH))})
        write_files(folder, {f"stuffthingmaps_trainval2017/{split}2017/{split}.png": encoded(labels, "PNG")})
    write_tar(tmp_path / "in" / "0.tar", {f"{name}.jpg": encoded(pixels(HEIGHT, WIDTH)) for name in ("train", "val")})
    settings = {"labels_kind": "coco-stuff", "max_bad_share": 0.5}
    for split in ("train", "val"):
        run(tmp_path / "in", tmp_path / split, config(folder, **settings, labels_split=split))
        assert list(read_tar(tmp_path / split / "0.tar")) == [f"{split}.jpg", f"{split}.json"]


def test_workers_write_the_same_bytes(labelled: Path, tmp_path: Path) -> None:
    source = shards(tmp_path / "in")
    for workers in (0, 1):
        run(source, tmp_path / f"{workers}", config(labelled, workers=workers))
    assert (tmp_path / "0" / "0.tar").read_bytes() == (tmp_path / "1" / "0.tar").read_bytes()


@pytest.mark.parametrize("settings", [{"labels_folder": "x", "generator": "given"}, {"generator": "labels"}])
def test_folder_and_generator_belong_together(settings: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="labels_folder is required for generator labels and must be empty otherwise"):
        MasksConfig(**settings)
