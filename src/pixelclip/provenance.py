"""What a provenance says: the settings of its whole chain, its stages, its data, and all of that as tags.

A stage's provenance nests that of every input that a stage made. One that fetched data from elsewhere has a `source`: where
in which revision the data stands (`git_sha`, `path`, `md5`, `nfiles`, `size`, and `repo` where it is known).
"""

from collections.abc import Iterator, Mapping
from typing import Any

from pixelclip import __version__
from pixelclip.code_version import code_image, code_revision

WEIGHTS = ("model", "clip", "dino", "weights")
"""Inputs that are no data."""


def chain(provenance: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The provenances of a result and of all stages before it, the nearest first."""
    yield provenance
    for described in provenance["inputs"].values():
        if "provenance" in described:
            yield from chain(described["provenance"])


def inputs(provenance: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any], str]]:
    """Name, description and reading stage of every input of the chain, the nearest first."""
    for stage in chain(provenance):
        if stage.get("stage") == "evaluate_clip" and stage is not provenance:
            continue  # `evaluate` has read the same
        for name, described in stage["inputs"].items():
            yield name, described, stage.get("stage", "")


def source(described: Mapping[str, Any]) -> dict[str, Any]:
    """Where an input was fetched from; empty when no stage fetched it."""
    return dict(described.get("provenance", {}).get("source", {}))


def flatten(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a stage and of all stages before it, as `stage.setting`; of two stages of one name, the nearer's."""
    params: dict[str, Any] = {}
    for stage in chain(provenance):
        params = {f"{stage['stage']}.{name}": value for name, value in stage["settings"].items()} | params
    return params


def tags(provenance: Mapping[str, Any]) -> dict[str, str]:
    """Lineage as tags: code (revision, version, image), and every input of the chain.

    An input has `data.NAME.md5` and `data.NAME.path`; of one that was fetched they are those of its source, beside
    `data.NAME.git_sha` and whatever else the source says.
    """
    found = {
        "code.revision": str(provenance.get("revision") or code_revision()),
        "code.version": str(provenance.get("version") or __version__),
    }
    if image := provenance.get("image") or code_image():
        found["code.image"] = image
    for name, described, _ in inputs(provenance):
        known = {"md5": described["md5"], "path": described["path"]} | source(described)
        found |= {f"data.{name}.{key}": str(value) for key, value in known.items()}
    return found


def data(provenance: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The data that the chain begins with, by name: what no stage made, or what was fetched. Weights are no data."""
    found: dict[str, Mapping[str, Any]] = {}
    for name, described, _ in inputs(provenance):
        if name not in WEIGHTS and ("provenance" not in described or source(described)):
            found.setdefault(name, described)
    return found
