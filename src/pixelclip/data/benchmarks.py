"""The five benchmarks in their published layouts: where images and label maps are, and how values map to classes."""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from pixelclip.data.class_names import benchmark_names
from pixelclip.data.images import IMAGE_SUFFIXES
from pixelclip.data.labelled_images import (
    IGNORE,
    NUM_VALUES,
    LabelledSet,
    Pairs,
    Split,
    complete,
    value_table,
    without_image,
)
from pixelclip.storage.files import files_below, read_json

_LAYOUTS = {
    "coco-stuff": "{split}2017/*.jpg (or images/{split}2017) and stuffthingmaps_trainval2017/{split}2017/*.png "
    "(or stuffthingmaps/{split}2017, annotations/{split}2017, beside the images, or annotations_detectron2/{split}2017)",
    "ade20k": "ADEChallengeData2016/images/{long}/*.jpg and ADEChallengeData2016/annotations/{long}/*.png "
    "(or annotations_detectron2/{long})",
    "pascal-context": "VOCdevkit/VOC2010/JPEGImages/*.jpg and beside it SegmentationClassContext/*.png with "
    "ImageSets/SegmentationContext/{split}.txt, trainval_merged.json, or annotations_detectron2/pc59_{split}/*.png",
    "cityscapes": "leftImg8bit/{split}/CITY/*_leftImg8bit.png and gtFine/{split}/CITY/*_gtFine_labelIds.png "
    "(or _labelTrainIds)",
    "voc": "VOCdevkit/VOC2012/JPEGImages/*.jpg and beside it SegmentationClass/*.png with ImageSets/Segmentation/{split}.txt, "
    "or annotations_detectron2/{split}/*.png",
}
_LONG = {"train": "training", "val": "validation"}
_CONVERTED = "annotations_detectron2"
"""Label maps converted by the reference's scripts: values are class indices, 255 is ignored."""

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


def _open_coco_stuff(folder: Path, split: Split) -> LabelledSet:
    name = f"{split}2017"
    # The zip of maps has the same folder names as those of images, so all may be unpacked in one place.
    with_images, with_maps = (
        [place for place in (name, f"images/{name}") if any((folder / place).glob(files))] for files in ("*.jpg", "*.png")
    )
    images = _part("coco-stuff", split, folder, *with_images, name, f"images/{name}")
    maps = ("stuffthingmaps_trainval2017", "stuffthingmaps", "annotations/stuffthingmaps_trainval2017", "annotations")
    published = [*(f"{parent}/{name}" for parent in maps), *with_maps]
    labels, converted = _maps("coco-stuff", split, folder, f"{_CONVERTED}/{name}", *published)
    used = range(171) if converted else [value for value in range(182) if value not in _COCO_UNUSED]
    return _benchmark("coco-stuff", _below(images, ".jpg", labels, ".png"), _numbered(used) | {255: IGNORE})


def _open_ade20k(folder: Path, split: Split) -> LabelledSet:
    name = _LONG[split]
    images = _part("ade20k", split, folder, f"images/{name}", f"ADEChallengeData2016/images/{name}")
    root = images.parents[1]
    labels, converted = _maps("ade20k", split, root, f"{_CONVERTED}/{name}", f"annotations/{name}")
    values = _numbered(range(150)) | {255: IGNORE} if converted else _numbered(range(1, 151)) | {0: IGNORE}
    return _benchmark("ade20k", _below(images, ".jpg", labels, ".png"), values)


def _open_cityscapes(folder: Path, split: Split) -> LabelledSet:
    images, labels = (_part("cityscapes", split, folder, f"{part}/{split}") for part in ("leftImg8bit", "gtFine"))
    trained = not any(labels.glob("*/*_labelIds.png")) and any(labels.glob("*/*_labelTrainIds.png"))
    pairs = _below(images, "_leftImg8bit.png", labels, f"_gtFine_{'labelTrainIds' if trained else 'labelIds'}.png")
    if trained:
        return _benchmark("cityscapes", pairs, _numbered(range(19)) | {255: IGNORE})
    return _benchmark("cityscapes", pairs, dict.fromkeys(range(34), IGNORE) | _numbered(_CITYSCAPES))


def _open_voc(folder: Path, split: Split) -> LabelledSet:
    images = _part("voc", split, folder, "JPEGImages", "VOC2012/JPEGImages", "VOCdevkit/VOC2012/JPEGImages")
    labels, converted = _maps("voc", split, images.parent, f"{_CONVERTED}/{split}", "SegmentationClass")
    if converted:
        return _benchmark("voc", _with_images(labels, images), _numbered(range(20)) | {255: IGNORE})
    pairs = _listed("voc", split, labels, f"ImageSets/Segmentation/{split}.txt")
    return _benchmark("voc", pairs, _numbered(range(1, 21)) | {0: IGNORE, 255: IGNORE})


