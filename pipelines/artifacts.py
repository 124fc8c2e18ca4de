"""KFP artifacts that point to folders, to which a component writes and from which the next one reads."""

import math
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pixelclip.storage.files import write_atomically

LOCATION = "location"
"""Metadata key with the path or prefix of the content, if it is not stored at the artifact's own path."""


def place(artifact: Any, workspace: str, stage: str) -> Path:
    """Return the output folder of a component: the artifact's own path, or `workspace/stage`.

    Args:
        artifact: a KFP output artifact; with a workspace it becomes a pointer.
        workspace: folder that outlives the run, in which stages are reused and resumed, or empty.
        stage: name of the stage.

    Raises:
        ValueError: see `writable`.
    """
    if not workspace:
        return Path(artifact.path)
    folder = writable(workspace) / stage
    point(artifact, str(folder))
    return folder


def writable(workspace: str) -> Path:
    """Return the folder of a workspace, and create it if necessary.

    Raises:
        ValueError: this user cannot write to it.
    """
    folder = Path(workspace).absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(
            f"workspace {folder}: user {os.getuid()} cannot write there ({error.strerror}); "
            "see docs/cluster.md for how to prepare its volume"
        ) from None
    return folder


def point(artifact: Any, location: str) -> None:
    """Make an output artifact a pointer to a folder or an s3:// prefix.

    KFP's launcher fails on any artifact whose URI is not in an object store, and on output artifacts outside the run's bucket.
    So the URI does not change; the location is in the metadata and in the file that KFP uploads.
    """
    artifact.metadata[LOCATION] = location
    write_atomically(Path(artifact.path), f"{location}\n")


def record(artifact: Any, metrics: Mapping[str, float]) -> None:
    """Add the metrics of a stage to the metadata of its output, where KFP shows them without a column in *Compare runs*.

    KFP rejects numbers that are not finite, so these are left out.
    """
    artifact.metadata.update({name: value for name, value in metrics.items() if math.isfinite(value)})


def located(artifact: Any) -> Path | str:
    """Return the path or s3:// prefix of the content of an input artifact."""
    location = str(artifact.metadata.get(LOCATION) or artifact.path)
    return location if location.startswith("s3://") else Path(location)
