"""How a labelled set is measured: what it is called, what numbers stand with, what they hang on, and what does not fit."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pixelclip.backbone import Backbone, check_patch, check_side
from pixelclip.benchmarks import KINDS, LabelledSet
from pixelclip.cache import origin
from pixelclip.clip_sources import clip_folder
from pixelclip.config import EvaluateConfig
from pixelclip.download import here
from pixelclip.s3 import is_s3
from pixelclip.shard_sources import describe_shards
from pixelclip.stage import describe
from pixelclip.storage import digest

PROTOCOL = "protocol.json"
_OPTIONS = {
    "whole": ("side", "feature_grid"),
    "slide": ("slide_side", "crop", "stride", "feature_grid"),
    "masks": ("side", "masks"),
    "given": ("masks_folder",),
    "felzenszwalb": ("felzenszwalb_scale", "felzenszwalb_sigma", "felzenszwalb_min_size"),
}
"""The settings that a protocol, or a kind of its masks, goes by."""


def sets_of(labelled: Sequence[str], config: EvaluateConfig) -> dict[str, tuple[Path, EvaluateConfig]]:
    """Labelled sets by name, each with its settings.

    Args:
        labelled: `FOLDER`, of the kind that the settings say, or `KIND:FOLDER`; a folder may be `s3://bucket/folder`.
        config: settings of all of them.

    Raises:
        ValueError: two have one name, or one has a name that no metric can have.
    """
    sets: dict[str, tuple[Path, EvaluateConfig]] = {}
    for word in labelled:
        kind, _, folder = word.partition(":")
        chosen = config if kind not in KINDS else config.model_copy(update={"kind": kind})
        path = here(folder if kind in KINDS else word)
        name = name_of(path, chosen)
        if name in sets:
            raise ValueError(f"two labelled sets are called {name!r}: {sets[name][0]} and {path}; evaluate them one by one")
        sets[name] = (path, chosen)
    return sets


def name_of(labelled: Path, config: EvaluateConfig) -> str:
    """What a labelled set is called in metrics.

    Raises:
        ValueError: MLflow knows no metric of that name.
    """
    name = config.name or (labelled.resolve().name if config.kind == "folder" else config.kind)
    if not re.fullmatch(r"[\w.\- :]+", name):
        raise ValueError(
            f"{labelled}: a metric cannot be called {name!r} in MLflow (letters, digits, _ - . :); set evaluate.name"
        )
    return name


def protocol_of(config: EvaluateConfig) -> dict[str, Any]:
    """How numbers come about, as `protocol.json` says it; None for what the protocol does not go by.

    Args:
        config: settings as they apply: with the set's name, and the side in pixels.
    """
    used = {*_OPTIONS[config.protocol], *(_OPTIONS.get(config.masks, ()) if config.protocol == "masks" else ())}
    settings = config.model_dump()
    always = {key: settings[key] for key in ("name", "kind", "protocol", "templates")}
    always |= {} if config.precision == "float32" else {"precision": config.precision}
    return always | {key: settings[key] if key in used else None for options in _OPTIONS.values() for key in options}


def conditions_of(protocol: Mapping[str, Any], inputs: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What numbers hang on besides the towers, by name; files by what they hold, wherever they stand.

    Args:
        protocol: see `protocol_of`.
        inputs: see `inputs_of`.
    """
    md5 = {f"md5 of {key}": inputs[key]["md5"] for key in ("labelled", "masks") if key in inputs}
    return md5 | {key: value for key, value in protocol.items() if key != "masks_folder"}


def label_of(protocol: dict[str, Any]) -> str:
    """What stands behind the slash of a metric: the set's name, and what is not the paper's protocol.

    Sizes and templates are not in it, so that runs of a sweep compare by one name; the tag `protocol.NAME` tells them.
    """
    masks = f"-{protocol['masks']}" if protocol["masks"] not in (None, "truth") else ""
    other = "" if protocol["protocol"] == "whole" else f".{protocol['protocol']}{masks}"
    return protocol["name"] + other


def in_words(protocol: dict[str, Any]) -> str:
    """A protocol as one line of text, without the set's name."""
    return ", ".join(f"{key} {value}" for key, value in protocol.items() if key != "name" and value is not None)


def inputs_of(labelled: Path, dataset: LabelledSet, spec: str, config: EvaluateConfig) -> dict[str, dict[str, Any]]:
    """What is read besides a model, as `describe` says it: `labelled`; `clip` and `masks` where they are files."""
    if config.kind == "folder":
        described = describe(labelled)
    else:  # as published a benchmark holds its training images too, which are not read
        read = {file for pair in dataset.pairs for file in pair}
        described = {"path": origin(labelled), **digest(labelled, read)}
    inputs = {"labelled": described}
    if weights := clip_folder(spec):
        inputs["clip"] = describe(weights)
    if config.protocol == "masks" and config.masks == "given":
        inputs["masks"] = describe_shards(config.masks_folder)
    return inputs


def check_masks(dataset: LabelledSet, config: EvaluateConfig) -> None:
    """Checks that given masks are there and can be told by the image's name.

    Raises:
        ValueError: they are not.
    """
    if config.protocol != "masks" or config.masks != "given":
        return
    if not is_s3(config.masks_folder) and not Path(config.masks_folder).exists():
        raise ValueError(f"evaluate.masks_folder {config.masks_folder}: no such folder")
    stems: dict[str, Path] = {}
    for image, _ in dataset.pairs:
        if (other := stems.setdefault(image.stem, image)) != image:
            raise ValueError(f"masks are found by the image's name, but two are called {image.stem}: {other} and {image}")


def check_sides(backbone: Backbone, config: EvaluateConfig) -> None:
    """Checks that an image tower can see what the settings show it.

    Args:
        backbone: the tower.
        config: settings, with the side in pixels.

    Raises:
        ValueError: a side is smaller than a patch; or, where no window is cut out of it, no multiple of one.
    """
    if config.protocol != "slide":
        check_side("evaluate.side", config.side, backbone)
        return
    check_patch("evaluate.crop", config.crop, backbone)
    if config.slide_side:
        check_patch("evaluate.slide_side", config.slide_side, backbone)
