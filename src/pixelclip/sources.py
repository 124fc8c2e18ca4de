"""Where Shards and CLIPs stand, and what identifies them.

Shards are a folder, a manifest, the parts that `masks` left, or a prefix of a store.
"""

import hashlib
import json
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, BinaryIO

from pixelclip import cache
from pixelclip.download import local_copy
from pixelclip.s3 import Listed, is_s3, list_below
from pixelclip.stage import PROVENANCE, describe
from pixelclip.storage import digest, read_json

_MANIFEST = (".txt", ".lst", ".manifest")


@dataclass(frozen=True)
class RemoteFile:
    """A file in a store that is brought here when it is opened; of a Path it has what readers of shards need."""

    uri: str
    etag: str
    size: int

    @property
    def name(self) -> str:
        """The last part of its URI."""
        return self.uri.rpartition("/")[2]

    @property
    def stem(self) -> str:
        """Its name without the suffix."""
        return Path(self.name).stem

    def open(self, mode: str = "rb") -> BinaryIO:
        """Opens the local copy; brings it again where the cache had to give it up.

        Raises:
            ValueError: as `local_copy`; or the file is of another version than the one that was listed.
        """
        while True:
            copy = _here.setdefault(self.uri, _here.get(self.uri) or local_copy(self.uri))
            if copy.parent.name != cache.key(f'"{self.etag}"'):
                raise ValueError(f"{self.uri}: the file changed in the store since this run listed it")
            try:
                opened = copy.open("rb")
            except FileNotFoundError:
                del _here[self.uri]
                continue
            cache.touch(copy)
            return opened

    def __str__(self) -> str:
        return self.uri


_here: dict[str, Path] = {}
"""The copies that this process opened: a server is asked about a version once, not at every read."""


Shard = Path | RemoteFile
"""A tar, here or in a store; the latter is brought here when it is read."""


def list_shards(source: Path | str) -> list[Shard]:
    """The tars of Shards: `*.tar` in a folder or below `s3://bucket/prefix`, or a text manifest with a path or URI a line.

    Raises:
        ValueError: nothing there, a shard of the manifest is missing, or the store refuses.
    """
    if is_s3(source) and not str(source).endswith(_MANIFEST):
        return [*_remote_shards(str(source), list_below(str(source)))]
    source = local_copy(str(source)) if is_s3(source) else Path(source)
    shards: list[Shard]
    if source.is_file():
        try:
            lines = [line.strip() for line in source.read_text().splitlines()]
        except UnicodeDecodeError:
            raise ValueError(f"{source}: is no manifest of shards (a text file with one path or URI a line)") from None
        lines = [line for line in lines if line and not line.startswith("#")]
        missing = [line for line in lines if not is_s3(line) and not (source.parent / line).is_file()]
        if missing:
            found = f"the first is {source.parent / missing[0]}"
            raise ValueError(f"{source}: {len(missing)} of its shards are missing, {found}")
        folders = {line.rpartition("/")[0] for line in lines if is_s3(line)}  # a listing each, not a request a shard
        remote = {tar.uri: tar for folder in folders for tar in _tars(list_below(folder))}
        if missing := [line for line in lines if is_s3(line) and line not in remote]:
            raise ValueError(f"{source}: {len(missing)} of its shards are missing, the first is {missing[0]}")
        shards = [remote[line] if is_s3(line) else source.parent / line for line in lines]
    elif source.is_dir():
        here = sorted(source.glob("*.tar")) or sorted(path for part in parts(source) for path in part.glob("*.tar"))
        shards = [*here]
    else:
        raise ValueError(f"{source}: no such folder or manifest of shards")
    if not shards:
        raise ValueError(f"{source}: holds no shard (*.tar)")
    return shards


def _tars(listed: list[Listed]) -> list[RemoteFile]:
    found = [RemoteFile(one.uri, one.etag, one.size) for one in listed]
    return [file for file in found if file.name.endswith(".tar") and not file.name.startswith(".")]


def _remote_shards(uri: str, listed: list[Listed]) -> list[RemoteFile]:
    folder, tars = uri.rstrip("/"), _tars(listed)
    shards = [tar for tar in tars if tar.uri.rpartition("/")[0] == folder]
    if not shards:
        of_parts = {f"{folder}/{name}" for name in _remote_parts(uri, listed)}
        shards = [tar for tar in tars if tar.uri.rpartition("/")[0] in of_parts]
    if not shards:
        raise ValueError(f"{uri}: holds no shard (*.tar)")
    return shards


