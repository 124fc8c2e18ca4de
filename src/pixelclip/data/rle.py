"""Validate COCO's run-length encoded masks (the format of SA-1B) and sample them without decoding. N masks, H W image."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
from numpy.typing import NDArray


def read_runs(codes: Sequence[str], num_pixels: int) -> list[NDArray[np.int64]]:
    """Decompress RLEs into run lengths, alternately outside and inside the mask, in column-major order.

    A run is a signed number in 5-bit groups, lowest first; from the fourth run on it is the difference to the run two before.

    Args:
        codes: compressed counts of all masks of one image.
        num_pixels: number of pixels of the image.

    Raises:
        ValueError: damaged, or the runs do not cover `num_pixels`. (pycocotools would write out of bounds.)
    """
    if not codes:
        return []
    texts = [code.encode(errors="surrogatepass") for code in codes]
    code = np.frombuffer(b"".join(texts), np.uint8) - np.uint8(48)  # lower codes wrap around to invalid characters
    stop = np.cumsum([len(text) for text in texts])
    if not all(texts) or code.max() > 63 or (code[stop - 1] & 32).any():
        raise ValueError("damaged RLE: its counts end early or contain an invalid character")
    last = np.flatnonzero(code < 32)
    first = np.concatenate([[0], last[:-1] + 1])
    length = last - first + 1
    if length.max() > 7:
        raise ValueError("damaged RLE: a run is too long")
    values = (code[first] & 31).astype(np.int64)
    for place in range(1, int(length.max())):
        longer = np.flatnonzero(length > place)
        values[longer] += (code[first[longer] + place] & 31).astype(np.int64) << (5 * place)
    values -= ((code[last] & 16) > 0) * (1 << (5 * length))
    ends = np.searchsorted(last, stop)
    runs = _undo_differences(values, ends)
    begins = np.concatenate([[0], ends[:-1]])
    covered = np.add.reduceat(runs, begins)
    if runs.min() < 0 or (covered != num_pixels).any():
        negative = np.minimum.reduceat(runs, begins) < 0
        wrong = covered[negative | (covered != num_pixels)][0]
        raise ValueError(f"damaged RLE: its runs cover {wrong} pixels, the image has {num_pixels}")
    return np.split(runs, ends[:-1])


def _undo_differences(values: NDArray[np.int64], ends: NDArray[np.int64]) -> NDArray[np.int64]:
    """Add to every value of a mask, from the fourth on, the one two before it; `ends` are the ends of the masks."""
    counts = np.diff(ends, prepend=0)
    begins = ends - counts
    sums = np.empty_like(values)
    for parity in (0, 1):
        np.cumsum(values[parity::2], out=sums[parity::2])
    # The cumulative sums also contain the preceding masks and the mask's first value: subtract both.
    own = np.repeat(sums[begins], counts)
    before = np.repeat(np.where(begins > 0, sums[begins - 1], 0), counts)
    odd = (np.arange(len(values)) - np.repeat(begins, counts)) & 1
    runs = sums - np.where(odd, before, own)
    runs[begins] = values[begins]
    return runs


@dataclass(frozen=True)
class RunMasks:
    """Masks of one image of (H, W) pixels as run lengths.

    Memory and time of sampling scale with runs and samples, not with the pixels of the image.
    """

    runs: Sequence[NDArray[np.int64]]
    size: tuple[int, int]

    @classmethod
    def whole(cls, size: tuple[int, int]) -> "RunMasks":
        """Return one mask that covers all pixels."""
        return cls([np.array([0, size[0] * size[1]])], size)

    def __len__(self) -> int:
        return len(self.runs)

    def sample(self, rows: NDArray[np.integer], columns: NDArray[np.integer]) -> NDArray[np.bool_]:
        """Sample the masks at all pairs of rows and columns, in any order and with repetitions: [N, h, w]."""
        rows, row_of = np.unique(rows, return_inverse=True)
        packed = self.sample_packed(rows, columns)
        inside = np.unpackbits(packed, axis=1, count=len(rows), bitorder="little")
        return cast("NDArray[np.bool_]", inside.view(bool)[:, row_of])

    def sample_packed(self, rows: NDArray[np.integer], columns: NDArray[np.integer]) -> NDArray[np.uint8]:
        """Sample the masks, 8 rows per byte: [N, ceil(h / 8), w], the first row in the lowest bit, 0 beyond the last.

        Args:
            rows: in ascending order, with repetitions.
            columns: in any order, with repetitions.
        """
        (height, width), num_masks = self.size, len(self.runs)
        columns, column_of = np.unique(columns, return_inverse=True)
        stride = -(-len(rows) // 8) * 8  # every column starts at a byte
        num_columns = num_masks * len(columns)
        if not num_columns * stride:
            return np.zeros((num_masks, stride // 8, len(column_of)), np.uint8)
        # Concatenate the masks to one of N * W columns. Samples are numbered like pixels, column after column, so a run of
        # pixels is a run of samples, possibly empty; a run outside continues into the next mask.
        counts = np.array([len(runs) for runs in self.runs])
        ends = np.cumsum(np.concatenate(self.runs))
        ends = np.delete(ends, np.cumsum(counts)[counts % 2 == 1] - 1)
        column, row = np.divmod(ends, height)
        columns_before = np.arange(num_masks)[:, None] * len(columns) + np.searchsorted(columns, np.arange(width))
        samples_before = np.append(columns_before, num_columns) * stride
        sampled = np.append(np.tile(np.isin(np.arange(width), columns), num_masks), False)
        changes = samples_before[column] + sampled[column] * np.searchsorted(rows, np.arange(height))[row]
        packed = _fill(changes, num_columns * stride).reshape(num_masks, len(columns), stride // 8)
        packed = np.ascontiguousarray(packed[:, column_of].transpose(0, 2, 1))
        packed[:, -1] &= np.uint8(0xFF >> (stride - len(rows)))
        return packed

    def decode(self, number: int) -> NDArray[np.bool_]:
        """Decode one mask at full size [H, W]."""
        runs = self.runs[number]
        inside = np.repeat(np.arange(len(runs)) % 2 == 1, runs)
        return inside.reshape(self.size[::-1]).T


def _fill(changes: NDArray[np.int64], num_bits: int) -> NDArray[np.uint8]:
    """Fill bits, lowest first, that start at 0 and flip at each of the ascending positions: num_bits / 8 bytes."""
    word, bit = changes >> 6, np.left_shift(np.uint64(1), (changes & 63).astype(np.uint64))
    first = np.flatnonzero(np.diff(word, prepend=-1))
    words = np.zeros(num_bits // 64 + 1, "<u8")
    words[word[first]] = np.bitwise_xor.reduceat(bit, first)
    for shift in (1, 2, 4, 8, 16, 32):  # prefix parity of the changes within a word
        words ^= words << np.uint64(shift)
    odd = np.logical_xor.accumulate(words >> np.uint64(63) == 1)
    words[1:][odd[:-1]] ^= np.uint64(0xFFFF_FFFF_FFFF_FFFF)
    return words.view(np.uint8)[: num_bits // 8]
