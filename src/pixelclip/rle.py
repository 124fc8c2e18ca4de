"""Masks as COCO's run lengths, as SA-1B stores them: checked, and sampled without being decoded. N masks, H W image."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
from numpy.typing import NDArray


def read_runs(codes: Sequence[str], num_pixels: int) -> list[NDArray[np.int64]]:
    """The runs of compressed RLEs: pixels outside and inside by turns, column after column.

    A run is a signed number of 5-bit groups, lowest first; from the fourth on it is the difference to the run two before.

    Args:
        codes: of the masks of one image, which are read all at once.
        num_pixels: of the image.

    Raises:
        ValueError: damaged, or of another number of pixels. (pycocotools would write out of bounds.)
    """
    if not codes:
        return []
    texts = [code.encode(errors="surrogatepass") for code in codes]
    code = np.frombuffer(b"".join(texts), np.uint8) - np.uint8(48)  # what is below wraps round to a foreign character
    stop = np.cumsum([len(text) for text in texts])
    if not all(texts) or code.max() > 63 or (code[stop - 1] & 32).any():
        raise ValueError("damaged RLE: its counts end early or hold a foreign character")
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
        found = covered[negative | (covered != num_pixels)][0]
        raise ValueError(f"damaged RLE: its runs cover {found} pixels, the image has {num_pixels}")
    return np.split(runs, ends[:-1])


def _undo_differences(values: NDArray[np.int64], ends: NDArray[np.int64]) -> NDArray[np.int64]:
    """Adds to every number of a mask the one two before it, from the fourth on; `ends`: where the masks end."""
    counts = np.diff(ends, prepend=0)
    begins = ends - counts
    sums = np.empty_like(values)
    for parity in (0, 1):
        np.cumsum(values[parity::2], out=sums[parity::2])
    # A mask's own sums begin after its first number, and the others' before it: both are taken off again.
    own = np.repeat(sums[begins], counts)
    before = np.repeat(np.where(begins > 0, sums[begins - 1], 0), counts)
    odd = (np.arange(len(values)) - np.repeat(begins, counts)) & 1
    runs = sums - np.where(odd, before, own)
    runs[begins] = values[begins]
    return runs


@dataclass(frozen=True)
class RunMasks:
    """Masks of one image of (H, W) pixels by the runs of each.

    Memory and time of everything here go by runs and samples, not by the pixels of the image.
    """

    runs: Sequence[NDArray[np.int64]]
    size: tuple[int, int]

    @classmethod
    def whole(cls, size: tuple[int, int]) -> "RunMasks":
        """One mask of all pixels."""
        return cls([np.array([0, size[0] * size[1]])], size)

    def __len__(self) -> int:
        return len(self.runs)

    def sample(self, rows: NDArray[np.integer], columns: NDArray[np.integer]) -> NDArray[np.bool_]:
        """The masks at all crossings of some rows and columns, in any order and as often as they are named: [N, h, w]."""
        rows, row_of = np.unique(rows, return_inverse=True)
        packed = self.sample_packed(rows, columns)
        inside = np.unpackbits(packed, axis=1, count=len(rows), bitorder="little")
        return cast("NDArray[np.bool_]", inside.view(bool)[:, row_of])

    def sample_packed(self, rows: NDArray[np.integer], columns: NDArray[np.integer]) -> NDArray[np.uint8]:
        """As `sample`, 8 rows a byte: [N, ceil(h / 8), w], the first row in the lowest bit, 0 beyond the last one.

        Args:
            rows: in ascending order, as often as they are named.
            columns: in any order.
        """
        (height, width), num_masks = self.size, len(self.runs)
        columns, column_of = np.unique(columns, return_inverse=True)
        stride = -(-len(rows) // 8) * 8  # a column begins with a byte
        num_columns = num_masks * len(columns)
        if not num_columns * stride:
            return np.zeros((num_masks, stride // 8, len(column_of)), np.uint8)
        # The masks follow each other as one of N * W columns. Its samples are numbered as its pixels are, column after
        # column, so a run of pixels is a run of samples, perhaps of none; one outside goes on into the next mask.
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
        """One mask at full size [H, W]."""
        runs = self.runs[number]
        inside = np.repeat(np.arange(len(runs)) % 2 == 1, runs)
        return inside.reshape(self.size[::-1]).T


def _fill(changes: NDArray[np.int64], num_bits: int) -> NDArray[np.uint8]:
    """Bits, lowest first, that are 0 at the start and change at places in ascending order: num_bits / 8 bytes."""
    word, bit = changes >> 6, np.left_shift(np.uint64(1), (changes & 63).astype(np.uint64))
    first = np.flatnonzero(np.diff(word, prepend=-1))
    words = np.zeros(num_bits // 64 + 1, "<u8")
    words[word[first]] = np.bitwise_xor.reduceat(bit, first)
    for shift in (1, 2, 4, 8, 16, 32):  # every bit becomes the parity of the changes up to it
        words ^= words << np.uint64(shift)
    odd = np.logical_xor.accumulate(words >> np.uint64(63) == 1)
    words[1:][odd[:-1]] ^= np.uint64(0xFFFF_FFFF_FFFF_FFFF)
    return words.view(np.uint8)[: num_bits // 8]
