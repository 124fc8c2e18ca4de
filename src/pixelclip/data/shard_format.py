"""Index, read and write tar shards that WebDataset can stream.

A sample is `KEY.jpg` and, once masked, `KEY.json` in SA-1B's annotation format. Reading uses an index of member offsets, so
samples can be read in any order, which makes shuffling global and resuming exact.
"""

import io
import posixpath
import tarfile
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

from pydantic import BaseModel, NonNegativeInt

from pixelclip.data.images import IMAGE_SUFFIXES
from pixelclip.data.shard_sources import Shard


@dataclass(frozen=True)
class Member:
    """Byte offsets and sizes of a sample's parts in its tar; `json_size` is 0 when the sample has no masks yet."""

    key: str
    image_offset: int
    image_size: int
    json_offset: int = 0
    json_size: int = 0


def index_shard(path: Shard) -> tuple[list[Member], list[tuple[str, str]]]:
    """List the samples of a tar, or of several joined by `cat`, without reading them.

    As in WebDataset, the key of a sample ends at the first dot of a member's name. Links within the tar are resolved.

    Returns:
        The samples in the order of the tar, and `(name, reason)` of each member that is not part of a complete sample.

    Raises:
        ValueError: the file is not a tar.
    """
    index = _Index(str(path))
    try:
        with path.open("rb") as file:
            size = file.seek(0, io.SEEK_END)
            start: int | None = 0
            while start is not None:
                start = index.scan(file, start, size)
    except (tarfile.TarError, OSError) as error:
        raise ValueError(f"{path}: cannot be read as a tar: {error}") from None
    return index.samples(), index.bad


class ShardSummary(BaseModel):
    """Content of `STEM.summary.json`, which `masks` writes beside a shard: images, their masks, and lines on bad samples."""

    images: NonNegativeInt
    masks: NonNegativeInt
    bad: list[str]


class _Index:
    """Members of one file: offset and size of each sample's parts, and the members that cannot be used."""

    def __init__(self, name: str) -> None:
        self.bad: list[tuple[str, str]] = []
        self._name = name
        self._parts: dict[str, dict[str, tuple[int, int]]] = {}
        self._links: dict[tuple[str, str], tuple[str, str]] = {}  # key and suffix -> name and path of the target
        self._repeated: set[str] = set()

    def scan(self, file: BinaryIO, start: int, size: int) -> int | None:
        """Add the members of the archive at byte `start`; return the first byte of the next archive, if there is one."""
        file.seek(start)
        with tarfile.open(fileobj=file, mode="r:") as tar:
            try:
                while member := tar.next():
                    tar.members.clear()  # type: ignore[attr-defined]  # tarfile keeps a kilobyte per member
                    self._add(member, size)
            except tarfile.ReadError as error:
                self.bad.append((self._name, f"damaged tar: {error}"))
                return None
            end = tar.offset
        file.seek(end)
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):  # tarfile stops at a damaged header without error
            self.bad.append((self._name, f"damaged tar: at byte {end} neither a member nor the end; the rest is skipped"))
            return None
        return _next_block(file)

    def _add(self, member: tarfile.TarInfo, size: int) -> None:
        if member.isdir():
            return
        name = member.name.removeprefix("./")
        key, suffix = _split(name)
        reason = ""
        if suffix not in ("jpg", "json"):
            if "." in suffix and suffix.endswith((".jpg", ".json")):
                reason = "not read: the key of a sample ends at the first dot, and its parts must be named KEY.jpg and KEY.json"
            elif f".{suffix.rpartition('.')[2].lower()}" in IMAGE_SUFFIXES:
                reason = "not read: images in a shard must be named KEY.jpg"
            else:
                return
        elif name.startswith("/") or ".." in name.split("/"):  # such a key would lead out of `masks.given_folder`
            reason = "not read: a member's name must be relative, without '..'"
        elif member.islnk() or member.issym():
            self._parts.setdefault(key, {})
            folder = posixpath.dirname(name) if member.issym() else ""
            self._links[key, suffix] = (member.linkname, posixpath.normpath(posixpath.join(folder, member.linkname)))
        elif not member.isfile() or member.issparse():
            reason = "a sparse file" if member.issparse() else "neither a file nor a link"
        elif member.offset_data + member.size > size:
            reason = "truncated: the tar ends before it"
        else:
            parts = self._parts.setdefault(key, {})
            if suffix in parts:
                self._repeated.add(key)
            parts[suffix] = (member.offset_data, member.size)
        if reason:
            self.bad.append((f"{self._name}: {member.name}", reason))

    def samples(self) -> list[Member]:
        """Return the complete samples and report the others; call it once, after all archives."""
        for (key, suffix), (target, _) in self._links.items():
            if found := self._follow(key, suffix):
                self._parts[key].setdefault(suffix, found)
            else:
                reason = f"link to {target}, which is not KEY.jpg or KEY.json in this tar"
                self.bad.append((f"{self._name}: {key}.{suffix}", reason))
        samples = []
        for key, part in self._parts.items():
            if key in self._repeated:
                reason = "several members have this name, so image and masks may not belong together"
                self.bad.append((f"{self._name}: {key}", reason))
            elif "jpg" in part:
                samples.append(Member(key, *part["jpg"], *part.get("json", (0, 0))))
            elif part:
                self.bad.append((f"{self._name}: {key}.json", "has no image"))
        return samples

    def _follow(self, key: str, suffix: str) -> tuple[int, int] | None:
        seen = set()
        while (key, suffix) in self._links and (key, suffix) not in seen:
            seen.add((key, suffix))
            key, suffix = _split(self._links[key, suffix][1])
        return self._parts.get(key, {}).get(suffix)


def _split(name: str) -> tuple[str, str]:
    """Split the name of a member into the key of its sample and the suffix, as WebDataset does."""
    folder, slash, base = name.rpartition("/")
    stem, _, suffix = base.partition(".")
    return f"{folder}{slash}{stem}", suffix


def _next_block(file: BinaryIO) -> int | None:
    """Return the position of the next block that is not zero."""
    start = file.tell()
    while chunk := file.read(1 << 20):
        if rest := chunk.lstrip(b"\0"):
            return start + (len(chunk) - len(rest)) // tarfile.BLOCKSIZE * tarfile.BLOCKSIZE
        start += len(chunk)
    return None


def read_part(path: Shard, offset: int, size: int) -> bytes:
    """Read the bytes of one member."""
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(size)


class ShardWriter:
    """Write samples into one tar, reproducible byte for byte; the file gets its final name only when it is complete.

    Args:
        path: the tar.
        append: continue the tar of a writer that an exception ended, after its last member.
    """

    def __init__(self, path: Path, append: bool = False) -> None:
        self._path = path
        self._temporary = path.with_name(f".{path.name}.partial")
        if append:
            self._temporary.stat()  # tarfile would create a missing file
        self._tar = tarfile.open(self._temporary, "a" if append else "w", format=tarfile.GNU_FORMAT)  # noqa: SIM115

    def add(self, name: str, data: bytes) -> None:
        """Add one member."""
        info = tarfile.TarInfo(name)
        info.size = len(data)
        self._tar.addfile(info, io.BytesIO(data))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._tar.close()
        if kind is None:
            self._temporary.replace(self._path)
