"""Uploads to a store: unchanged files are skipped, and a folder is complete once its last file exists.

Each request carries its SHA-256, which the store verifies.
"""

import hashlib
from pathlib import Path
from typing import Any

from pixelclip.storage import s3
from pixelclip.storage.files import files_below
from pixelclip.storage.progress import track

_PART = 64 << 20  # bytes; S3 accepts 10,000 parts, so a file may have 670 GB


def upload(path: Path, uri: str) -> None:
    """Upload one file to `s3://bucket/key`.

    Raises:
        ValueError: the store rejects the request or the connection fails.
    """
    with s3.connected(uri) as client:
        _upload(client, path, uri)


def upload_folder(folder: Path, uri: str, last: str) -> None:
    """Upload all files below a folder, except those that the store already has.

    Args:
        folder: the folder.
        uri: `s3://bucket/folder`.
        last: relative path of the file to upload last; a reader that finds it finds all files.

    Raises:
        ValueError: as `upload`; another call uploads the missing files.
    """
    existing = {(one.uri, one.size, one.etag) for one in s3.list_below(uri)}
    files = sorted(files_below(folder), key=lambda path: path.relative_to(folder).as_posix() == last)
    with s3.connected(uri) as client:
        for path in track(files, f"to {uri}", "file"):
            target = f"{uri}/{path.relative_to(folder).as_posix()}"
            if (target, path.stat().st_size, _etag(path)) not in existing:
                _upload(client, path, target)


def _upload(client: Any, path: Path, uri: str) -> None:
    with s3.transfers(client, _PART) as manager:
        manager.upload(str(path), *s3.split(uri)).result()


def _etag(path: Path) -> str:
    """Return S3's ETag of a file uploaded in parts of `_PART`: its MD5, or the MD5 of its parts' MD5s."""
    with path.open("rb") as file:
        parts = [_md5(chunk) for chunk in iter(lambda: file.read(_PART), b"")] or [_md5(b"")]
    return parts[0].hex() if len(parts) == 1 else f"{_md5(b''.join(parts)).hex()}-{len(parts)}"


def _md5(content: bytes) -> bytes:
    return hashlib.md5(content, usedforsecurity=False).digest()
