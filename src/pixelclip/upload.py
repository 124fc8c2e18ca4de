"""Results into a store: checked by MD5, large files in parts that a second call continues, a folder whole or not at all."""

import base64
import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from tqdm import tqdm

from pixelclip import cache, s3
from pixelclip.download import local_copy
from pixelclip.stage import METRICS, PROVENANCE
from pixelclip.storage import files_below, read_json

_PART = 64 << 20  # bytes; S3 takes 10,000 parts, so files of up to 670 GB


def upload(path: Path, uri: str) -> None:
    """Uploads one file; what is there already with the same content is left, parts of an interrupted upload are kept.

    Args:
        path: the file.
        uri: `s3://bucket/key`.

    Raises:
        ValueError: the store refuses, or is lost: the same call then continues.
    """
    bucket, key = s3.split(uri)
    with s3.connected(uri) as client:
        _upload(client, path, bucket, key)


def _upload(client: Any, path: Path, bucket: str, key: str) -> None:
    size = path.stat().st_size
    with path.open("rb") as file:
        if size <= _PART:
            md5 = _md5(file, 0, size)
            answer = client.put_object(Bucket=bucket, Key=key, Body=file, ContentMD5=_base64(md5))
            _checked(answer, md5, key)
        else:
            _in_parts(client, file, size, bucket, key)


def _in_parts(client: Any, file: BinaryIO, size: int, bucket: str, key: str) -> None:
    whole = {"Bucket": bucket, "Key": key}
    begun = client.list_multipart_uploads(Bucket=bucket, Prefix=key).get("Uploads", [])
    ids = [upload["UploadId"] for upload in begun if upload["Key"] == key]
    upload_id = ids[-1] if ids else client.create_multipart_upload(**whole)["UploadId"]
    pages = client.get_paginator("list_parts").paginate(**whole, UploadId=upload_id) if ids else []
    there = {part["PartNumber"]: part["ETag"].strip('"') for page in pages for part in page.get("Parts", [])}
    parts = []
    bar = tqdm(total=size, desc=key.rpartition("/")[2], unit="B", unit_scale=True, unit_divisor=1024)
    with bar:
        for number, start in enumerate(range(0, size, _PART), 1):
            length = min(_PART, size - start)
            md5 = _md5(file, start, length)
            etag = there.get(number)
            if etag != md5.hex():
                body, named = file.read(length), {**whole, "UploadId": upload_id, "PartNumber": number}
                etag = _checked(client.upload_part(**named, Body=body, ContentMD5=_base64(md5)), md5, key)
            parts.append({"PartNumber": number, "ETag": f'"{etag}"'})
            bar.update(length)
    client.complete_multipart_upload(**whole, UploadId=upload_id, MultipartUpload={"Parts": parts})


def _checked(answer: dict[str, Any], md5: bytes, key: str) -> str:
    """The ETag of what arrived, which is its MD5 where the store does not encrypt; not every store looks at Content-MD5."""
    etag = str(answer["ETag"]).strip('"')
    if answer.get("ServerSideEncryption", "AES256") == "AES256" and re.fullmatch("[0-9a-f]{32}", etag) and etag != md5.hex():
        raise ValueError(f"{key}: md5 {etag} arrived in the store, {md5.hex()} was sent")
    return etag


def _md5(file: BinaryIO, start: int, length: int) -> bytes:
    found = hashlib.md5(usedforsecurity=False)
    file.seek(start)
    while length and (chunk := file.read(min(length, 1 << 20))):
        found.update(chunk)
        length -= len(chunk)
    file.seek(start)
    return found.digest()


def _base64(md5: bytes) -> str:
    return base64.b64encode(md5).decode()


@contextmanager
def outbox(out: str) -> Iterator[Path]:
    """The local folder in which a stage makes what belongs to `out`, which may be `s3://bucket/folder`.

    A finished result is uploaded when the `with` ends, its provenance last: a reader sees all of it or nothing. Of a result
    that is there already only provenance and metrics are brought, for the stage to find; nothing is uploaded again.
    An interrupted stage continues on the same machine.

    Args:
        out: local path, or `s3://bucket/folder`.

    Raises:
        ValueError: the store refuses or is lost; the same command then continues.
    """
    if not s3.is_s3(out):
        yield Path(out)
        return
    out = out.rstrip("/")
    folder = cache.home(out) / "out" / out.rpartition("/")[2]
    if os.environ.get("RANK", "0") != "0":  # of processes that work together the first one writes
        yield folder
        return
    there = {one.uri.removeprefix(f"{out}/"): one for one in s3.list_below(out)}
    finished = PROVENANCE in there
    if finished:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for name in (PROVENANCE, METRICS):
            shutil.copyfile(local_copy(f"{out}/{name}"), folder / name)
    elif any(name.endswith(f"/{PROVENANCE}") for name in there):  # several results side by side
        shutil.copytree(local_copy(f"{out}/"), folder, dirs_exist_ok=True)
    elif others := [name for name in there if not (folder / name).is_file()]:
        raise ValueError(f"{out}: holds {others[0]}, which no finished stage of pixelclip put there; give a new prefix")
    yield folder
    if finished and read_json(folder / PROVENANCE) == read_json(local_copy(f"{out}/{PROVENANCE}")):
        return
    bucket, prefix = s3.split(f"{out}/")
    files = sorted(files_below(folder), key=lambda path: path.name == PROVENANCE)
    with s3.connected(out) as client:
        for path in tqdm(files, desc=f"to {out}", unit="file"):
            name = path.relative_to(folder).as_posix()
            if name == PROVENANCE or not _same(path, there.get(name)):
                _upload(client, path, bucket, prefix + name)
    shutil.rmtree(folder.parent)


def _same(path: Path, there: s3.Listed | None) -> bool:
    if there is None or there.size != path.stat().st_size:
        return False
    with path.open("rb") as file:
        if there.size <= _PART:
            return there.etag == _md5(file, 0, there.size).hex()
        parts = [_md5(file, start, min(_PART, there.size - start)) for start in range(0, there.size, _PART)]
    return there.etag == f"{hashlib.md5(b''.join(parts), usedforsecurity=False).hexdigest()}-{len(parts)}"
