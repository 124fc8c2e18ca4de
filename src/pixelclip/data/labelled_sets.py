"""Labelled sets for evaluation: five benchmarks in their published layouts, or a plain folder.

A plain folder contains `images/`, `labels/` (PNG, 255 = ignore) and `classes.txt`.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pixelclip.data.annotations import parse_annotation
from pixelclip.data.class_names import SHIPPED, benchmark_names, read_classes
from pixelclip.data.images import IMAGE_SUFFIXES, decode_image, open_image
from pixelclip.settings import nearest
from pixelclip.storage.files import files_below, read_json

IGNORE = 255
_INVALID = -1
_NUM_VALUES = 1 << 16  # PASCAL-Context has 459 categories, too many for 8 bits

Pairs = list[tuple[Path, Path]]


@dataclass(frozen=True)
class LabelledSet:
    """Images with label maps; labels index into `classes` or are `IGNORE`.

    Args:
        classes: class names in the order of the labels; "a, b" are synonyms.
        pairs: image file and label file of each sample; several samples may share one label file.
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
            ValueError: a file is unreadable, the sizes differ or a value is not allowed; the message names the file.
        """
        image_path, label_path = self.pairs[index]
        image = open_image(image_path)
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


def open_labelled(folder: Path, kind: str = "folder", names: str = "reference") -> LabelledSet:
    """Open the validation split of a benchmark in its published layout, or a plain folder.

    Args:
        folder: root of the layout; for ADE20K and PASCAL also a parent folder.
        kind: one of `KINDS`.
        names: see `benchmark_names`; a plain folder has its own names unless this is a file.

    Raises:
        ValueError: unknown kind, part of the layout is missing, unreadable or empty, or the names do not fit.
    """
    if kind not in _OPENERS:
        raise ValueError(f"unknown kind of labelled set {kind!r}{nearest(kind, KINDS)}; allowed: {', '.join(KINDS)}")
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    opened = _OPENERS[kind](folder)
    if kind == "folder" and names in SHIPPED:
        return opened
    classes = benchmark_names(names, kind)
    if len(classes) != len(opened.classes):
        needed = f"{folder} ({kind}) has {len(opened.classes)} classes"
        raise ValueError(f"evaluate.names {names}: contains {len(classes)} class names, but {needed}")
    return replace(opened, classes=classes)


def open_folder(folder: Path) -> LabelledSet:
    """Open a folder with `images/`, `labels/` and `classes.txt`.

    Raises:
        ValueError: part of it is missing or empty, or an image has no label map.
    """
    for part in ("images", "labels"):
        if not (folder / part).is_dir():
            raise ValueError(f"{folder}: is not a labelled set, {part}/ is missing; it needs images/, labels/ and classes.txt")
    classes = read_classes(folder / "classes.txt")
    if len(classes) > IGNORE:
        raise ValueError(f"{folder / 'classes.txt'}: {len(classes)} classes, 8-bit label maps allow at most {IGNORE}")
    images = [path for path in files_below(folder / "images") if path.suffix.lower() in IMAGE_SUFFIXES]
    if not images:
        raise ValueError(f"{folder / 'images'}: contains no image")
    labels = [folder / "labels" / path.relative_to(folder / "images").with_suffix(".png") for path in images]
    pairs = _complete(folder, list(zip(images, labels, strict=True)), "images have no label map")
    return LabelledSet(classes, pairs, _table({label: label for label in [*range(len(classes)), IGNORE]}))


_LAYOUTS = {
    "coco-stuff": "val2017/*.jpg (or images/val2017) and stuffthingmaps_trainval2017/val2017/*.png "
    "(or stuffthingmaps/val2017, annotations/val2017)",
    "ade20k": "ADEChallengeData2016/images/validation/*.jpg and ADEChallengeData2016/annotations/validation/*.png",
    "pascal-context": "VOCdevkit/VOC2010/JPEGImages/*.jpg and beside it either SegmentationClassContext/*.png with "
    "ImageSets/SegmentationContext/val.txt, or trainval_merged.json",
    "cityscapes": "leftImg8bit/val/CITY/*_leftImg8bit.png and gtFine/val/CITY/*_gtFine_labelIds.png (or _labelTrainIds)",
    "voc": "VOCdevkit/VOC2012/JPEGImages/*.jpg and beside it SegmentationClass/*.png and ImageSets/Segmentation/val.txt",
}

# Values of COCO-Stuff's maps (id - 1) that never occur: thing categories without annotations in COCO.
_COCO_UNUSED = {11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90}
# labelIds in cityscapesScripts' labels.py, ordered by trainId; the other ids up to 33 are ignored in evaluation.
_CITYSCAPES = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
# The 59 evaluated categories of 459, in ascending order, which is how all converters of trainval_merged.json number them.
_CONTEXT = (
    *(2, 9, 18, 19, 22, 23, 25, 31, 33, 34, 44, 45, 46, 59, 65, 68, 72, 80, 85, 98, 104, 105, 113, 115, 144, 158, 159, 162),
    *(187, 189, 207, 220, 232, 258, 259, 260, 284, 295, 296, 308, 324, 326, 347, 349, 354, 355, 360, 366, 368, 397, 415),
    *(416, 420, 424, 427, 440, 445, 454, 458),
)


def _open_coco_stuff(folder: Path) -> LabelledSet:
    images = _part("coco-stuff", folder, "val2017", "images/val2017")
    maps = ("stuffthingmaps_trainval2017", "stuffthingmaps", "annotations/stuffthingmaps_trainval2017", "annotations")
    labels = _part("coco-stuff", folder, *(f"{name}/val2017" for name in maps))
    used = [value for value in range(182) if value not in _COCO_UNUSED]
    return _benchmark("coco-stuff", _below(images, ".jpg", labels, ".png"), _numbered(used) | {255: IGNORE})


def _open_ade20k(folder: Path) -> LabelledSet:
    images = _part("ade20k", folder, "images/validation", "ADEChallengeData2016/images/validation")
    labels = _part("ade20k", images.parents[1], "annotations/validation")
    return _benchmark("ade20k", _below(images, ".jpg", labels, ".png"), _numbered(range(1, 151)) | {0: IGNORE})


def _open_cityscapes(folder: Path) -> LabelledSet:
    images, labels = _part("cityscapes", folder, "leftImg8bit/val"), _part("cityscapes", folder, "gtFine/val")
    trained = not any(labels.glob("*/*_labelIds.png")) and any(labels.glob("*/*_labelTrainIds.png"))
    pairs = _below(images, "_leftImg8bit.png", labels, f"_gtFine_{'labelTrainIds' if trained else 'labelIds'}.png")
    if trained:
        return _benchmark("cityscapes", pairs, _numbered(range(19)) | {255: IGNORE})
    return _benchmark("cityscapes", pairs, dict.fromkeys(range(34), IGNORE) | _numbered(_CITYSCAPES))


def _open_voc(folder: Path) -> LabelledSet:
    root = _part("voc", folder, "JPEGImages", "VOC2012/JPEGImages", "VOCdevkit/VOC2012/JPEGImages").parent
    pairs = _listed("voc", root, "SegmentationClass", "ImageSets/Segmentation/val.txt")
    return _benchmark("voc", pairs, _numbered(range(1, 21)) | {0: IGNORE, 255: IGNORE})


def _open_pascal_context(folder: Path) -> LabelledSet:
    images = _part("pascal-context", folder, "JPEGImages", "VOC2010/JPEGImages", "VOCdevkit/VOC2010/JPEGImages")
    root = images.parent
    if (root / "SegmentationClassContext").is_dir():
        pairs = _listed("pascal-context", root, "SegmentationClassContext", "ImageSets/SegmentationContext/val.txt")
        return _benchmark("pascal-context", pairs, _numbered(range(1, 60)) | {0: IGNORE})
    path = _part("pascal-context", root, "trainval_merged.json")
    masks = _read_detail(path)
    pairs = _complete(path, [(images / name, path) for name in masks], "listed files are missing")
    return _benchmark("pascal-context", pairs, _numbered(_CONTEXT) | {0: IGNORE}, list(masks.values()))


def _read_detail(path: Path) -> dict[str, bytes]:
    """Read the masks of PASCAL in Detail's validation images, by file name, in the format of `LabelledSet.masks`."""
    document = read_json(path)
    try:
        names = {image["image_id"]: str(image["file_name"]) for image in document["images"] if image["phase"] == "val"}
        masks: dict[str, list[dict[str, Any]]] = {name: [] for name in sorted(names.values())}
        for annotation in document["annos_segmentation"]:
            if annotation["image_id"] in names:
                category = annotation["category_id"]
                if type(category) is not int or not 0 <= category < _NUM_VALUES:
                    raise ValueError(f"category_id {category!r}")
                mask = {"segmentation": annotation["segmentation"], "category_id": category}
                masks[names[annotation["image_id"]]].append(mask)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path}: is not a trainval_merged.json of PASCAL in Detail ({type(error).__name__} {error}); it needs "
            "images (image_id, file_name, phase) and annos_segmentation (image_id, category_id, segmentation)"
        ) from None
    if not masks:
        raise ValueError(f"{path}: contains no image of phase 'val'")
    return {name: json.dumps({"annotations": entries}).encode() if entries else b"" for name, entries in masks.items()}


