"""Masks as COCO's run lengths, as SA-1B stores them: checked, and sampled without being decoded. N masks, H W image."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


def read_runs(counts: str, num_pixels: int) -> NDArray[np.int64]:
    """The runs of a compressed RLE: pixels outside and inside by turns, column after column.

    A run is a signed number of 5-bit groups, lowest first; from the fourth on it is the difference to the run two before.

    Args:
        counts: the code.
        num_pixels: of the image.

    Raises:
        ValueError: damaged, or of another number of pixels. (pycocotools would write out of bounds.)
    """
    code = np.frombuffer(counts.encode(errors="surrogatepass"), np.uint8).astype(np.int64) - 48
    last = np.flatnonzero((code & 32) == 0)
    if not len(code) or code.min() < 0 or code.max() > 63 or last[-1:].tolist() != [len(code) - 1]:
        raise ValueError("damaged RLE: its counts end early or hold a foreign character")
    first = np.concatenate([[0], last[:-1] + 1])
    length = last - first + 1
    if length.max() > 7:
        raise ValueError("damaged RLE: a run is too long")
    place = np.arange(len(code)) - np.repeat(first, length)
    runs = np.add.reduceat((code & 31) << (5 * place), first) - ((code[last] & 16) > 0) * (1 << (5 * length))
    runs[1::2] = np.cumsum(runs[1::2])
    runs[2::2] = np.cumsum(runs[2::2])
    if runs.min() < 0 or runs.sum() != num_pixels:
        raise ValueError(f"damaged RLE: its runs cover {runs.sum()} pixels, the image has {num_pixels}")
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
        height, width = self.size
        if not self.runs:
            return np.zeros((0, len(rows), len(columns)), bool)
        rows, row_of = np.unique(rows, return_inverse=True)
        columns, column_of = np.unique(columns, return_inverse=True)
        # Samples are numbered as pixels are, column after column, so a run of pixels is a run of samples, perhaps of none.
        samples_before_row = np.searchsorted(rows, np.arange(height))
        samples_before_column = np.searchsorted(columns, np.arange(width + 1)) * len(rows)
        sampled = np.isin(np.arange(width + 1), columns)
        column, row = np.divmod(np.concatenate([np.cumsum(runs) for runs in self.runs]), height)
        ends = samples_before_column[column] + sampled[column] * samples_before_row[row]
        lengths = np.diff(ends, prepend=0)
        of_mask = [len(runs) for runs in self.runs]
        first = np.cumsum([0, *of_mask[:-1]])
        lengths[first] = ends[first]
        inside = np.repeat((np.arange(len(ends)) - np.repeat(first, of_mask)) % 2 == 1, lengths)
        return inside.reshape(len(self.runs), len(columns), len(rows))[:, column_of][:, :, row_of].transpose(0, 2, 1)

    def decode(self, number: int) -> NDArray[np.bool_]:
        """One mask at full size [H, W]."""
        runs = self.runs[number]
        inside = np.repeat(np.arange(len(runs)) % 2 == 1, runs)
        return inside.reshape(self.size[::-1]).T
