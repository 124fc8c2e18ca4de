"""Run-length encoded masks against pycocotools' decoder and numpy's indexing."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pycocotools import mask as rle

from pixelclip.data.rle import RunMasks, read_runs


def encode(masks: np.ndarray) -> RunMasks:
    codes = [rle.encode(np.asfortranarray(mask, np.uint8))["counts"].decode() for mask in masks]
    return RunMasks(read_runs(codes, masks[0].size), masks.shape[1:])


@given(
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    number=st.integers(1, 4),
    coarse=st.integers(1, 9),
    share=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    seed=st.integers(0, 10_000),
    data=st.data(),
)
def test_samples_equal_those_of_decoded_masks(size, number, coarse, share, seed, data):
    random = np.random.default_rng(seed)
    small = random.random((number, -(-size[0] // coarse), -(-size[1] // coarse))) < share
    masks = small.repeat(coarse, 1).repeat(coarse, 2)[:, : size[0], : size[1]]
    rows, columns = (np.array(data.draw(st.lists(st.integers(0, edge - 1), max_size=50)), int) for edge in size)
    runs = encode(masks)
    assert np.array_equal(runs.sample(rows, columns), masks[:, rows][:, :, columns])
    for index, mask in enumerate(masks):
        assert np.array_equal(runs.decode(index), mask)


@given(
    size=st.tuples(st.integers(1, 30), st.integers(1, 30)),
    grid=st.tuples(st.integers(1, 70), st.integers(1, 40)),
    seed=st.integers(0, 10_000),
)
def test_packed_samples_equal_packed_decoded_masks(size, grid, seed):
    """Rows ascend and may repeat, columns are in any order, masks have even and odd numbers of runs."""
    random = np.random.default_rng(seed)
    masks = random.random((5, *size)) < np.array([0, 0.1, 0.5, 0.9, 1])[:, None, None]
    rows, columns = np.sort(random.integers(0, size[0], grid[0])), random.integers(0, size[1], grid[1])
    expected = np.packbits(masks[:, rows][:, :, columns], axis=1, bitorder="little")
    assert np.array_equal(encode(masks).sample_packed(rows, columns), expected)


def test_large_masks_of_many_runs_are_sampled():
    masks = np.random.default_rng(0).random((3, 300, 500)) < 0.5
    rows, columns = np.arange(0, 300, 7), np.arange(499, 0, -3)
    assert np.array_equal(encode(masks).sample(rows, columns), masks[:, rows][:, :, columns])


def test_no_masks_and_whole_mask_are_sampled():
    rows, columns = np.arange(3), np.arange(4)
    assert RunMasks(read_runs([], 30), (5, 6)).sample(rows, columns).shape == (0, 3, 4)
    assert RunMasks.whole((5, 6)).sample(rows, columns).all()
    assert RunMasks.whole((5, 6)).decode(0).shape == (5, 6)


@pytest.mark.parametrize("counts", ["", "o", "oooooooo1", "é1", "V2I"])
def test_damaged_codes_are_rejected(counts):
    good = rle.encode(np.asfortranarray(np.ones((7, 9), np.uint8)))["counts"].decode()
    for codes in ([counts], [good, counts], [counts, good], [good, counts, good]):
        with pytest.raises(ValueError, match="damaged RLE"):
            read_runs(codes, 63)
