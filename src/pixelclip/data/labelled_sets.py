"""Labelled sets, for evaluation and generator `labels`: five benchmarks in their published layouts, or a plain folder.

A plain folder contains `images/`, `labels/` (PNG, 255 = ignore) and `classes.txt`.
"""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from pixelclip.data.benchmarks import OPENERS
from pixelclip.data.class_names import SHIPPED, benchmark_names, read_classes
from pixelclip.data.images import IMAGE_SUFFIXES
from pixelclip.data.labelled_images import IGNORE, LabelledSet, Split, complete, value_table, without_image
from pixelclip.settings import nearest
from pixelclip.storage.cache import origin
from pixelclip.storage.files import digest, files_below, no_such
from pixelclip.workflow.stage import describe

KINDS = ("folder", *OPENERS)


def open_labelled(folder: Path, kind: str = "folder", split: Split = "val", names: str = "reference") -> LabelledSet:
    """Open a split of a benchmark in its published layout, or a plain folder.

    The folders `annotations_detectron2/` of the reference implementation are read where the published label maps are missing.

    Args:
        folder: root of the layout; for ADE20K and PASCAL also a parent folder.
        kind: one of `KINDS`.
        split: `val` for evaluation, `train` for masks; a plain folder has no splits.
        names: see `benchmark_names`; a plain folder has its own names unless this is a file.

    Raises:
        ValueError: unknown kind, part of the layout is missing, unreadable or empty, or the names do not fit.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown kind of labelled set {kind!r}{nearest(kind, KINDS)}; allowed: {', '.join(KINDS)}")
    if not folder.is_dir():
        word, colon, _ = str(folder).partition(":")
        if colon and word.isidentifier():  # not a path: a mistyped kind
            raise ValueError(f"unknown kind of labelled set {word!r}{nearest(word, KINDS)}; allowed: {', '.join(KINDS)}")
        raise ValueError(no_such(folder, "folder"))
    opened = open_folder(folder) if kind == "folder" else OPENERS[kind](folder, split)
    if kind == "folder" and names in SHIPPED:
        return opened
    try:
        classes = benchmark_names(names, kind)
    except ValueError as error:
        raise ValueError(f"evaluate.names: {error}") from None
    if len(classes) != len(opened.classes):
        needed = f"{folder} ({kind}) has {len(opened.classes)} classes"
        raise ValueError(f"evaluate.names {names}: contains {len(classes)} class names, but {needed}")
    return replace(opened, classes=classes)


def describe_labelled(folder: Path, kind: str, files: Iterable[Path]) -> dict[str, Any]:
    """Identify a labelled set like `workflow.stage.describe`, a benchmark only by the files of it that are read."""
    if kind == "folder":
        return describe(folder)
    return {"path": origin(folder), **digest(folder, set(files))}


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
    pairs = complete(folder, list(zip(images, labels, strict=True)), "images have no label map")
    pairs += without_image(folder / "images", "", folder / "labels", ".png", pairs)
    return LabelledSet(classes, pairs, value_table({label: label for label in [*range(len(classes)), IGNORE]}))
