"""Labelled images: pairs of images and label maps, read one at a time."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pixelclip.data.annotations import parse_annotation
from pixelclip.data.images import IMAGE_SUFFIXES, decode_image, open_image
from pixelclip.storage.files import files_below

IGNORE = 255
_INVALID = -1
NUM_VALUES = 1 << 16  # PASCAL-Context has 459 categories, too many for 8 bits

Pairs = list[tuple[Path, Path]]
Split = Literal["train", "val"]


@dataclass(frozen=True)
class LabelledSet:
    """Images with label maps; labels index into `classes` or are `IGNORE`.

    Args:
        classes: class names in the order of the labels; "a, b" are synonyms.
        pairs: image file and label file of each sample; several samples may share one label file. For a label map
            without an image, the image is a path without suffix that does not exist.
        table: [65536], maps each value of a label file to its label, or to -1 if the value is not allowed.
        masks: for sets without pixel maps: the masks of each sample as SA-1B annotation JSON with a `category_id` per mask,
            empty for a sample without masks.
    """

    classes: list[str]
    pairs: Pairs
    table: NDArray[np.int16]
    masks: list[bytes] | None = None

    def __len__(self) -> int:
        return len(self.pairs)

    def read(self, index: int) -> tuple[Image.Image, NDArray[np.uint8]]:
        """Read one image (RGB, upright) and its label map [H, W].

        Raises:
            ValueError: a file is unreadable, the sizes differ, a value is not allowed, or EXIF data turn the image without
                changing its size; the message names the file.
        """
        image_path, label_path = self.pairs[index]
        if not image_path.is_file():  # see without_image
            raise ValueError(f"{label_path}: label map without an image: {image_path} with one of {', '.join(IMAGE_SUFFIXES)}")
        image = open_image(image_path, "labels")
        where = f"{label_path}" if self.masks is None else f"{label_path}: {image_path.name}"
        try:
            values = _read_map(label_path) if self.masks is None else _draw(self.masks[index], image.size)
        except (OSError, ValueError) as error:
            raise ValueError(f"{where}: {error}") from None
        if values.shape != image.size[::-1]:
            size = values.shape[::-1]
            raise ValueError(f"{where}: label map has size {size}, but image {image_path.name} has {image.size}")
        labels = self.table[values]
        invalid = np.unique(values[labels == _INVALID])
        if len(invalid):
            raise ValueError(f"{where}: found label {', '.join(map(str, invalid[:5]))}; allowed: {self._allowed()}")
        return image, labels.astype(np.uint8)

    def _allowed(self) -> str:
        ignored = self.table == IGNORE
        return f"{_ranges(~ignored & (self.table != _INVALID))} (classes) and {_ranges(ignored)} (ignore)"


def _ranges(mask: NDArray[np.bool_]) -> str:
    values = np.flatnonzero(mask)
    runs = np.split(values, np.flatnonzero(np.diff(values) > 1) + 1)
    return ", ".join(f"{run[0]} to {run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def _read_map(path: Path) -> NDArray[np.uint8]:
    data = path.read_bytes()
    label = decode_image(data)
    if label.mode not in ("L", "P"):
        raise ValueError(f"must have one 8-bit channel (mode L or P), found mode {label.mode}")
    values = np.asarray(label)
    if label.format == "PNG" and label.mode == "L" and (bits := data[24]) < 8:  # bit depth in IHDR
        values = values // np.uint8(255 // (2**bits - 1))  # Pillow scales 2- and 4-bit grey to 0 to 255
    return values


def _draw(masks: bytes, size: tuple[int, int]) -> NDArray[np.uint16]:
    """Draw category ids [H, W], 0 outside all masks, in file order like the Detail API's `getMask`: the last one is on top."""
    from pycocotools import mask as rle  # an optional dependency that inference does not need

    values = np.zeros(size[::-1], np.uint16)
    for annotation in parse_annotation(masks, size)[0]["annotations"] if masks else []:
        values[rle.decode(annotation["segmentation"]) == 1] = annotation["category_id"]
    return values


def value_table(labels: Mapping[int, int]) -> NDArray[np.int16]:
    """Return the `table` of a `LabelledSet` from values of label files to labels."""
    table = np.full(NUM_VALUES, _INVALID, np.int16)
    table[list(labels)] = list(labels.values())
    return table


def without_image(images: Path, middle: str, labels: Path, label_ending: str, pairs: Pairs) -> Pairs:
    """Return the label maps without an image as samples that cannot be read, so that an evaluation counts and names them."""
    used = {label for _, label in pairs}
    left = [path for path in files_below(labels) if path.name.endswith(label_ending) and path not in used]
    stems = [path.relative_to(labels).as_posix().removesuffix(label_ending) for path in left]
    # mmsegmentation writes NAME_labelTrainIds.png beside COCO-Stuff's maps.
    pairs = [(images / f"{stem}{middle}", path) for stem, path in zip(stems, left, strict=True)]
    return [pair for pair, stem in zip(pairs, stems, strict=True) if not stem.endswith("_labelTrainIds")]


def complete(source: Path, pairs: Pairs, problem: str) -> Pairs:
    """Return the pairs; raise ValueError with `problem` if a file is missing."""
    missing = list(dict.fromkeys(path for pair in pairs for path in pair if not path.is_file()))
    if missing:
        raise ValueError(f"{source}: {len(missing)} {problem}, the first is {missing[0]}")
    return pairs
