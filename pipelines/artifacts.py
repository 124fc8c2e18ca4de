"""KFP artifacts that point to folders, to which a component writes and from which the next one reads."""

import math
import os
import tarfile
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pixelclip.storage.files import write_atomically
from pixelclip.workflow.stage import METRICS, PROVENANCE

LOCATION = "location"
"""Metadata key with the path or prefix of the content, if it is not stored at the artifact's own path."""
RUN = "{run}"
"""In the workspace and output of a prediction: the ID of the pipeline run."""
PACKED = ".packed"
"""Subfolder of a packed artifact with its files in tars."""
_MANY = 100  # files; folders of fewer files are not packed
_TAR_SIZE = 512 << 20  # bytes of content in one tar


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
    folder = writable(of_run(workspace)) / stage
    point(artifact, str(folder))
    return folder


def place_in(out: str, artifact: Any, workspace: str, stage: str) -> str:
    """Return the output of a component: the s3:// prefix `out`, to which the artifact then points, or as `place` does."""
    if not out:
        return str(place(artifact, workspace, stage))
    point(artifact, out := of_run(out))
    return out


def of_run(place: str) -> str:
    """Replace `{run}` in a place by the ID of the pipeline run.

    Raises:
        ValueError: the ID is unknown, outside of a cluster.
    """
    if RUN not in place:
        return place
    from pixelclip.tracking.run import PIPELINE_RUN  # imports MLflow

    if not (run := os.environ.get(PIPELINE_RUN)):
        raise ValueError(f"{place}: {RUN} is the ID of a pipeline run, but {PIPELINE_RUN} is not set")
    return place.replace(RUN, run)


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


def pack(artifact: Any) -> None:
    """Pack the files of an output artifact of many files into few tars in its subfolder `PACKED`.

    KFP's launcher transfers one file after another, at 5.5 ms per file beside the store and more over a network. `located`
    unpacks the files. Provenance and metrics stay outside, by which another attempt recognises the result. A pointer is not
    packed, and neither is anything outside of a cluster, where steps share their folders.
    """
    folder = Path(artifact.path)
    if artifact.metadata.get(LOCATION) or not os.environ.get("KFP_POD_NAME") or not folder.is_dir():
        return
    tars = folder / PACKED
    if not tars.is_dir() and sum(1 for _ in _files(folder)) <= _MANY:
        return
    tars.mkdir(exist_ok=True)
    for number, files in enumerate(_groups(folder), len(list(tars.glob("*.tar")))):  # after those of an interrupted attempt
        tar = tars / f"{number:06d}.tar"
        with tarfile.open(partial := tar.with_suffix(".partial"), "w") as opened:
            for file in files:
                opened.add(file, file.relative_to(folder).as_posix(), recursive=False)
        partial.replace(tar)
        for file in files:
            file.unlink()
    for parent, _, _ in os.walk(folder, topdown=False):
        if not any(Path(parent).iterdir()):
            Path(parent).rmdir()


def _files(folder: Path) -> Iterator[Path]:
    """Yield all files below a folder, hidden ones too, except the tars, provenance and metrics."""
    for parent, folders, names in os.walk(folder):
        others = {PACKED, PROVENANCE, METRICS} if Path(parent) == folder else set()
        folders[:] = [name for name in folders if name not in others]
        yield from (Path(parent, name) for name in sorted(names) if name not in others)


def _groups(folder: Path) -> Iterator[list[Path]]:
    """Yield all files of a folder in groups of at most `_TAR_SIZE` bytes, or of one larger file."""
    group: list[Path] = []
    size = 0
    for file in list(_files(folder)):
        length = file.stat().st_size
        if group and size + length > _TAR_SIZE:
            yield group
            group, size = [], 0
        group.append(file)
        size += length
    if group:
        yield group


def _unpack(folder: Path) -> None:
    """Unpack a packed artifact in its own folder; if interrupted, another call continues."""
    for tar in sorted((folder / PACKED).glob("*.tar")):
        with tarfile.open(tar) as opened:
            opened.extractall(folder, filter="data")
        tar.unlink()
    (folder / PACKED).rmdir()


def located(artifact: Any) -> Path | str:
    """Return the path or s3:// prefix of the content of an input artifact; unpack it if necessary."""
    location = str(artifact.metadata.get(LOCATION) or artifact.path)
    if location.startswith("s3://"):
        return location
    if (Path(location) / PACKED).is_dir():
        _unpack(Path(location))
    return Path(location)
