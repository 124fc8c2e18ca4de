"""Evaluation protocol: names of labelled sets, labels of metrics, the settings that determine a metric, and validation."""

import re
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from pixelclip.config import BEST, QUALITIES, EvaluateConfig, Refinement
from pixelclip.data.class_names import SHIPPED
from pixelclip.data.labelled_images import LabelledSet
from pixelclip.data.labelled_sets import KINDS, describe_labelled
from pixelclip.data.shard_sources import describe_shards
from pixelclip.models.backbone import Backbone, check_patch, check_side
from pixelclip.models.clip_sources import clip_folder
from pixelclip.models.tokenizer import describe_tokenizer
from pixelclip.storage.download import local_path
from pixelclip.storage.files import read_json
from pixelclip.storage.s3 import is_s3
from pixelclip.workflow.provenance import read_provenance
from pixelclip.workflow.stage import PROVENANCE, describe

PROTOCOL = "protocol.json"
_OPTIONS = {
    "whole": ("side", "shortest_edge", "longest_edge", "feature_grid"),
    "slide": ("slide_side", "crop", "stride", "feature_grid"),
    "masks": ("side", "masks"),
    "given": ("masks_folder",),
    "felzenszwalb": ("felzenszwalb_scale", "felzenszwalb_sigma", "felzenszwalb_min_size"),
}
"""Settings that a protocol, or a source of its masks, depends on."""


def parse_labelled_sets(labelled: Sequence[str], config: EvaluateConfig) -> dict[str, tuple[Path, EvaluateConfig]]:
    """Map the name of each labelled set to its folder and settings.

    Args:
        labelled: `FOLDER` of the kind in the settings, or `KIND:FOLDER`; a folder may be `s3://bucket/folder`.
        config: settings shared by all sets.

    Raises:
        ValueError: two sets have the same name, or a name is not valid in a metric.
    """
    sets: dict[str, tuple[Path, EvaluateConfig]] = {}
    for word in labelled:
        kind, _, folder = word.partition(":")
        set_config = config if kind not in KINDS else config.model_copy(update={"kind": kind})
        path = local_path(folder if kind in KINDS else word)
        name = metric_name(path, set_config)
        if name in sets:
            raise ValueError(f"two labelled sets have the name {name!r}: {sets[name][0]} and {path}; evaluate them one by one")
        sets[name] = (path, set_config)
    return sets


def metric_name(labelled: Path, config: EvaluateConfig) -> str:
    """Return the name of a labelled set in metrics.

    Raises:
        ValueError: the name is not valid in an MLflow metric.
    """
    name = config.name or (labelled.resolve().name if config.kind == "folder" else config.kind)
    if not re.fullmatch(r"[\w.\- :]+", name):
        raise ValueError(
            f"{labelled}: {name!r} is not a valid MLflow metric name (letters, digits, _ - . : and blanks); set evaluate.name"
        )
    if name.endswith(BEST):
        raise ValueError(f"{labelled}: {name!r} ends with {BEST}, which is for metrics of quality=best; set evaluate.name")
    return name


def protocol_of(config: EvaluateConfig) -> dict[str, Any]:
    """Return the content of `protocol.json` for resolved settings; unused settings are None."""
    used = {
        *_OPTIONS[config.protocol],
        *(_OPTIONS.get(config.masks, ()) if config.protocol == "masks" else ()),
        *_OPTIONS.get(config.segments, ()),
    }
    settings = config.model_dump() | first_resize(config.model_dump())
    always = {key: settings[key] for key in ("name", "kind", "protocol", "templates")}
    # A folder has only its own names, so the word does not matter unless it is a file.
    always["names"] = None if config.kind == "folder" and config.names in SHIPPED else config.names
    always |= _refinement_of(config)
    always |= {} if config.precision == "float32" else {"precision": config.precision}
    return always | {key: settings[key] if key in used else None for options in _OPTIONS.values() for key in options}


def _refinement_of(config: EvaluateConfig) -> dict[str, Any]:
    """Return the settings of the refinement in use, or of quality=best; empty for the single view, as in earlier versions."""
    if config.best:
        return {"best": _in_words(QUALITIES["best"]), "window": config.window}
    if not config.steps:
        return {}
    return {"refinement": "-".join(config.steps), "refined": _in_words(config), "window": config.window}


def _in_words(refinement: Refinement) -> str:
    names = [name for name in Refinement.model_fields if not name.startswith("felzenszwalb")]
    return "; ".join(f"{name} {getattr(refinement, name)}" for name in names)


def first_resize(settings: Mapping[str, Any]) -> dict[str, int]:
    """Return `shortest_edge` and `longest_edge` of an evaluation's settings, zeros without that resize.

    Args:
        settings: settings of stage `evaluate`; those of versions before 0.2.0, which did not resize, lack both.
    """
    shortest = settings.get("shortest_edge", 0)
    return {"shortest_edge": shortest, "longest_edge": settings["longest_edge"] if shortest else 0}