def parts(source: Path) -> list[Path]:
    """The folders in which `masks` left its parts (`masks.part`), all of them or none.

    Raises:
        ValueError: some part is missing, or is of another whole.
    """
    folders = [folder for folder in sorted(source.iterdir()) if not folder.name.startswith(".")]
    made = {folder.name: read_json(folder / PROVENANCE) for folder in folders if (folder / PROVENANCE).is_file()}
    return [source / name for name in _whole(str(source), made)]


def _remote_parts(uri: str, listed: list[Listed]) -> dict[str, dict[str, Any]]:
    """As `parts` in a store: name and provenance."""
    folder = uri.rstrip("/")
    below = [one.uri.removeprefix(f"{folder}/").split("/") for one in listed]
    names = [name for name, *others in below if others == [PROVENANCE]]
    made = {name: read_json(local_copy(f"{folder}/{name}/{PROVENANCE}")) for name in names}
    return {name: made[name] for name in _whole(uri, made)}


def _whole(source: str, made: dict[str, dict[str, Any]]) -> list[str]:
    """Of folders with their provenance the names of those that are parts of one whole."""
    found: dict[str, str] = {}
    kinds: dict[str, str] = {}
    for name, provenance in made.items():
        settings = dict(provenance.get("settings", {}))
        if part := str(settings.pop("part", "")):
            inputs = {key: described["md5"] for key, described in provenance["inputs"].items()}
            kinds.setdefault(json.dumps([settings, inputs, part.partition("/")[2]], sort_keys=True), name)
            found[part] = name
    if len(kinds) > 1:
        raise ValueError(f"{source}: holds parts of masks of other settings, shards or numbers: {', '.join(kinds.values())}")
    count = max((int(part.partition("/")[2]) for part in found), default=0)
    missing = [part for part in (f"{number}/{count}" for number in range(1, count + 1)) if part not in found]
    if missing:
        raise ValueError(f"{source}: holds parts of masks, but not {', '.join(missing)}")
    return list(found.values())


def describe_shards(source: Path | str) -> dict[str, Any]:
    """Identifies Shards as `stage.describe` does; a manifest, a folder of parts or a prefix by the tars in it.

    Tars in a store are identified by their ETags: a listing tells them, nothing is read.
    """
    if is_s3(source) and not str(source).endswith(_MANIFEST):
        wanted = f"{str(source).rstrip('/')}/{PROVENANCE}"
        listed = list_below(str(source))
        if any(one.uri == wanted for one in listed):
            provenance = read_json(local_copy(wanted))
            return {"path": str(source), **provenance["output"], "provenance": provenance}
        made = list(_remote_parts(str(source), listed).values())
    elif not is_s3(source) and (folder := Path(source)).is_dir():
        if any(folder.glob("*.tar")) or not (of_parts := parts(folder)):
            return describe(folder)
        made = [read_json(part / PROVENANCE) for part in of_parts]
    else:
        made = []
    whole, size = hashlib.md5(usedforsecurity=False), 0
    tars = list_shards(source)
    for tar in tars:
        found: dict[str, Any] = {"md5": tar.etag, "size": tar.size} if isinstance(tar, RemoteFile) else digest(tar)
        whole.update(f"{tar.name} {found['md5']}\n".encode())
        size += found["size"]
    identity = {"path": str(source), "md5": whole.hexdigest(), "num_files": len(tars), "size": size}
    return identity | ({"provenance": made[0]} if made else {})  # what made one part made them all


def clip_folder(spec: str) -> Path | None:
    """The file or folder that a `clip` setting names, or None when open_clip finds the weights by name."""
    if spec == "toy":
        return Path(str(resources.files("pixelclip") / "assets" / "toy_clip"))
    if Path(spec).is_dir():
        return Path(spec)
    weights = spec.partition(":")[2]
    if "://" in weights:
        return local_copy(weights)
    return Path(weights) if weights and Path(weights).is_file() else None


def clip_version(spec: str) -> str:
    """What identifies the weights that a `clip` setting names now: the setting, and the md5 of weights that are files."""
    weights = clip_folder(spec)
    return spec if weights is None else f"{spec} md5 {digest(weights)['md5']}"
