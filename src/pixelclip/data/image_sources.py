"""Images to predict: one file, a folder, a glob, shards, or an `s3://` object or prefix."""

import fnmatch
import glob
import hashlib
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from pixelclip.data.images import HEIC_ADVICE, HEIC_SUFFIXES, IMAGE_SUFFIXES
from pixelclip.data.shard_format import index_shard, read_part
from pixelclip.data.shard_sources import MANIFEST, RemoteFile, Shard, describe_shards, list_shards, parts
from pixelclip.storage.files import digest, files_below, no_such
from pixelclip.storage.s3 import check_content, check_names, current_version, download, is_s3, list_below
from pixelclip.workflow.stage import PROVENANCE, describe

_MAGIC = frozenset("*?[")
_PREVIEW = "preview.jpg"  # of stage masks, beside its shards
_File = TypeVar("_File", Path, RemoteFile)


@dataclass(frozen=True)
class Photo:
    """One image.

    Attributes:
        name: unique relative path without a suffix, for files about it.
        file_name: relative path of the image; in shards the tar's name and the member's.
        uri: `s3://` URI or absolute path; empty for members of shards.
        remote: whether it is read from a store.
        read: returns the bytes of the file; raises OSError or ValueError.
    """

    name: str
    file_name: str
    uri: str
    remote: bool
    read: Callable[[], bytes] = field(repr=False)


@dataclass(frozen=True)
class _Entry:
    name: str
    file_name: str
    file: Shard


@dataclass(frozen=True)
class Photos:
    """The images of one source, or of a part of it.

    Attributes:
        inputs: identities, see `stage.describe`: `images` of the whole source and, if only the names and sizes of its files are
            in this one, `part` of the content of these images.
        entries: the images, or the shards.
        in_shards: whether the entries are shards.
        ignored: number of files that are neither.
    """

    inputs: dict[str, dict[str, Any]]
    entries: list[_Entry]
    in_shards: bool
    ignored: int = 0

    def __iter__(self) -> Iterator[Photo | str]:
        """Yield the images, and a message for every damaged member of a shard. Shards are opened one after another."""
        for entry in self.entries:
            remote = isinstance(entry.file, RemoteFile)
            if not self.in_shards:
                yield Photo(entry.name, entry.file_name, _uri(entry.file), remote, partial(_read, entry.file))
                continue
            members, bad = index_shard(entry.file)
            yield from (f"{where}: {reason}" for where, reason in bad)
            for member in members:
                key = f"{entry.name}/{member.key}"
                yield Photo(
                    key, f"{key}.jpg", "", remote, partial(read_part, entry.file, member.image_offset, member.image_size)
                )


def _read(file: Shard) -> bytes:
    if isinstance(file, Path):
        return file.read_bytes()
    with tempfile.TemporaryDirectory() as folder:  # not the cache, which millions of images would fill
        copy = Path(folder, "image")
        download(file.uri, {copy: file})
        check_content(copy, file)
        return copy.read_bytes()


def _uri(file: Shard) -> str:
    return str(file.absolute()) if isinstance(file, Path) else file.uri


def list_photos(source: str, part: str = "") -> Photos:
    """List the images of a source. A folder or prefix with tars is a set of shards, any other is searched recursively.

    Args:
        source: image, folder, glob, shards, or an `s3://` object or prefix.
        part: `i/n` lists only the i-th of n consecutive parts; of a folder or glob only the content of this part is read.

    Raises:
        ValueError: no such source, no images, images beside shards, or fewer images, or shards, than parts.
    """
    if is_s3(source):
        return _listed_in_store(source, part)
    path = Path(source)
    if not path.exists() and _MAGIC & set(source):
        root = Path(*_before_magic(path.parts))
        found = [Path(name) for name in sorted(glob.glob(source, recursive=True)) if Path(name).is_file()]  # noqa: PTH207
        return _listed(source, root, found, part)
    if path.is_file():
        if path.suffix.lower() in MANIFEST:
            return _shards(source, part)
        return _listed(source, path.parent, [path], part, path)
    if not path.is_dir():
        raise ValueError(no_such(path, "image, folder, manifest of shards or glob"))
    if parts(path):
        return _shards(source, part)
    return _listed(source, path, files_below(path), part, path)


def check_output(source: str, out: str) -> None:
    """Raise ValueError if `out`, a folder or `s3://` prefix, is inside the folder, glob or prefix of images that is read."""
    path = Path(source)
    if is_s3(source) or is_s3(out):
        inside = f"{out.rstrip('/')}/".startswith(f"{source.rstrip('/')}/")
    elif not path.exists() and _MAGIC & set(source):
        inside = _descends(path.resolve().parts, Path(out).resolve().parts)
    else:
        inside = path.is_dir() and Path(out).resolve().is_relative_to(path.resolve())
    if inside:
        raise ValueError(f"{out}: predictions must not be inside the images that are read, {source}; choose another --out")


