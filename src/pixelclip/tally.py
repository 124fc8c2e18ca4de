"""What evaluation counts: confusions, recalled classes, masks; sums that add up over processes and survive a kill.

B images, T towers, N masks, K classes, H W image.
"""

import io
import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pixelclip.benchmarks import IGNORE
from pixelclip.ranks import ProcessGroup
from pixelclip.storage import write_atomically

OTHERS = "(all others)"
"""What the classes are called that no row of a confusion matrix is left for."""
OURS, CLIP = "", "_clip"
"""The towers, PixelCLIP's and that of the CLIP it came from, by what their metrics end with."""


@dataclass(frozen=True)
class Found:
    """What each tower took the pixels, and the masks if there are any, of one image for.

    Args:
        maps: of every tower [H, W], int64, on the device; K where no mask is.
        hits: of every tower the masks whose most frequent true class it found.
        masks: how many masks hold a labelled pixel at all.
    """

    maps: list[Tensor]
    hits: list[int]
    masks: int


@dataclass
class Confusion:
    """Pixel counts [K, K + 1] of truth (rows) against prediction (columns); the last column is for no prediction (K)."""

    counts: NDArray[np.int64]

    @classmethod
    def zeros(cls, classes: int) -> "Confusion":
        """An empty one."""
        return cls(np.zeros((classes, classes + 1), np.int64))

    def add(self, truth: NDArray[np.integer] | Tensor, predicted: NDArray[np.integer] | Tensor) -> None:
        """Counts one image, [H, W] each, where its prediction stands; `IGNORE`d pixels are left out."""
        predicted = torch.as_tensor(predicted)
        truth = torch.as_tensor(truth).to(predicted.device)
        joint = torch.where(truth != IGNORE, truth.long() * self.counts.shape[1] + predicted, self.counts.size)
        counted = joint.flatten().bincount(minlength=self.counts.size + 1)[:-1]
        self.counts += counted.view(self.counts.shape).cpu().numpy()

    def iou(self) -> NDArray[np.float64]:
        """Intersection over union of every class; NaN for one that the truth does not hold."""
        hit, truth, predicted = np.diag(self.counts), self.counts.sum(axis=1), self.counts.sum(axis=0)[:-1]
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.where(truth > 0, hit / (truth + predicted - hit), np.nan)

    def largest(self, names: Sequence[str], number: int) -> dict[str, Any]:
        """The counts of the classes that the truth holds most of, as a square matrix.

        Args:
            names: of all classes.
            number: how many classes stand for themselves; the rest, and pixels without a prediction, are counted as one.

        Returns:
            `{"classes": names, "counts": rows of truth}`, the most frequent class first.
        """
        truth = self.counts.sum(axis=1)
        shown = np.argsort(-truth, kind="stable")[:number]
        shown = shown[truth[shown] > 0]
        place = np.full(self.counts.shape[1], len(shown))
        place[shown] = np.arange(len(shown))
        counts = np.zeros((len(shown) + 1, len(shown) + 1), np.int64)
        np.add.at(counts, (place[:-1, None], place[None]), self.counts)
        classes = [names[index] for index in shown] + [OTHERS]
        if not (counts[-1].any() or counts[:, -1].any()):
            classes, counts = classes[:-1], counts[:-1, :-1]
        return {"classes": classes, "counts": counts.tolist()}

    def miou(self) -> float:
        """Mean IoU in points over the classes that the truth holds."""
        return float(100 * np.nanmean(self.iou()))

    def pixel_accuracy(self) -> float:
        """Correct pixels in percent."""
        return float(100 * np.trace(self.counts) / self.counts.sum())


def count_recalled(similarities: Tensor, present: Sequence[NDArray[np.integer]]) -> NDArray[np.int64]:
    """Counts the present classes that are among an image's n most similar ones, n being how many are present.

    Args:
        similarities: [B, K], image with class.
        present: the classes in the truth of each image.

    Returns:
        [2]: those found, and all that are present.
    """
    found = total = 0
    for row, classes in zip(similarities, present, strict=True):
        top = set(row.topk(len(classes)).indices.tolist())
        found, total = found + len(top & set(classes.tolist())), total + len(classes)
    return np.array([found, total], np.int64)


