"""Find Shards and identify them: a folder, a manifest, the parts written by `masks`, or an `s3://` prefix."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from pixelclip import cache
from pixelclip.download import local_copy
from pixelclip.s3 import Listed, is_s3, list_below
from pixelclip.stage import PROVENANCE, describe
from pixelclip.storage import digest, read_json

_MANIFEST = (".txt", ".lst", ".manifest")
_local_copies: dict[str, Path] = {}
"""Local copy of every URI opened by this process, so that the server is asked for the version once, not at every read."""


@dataclass(frozen=True)
class RemoteFile:
    """A file in an object store, downloaded when it is opened; has the part of Path's interface that shard readers use."""

    uri: str
    etag: str
    size: int

    @property
    def name(self) -> str:
        """The last component of the URI."""
        return self.uri.rpartition("/")[2]

    @property
    def stem(self) -> str:
        """The name without its suffix."""
        return Path(self.name).stem

    @property
    def folder(self) -> str:
        """The URI without its last component."""
        return self.uri.rpartition("/")[0]

    def open(self, mode: str = "rb") -> BinaryIO:
        """Open the local copy; download it again if the cache has evicted it.

        Raises:
            ValueError: as `local_copy`; or the file has changed since it was listed.
        """
        while True:
            copy = _local_copies.setdefault(self.uri, _local_copies.get(self.uri) or local_copy(self.uri))
            if copy.parent.name != cache.key(f'"{self.etag}"'):
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
        ValueError: the source does not exist or has no shard, a shard of the manifest is missing, or the store refuses access.
    """
    return _find_shards(source)[0]


def describe_shards(source: Path | str) -> dict[str, Any]:
    """Identify Shards as `stage.describe` does; a manifest, mask parts or a prefix by the tars in it.

    Tars in a store are identified by the ETags in its listing, so nothing is downloaded.
    """
    folder = str(source).rstrip("/")
    if _is_prefix(source):
        listed = list_below(folder)
        if any(entry.uri == f"{folder}/{PROVENANCE}" for entry in listed):
            provenance = read_json(local_copy(f"{folder}/{PROVENANCE}"))
            return {"path": str(source), **provenance["output"], "provenance": provenance}
        shards, parts_provenance = _find_shards(source, listed)
    elif not is_s3(source) and (path := Path(source)).is_dir() and (any(path.glob("*.tar")) or not _local_parts(path)):
        return describe(path)
    else:
        shards, parts_provenance = _find_shards(source)
    md5, size = hashlib.md5(usedforsecurity=False), 0
    for shard in shards:
        entry: dict[str, Any] = {"md5": shard.etag, "size": shard.size} if isinstance(shard, RemoteFile) else digest(shard)
        md5.update(f"{shard.name} {entry['md5']}\n".encode())
        size += entry["size"]
    identity = {"path": str(source), "md5": md5.hexdigest(), "num_files": len(shards), "size": size}
    return identity | ({"provenance": parts_provenance[0]} if parts_provenance else {})  # the parts share their provenance


def parts(source: Path) -> list[Path]:
    """List the folders of mask parts (`masks.part`) in a folder; empty if it has none.

    Raises:
        ValueError: a part is missing, or the parts belong to different runs.
    """
    return [source / name for name in _local_parts(source)]


def _is_prefix(source: Path | str) -> bool:
    return is_s3(source) and not str(source).endswith(_MANIFEST)


def _find_shards(source: Path | str, listed: list[Listed] | None = None) -> tuple[list[Shard], list[dict[str, Any]]]:
    """Return the shards, and the provenance of each mask part if that is where they are stored."""
    made: dict[str, dict[str, Any]] = {}
    shards: list[Shard]
    if _is_prefix(source):
        folder = str(source).rstrip("/")
        listed = list_below(folder) if listed is None else listed
        tars = _tars(listed)
        shards = [tar for tar in tars if tar.folder == folder]
        if not shards:
            made = _remote_parts(folder, listed)
            shards = [tar for tar in tars if tar.folder in {f"{folder}/{name}" for name in made}]
    else:
        path = local_copy(str(source)) if is_s3(source) else Path(source)
        if path.is_file():
            shards = _read_manifest(path)
        elif path.is_dir():
            shards = [*sorted(path.glob("*.tar"))]
            if not shards:
                made = _local_parts(path)
                shards = [*sorted(tar for name in made for tar in (path / name).glob("*.tar"))]
        else:
            raise ValueError(f"{source}: no such folder or manifest of shards")
    if not shards:
        raise ValueError(f"{source}: holds no shard (*.tar)")
    return shards, list(made.values())


def _read_manifest(manifest: Path) -> list[Shard]:
    try:
        lines = [line.strip() for line in manifest.read_text().splitlines()]
    except UnicodeDecodeError:
        raise ValueError(f"{manifest}: is no manifest of shards (a text file with one path or URI per line)") from None
    lines = [line for line in lines if line and not line.startswith("#")]
    folders = {line.rpartition("/")[0] for line in lines if is_s3(line)}  # one listing per folder, not a request per shard
    remote = {tar.uri: tar for folder in folders for tar in _tars(list_below(folder))}
    shards = [remote.get(line) if is_s3(line) else manifest.parent / line for line in lines]
    missing = [
        line if is_s3(line) else str(manifest.parent / line)
        for line, shard in zip(lines, shards, strict=True)
        if shard is None or (isinstance(shard, Path) and not shard.is_file())
    ]
    if missing:
        raise ValueError(f"{manifest}: {len(missing)} of its shards are missing, the first is {missing[0]}")
    return [shard for shard in shards if shard]


def _tars(listed: list[Listed]) -> list[RemoteFile]:
    files = [RemoteFile(entry.uri, entry.etag, entry.size) for entry in listed]
    return [file for file in files if file.name.endswith(".tar") and not file.name.startswith(".")]


def _local_parts(source: Path) -> dict[str, dict[str, Any]]:
    folders = [folder for folder in sorted(source.iterdir()) if not folder.name.startswith(".")]
    made = {folder.name: read_json(folder / PROVENANCE) for folder in folders if (folder / PROVENANCE).is_file()}
    return _complete_parts(str(source), made)


def _remote_parts(folder: str, listed: list[Listed]) -> dict[str, dict[str, Any]]:
    below = [entry.uri.removeprefix(f"{folder}/").split("/") for entry in listed]
    names = [name for name, *others in below if others == [PROVENANCE]]
    made = {name: read_json(local_copy(f"{folder}/{name}/{PROVENANCE}")) for name in names}
    return _complete_parts(folder, made)


def _complete_parts(source: str, made: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the folders, of those with a provenance, that form one complete set of mask parts."""
    folder_of: dict[str, str] = {}
    runs: dict[str, str] = {}
    for name, provenance in made.items():
        settings = dict(provenance.get("settings", {}))
        if part := str(settings.pop("part", "")):
            inputs = {key: described["md5"] for key, described in provenance["inputs"].items()}
            runs.setdefault(json.dumps([settings, inputs, part.partition("/")[2]], sort_keys=True), name)
            folder_of[part] = name
    if len(runs) > 1:
        raise ValueError(f"{source}: holds parts of masks of other settings, shards or numbers: {', '.join(runs.values())}")
    count = max((int(part.partition("/")[2]) for part in folder_of), default=0)
    missing = [part for part in (f"{number}/{count}" for number in range(1, count + 1)) if part not in folder_of]
    if missing:
        raise ValueError(f"{source}: holds parts of masks, but not {', '.join(missing)}")
    return {name: made[name] for name in folder_of.values()}