def input_size(settings: Mapping[str, Any], model_side: int) -> dict[str, int]:
    """Return the sizes with which a prediction repeats an evaluation: first resize, side and window of CLIP's input.

    Args:
        settings: see `first_resize`.
        model_side: the side of the training, in pixels; `side` and `window` are left out if they are the same.
    """
    whole = settings.get("protocol", "whole") == "whole"
    sides = {name: settings.get(name, 0) for name in ("side", "window") if whole}
    return first_resize(settings) | {name: side for name, side in sides.items() if side not in (0, model_side)}


def conditions_of(protocol: Mapping[str, Any], inputs: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return all conditions besides the model that determine the metrics; files are identified by content, not by path.

    Arguments are the results of `protocol_of` and `describe_inputs`, or the content of their files.
    """
    md5 = {f"md5 of {key}": inputs[key]["md5"] for key in ("labelled", "masks", "names", "tokenizer") if key in inputs}
    paths = {"masks_folder", *(["names"] if "names" in inputs else [])}
    # Versions before 0.2.0 had no such settings; without them the conditions are the same.
    unused = {key for key in ("names", "shortest_edge", "longest_edge") if not protocol.get(key)}
    return md5 | {key: value for key, value in protocol.items() if key not in paths | unused}


class _Protocol(BaseModel):
    name: str
    kind: str
    protocol: str
    side: int | None


def read_protocol(folder: Path) -> dict[str, Any]:
    """Read the `protocol.json` of an evaluation; raise ValueError if it is missing or damaged."""
    return dict(read_json(folder / PROTOCOL, _Protocol))


def metric_label(protocol: dict[str, Any]) -> str:
    """Return the part of a metric's name after the slash: the set's name, plus any deviation from the paper's protocol.

    Sizes and templates are not part of it, so that all runs of a sweep share one name. The tag `protocol.NAME` records them.
    """
    masks = f"-{protocol['masks']}" if protocol["masks"] not in (None, "truth") else ""
    deviation = "" if protocol["protocol"] == "whole" else f".{protocol['protocol']}{masks}"
    refinement = f".{protocol['refinement']}" if protocol.get("refinement") else ""
    return protocol["name"] + deviation + refinement


def describe_protocol(protocol: dict[str, Any]) -> str:
    """Format a protocol as one line of text, without the set's name and the limit of a resize that is switched off."""
    hidden = {"name"} if protocol.get("shortest_edge") else {"name", "longest_edge"}
    return ", ".join(f"{key} {value}" for key, value in protocol.items() if key not in hidden and value is not None)


def check_evaluation(evaluation: Path, model: Path) -> dict[str, Any]:
    """Return the provenance of an evaluation; raise ValueError unless it is the output of `evaluate` for this model folder."""
    evaluated = read_provenance(evaluation / PROVENANCE)
    if evaluated["stage"] != "evaluate":
        raise ValueError(f"{evaluation}: expected the output of evaluate, found that of {evaluated['stage']!r}")
    if evaluated["inputs"].get("model", {}).get("md5") != read_provenance(model / PROVENANCE)["output"]["md5"]:
        raise ValueError(f"{evaluation}: evaluates a different model than {model}")
    return evaluated


def describe_inputs(labelled: Path, dataset: LabelledSet, config: EvaluateConfig) -> dict[str, dict[str, Any]]:
    """Identify all inputs besides the model, as `describe` does: `labelled`, and if they are files `clip`, its `tokenizer`,
    `masks` and `names`.
    """
    inputs = {"labelled": describe_labelled(labelled, config.kind, chain(*dataset.pairs))}
    if weights := clip_folder(config.clip):
        inputs |= {"clip": describe(weights), **describe_tokenizer(weights)}
    if config.names not in SHIPPED:
        inputs["names"] = describe(Path(config.names))
    if config.reads_masks:
        inputs["masks"] = describe_shards(config.masks_folder)
    return inputs


def check_masks(dataset: LabelledSet, config: EvaluateConfig) -> None:
    """Check that given masks exist and that image names identify them uniquely.

    Raises:
        ValueError: the folder is missing, or two images have the same name.
    """
    if not config.reads_masks:
        return
    if not is_s3(config.masks_folder) and not Path(config.masks_folder).exists():
        raise ValueError(f"evaluate.masks_folder {config.masks_folder}: no such folder")
    stems: dict[str, Path] = {}
    for image in (image for image, _ in dataset.pairs if image.is_file()):  # others are label maps without an image
        if (other := stems.setdefault(image.stem, image)) != image:
            raise ValueError(f"masks are matched by image name, but two images are named {image.stem}: {other} and {image}")


def check_sides(backbone: Backbone, config: EvaluateConfig) -> None:
    """Check that the input sizes in the resolved settings fit the patches of an image tower.

    Raises:
        ValueError: a side is smaller than a patch or, unless windows are cropped from it, not a multiple of the patch.
    """
    if config.protocol != "slide":
        check_side("evaluate.side", config.side, backbone)
        if config.best or config.scales:
            check_side("evaluate.window", config.window, backbone)
        return
    check_patch("evaluate.crop", config.crop, backbone)
    if config.slide_side:
        check_patch("evaluate.slide_side", config.slide_side, backbone)