def _open_pascal_context(folder: Path, split: Split) -> LabelledSet:
    kind = "pascal-context"
    images = _part(kind, split, folder, "JPEGImages", "VOC2010/JPEGImages", "VOCdevkit/VOC2010/JPEGImages")
    folder_of_maps = (images.parent / "SegmentationClassContext").is_dir()
    published = "SegmentationClassContext" if folder_of_maps else "trainval_merged.json"
    labels, converted = _maps(kind, split, images.parent, f"{_CONVERTED}/pc59_{split}", published)
    if converted:
        return _benchmark(kind, _with_images(labels, images), _numbered(range(59)) | {255: IGNORE})
    if labels.is_dir():
        pairs = _listed(kind, split, labels, f"ImageSets/SegmentationContext/{split}.txt")
        return _benchmark(kind, pairs, _numbered(range(1, 60)) | {0: IGNORE})
    masks = _read_detail(labels, split)
    pairs = complete(labels, [(images / name, labels) for name in masks], "listed files are missing")
    return _benchmark(kind, pairs, _numbered(_CONTEXT) | {0: IGNORE}, list(masks.values()))


def _read_detail(path: Path, split: Split) -> dict[str, bytes]:
    """Read the masks of PASCAL in Detail's images of a split, by file name, in the format of `LabelledSet.masks`."""
    document = read_json(path)
    try:
        names = {image["image_id"]: str(image["file_name"]) for image in document["images"] if image["phase"] == split}
        masks: dict[str, list[dict[str, Any]]] = {name: [] for name in sorted(names.values())}
        for annotation in document["annos_segmentation"]:
            if annotation["image_id"] in names:
                category = annotation["category_id"]
                if type(category) is not int or not 0 <= category < NUM_VALUES:
                    raise ValueError(f"category_id {category!r}")
                mask = {"segmentation": annotation["segmentation"], "category_id": category}
                masks[names[annotation["image_id"]]].append(mask)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path}: is not a trainval_merged.json of PASCAL in Detail ({type(error).__name__} {error}); it needs "
            "images (image_id, file_name, phase) and annos_segmentation (image_id, category_id, segmentation)"
        ) from None
    if not masks:
        raise ValueError(f"{path}: contains no image of phase {split!r}")
    return {name: json.dumps({"annotations": entries}).encode() if entries else b"" for name, entries in masks.items()}


OPENERS: dict[str, Callable[[Path, Split], LabelledSet]] = {
    "coco-stuff": _open_coco_stuff,
    "ade20k": _open_ade20k,
    "pascal-context": _open_pascal_context,
    "cityscapes": _open_cityscapes,
    "voc": _open_voc,
}


def _benchmark(kind: str, pairs: Pairs, values: Mapping[int, int], masks: list[bytes] | None = None) -> LabelledSet:
    return LabelledSet(benchmark_names("reference", kind), pairs, value_table(values), masks)


def _numbered(values: Iterable[int]) -> dict[int, int]:
    return {value: label for label, value in enumerate(values)}


def _part(kind: str, split: Split, folder: Path, *candidates: str) -> Path:
    for candidate in candidates:
        if (folder / candidate).exists():
            return folder / candidate
    layout = _LAYOUTS[kind].format(split=split, long=_LONG[split])
    raise ValueError(f"{folder}: is not {kind} as published, {candidates[0]} is missing; it needs {layout}")


def _maps(kind: str, split: Split, folder: Path, converted: str, *published: str) -> tuple[Path, bool]:
    """Find the label maps, and whether they are those of `_CONVERTED`, which are read only if no published ones exist."""
    if (folder / converted).is_dir() and not any((folder / name).exists() for name in published):
        return folder / converted, True
    return _part(kind, split, folder, *published), False


def _below(images: Path, image_ending: str, labels: Path, label_ending: str) -> Pairs:
    middle = image_ending.rpartition(".")[0]  # converted images have another suffix
    beside = label_ending if labels == images else "/"  # label maps may lie among the images
    files = [path for path in files_below(images) if not path.name.endswith(beside)]
    paths = [path for path in files if path.suffix.lower() in IMAGE_SUFFIXES and path.stem.endswith(middle)]
    if not paths:
        raise ValueError(f"{images}: contains no *{image_ending}")
    stems = [path.relative_to(images).with_suffix("").as_posix().removesuffix(middle) for path in paths]
    pairs = [(path, labels / f"{stem}{label_ending}") for path, stem in zip(paths, stems, strict=True)]
    pairs = complete(images, pairs, "images have no label map")
    return pairs + without_image(images, middle, labels, label_ending, pairs)


def _listed(kind: str, split: Split, labels: Path, names_file: str) -> Pairs:
    root = labels.parent
    path = _part(kind, split, root, names_file)
    try:
        names = path.read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: the list of images cannot be read: {error}") from None
    if not names:
        raise ValueError(f"{path}: lists no image")
    pairs = [(root / "JPEGImages" / f"{name}.jpg", labels / f"{name}.png") for name in names]
    return complete(path, pairs, "listed files are missing")


def _with_images(labels: Path, images: Path) -> Pairs:
    """Pair every label map with its image; images of other splits have no label map."""
    maps = [path for path in files_below(labels) if path.suffix == ".png"]
    if not maps:
        raise ValueError(f"{labels}: contains no *.png")
    return complete(labels, [(images / f"{path.stem}.jpg", path) for path in maps], "label maps have no image")
