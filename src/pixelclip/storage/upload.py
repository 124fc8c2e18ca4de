"""Uploads to a store: unchanged files are skipped, and a folder is complete once its last file exists.

Each request carries its MD5, which the store verifies, and its SHA-256, which not every store does.
"""

import base64
import hashlib
from pathlib import Path
from typing import Any

from pixelclip.storage import s3
from pixelclip.storage.files import file_md5, files_below
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
            if (target, path.stat().st_size, s3.etag_of(path, _PART)) not in existing:
                _upload(client, path, target)


def _upload(client: Any, path: Path, uri: str) -> None:
    options = {}
    if path.stat().st_size > _PART:  # its ETag will not be the MD5 that a download is compared with
        options["Metadata"] = {s3.MD5_METADATA: base64.b64encode(bytes.fromhex(file_md5(path))).decode()}
    for operation in ("PutObject", "UploadPart"):
        client.meta.events.register(f"provide-client-params.s3.{operation}", _add_md5, unique_id=operation)
    with s3.transfers(client, _PART) as manager:
        manager.upload(str(path), *s3.split(uri), extra_args=options).result()


def _add_md5(params: dict[str, Any], **_: Any) -> dict[str, Any]:
    body, md5 = params["Body"], hashlib.md5(usedforsecurity=False)
    start = body.tell()
    for chunk in iter(lambda: body.read(1 << 20), b""):
        md5.update(chunk)
    body.seek(start)
    return {**params, "ContentMD5": base64.b64encode(md5.digest()).decode()}
