"""Confusion matrices and the other counts of an evaluation: summed over images and processes, saved as checkpoints.

B images, T towers, N masks, K classes, H W image.
"""

import io
import json
import zipfile
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, NonNegativeInt
from torch import Tensor

from pixelclip.data.labelled_images import IGNORE
from pixelclip.distributed import ProcessGroup
from pixelclip.storage.files import parse_json, write_atomically

OTHERS = "(all others)"
"""Label of the row that sums all classes without a row in a shortened confusion matrix."""
OURS, CLIP = "", "_clip"
"""Keys of the towers of PixelCLIP and of the original CLIP, which are the suffixes of their metrics."""


@dataclass(frozen=True)
class Predictions:
    """Predictions of every tower for one image.

    Args:
        label_maps: for each tower [H, W], int64, on the device; K where no mask covers the pixel.
        correct_masks: for each tower the number of masks whose majority class it predicted.
        num_masks: number of masks with at least one labelled pixel.
    """

    label_maps: list[Tensor]
    correct_masks: list[int]
    num_masks: int


@dataclass
class ConfusionMatrix:
    """Pixel counts [K, K + 1], truth by prediction; the last column counts pixels without a prediction (K)."""

    counts: NDArray[np.int64]

    @classmethod
    def zeros(cls, classes: int) -> "ConfusionMatrix":
        """Return an empty confusion matrix."""
        return cls(np.zeros((classes, classes + 1), np.int64))

    def add(self, truth: NDArray[np.integer] | Tensor, predicted: NDArray[np.integer] | Tensor) -> None:
        """Add the pixels of one image, [H, W] each, on the device of the prediction; `IGNORE` pixels are skipped."""
        predicted = torch.as_tensor(predicted)
        truth = torch.as_tensor(truth).to(predicted.device)
        joint = torch.where(truth != IGNORE, truth.long() * self.counts.shape[1] + predicted, self.counts.size)
        counted = joint.flatten().bincount(minlength=self.counts.size + 1)[:-1]
        self.counts += counted.view(self.counts.shape).cpu().numpy()

    def iou(self) -> NDArray[np.float64]:
        """Return the intersection over union of each class; NaN for a class without labelled pixels."""
        hit, truth, predicted = np.diag(self.counts), self.counts.sum(axis=1), self.counts.sum(axis=0)[:-1]
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.where(truth > 0, hit / (truth + predicted - hit), np.nan)

    def largest(self, names: Sequence[str], number: int) -> dict[str, Any]:
        """Return a square confusion matrix of the classes with the most labelled pixels.

        Args:
            names: names of all classes.
            number: classes with a row of their own; other classes and pixels without a prediction are summed as `OTHERS`.

        Returns:
            `{"classes": names, "counts": rows of truth}`, the most frequent class first.
        """
        truth = self.counts.sum(axis=1)
        shown = np.argsort(-truth, kind="stable")[:number]
        shown = shown[truth[shown] > 0]
        row_of_class = np.full(self.counts.shape[1], len(shown))
        row_of_class[shown] = np.arange(len(shown))
        counts = np.zeros((len(shown) + 1, len(shown) + 1), np.int64)
        np.add.at(counts, (row_of_class[:-1, None], row_of_class[None]), self.counts)
        classes = [names[index] for index in shown] + [OTHERS]
        if not (counts[-1].any() or counts[:, -1].any()):
            classes, counts = classes[:-1], counts[:-1, :-1]
        return {"classes": classes, "counts": counts.tolist()}

    def miou(self) -> float:
        """Return the mean IoU in points over the classes with labelled pixels."""
        return float(100 * np.nanmean(self.iou()))

    def pixel_accuracy(self) -> float:
        """Return the percentage of correct pixels."""
        return float(100 * np.trace(self.counts) / self.counts.sum())


def count_recalled(similarities: Tensor, present: Sequence[NDArray[np.integer]]) -> NDArray[np.int64]:
    """Count the present classes among the n most similar classes of an image, where n classes are present.

    Args:
        similarities: [B, K], image with class.
        present: classes in the truth of each image.

    Returns:
        [2]: number of recalled classes, number of present classes.
    """
    recalled = total = 0
    for row, classes in zip(similarities, present, strict=True):
        top = set(row.topk(len(classes)).indices.tolist())
        recalled, total = recalled + len(top & set(classes.tolist())), total + len(classes)
    return np.array([recalled, total], np.int64)


class _Rest(BaseModel):
    position: NonNegativeInt
    bad: list[str]