@dataclass
class Tally:
    """Sums over images, so that those of several processes add up and a killed one continues.

    Args:
        confusions: of each tower.
        recalled: [2], see `count_recalled`; nothing where CLIP is none of the towers.
        masks: [T + 1], masks that each tower classified rightly, and all of them.
        position: the first image that is not counted yet.
        bad: samples before it that could not be used.
    """

    confusions: dict[str, Confusion]
    recalled: NDArray[np.int64]
    masks: NDArray[np.int64]
    position: int
    bad: list[str] = field(default_factory=list)

    @classmethod
    def zeros(cls, towers: Collection[str], classes: int, position: int) -> "Tally":
        """Nothing counted yet."""
        confusions = {tower: Confusion.zeros(classes) for tower in towers}
        return cls(confusions, np.zeros(2, np.int64), np.zeros(len(towers) + 1, np.int64), position)

    def add(self, truths: Sequence[NDArray[np.integer]], found: Sequence[Found]) -> None:
        """Counts images: their label maps, and what each tower found, in the order of `confusions`."""
        for truth, one in zip(truths, found, strict=True):
            for confusion, predicted in zip(self.confusions.values(), one.maps, strict=True):
                confusion.add(truth, predicted)
            self.masks += [*one.hits, one.masks]

    def recall(self, truths: Sequence[NDArray[np.integer]], similarities: Tensor) -> None:
        """Counts the classes that CLIP recalls by the cosines [B, K] of whole images with classes."""
        self.recalled += count_recalled(similarities, [np.setdiff1d(truth, [IGNORE]) for truth in truths])

    def joined(self, other: "Tally") -> "Tally":
        """This tally with that of other towers on the same images.

        Raises:
            ValueError: the two did not count the same pixels and masks.
        """
        confusions = self.confusions | other.confusions
        first, *others = [found.counts.sum(axis=1) for found in confusions.values()]
        same = all(np.array_equal(first, truth) for truth in others) and self.masks[-1] == other.masks[-1]
        if not same or len(self.bad) != len(other.bad):
            bad = f"; unusable samples there: {', '.join(other.bad) or 'none'}, here: {', '.join(self.bad) or 'none'}"
            raise ValueError(f"other pixels or masks were counted there than here{bad}")
        masks = np.concatenate([self.masks[:-1], other.masks])
        return Tally(confusions, self.recalled + other.recalled, masks, self.position, self.bad)

    def arrays(self) -> dict[str, NDArray[np.int64]]:
        """The sums, by name; they share their memory with the tally."""
        confusions = {f"confusion{tower}": found.counts for tower, found in self.confusions.items()}
        return confusions | {"recalled": self.recalled, "masks": self.masks}

    def sum(self, ranks: ProcessGroup) -> None:
        """Adds up the tallies of all ranks, for each of them."""
        for array in self.arrays().values():
            array[...] = ranks.all_reduce(torch.from_numpy(array).to(ranks.device)).cpu().numpy()
        self.bad = list(chain(*ranks.all_gather_object(self.bad)))

    def save(self, path: Path) -> None:
        """Writes a checkpoint, atomically."""
        rest = json.dumps({"position": self.position, "bad": self.bad}).encode()
        write_atomically(path, packed(**self.arrays(), rest=np.frombuffer(rest, np.uint8)))

    def load(self, path: Path) -> None:
        """Continues from a checkpoint."""
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as saved:
            for name, array in self.arrays().items():
                array[...] = saved[name]
            rest = json.loads(saved["rest"].tobytes())
        self.position, self.bad = rest["position"], rest["bad"]


def packed(**arrays: NDArray[Any]) -> bytes:
    """Arrays as the bytes of an .npz, which holds no pickle."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, allow_pickle=False, **arrays)
    return buffer.getvalue()
