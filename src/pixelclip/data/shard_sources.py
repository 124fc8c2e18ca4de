"""List and identify shards: in a folder, a manifest, the parts written by `masks`, or an `s3://` prefix."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from pixelclip.storage import cache
from pixelclip.storage.download import local_copy, local_path
from pixelclip.storage.files import digest, no_such
from pixelclip.storage.s3 import Listed, is_s3, list_below
from pixelclip.workflow.provenance import read_provenance
from pixelclip.workflow.stage import PROVENANCE, describe

MANIFEST = (".txt", ".lst", ".manifest")
_local_copies: dict[str, Path] = {}
"""Local copy of every URI opened by this process, so that the version is requested once, not at every read."""


class RemoteFile(Listed):
    """A file in an object store, downloaded when it is opened; has the part of Path's interface that shard readers use."""

    @property
    def name(self) -> str:
        """The last component of the URI."""
        return self.uri.rpartition("/")[2]

    @property
    def stem(self) -> str:
        """The name without its suffix."""
        return Path(self.name).stem

    def open(self, mode: str = "rb") -> BinaryIO:
        """Open the local copy; download it again if the cache has evicted it.

        Raises:
            ValueError: the file has changed since it was listed; also the errors of `local_copy`.
        """
        while True:
            copy = _local_copies.setdefault(self.uri, _local_copies.get(self.uri) or local_copy(self.uri))
            if copy.parent.name != cache.short_hash(f'"{self.etag}"'):
                raise ValueError(f"{self.uri}: the file changed in the store since this run listed it")
            try:
                opened = copy.open("rb")
            except FileNotFoundError:
                del _local_copies[self.uri]
                continue
            cache.touch(copy)
            return opened

    def __str__(self) -> str:
        return self.uri


Shard = Path | RemoteFile
"""A tar, on disk or in an object store."""


def list_shards(source: Path | str) -> list[Shard]:
    """List the tars in a folder, in the mask parts of a folder, below an `s3://` prefix, or in a manifest.

    A manifest is a text file with one path or URI per line. Paths are relative to it.

    Raises:
        ValueError: the source does not exist or has no shard, a shard of the manifest is missing, or the store rejects access.
    """
    return _find_shards(source)[0]


def describe_shards(source: Path | str) -> dict[str, Any]:
    """Like `stage.describe`, but a manifest, a set of parts or an `s3://` prefix is identified by its tars.

    Tars in a store are identified by the ETags in its listing, so nothing is downloaded.
    """
    if not is_s3(source) and (path := Path(source)).is_dir() and (any(path.glob("*.tar")) or not parts(path)):
        return describe(path)
    listed = list_below(folder := str(source).rstrip("/")) if _is_prefix(source) else []
    if any(entry.uri == f"{folder}/{PROVENANCE}" for entry in listed):
        provenance = read_provenance(local_copy(f"{folder}/{PROVENANCE}"))
        return {"path": str(source), **provenance["output"], "provenance": provenance}
    shards, provenances = _find_shards(source, listed)
    md5, size = hashlib.md5(usedforsecurity=False), 0
    for shard in shards:
        entry: dict[str, Any] = {"md5": shard.etag, "size": shard.size} if isinstance(shard, RemoteFile) else digest(shard)
        md5.update(f"{shard.name} {entry['md5']}\n".encode())
        size += entry["size"]
    identity = {"path": str(source), "md5": md5.hexdigest(), "num_files": len(shards), "size": size}
    return identity | ({"provenance": provenances[0]} if provenances else {})  # the parts share their provenance


def parts(source: Path) -> list[Path]:
    """List the folders of mask parts (`masks.part`) in a folder; empty if it has none.

    Raises:
        ValueError: a part is missing, or the parts come from different runs.
    """
    return [source / name for name in _complete_parts(source, sorted(source.glob(f"*/{PROVENANCE}")))]


def _is_prefix(source: Path | str) -> bool:
    return is_s3(source) and not str(source).endswith(MANIFEST)


