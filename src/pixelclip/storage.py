"""Files and folders: atomic writes, checksums, JSON with errors that name the file."""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

_IGNORED = {".DS_Store", "Thumbs.db"}


def write_atomically(path: Path, content: bytes | str) -> None:
    """Writes a file so that a reader, or a crash, sees all of it or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = content.encode() if isinstance(content, str) else content
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o666 & ~_umask())
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def check_place(file: Path) -> None:
    """Makes the folder of a file that is written after long work, so that what stands against it is said before.

    Raises:
        ValueError: `file` is a folder, or nothing can be written beside it.
    """
    if file.is_dir():
        raise ValueError(f"{file}: must be a file, found a folder")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=file.parent):
            pass
    except OSError as error:
        raise ValueError(f"{file}: cannot be written: {error.strerror}") from None


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_json(path: Path, value: Any) -> None:
    """Writes `value` as indented JSON, atomically; NaN and infinity are refused."""
    write_atomically(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Reads a JSON file.

    Raises:
        ValueError: the file is missing or is not JSON; the message names it.
    """
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: cannot be read as JSON: {error}") from None


def files_below(folder: Path) -> list[Path]:
    """Every file below `folder`, sorted by its relative path; hidden files and folders are left out.

    Links are followed, but never back into a folder that they stand in.
    """
    found = []
    for root, folders, names in os.walk(folder, followlinks=True):
        above = {os.path.realpath(path) for path in [Path(root), *Path(root).parents]}
        folders[:] = [name for name in folders if not name.startswith(".") and os.path.realpath(Path(root, name)) not in above]
        found += [Path(root, name) for name in names if not name.startswith(".") and name not in _IGNORED]
    return sorted(found, key=lambda path: path.relative_to(folder).as_posix())


def file_md5(path: Path) -> str:
    """MD5 of one file, as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()


def digest(path: Path, files: Iterable[Path] | None = None) -> dict[str, Any]:
    """Identifies a file, or a folder by the relative paths and contents of its files.

    Args:
        path: a file or folder.
        files: the files below `path` that count; all of them by default.

    Returns:
        `{"md5": ..., "num_files": ..., "size": bytes}`.

    Raises:
        ValueError: there is no such file or folder.
    """
    if path.is_file():
        return {"md5": file_md5(path), "num_files": 1, "size": path.stat().st_size}
    if not path.is_dir():
        raise ValueError(f"{path}: no such file or folder")
    listed = files_below(path) if files is None else sorted(files)
    whole, size = hashlib.md5(usedforsecurity=False), 0
    for file in listed:
        try:
            md5, length = file_md5(file), file.stat().st_size
        except OSError:  # a dangling link; whoever needs the file says so by name
            md5, length = "unreadable", 0
        whole.update(os.fsencode(f"{file.relative_to(path).as_posix()} {md5}\n"))
        size += length
    return {"md5": whole.hexdigest(), "num_files": len(listed), "size": size}