@dataclass
class EvaluationCounts:
    """Counts of an evaluation, summed over images. They can be added over processes, saved and resumed.

    Args:
        confusions: confusion matrix of each tower.
        recalled: [2], see `count_recalled`; zeros unless CLIP is one of the towers.
        masks: [T + 1], correctly classified masks of each tower, and the number of masks.
        next_index: sample index at which to resume.
        bad_samples: unusable samples before `next_index`.
    """

    confusions: dict[str, ConfusionMatrix]
    recalled: NDArray[np.int64]
    masks: NDArray[np.int64]
    next_index: int
    bad_samples: list[str] = field(default_factory=list)

    @classmethod
    def zeros(cls, towers: Collection[str], classes: int, next_index: int) -> "EvaluationCounts":
        """Return empty counts."""
        confusions = {tower: ConfusionMatrix.zeros(classes) for tower in towers}
        return cls(confusions, np.zeros(2, np.int64), np.zeros(len(towers) + 1, np.int64), next_index)

    def add(self, truths: Sequence[NDArray[np.integer]], predictions: Sequence[Predictions]) -> None:
        """Add images: their label maps and the predictions of each tower, in the order of `confusions`."""
        for truth, predicted in zip(truths, predictions, strict=True):
            for confusion, label_map in zip(self.confusions.values(), predicted.label_maps, strict=True):
                confusion.add(truth, label_map)
            self.masks += [*predicted.correct_masks, predicted.num_masks]

    def add_recalled(self, truths: Sequence[NDArray[np.integer]], similarities: Tensor) -> None:
        """Add the classes that CLIP recalls, from the cosines [B, K] between whole images and classes."""
        self.recalled += count_recalled(similarities, [np.setdiff1d(truth, [IGNORE]) for truth in truths])

    def merge(self, other: "EvaluationCounts") -> "EvaluationCounts":
        """Combine these counts with those of other towers on the same images.

        Raises:
            ValueError: they do not cover the same pixels and masks.
        """
        confusions = self.confusions | other.confusions
        first, *others = [confusion.counts.sum(axis=1) for confusion in confusions.values()]
        same = all(np.array_equal(first, truth) for truth in others) and self.masks[-1] == other.masks[-1]
        if not same or len(self.bad_samples) != len(other.bad_samples):
            theirs, ours = (", ".join(counts.bad_samples) or "none" for counts in (other, self))
            raise ValueError(
                f"covers different pixels or masks than this evaluation (bad samples: {theirs}; in this evaluation: {ours})"
            )
        masks = np.concatenate([self.masks[:-1], other.masks])
        return EvaluationCounts(confusions, self.recalled + other.recalled, masks, self.next_index, self.bad_samples)

    def arrays(self) -> dict[str, NDArray[np.int64]]:
        """Return the arrays to sum and save, keyed by name, as views of this object's memory."""
        confusions = {f"confusion{tower}": confusion.counts for tower, confusion in self.confusions.items()}
        return confusions | {"recalled": self.recalled, "masks": self.masks}

    def all_reduce(self, group: ProcessGroup) -> None:
        """Sum the counts of all processes, in every process."""
        for array in self.arrays().values():
            array[...] = group.all_reduce(torch.from_numpy(array).to(group.device)).cpu().numpy()
        self.bad_samples = list(chain(*group.all_gather_object(self.bad_samples)))

    def save(self, path: Path) -> None:
        """Write a checkpoint atomically."""
        rest = json.dumps({"position": self.next_index, "bad": self.bad_samples}).encode()
        write_atomically(path, to_npz(**self.arrays(), rest=np.frombuffer(rest, np.uint8)))

    def load(self, path: Path) -> None:
        """Load a checkpoint; raise ValueError if it is damaged or of other towers or classes."""
        own = self.arrays()
        saved = read_npz(path, [*own, "rest"])
        for name, array in own.items():
            found = saved[name]
            if (found.dtype, found.shape) != (array.dtype, array.shape):
                expected = f"{array.dtype}{[*array.shape]}"
                raise ValueError(f"{path}: {name} is {found.dtype}{[*found.shape]}, expected {expected}")
            array[...] = found
        rest = parse_json(saved["rest"].tobytes(), f"{path}: rest", _Rest)
        self.next_index, self.bad_samples = rest["position"], rest["bad"]


def to_npz(**arrays: NDArray[Any]) -> bytes:
    """Serialize arrays as an .npz file without pickle."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, allow_pickle=False, **arrays)
    return buffer.getvalue()


def read_npz(path: Path, expected: Iterable[str] = ()) -> dict[str, NDArray[Any]]:
    """Read an .npz file without pickle, and check the checksum of every array, which `np.load` may not reach.

    Raises:
        ValueError: the file is missing or damaged, or has no array of an `expected` name.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            files = {name.removesuffix(".npy"): io.BytesIO(archive.read(name)) for name in archive.namelist()}
        arrays = {name: np.lib.format.read_array(file, allow_pickle=False) for name, file in files.items()}
    except Exception as error:  # of zipfile, zlib and numpy, many kinds for damaged files
        raise ValueError(f"{path}: cannot be read as .npz: {str(error)[:200]}") from None
    if missing := [name for name in expected if name not in arrays]:
        raise ValueError(f"{path}: array {missing[0]!r} is missing, found {', '.join(arrays) or 'none'}")
    return arrays
