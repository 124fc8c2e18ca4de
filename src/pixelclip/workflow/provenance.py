"""Read provenance: the settings, stages and data of a chain of stages, and lineage tags.

A stage's provenance contains that of every input that a stage wrote. A stage that fetched data has a `source`: `git_sha`,
`path`, `md5`, `nfiles`, `size`, and `repo` if known.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from pixelclip import __version__
from pixelclip.config import SETTINGS
from pixelclip.storage.files import read_json
from pixelclip.workflow.code_version import code_image, code_revision

WEIGHTS = ("model", "clip", "dino", "weights")
"""Inputs that are models, not data."""
UNFINISHED = ".provenance.json.partial"
"""Provenance of an unfinished stage, in its hidden folder: its inputs are needed until it has ended."""


class _Digest(BaseModel):
    md5: str
    num_files: int
    size: int


class _Input(_Digest):
    path: str
    provenance: "_Provenance | None" = None


class _Provenance(BaseModel):
    stage: str
    settings: dict[str, Any]
    inputs: dict[str, _Input]
    version: str
    revision: str
    source: dict[str, Any] | None = None


class _Finished(_Provenance):
    output: _Digest


def read_provenance(file: Path) -> dict[str, Any]:
    """Read the `provenance.json` of a finished stage.

    Raises:
        ValueError: the file is missing or damaged.
    """
    return dict(read_json(file, _Finished))


def read_unfinished(file: Path) -> dict[str, Any]:
    """Read the provenance of an unfinished stage, `UNFINISHED` in its hidden folder, which has no `output` yet.

    Raises:
        ValueError: the file is missing or damaged.
    """
    return dict(read_json(file, _Provenance))


def chain(provenance: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield the provenance of a result and of all earlier stages, nearest first."""
    yield provenance
    for described in provenance["inputs"].values():
        if "provenance" in described:
            yield from chain(described["provenance"])


def inputs(provenance: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any], str]]:
    """Yield every input of the chain as (name, description, stage that reads it), nearest first."""
    for stage in chain(provenance):
        if stage.get("stage") == "evaluate_clip" and stage is not provenance:
            continue  # `evaluate` reads the same inputs
        for name, described in stage["inputs"].items():
            yield name, described, stage.get("stage", "")


def source(described: Mapping[str, Any]) -> dict[str, Any]:
    """Return the origin of a fetched input; empty if no stage fetched it."""
    return dict(described.get("provenance", {}).get("source", {}))


def flatten(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a chain as `stage.setting`; if two stages share a name, the nearer one wins."""
    params: dict[str, Any] = {}
    for stage in chain(provenance):
        params = {f"{stage['stage']}.{name}": value for name, value in stage["settings"].items()} | params
    return params


_ONLY_FOR: dict[str, dict[Any, tuple[str, ...]]] = {
    "masks.generator": {
        "given": ("given_",),
        "sam": ("sam_",),
        "dino": ("dino_", "seed"),
        "labels": ("labels_",),
        "felzenszwalb": ("felzenszwalb_",),
        "model": ("model_",),
    },
    "train.strong_view": {True: ("cutout_",)},
}
"""For each value of a setting, how the names of those settings of the same stage start that apply only then."""


def used_settings(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a chain as `flatten` does, without empty ones and those that its other settings switch off."""
    flat = flatten(provenance)
    unused = set()
    for switch, values in _ONLY_FOR.items():
        for value, starts in values.items():
            if flat.get(switch, value) != value:
                unused |= {f"{switch.partition('.')[0]}.{start}" for start in starts}
    if not flat.get("train.dino"):
        unused.add("train.dino_")
    return {name: value for name, value in flat.items() if value != "" and not name.startswith(tuple(unused))}


def changed_settings(stage: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of one stage's provenance that differ from this version's defaults."""
    defaults = SETTINGS[stage["stage"]]().model_dump() if stage["stage"] in SETTINGS else {}
    return {name: value for name, value in stage["settings"].items() if defaults.get(name, ...) != value}


def tags(provenance: Mapping[str, Any]) -> dict[str, str]:
    """Return lineage tags: code (revision, version, image) and every input of the chain.

    An input has the tags `data.NAME.md5` and `data.NAME.path`. For a fetched input, these and further tags, such as
    `data.NAME.git_sha`, describe its source. If two inputs share a name, the nearer one wins.
    """
    lineage = {
        "code.revision": str(provenance.get("revision") or code_revision()),
        "code.version": str(provenance.get("version") or __version__),
    }
    if image := provenance.get("image") or code_image():
        lineage["code.image"] = image
    nearest: dict[str, Mapping[str, Any]] = {}
    for name, described, _ in inputs(provenance):
        nearest.setdefault(name, described)
    for name, described in nearest.items():
        origin = {"md5": described["md5"], "path": described["path"]} | source(described)
        lineage |= {f"data.{name}.{key}": str(value) for key, value in origin.items()}
    return lineage


def origins(provenance: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any], str]]:
    """Yield the data and weights at the start of the chain: those `inputs` that were fetched or that no stage wrote."""
    return (each for each in inputs(provenance) if "provenance" not in each[1] or source(each[1]))


def data(provenance: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Map names to `origins` without weights; if two share a name, the nearer one wins."""
    farthest_first = reversed([*origins(provenance)])
    return {name: described for name, described, _ in farthest_first if name not in WEIGHTS}