def _find_shards(source: Path | str, listed: Sequence[Listed] = ()) -> tuple[list[Shard], list[dict[str, Any]]]:
    """Return the shards, and the provenance of each mask part if they are stored in parts."""
    files: dict[str, Shard]
    if _is_prefix(source):
        folder = str(source).rstrip("/")
        files = {entry.uri.removeprefix(f"{folder}/"): RemoteFile(**vars(entry)) for entry in listed or list_below(folder)}
    else:
        path = local_path(source)
        if path.is_file():
            return _read_manifest(path), []
        if not path.is_dir():
            raise ValueError(no_such(path, "folder or manifest of shards"))
        found = [*path.glob("*.tar")] or [*path.glob("*/*.tar"), *path.glob(f"*/{PROVENANCE}")]
        files = {file.relative_to(path).as_posix(): file for file in sorted(found)}

    def tars(*folders: str) -> list[Shard]:
        named = [(*name.rpartition("/")[::2], file) for name, file in files.items() if name.endswith(".tar")]
        return [file for folder, name, file in named if folder in folders and not name.startswith(".")]

    shards, made = tars(""), {}
    if not shards:
        made = _complete_parts(source, [file for name, file in files.items() if name.split("/")[1:] == [PROVENANCE]])
        shards = sorted(tars(*made), key=lambda tar: tar.name)  # as without parts, whatever the names of the folders
    if not shards:
        raise ValueError(f"{source}: contains no shard (*.tar)")
    return shards, list(made.values())


def _read_manifest(manifest: Path) -> list[Shard]:
    try:
        lines = [line.strip() for line in manifest.read_text().splitlines()]
    except UnicodeDecodeError:
        raise ValueError(f"{manifest}: is not a shard manifest (a text file with one path or URI per line)") from None
    lines = [line for line in lines if line and not line.startswith("#")]
    folders = {line.rpartition("/")[0] for line in lines if is_s3(line)}  # one listing per folder, not a request per shard
    remote = {entry.uri: RemoteFile(**vars(entry)) for folder in folders for entry in list_below(folder)}
    shards = [remote.get(line) if is_s3(line) else manifest.parent / line for line in lines]
    missing = [
        line if is_s3(line) else str(manifest.parent / line)
        for line, shard in zip(lines, shards, strict=True)
        if shard is None or (isinstance(shard, Path) and not shard.is_file())
    ]
    if missing:
        raise ValueError(f"{manifest}: {len(missing)} of its shards are missing, the first is {missing[0]}")
    if not lines:
        raise ValueError(f"{manifest}: contains no shard (*.tar)")
    return [shard for shard in shards if shard]


def _complete_parts(source: Path | str, provenances: Iterable[Shard]) -> dict[str, dict[str, Any]]:
    """Map the folders of a complete set of mask parts to their provenance.

    Args:
        source: name of the set in error messages.
        provenances: provenance of any stage, one file per folder.
    """
    files = {str(file).split("/")[-2]: str(file) for file in provenances}
    made = {name: read_provenance(local_path(file)) for name, file in files.items() if not name.startswith(".")}
    folder_of: dict[str, str] = {}
    runs: dict[str, str] = {}
    for name, provenance in made.items():
        settings = dict(provenance["settings"])
        if part := str(settings.pop("part", "")):
            inputs = {key: described["md5"] for key, described in provenance["inputs"].items() if key != "part"}
            runs.setdefault(json.dumps([settings, inputs, part.partition("/")[2]], sort_keys=True), name)
            folder_of[part] = name
    if len(runs) > 1:
        reason = "contains parts from different runs (settings, inputs or number of parts differ)"
        raise ValueError(f"{source}: {reason}: {', '.join(runs.values())}")
    count = max((int(part.partition("/")[2]) for part in folder_of), default=0)
    missing = [part for part in (f"{number}/{count}" for number in range(1, count + 1)) if part not in folder_of]
    if missing:
        raise ValueError(f"{source}: contains parts, but not {', '.join(missing)}")
    return {name: made[name] for name in folder_of.values()}
