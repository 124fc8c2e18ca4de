"""Index, read and write tar shards that WebDataset can stream.

A sample is `KEY.jpg` and, once masked, `KEY.json` in SA-1B's annotation format. Reading uses an index of member offsets, so
samples can be read in any order, which makes shuffling global and resuming exact.
"""

import io
import tarfile
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

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
    """List the samples of a tar without reading them.

    Returns:
        The samples in the order of the tar, and `(name, reason)` of each member that is not part of a complete sample.

    Raises:
        ValueError: the file is not a tar.
    """
    parts: dict[str, dict[str, tuple[int, int]]] = {}
    bad: list[tuple[str, str]] = []
    try:
        with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            size = file.seek(0, io.SEEK_END)
            try:
                while member := tar.next():
                    tar.members.clear()  # type: ignore[attr-defined]  # tarfile keeps a kilobyte per member
                    if not member.isfile():
                        continue
                    key, _, suffix = member.name.removeprefix("./").rpartition(".")
                    if member.offset_data + member.size > size:
                        bad.append((f"{path}: {member.name}", "truncated: the tar ends before it"))
                    elif suffix in ("jpg", "json"):
                        parts.setdefault(key, {})[suffix] = (member.offset_data, member.size)
                    elif f".{suffix.lower()}" in IMAGE_SUFFIXES:
                        bad.append((f"{path}: {member.name}", "not read: images in a shard must be named KEY.jpg"))
                file.seek(tar.offset)
                if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):  # tarfile stops at a damaged header without error
                    reason = f"damaged tar: at byte {tar.offset} neither a member nor the end; the rest is skipped"
                    bad.append((str(path), reason))
            except tarfile.ReadError as error:
                bad.append((str(path), f"damaged tar: {error}"))
    except (tarfile.TarError, OSError) as error:
        raise ValueError(f"{path}: cannot be read as a tar: {error}") from None
    bad += [(f"{path}: {key}.json", "has no image") for key, part in parts.items() if "jpg" not in part]
    return [Member(key, *part["jpg"], *part.get("json", (0, 0))) for key, part in parts.items() if "jpg" in part], bad


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
