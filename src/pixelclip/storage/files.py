"""Files and folders: atomic writes, checksums, JSON."""

import fcntl
import hashlib
import json
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Iterable
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from pixelclip.settings import cut, nearest

_MOST_NAMES = 10_000  # of a folder that are compared with a mistyped one
TRASH = re.compile(r"\.deleted\.[0-9a-f]{8}")
"""Name of a folder that `remove_folder` has not removed completely."""
_IGNORED = {".DS_Store", "Thumbs.db"}


def write_atomically(path: Path, content: bytes | str) -> None:
    """Write a file atomically: readers see all of it or nothing, even after a crash."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        with temporary.open("xb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def lock_folder(path: Path, problem: str) -> int:
    """Lock a folder until the returned handle is closed; raise ValueError(problem) if another process has locked it."""
    handle = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        raise ValueError(problem) from None
    return handle


def short_path(path: Path) -> str:
    """Return a path relative to the working folder, if it is below it."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def remove_folder(path: Path) -> None:
    """Remove a folder, which is renamed to `TRASH` first: an interruption leaves all of it, or a rest that `TRASH` matches."""
    if not TRASH.fullmatch(path.name):
        path = path.rename(path.with_name(f".deleted.{uuid.uuid4().hex[:8]}"))
    shutil.rmtree(path)


def check_writable(file: Path) -> None:
    """Create the folder of a file and fail early if the file cannot be written.

    Raises:
        ValueError: `file` is a folder, or its folder is not writable.
    """
    if file.is_dir():
        raise ValueError(f"{file}: must be a file, found a folder")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=file.parent):
            pass
    except OSError as error:
        raise ValueError(f"{file}: cannot be written: {error.strerror}") from None


def no_such(path: Path, kind: str = "file or folder") -> str:
    """Return `PATH: no such KIND`, and the most similar name beside it, or beside its first part that is missing."""
    missing = path
    while missing.parent != missing and not missing.parent.exists():
        missing = missing.parent
    try:
        names = [each.name for each in islice(missing.parent.iterdir(), _MOST_NAMES)]
    except OSError:
        names = []
    return f"{path}: no such {kind}{nearest(missing.name, names)}"


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically; reject NaN and infinity."""
    write_atomically(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path: Path, kind: Any = Any) -> Any:
    """Read a JSON file and check its content, see `parse_json`.

    Raises:
        ValueError: as `parse_json`, or the file cannot be read.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from None
    return parse_json(data, str(path), kind)


def parse_json(data: bytes | str, source: str, kind: Any = Any) -> Any:
    """Parse a JSON document and check it, so that a damaged file is an error wherever it is read.

    Args:
        data: the document.
        source: its origin, for errors.
        kind: the type of its content, any that pydantic validates. Values are not converted; models allow additional entries.

    Returns:
        The document as it is.

    Raises:
        ValueError: it is not JSON or does not fit `kind`; one line with the first wrong entry, its value and what is allowed.
    """
    try:
        document = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{source}: cannot be read as JSON: {error}") from None
    try:
        _adapter(kind).validate_python(document, strict=True)
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        name = ".".join(str(part) for part in fault["loc"])
        if fault["type"] == "missing":
            raise ValueError(f"{source}: entry {cut(name)} is missing") from None
        message = "Input should be an object" if fault["type"] == "model_type" else fault["msg"].partition("\n")[0]
        where = f"{name[:200]}: " if name else ""
        raise ValueError(f"{source}: {where}{message} (found {cut(fault['input'])})") from None
    return document


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def files_below(folder: Path) -> list[Path]:
    """List all files below `folder`, sorted by relative path, without hidden files and folders.

    Links are followed, except links to a parent folder.

    Raises:
        ValueError: a folder cannot be read; the message names it.
    """

    def stop(error: OSError) -> None:  # os.walk would skip the folder silently
        raise ValueError(f"{error.filename}: folder cannot be read: {error.strerror}") from None

    files = []
    for root, folders, names in os.walk(folder, onerror=stop, followlinks=True):
        above = {os.path.realpath(path) for path in [Path(root), *Path(root).parents]}
        folders[:] = [name for name in folders if not name.startswith(".") and os.path.realpath(Path(root, name)) not in above]
        files += [Path(root, name) for name in names if not name.startswith(".") and name not in _IGNORED]
    return sorted(files, key=lambda path: path.relative_to(folder).as_posix())


def file_md5(path: Path) -> str:
    """Return the MD5 of a file as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()


def digest(path: Path, files: Iterable[Path] | None = None) -> dict[str, Any]:
    """Identify a file by its content, or a folder by the relative paths and contents of its files.

    Args:
        path: a file or folder.
        files: the files below `path` to include; all by default.

    Returns:
        `{"md5": ..., "num_files": ..., "size": bytes}`.

    Raises:
        ValueError: no such file or folder, or a folder cannot be read.
    """
    if path.is_file():
        return {"md5": file_md5(path), "num_files": 1, "size": path.stat().st_size}
    if not path.is_dir():
        raise ValueError(f"{path}: no such file or folder")
    listed = files_below(path) if files is None else sorted(files)
    combined, size = hashlib.md5(usedforsecurity=False), 0
    for file in listed:
        try:
            md5, length = file_md5(file), file.stat().st_size
        except OSError:  # a dangling link; the stage that reads it raises the error
            md5, length = "unreadable", 0
        combined.update(os.fsencode(f"{file.relative_to(path).as_posix()} {md5}\n"))
        size += length
    return {"md5": combined.hexdigest(), "num_files": len(listed), "size": size}