_OPENERS: dict[str, Callable[[Path], LabelledSet]] = {
    "folder": open_folder,
    "coco-stuff": _open_coco_stuff,
    "ade20k": _open_ade20k,
    "pascal-context": _open_pascal_context,
    "cityscapes": _open_cityscapes,
    "voc": _open_voc,
}
KINDS = tuple(_OPENERS)


def _benchmark(kind: str, pairs: Pairs, values: Mapping[int, int], masks: list[bytes] | None = None) -> LabelledSet:
    return LabelledSet(benchmark_names("reference", kind), pairs, _table(values), masks)


def _numbered(values: Iterable[int]) -> dict[int, int]:
    return {value: label for label, value in enumerate(values)}


def _table(labels: Mapping[int, int]) -> NDArray[np.int16]:
    table = np.full(_NUM_VALUES, _INVALID, np.int16)
    table[list(labels)] = list(labels.values())
    return table


def _part(kind: str, folder: Path, *candidates: str) -> Path:
    for candidate in candidates:
        if (folder / candidate).exists():
            return folder / candidate
    raise ValueError(f"{folder}: is not {kind} as published, {candidates[0]} is missing; it needs {_LAYOUTS[kind]}")


def _below(images: Path, image_ending: str, labels: Path, label_ending: str) -> Pairs:
    paths = [path for path in files_below(images) if path.name.endswith(image_ending)]
    if not paths:
        raise ValueError(f"{images}: contains no *{image_ending}")
    stems = [path.relative_to(images).as_posix().removesuffix(image_ending) for path in paths]
    pairs = [(path, labels / f"{stem}{label_ending}") for path, stem in zip(paths, stems, strict=True)]
    return _complete(images, pairs, "images have no label map")


def _listed(kind: str, root: Path, labels: str, split: str) -> Pairs:
    folder, path = _part(kind, root, labels), _part(kind, root, split)
    try:
        names = path.read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: the list of images cannot be read: {error}") from None
    if not names:
        raise ValueError(f"{path}: lists no image")
    pairs = [(root / "JPEGImages" / f"{name}.jpg", folder / f"{name}.png") for name in names]
    return _complete(path, pairs, "listed files are missing")


def _complete(source: Path, pairs: Pairs, problem: str) -> Pairs:
    missing = list(dict.fromkeys(path for pair in pairs for path in pair if not path.is_file()))
    if missing:
        raise ValueError(f"{source}: {len(missing)} {problem}, the first is {missing[0]}")
    return pairs
