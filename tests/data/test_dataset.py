"""Training samples depend only on seed and position, occur once per epoch, and keep image and masks aligned.

Alignment is tested with an image whose colours are its coordinates.
"""

import io
from collections.abc import Iterable
from dataclasses import asdict, replace
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps

from helpers.fake_data import annotation, encoded, pixels, turned, write_tar
from helpers.samples import FULL, PLAIN, blobs, in_runs
from pixelclip.data.dataset import MaskedImages, PackedBatch, collate, load_batches, sample_indices
from pixelclip.data.rle import RunMasks
from pixelclip.data.views import TrainingSample, draw
from pixelclip.distributed import ProcessGroup


def coordinates(height: int, width: int) -> Image.Image:
    """Create an image whose red and green are four times the column and the row; at most 64 pixels per side."""
    rows, columns = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([columns * 4, rows * 4, np.full_like(rows, 200)], axis=-1).astype(np.uint8))


def generator(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.fixture
def shards(tmp_path: Path) -> list[Path]:
    """Write two shards with seven samples and one image without masks."""
    samples = {}
    for i in range(7):
        height, width = 40 + 3 * i, 61 - 2 * i
        samples[f"s{i}.jpg"] = encoded(pixels(height, width, seed=i), quality=95)
        samples[f"s{i}.json"] = annotation(blobs(height, width, count=1 + i % 3, seed=i))
    names = list(samples)
    return [
        write_tar(tmp_path / "0.tar", {name: samples[name] for name in names[:6]}),
        write_tar(tmp_path / "1.tar", {name: samples[name] for name in names[6:]} | {"alone.jpg": samples["s0.jpg"]}),
    ]


def same(first: TrainingSample | PackedBatch, second: TrainingSample | PackedBatch) -> bool:
    return all(
        torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other
        for value, other in zip(asdict(first).values(), asdict(second).values(), strict=True)
    )


@pytest.mark.parametrize(("shortest_edge", "crop"), [(64, 32), (32, 24), (96, 33)])
def test_masks_and_image_stay_aligned_through_crop_and_flip(shortest_edge: int, crop: int) -> None:
    views = replace(PLAIN, flip=True, shortest_edge=shortest_edge, crop=crop)
    masks = blobs(64, 64)
    flips, compared = set(), 0
    for seed in range(12):
        sample = draw(coordinates(64, 64), in_runs(masks), views, generator(seed))
        column, row = (sample.weak[:2].numpy() * 255 / 4) + 0.5  # image coordinates of every cell's centre
        flips.add(bool(column[5, 5] > column[5, 25]))
        sure = np.minimum(abs(column - column.round()), abs(row - row.round())) > 0.2
        sure[[0, -1]] = sure[:, [0, -1]] = False  # resampling averages fewer pixels at the edges
        for y, x in zip(*np.nonzero(sure), strict=True):
            naive = masks[:, int(row[y, x]), int(column[y, x])]
            assert np.array_equal(sample.masks[:, y, x].numpy(), naive), (seed, y, x)
        compared += sure.sum()
    assert flips == {True, False}
    assert compared > 1000


def test_crops_vary_within_the_image_and_have_the_right_size() -> None:
    lefts = set()
    for seed in range(20):
        sample = draw(coordinates(64, 64), in_runs(blobs(64, 64)), PLAIN, generator(seed))
        column = sample.weak[0, 16].numpy() * 255 / 4
        assert column[0] >= 0 and column[-1] <= 63
        assert column[-1] - column[0] == pytest.approx(31, abs=0.6)
        lefts.add(round(float(column[0])))
    assert len(lefts) > 8


def test_longest_edge_limits_the_scale_and_small_images_are_not_cropped() -> None:
    wide = coordinates(32, 64)  # scaled to 64 it would be 128 wide; the limit of 64 keeps its size
    views = replace(PLAIN, longest_edge=64, crop=48)
    sample = draw(wide, in_runs(blobs(32, 64)), views, generator(0))
    column, row = sample.weak[0, 16].numpy() * 255 / 4, sample.weak[1, :, 16].numpy() * 255 / 4
    assert row[-1] - row[0] == pytest.approx(31, abs=0.6)  # all of the height
    assert column[-1] - column[0] == pytest.approx(48 * 31 / 32, abs=0.8)


def test_masks_of_at_most_one_cell_are_dropped() -> None:
    masks = np.zeros((4, 32, 32), bool)
    masks[1, 7, 9] = masks[2, 7, 9] = masks[2, 20, 3] = True
    masks[3, :, 5:] = True
    views = replace(PLAIN, shortest_edge=32)
    sample = draw(coordinates(32, 32), in_runs(masks), views, generator(0))
    assert np.array_equal(sample.masks.numpy(), masks[2:])


def test_cutout_is_black_in_the_strong_view_and_removed_from_the_masks() -> None:
    views = replace(PLAIN, strong_view=True)
    places = set()
    for seed in range(10):
        sample = draw(Image.new("RGB", (64, 64), (180, 190, 200)), RunMasks.whole((64, 64)), views, generator(seed))
        black = (sample.strong == 0).all(0)
        assert torch.equal(sample.masks[0], ~black)
        rows, columns = np.nonzero(black.numpy())
        top, left, height, width = rows.min(), columns.min(), np.ptp(rows) + 1, np.ptp(columns) + 1
        assert height * width == len(rows)  # one rectangle
        assert 2 <= height <= 17 and 2 <= width <= 17  # a tenth to a half of 32
        assert not (sample.weak == 0).any()
        places.add((top, left))
    assert len(places) > 5


def test_switches_disable_jitter_strong_view_and_cutout() -> None:
    image, masks = Image.fromarray(pixels(64, 64)), in_runs(blobs(64, 64))
    plain = [draw(image, masks, PLAIN, generator(seed)) for seed in range(6)]
    assert all(torch.equal(sample.weak, sample.strong) for sample in plain)
    jittered = [draw(image, masks, replace(PLAIN, color_jitter=True), generator(seed)) for seed in range(6)]
    assert sum(not torch.equal(a.weak, b.weak) for a, b in zip(plain, jittered, strict=True)) >= 4
    for sample in jittered:
        assert sample.weak.min() >= 0 and sample.weak.max() <= 1
    uncut = replace(PLAIN, strong_view=True, cutout_max=0.0)
    strong = [draw(image, masks, uncut, generator(seed)) for seed in range(6)]
    assert all(torch.equal(a.masks, b.masks) and torch.equal(a.weak, b.weak) for a, b in zip(plain, strong, strict=True))
    assert sum(not torch.equal(sample.weak, sample.strong) for sample in strong) >= 4


def test_views_are_normalised() -> None:
    normal = replace(PLAIN, mean=(0.1, 0.2, 0.3), std=(0.5, 2.0, 4.0))
    image, masks = coordinates(64, 64), in_runs(blobs(64, 64))
    found, raw = draw(image, masks, normal, generator(0)), draw(image, masks, PLAIN, generator(0))
    undone = found.strong * torch.tensor(normal.std).view(3, 1, 1) + torch.tensor(normal.mean).view(3, 1, 1)
    torch.testing.assert_close(undone, raw.strong, atol=1e-6, rtol=0)


def test_sample_depends_only_on_seed_and_position(shards: list[Path]) -> None:
    dataset, other = MaskedImages(shards, FULL, seed=3), MaskedImages(shards, FULL, seed=3)
    other[11]
    assert same(dataset[4], other[4])
    assert same(dataset[4], dataset[4])
    drawn = [dataset[position] for position in (4, 5, 4 + 7, 4 + 14)] + [MaskedImages(shards, FULL, seed=4)[4]]
    for index, sample in enumerate(drawn):
        assert not any(torch.equal(sample.weak, before.weak) for before in drawn[:index])


def test_every_epoch_visits_each_sample_once_in_a_new_order(shards: list[Path]) -> None:
    dataset = MaskedImages(shards, FULL, seed=0)
    epochs = [[dataset.member(7 * epoch + offset) for offset in range(7)] for epoch in range(4)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_samples_without_masks_are_counted(shards: list[Path], tmp_path: Path) -> None:
    dataset = MaskedImages(shards, FULL, seed=0)
    assert (len(dataset), dataset.without_masks, dataset.bad) == (7, 1, [])
    with pytest.raises(ValueError, match="no sample in these shards has masks; run the masks stage first"):
        MaskedImages([write_tar(tmp_path / "bare" / "0.tar", {"a.jpg": b"x"})], FULL, seed=0)


def test_sample_is_read_with_its_own_masks(shards: list[Path]) -> None:
    dataset = MaskedImages(shards, FULL, seed=0)
    for index in range(7):
        image, masks = dataset.read(index)
        expected = blobs(40 + 3 * index, 61 - 2 * index, count=1 + index % 3, seed=index)
        assert image.size == (61 - 2 * index, 40 + 3 * index)
        assert np.array_equal([masks.decode(number) for number in range(len(masks))], expected)


BAD = {
    "image": (b"no image", annotation(blobs(40, 61)), "unreadable image"),
    "json": (encoded(pixels(40, 61)), b"{", "unreadable JSON"),
    "size": (encoded(pixels(40, 61)), annotation(blobs(61, 40)), "mask has size 40x61, but the image is 61x40"),
    "turned": (encoded(pixels(40, 61), exif=turned(3)), annotation(blobs(40, 61)), "EXIF orientation 3 turns this image"),
    "empty": (encoded(pixels(40, 61)), annotation(np.zeros((2, 40, 61))), "all 2 masks are empty"),
    "no masks": (encoded(pixels(40, 61)), b'{"annotations": []}', "no mask found"),
    "rle": (encoded(pixels(40, 61)), b'{"annotations": [{"segmentation": {"size": [40, 61], "counts": "oo"}}]}', "damaged RLE"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_sample_becomes_a_string_that_names_it(shards: list[Path], tmp_path: Path, kind: str) -> None:
    image, masks, reason = BAD[kind]
    bad = write_tar(tmp_path / "bad.tar", {"some/folder/x y.jpg": image, "some/folder/x y.json": masks})
    dataset = MaskedImages([*shards, bad], FULL, seed=0)
    batch = collate([dataset[position] for position in range(8)])
    assert len(batch.bad) == 1 and len(batch.weak) == 7
    assert batch.bad[0].startswith(f"{bad}: some/folder/x y.jpg: ") and reason in batch.bad[0]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_image_without_masks_is_read_upright(tmp_path: Path, orientation: int) -> None:
    photo = encoded(pixels(200, 300), exif=turned(orientation))
    dataset = MaskedImages([write_tar(tmp_path / "0.tar", {"a.jpg": photo})], FULL, seed=0, masked=False)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(photo)))
    image, masks = dataset.read(0)
    assert np.array_equal(image, upright)
    assert np.array_equal(masks.decode(0), np.ones(upright.size[::-1]))
    assert isinstance(dataset[0], TrainingSample)


def test_collate_joins_samples_and_indexes_the_image_of_each_mask() -> None:
    counts = [2, 0, 3]
    masks = [torch.rand(count, 11, 11) < 0.5 for count in counts]
    packed = [torch.from_numpy(np.packbits(of_one.numpy(), axis=1, bitorder="little")) for of_one in masks]
    samples: list[TrainingSample | str] = [
        TrainingSample(torch.full((3, 4, 4), float(i)), torch.full((3, 4, 4), -float(i)), of_one)
        for i, of_one in enumerate(packed)
    ]
    joined = collate([samples[0], "why not", *samples[1:]])
    assert len(joined.masks) == 5 and joined.masks.shape[1] == 2
    batch = joined.to(torch.device("cpu"))
    assert batch.image_index.tolist() == [0, 0, 2, 2, 2]
    assert batch.weak[:, 0, 0, 0].tolist() == [0, 1, 2] and batch.strong[:, 0, 0, 0].tolist() == [0, -1, -2]
    assert torch.equal(batch.masks, torch.cat(masks)) and batch.masks.is_contiguous()
    assert batch.bad == ["why not"]


def test_collate_of_bad_samples_only_is_an_empty_batch() -> None:
    batch = collate(["one", "two"]).to(torch.device("cpu"))
    assert (len(batch.weak), len(batch.strong), len(batch.masks), len(batch.image_index)) == (0, 0, 0, 0)
    assert batch.masks.dtype == torch.bool and batch.image_index.dtype == torch.long
    assert batch.bad == ["one", "two"]


def test_resumed_loader_yields_the_same_batches(shards: list[Path]) -> None:
    undisturbed = batches(shards, sample_indices(3, range(3), 1, 0, 6))
    resumed = batches(shards, sample_indices(3, range(3), 1, 4, 6))
    assert len(resumed) == 2 and len(undisturbed) == 6
    assert all(same(a, b) for a, b in zip(resumed, undisturbed[4:], strict=True))
    assert not same(undisturbed[4], undisturbed[5])


def batches(shards: list[Path], lists: Iterable[list[int]], workers: int = 0) -> list[PackedBatch]:
    return list(load_batches(MaskedImages(shards, FULL, 0), lists, workers=workers, pin=False))


def test_worker_process_yields_the_same_batches(shards: list[Path]) -> None:
    alone, worker = (batches(shards, sample_indices(4, range(4), 1, 1, 4), workers) for workers in (0, 1))
    assert all(same(a, b) for a, b in zip(alone, worker, strict=True))


@given(
    batch_size=st.integers(1, 50),
    size=st.integers(1, 9),
    pieces=st.integers(1, 5),
    start=st.integers(0, 9),
    steps=st.integers(0, 5),
)
def test_ranks_and_micro_batches_partition_the_stream(batch_size, size, pieces, start, steps):
    positions = []
    for rank in range(size):
        lists = list(sample_indices(batch_size, ProcessGroup(rank, size).local_range(batch_size), pieces, start, start + steps))
        assert len(lists) == steps * pieces
        for step in range(steps):
            mine = list(chain(*lists[step * pieces : (step + 1) * pieces]))
            assert all((start + step) * batch_size <= position < (start + step + 1) * batch_size for position in mine)
            assert abs(len(mine) - batch_size / size) < 1
            positions += mine
    assert sorted(positions) == list(range(start * batch_size, (start + steps) * batch_size))
