"""Outputs of stages in a store: `s3://bucket/folder` contains a complete result or none."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pixelclip.storage import cache, s3
from pixelclip.storage.download import local_copy
from pixelclip.storage.upload import upload_folder
from pixelclip.workflow.provenance import read_provenance
from pixelclip.workflow.stage import METRICS, PROVENANCE


@contextmanager
def output_folder(out: str) -> Iterator[Path]:
    """Yield the local folder in which a stage writes `out`; upload it when the `with` block ends.

    Provenance is uploaded last, so a reader sees the complete result or none. If the store has a finished result, only its
    provenance and metrics are downloaded, so that the stage recognises it, and nothing is uploaded. An interrupted stage
    resumes on the same machine.

    Args:
        out: local path, or `s3://bucket/folder`.

    Raises:
        ValueError: the store rejects the request or the connection fails; the same command then resumes.
    """
    if not s3.is_s3(out):
        yield Path(out)
        return
    out = out.rstrip("/")
    folder = cache.folder_of(out) / cache.OUT / out.rpartition("/")[2]
    if os.environ.get("RANK", "0") != "0":  # only the main process of a process group writes
        yield folder
        return
    existing = [one.uri.removeprefix(f"{out}/") for one in s3.list_below(out)]
    finished = PROVENANCE in existing
    if finished:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for name in (PROVENANCE, METRICS):
            shutil.copyfile(local_copy(f"{out}/{name}"), folder / name)
    elif any(name.endswith(f"/{PROVENANCE}") for name in existing):  # several results side by side
        shutil.copytree(local_copy(f"{out}/"), folder, dirs_exist_ok=True)
    elif others := [name for name in existing if not (folder / name).is_file()]:
        raise ValueError(f"{out}: contains {others[0]}, which no finished stage of pixelclip wrote; choose a new prefix")
    yield folder
    if finished and read_provenance(folder / PROVENANCE) == read_provenance(local_copy(f"{out}/{PROVENANCE}")):
        return
    upload_folder(folder, out, last=PROVENANCE)
    shutil.rmtree(folder.parent)
