"""The folder of local copies that processes share: PIXELCLIP_CACHE, else `~/.cache/pixelclip`.

A copy stands in CACHE/KEY OF ITS URI/KEY OF ITS VERSION/NAME. PIXELCLIP_CACHE_GB bounds the whole: the copies that were not
used for the longest time go first.
"""

import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_URI = "uri"


def root() -> Path:
    """The folder itself, which may not exist yet.

    Raises:
        ValueError: there is no home folder.
    """
    try:
        return Path(os.environ.get("PIXELCLIP_CACHE") or "~/.cache/pixelclip").expanduser().absolute()
    except RuntimeError:
        raise ValueError("there is no home folder to keep downloads in; set PIXELCLIP_CACHE") from None


def key(text: str) -> str:
    """A short name for a URI or a version."""
    return hashlib.sha256(os.fsencode(text)).hexdigest()[:16]


def home(uri: str) -> Path:
    """Where the copies of a URI are kept."""
    return root() / key(uri)


@contextmanager
def locked(uri: str) -> Iterator[None]:
    """Lets one process at a time bring what a URI names; the others wait and say so."""
    folder = home(uri)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:  # the end of a process frees it, however it ends
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"{uri}: waits for another process that downloads it", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        (folder / _URI).write_text(uri)
        yield


def origin(path: Path) -> str:
    """The URI that a path is a copy of; of any other path the path itself."""
    try:
        folder, _, _, *below = path.absolute().relative_to(root()).parts
        uri = (root() / folder / _URI).read_text()
    except (ValueError, OSError):
        return str(path)
    return "/".join([uri.rstrip("/"), *below]) if below else uri


def touch(copy: Path) -> None:
    """Notes that a copy is in use."""
    with suppress(OSError):  # a cache that is only read, or a copy that another process removed just now
        os.utime(copy.parent)


def trim(kept: Path) -> None:
    """Removes the copies unused for longest until the bound holds; `kept` and what is unfinished stay.

    Raises:
        ValueError: PIXELCLIP_CACHE_GB is no positive number.
    """
    text = os.environ.get("PIXELCLIP_CACHE_GB", "")
    if not text:
        return
    try:
        bound = float(text) * 1e9
    except ValueError:
        bound = 0.0
    if not bound > 0:
        raise ValueError(f"PIXELCLIP_CACHE_GB {text!r}: a positive number is expected")
    copies = []
    for version in root().glob("*/*/"):
        with suppress(OSError):  # another process trims too
            if not any(part.name.endswith(".partial") for part in version.iterdir()):
                copies.append((version.stat().st_mtime, version, _size(version)))
    total = sum(size for _, _, size in copies)
    for _, version, size in sorted(copies, key=lambda entry: entry[0]):
        if total <= bound:
            return
        if version != kept.parent:
            shutil.rmtree(version, ignore_errors=True)
            total -= size


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
