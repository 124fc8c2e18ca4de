"""Cache of local copies that processes share: PIXELCLIP_CACHE, else `~/.cache/pixelclip`.

A copy is stored as `<cache>/<hash of URI>/<hash of version>/<name>`. PIXELCLIP_CACHE_GB limits the total size: the least
recently used copies are removed first.
"""

import fcntl
import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from pixelclip.storage.files import remove_folder
from pixelclip.storage.urls import public_url

OUT = "out"
"""Name of the folder beside the versions of a URI in which a stage works whose output is this URI."""
_URI = "uri"
_UNFINISHED = re.compile(r"\.partial(\.[0-9a-fA-F]{8})?$")  # s3transfer appends eight digits


def root() -> Path:
    """Return the cache folder, which may not exist yet.

    Raises:
        ValueError: this user has no home folder.
    """
    try:
        return Path(os.environ.get("PIXELCLIP_CACHE") or "~/.cache/pixelclip").expanduser().absolute()
    except RuntimeError:
        raise ValueError("this user has no home folder for downloads; set PIXELCLIP_CACHE") from None


def short_hash(text: str) -> str:
    """Return a short hash of a URI or a version."""
    return hashlib.sha256(os.fsencode(text)).hexdigest()[:16]


def folder_of(uri: str) -> Path:
    """Return the folder of all copies of a URI."""
    return root() / short_hash(uri)


@contextmanager
def locked(uri: str) -> Iterator[None]:
    """Lock a URI, so that one process at a time downloads it; a waiting process prints a line."""
    folder = folder_of(uri)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:  # released whenever the process ends
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"{public_url(uri)}: waiting for another process that downloads it", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        (folder / _URI).write_text(public_url(uri))
        yield


def origin(path: Path) -> str:
    """Return the URI of a cached copy; a path outside the cache is returned unchanged."""
    try:
        folder, _, _, *below = path.absolute().relative_to(root()).parts
        uri = (root() / folder / _URI).read_text()
    except (ValueError, OSError):
        return str(path)
    return "/".join([uri.rstrip("/"), *below]) if below else uri


def touch(copy: Path) -> None:
    """Mark a copy as recently used."""
    with suppress(OSError):  # a read-only cache, or a copy that another process has just removed
        os.utime(copy.parent)


def trim(kept: Path) -> None:
    """Remove the least recently used copies beyond PIXELCLIP_CACHE_GB, except `kept` and unfinished downloads.

    Raises:
        ValueError: PIXELCLIP_CACHE_GB is not a positive number.
    """
    text = os.environ.get("PIXELCLIP_CACHE_GB", "")
    if not text:
        return
    try:
        bound = float(text) * 1e9
    except ValueError:
        bound = 0.0
    if not bound > 0:
        raise ValueError(f"PIXELCLIP_CACHE_GB {text!r}: must be a positive number")
    listed = [copy for copy in copies() if not copy.unfinished]
    total = sum(copy.size for copy in listed)
    for copy in sorted(listed, key=lambda copy: copy.used):
        if total <= bound:
            return
        if copy.folder != kept.parent:
            shutil.rmtree(copy.folder, ignore_errors=True)
            total -= copy.size


class Copy(NamedTuple):
    """One version of a URI: its folder, the time of its last use, bytes, and whether its download is incomplete."""

    folder: Path
    used: float
    size: int
    unfinished: bool


def copies() -> Iterator[Copy]:
    """Yield all versions of all URIs."""
    for version in root().glob("*/*/"):
        with suppress(OSError):  # another process trims too
            unfinished = any(_UNFINISHED.search(entry.name) for entry in version.iterdir())
            yield Copy(version, version.stat().st_mtime, _size(version), unfinished)


def remove(copy: Copy) -> None:
    """Remove a version unless a process downloads its URI.

    Raises:
        ValueError: a process does.
    """
    with (copy.folder.parent / "lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError("running: a process is downloading it") from None
        remove_folder(copy.folder)


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
