"""Uploads to a store: verified, unchanged files left alone, a folder complete once its last file is there."""

import hashlib
from pathlib import Path
from typing import Any

from tqdm import tqdm

from pixelclip import s3
from pixelclip.storage import files_below

_PART = 64 << 20  # bytes; S3 takes 10,000 parts, so files of up to 670 GB


def upload(path: Path, uri: str) -> None:
    """Upload one file to `s3://bucket/key`.

    Raises:
        ValueError: the store refuses, is lost, or holds something else afterwards.
    """
    with s3.connected(uri) as client:
        _upload(client, path, uri, _etag(path))


def upload_folder(folder: Path, uri: str, last: str) -> None:
    """Upload all files below a folder that the store does not hold already.

    Args:
        folder: the folder.
        uri: `s3://bucket/folder`.
        last: relative path of the file that goes last, so that whoever finds it finds all.

    Raises:
        ValueError: as `upload`; the same call then sends the missing files.
    """
    existing = {(one.uri, one.size, one.etag) for one in s3.list_below(uri)}
    files = sorted(files_below(folder), key=lambda path: path.relative_to(folder).as_posix() == last)
    with s3.connected(uri) as client:
        for path in tqdm(files, desc=f"to {uri}", unit="file"):
            target, etag = f"{uri}/{path.relative_to(folder).as_posix()}", _etag(path)
            if (target, path.stat().st_size, etag) not in existing:
                _upload(client, path, target, etag)


def _upload(client: Any, path: Path, uri: str, etag: str) -> None:
    bucket, key = s3.split(uri)
    with s3.transfers(client, _PART) as manager:
        manager.upload(str(path), bucket, key).result()
    reply = client.head_object(Bucket=bucket, Key=key)
    size, md5 = reply["ContentLength"], s3.plain_md5(reply, bucket)
    if size != path.stat().st_size or (md5 and md5 != etag):
        raise ValueError(
            f"{uri}: {size:,} bytes with md5 {md5 or 'unknown'} arrived, {path.stat().st_size:,} with {etag} were sent"
        )


def _etag(path: Path) -> str:
    """Return the ETag that S3 gives a file uploaded in parts of `_PART`: its MD5, or the MD5 of its parts' MD5s."""
    with path.open("rb") as file:
        parts = [_md5(chunk) for chunk in iter(lambda: file.read(_PART), b"")] or [_md5(b"")]
    return parts[0].hex() if len(parts) == 1 else f"{_md5(b''.join(parts)).hex()}-{len(parts)}"


def _md5(content: bytes) -> bytes:
    return hashlib.md5(content, usedforsecurity=False).digest()
