"""Labelled sets, for evaluation only: a folder with `images/`, `labels/` (PNG, 255 = ignore) and `classes.txt`."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pixelclip.images import decode_image, open_image
from pixelclip.shards import IMAGE_SUFFIXES
from pixelclip.storage import files_below
from pixelclip.text import check_names

IGNORE = 255


@dataclass(frozen=True)
class LabelledSet:
    """Images with label maps: `pairs` of image and label file; labels index into `classes`, `IGNORE` is left out."""

    classes: list[str]
    pairs: list[tuple[Path, Path]]

    def __len__(self) -> int:
        return len(self.pairs)

    def read(self, index: int) -> tuple[Image.Image, NDArray[np.uint8]]:
        """Reads one image (RGB, upright) and its label map [H, W].

        Raises:
            ValueError: unreadable, of two sizes, or a label outside the class list; the message names the file.
        """
        image_path, label_path = self.pairs[index]
        image = open_image(image_path)
        try:
            label = decode_image(label_path.read_bytes())
        except (OSError, ValueError) as error:
            raise ValueError(f"{label_path}: {error}") from None
        if label.mode not in ("L", "P"):
            raise ValueError(f"{label_path}: one 8-bit channel (mode L or P) is needed, found mode {label.mode}")
        if label.size != image.size:
            raise ValueError(f"{label_path}: label map of size {label.size}, its image {image_path.name} has {image.size}")
        labels = np.asarray(label)
        outside = np.unique(labels[(labels >= len(self.classes)) & (labels != IGNORE)])
        if len(outside):
            raise ValueError(
                f"{label_path}: label {', '.join(map(str, outside[:5]))} found, "
                f"allowed are 0 to {len(self.classes) - 1} (classes.txt) and {IGNORE} (ignore)"
            )
        return image, labels


def read_classes(path: Path) -> list[str]:
    """Reads class names, one a line.

    Raises:
        ValueError: missing, empty, or names that are blank or stand twice; the message names the file.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: class names, one a line, cannot be read: {error}") from None
    while lines and not lines[-1].strip():
        lines.pop()
    return check_names(lines, str(path))


def open_folder(folder: Path) -> LabelledSet:
    """Opens a folder of labels.

    Raises:
        ValueError: a part is missing or empty, or an image has no label map.
    """
    for part in ("images", "labels"):
        if not (folder / part).is_dir():
            raise ValueError(f"{folder}: is no labelled set, {part}/ is missing; it needs images/, labels/ and classes.txt")
    classes = read_classes(folder / "classes.txt")
    if len(classes) > IGNORE:
        raise ValueError(f"{folder / 'classes.txt'}: {len(classes)} classes, 8-bit label maps hold at most {IGNORE}")
    pairs: list[tuple[Path, Path]] = []
    missing: list[tuple[Path, Path]] = []
    for image in files_below(folder / "images"):
        if image.suffix.lower() in IMAGE_SUFFIXES:
            label = folder / "labels" / image.relative_to(folder / "images").with_suffix(".png")
            (pairs if label.is_file() else missing).append((image, label))
    if missing:
        raise ValueError(f"{folder}: {len(missing)} images have no label map, the first is {missing[0][1]}")
    if not pairs:
        raise ValueError(f"{folder / 'images'}: holds no image")
    return LabelledSet(classes, pairs)