def _descends(pattern: Sequence[str], folder: Sequence[str]) -> bool:
    """Return whether a glob looks for files below a folder."""
    for word, part in zip(pattern, folder, strict=False):
        if word == "**":
            return True
        if not fnmatch.fnmatch(part, word):
            return False
    return len(pattern) > len(folder)


def _before_magic(words: Sequence[str]) -> Iterator[str]:
    for word in words[:-1]:
        if _MAGIC & set(word):
            return
        yield word


def _shards(source: str, part: str) -> Photos:
    entries = _named(source, [(shard.name, shard) for shard in list_shards(source)])
    return Photos({"images": describe_shards(source)}, _part(entries, part, True), True)


def _listed(source: str, root: Path, found: list[Path], part: str, described: Path | None = None) -> Photos:
    """Return the images, or the shards, among files below `root`; `described` is the source if it is no glob."""
    chosen, in_shards = _chosen(source, [(file.relative_to(root).as_posix(), file) for file in found])
    entries = _part(_named(source, chosen), part, in_shards)
    if part and not (described and (described / PROVENANCE).is_file()):
        own = [entry.file for entry in entries if isinstance(entry.file, Path)]
        inputs = {"images": _listing(source, chosen), "part": {"path": source, **digest(root, own)}}
    elif described:
        inputs = {"images": describe(described)}
    else:
        inputs = {"images": {"path": source, **digest(root, [file for _, file in chosen])}}
    return Photos(inputs, entries, in_shards, len(found) - len(chosen))


def _listing(source: str, files: Sequence[tuple[str, Shard]]) -> dict[str, Any]:
    """Identify files without reading them: by names and ETags in a store, else by names and sizes."""
    md5, total = hashlib.md5(usedforsecurity=False), 0
    for name, file in files:
        if isinstance(file, RemoteFile):
            size, version = file.size, file.etag
        else:
            size = file.stat().st_size if file.exists() else 0  # a dangling link, which is a bad image
            version = str(size)
        md5.update(os.fsencode(f"{name} {version}\n"))
        total += size
    return {"path": source, "md5": md5.hexdigest(), "num_files": len(files), "size": total}


def _part(entries: list[_Entry], part: str, in_shards: bool) -> list[_Entry]:
    """Return the i-th of n consecutive parts, `i/n`; all for an empty text."""
    if not part:
        return entries
    number, count = (int(word) for word in part.split("/"))
    if count > (most := len(entries)):
        kind = "shards" if in_shards else "images"
        raise ValueError(f"part {part}: there are {most} {kind}, so at most {most} parts are possible")
    first, stop = (most * edge // count for edge in (number - 1, number))
    return entries[first:stop]


def _chosen(source: str, found: Sequence[tuple[str, _File]]) -> tuple[list[tuple[str, _File]], bool]:
    """Return the images, or the shards, among the files of a source, and whether they are shards."""
    tars = [(name, file) for name, file in found if name.endswith(".tar")]
    images = [(name, file) for name, file in found if PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES]
    beside = [name for name, _ in images if name != _PREVIEW]
    if tars and beside:
        raise ValueError(f"{source}: contains both images ({beside[0]}) and shards ({tars[0][0]}); name only one kind")
    if not (tars or images):
        heic = f"; {HEIC_ADVICE}" if any(name.lower().endswith(HEIC_SUFFIXES) for name, _ in found) else ""
        raise ValueError(f"{source}: contains no image ({', '.join(IMAGE_SUFFIXES)}) and no shard (*.tar){heic}")
    return tars or images, bool(tars)


def _named(source: str, files: Sequence[tuple[str, Shard]]) -> list[_Entry]:
    """Name files by their paths without suffixes, or with them if these are not unique."""
    stems = [str(PurePosixPath(name).with_suffix("")) for name, _ in files]
    counts = Counter(stems)
    names = [stem if counts[stem] == 1 else name for stem, (name, _) in zip(stems, files, strict=True)]
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise ValueError(f"{source}: results are named after their files, but two would be named {twice[0]}")
    return [_Entry(name, file_name, file) for name, (file_name, file) in zip(names, files, strict=True)]


def _listed_in_store(source: str, part: str) -> Photos:
    if source.lower().endswith(MANIFEST):
        return _shards(source, part)
    listed = list_below(source) or [current_version(source)]
    folder = source.rstrip("/") if listed[0].uri != source else source.rpartition("/")[0]
    found = [(one.uri.removeprefix(f"{folder}/"), RemoteFile(**vars(one))) for one in listed]
    check_names(source, [name for name, _ in found], "results cannot be named after the key")
    chosen, in_shards = _chosen(source, found)
    entries = _part(_named(source, chosen), part, in_shards)
    return Photos({"images": _listing(source, chosen)}, entries, in_shards, len(found) - len(chosen))
