"""S3-compatible stores (AWS, MinIO, Ceph, ...): connections, errors, listings, downloads of pinned versions."""

import base64
import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from pixelclip.storage.files import file_md5
from pixelclip.storage.progress import count
from pixelclip.storage.urls import public_url, scrubbed

MD5_METADATA = "md5chksum"
"""User metadata with the MD5 (base64) of an object uploaded in parts, whose ETag is none; rclone writes and reads the same."""
_ATTEMPTS = 8  # botocore doubles the delay before each retry, up to 20 s
_CHANGED = "changed in the store during the download; try again"
_REASONS = {
    "NoSuchBucket": "there is no such bucket",
    "NoSuchKey": "there is no such key in the bucket",
    "AccessDenied": "access denied, or no such key",
    "InvalidAccessKeyId": "wrong credentials, see AWS_ACCESS_KEY_ID",
    "SignatureDoesNotMatch": "wrong credentials, see AWS_SECRET_ACCESS_KEY",
    "InvalidToken": "wrong credentials, see AWS_SESSION_TOKEN",
    "BadDigest": "damaged on its way to the store; try again",
    "XAmzContentSHA256Mismatch": "damaged on its way to the store; try again",
    "ExpiredToken": "the credentials have expired, see AWS_SESSION_TOKEN",
}


class MissingError(ValueError):
    """No object has this key."""


class UnreachableError(ValueError):
    """No server answers."""


@dataclass(frozen=True)
class Listed:
    """One version of an object: `s3://bucket/key`, ETag without quotes, size in bytes."""

    uri: str
    etag: str
    size: int
    md5: str = ""  # of the content, if known
    modified: float = field(default=0.0, compare=False)  # seconds since the epoch, in listings


def is_s3(uri: object) -> bool:
    """Return True for an `s3://` URI."""
    return str(uri).lower().startswith("s3://")


def split(uri: str) -> tuple[str, str]:
    """Return bucket and key of `s3://bucket/key` (the key may be empty); raise ValueError if the URI has no bucket."""
    bucket, _, key = uri.partition("://")[2].partition("/")
    if not is_s3(uri) or not bucket:
        raise ValueError(f"{uri}: expected s3://bucket/key")
    return bucket, key


@cache
def _loader() -> Any:
    """Return botocore's loader of API descriptions, shared since reading them takes most of the time to make a client."""
    from botocore.loaders import create_loader

    return create_loader()


@contextmanager
def connected(uri: str) -> Iterator[Any]:
    """Open a boto3 client configured by the usual AWS variables and files (AWS_ENDPOINT_URL for stores other than Amazon's).

    Args:
        uri: prefix of the error messages.

    Raises:
        ValueError: boto3 is missing, a setting is invalid, or the store rejects a request or the connection fails.
    """
    try:
        import boto3.session
        import botocore.session
        from botocore.config import Config
        from botocore.exceptions import BotoCoreError
    except ImportError:
        raise ValueError(f"{uri}: boto3 is missing; pip install 'pixelclip[s3]'") from None
    config = Config(
        connect_timeout=10,
        read_timeout=30,
        retries={"mode": "standard", "total_max_attempts": _ATTEMPTS},
        # Many stores reject boto3's checksum trailers; all accept the SHA-256 of a signed payload.
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
        s3={"payload_signing_enabled": True},
    )
    try:
        session = botocore.session.get_session()
        session.register_component("data_loader", _loader())
        client = boto3.session.Session(botocore_session=session).client("s3", config=config)
    except (BotoCoreError, ValueError) as error:
        raise ValueError(f"{uri}: {scrubbed(str(error))}") from None
    with closing(client), _explained(uri, client.meta.endpoint_url):
        yield client


@contextmanager
def _explained(uri: str, endpoint: str) -> Iterator[None]:
    """Turn boto3's exceptions into one-line ValueErrors."""
    from botocore import exceptions as boto
    from s3transfer.exceptions import RetriesExceededError, S3DownloadFailedError

    try:
        yield
    except boto.ClientError as error:
        status, code = error.response["ResponseMetadata"]["HTTPStatusCode"], error.response["Error"].get("Code", "")
        reason = _CHANGED if status == 412 else _REASONS.get(code) or error.response["Error"].get("Message") or "refused"
        kind = MissingError if code == "NoSuchKey" else ValueError
        raise kind(f"{uri}: {reason} ({code}, status {status}, {public_url(endpoint)})") from None
    except (boto.NoCredentialsError, boto.PartialCredentialsError) as error:
        raise ValueError(f"{uri}: {error}; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE") from None
    except boto.BotoCoreError as error:
        kind = UnreachableError if isinstance(error, boto.ConnectionError) else ValueError
        raise kind(f"{uri}: {scrubbed(' '.join(str(error).split()), endpoint)}") from None
    except S3DownloadFailedError:  # PreconditionFailed
        raise ValueError(f"{uri}: {_CHANGED}") from None
    except RetriesExceededError as error:
        raise ValueError(f"{uri}: connection lost at every attempt ({error.last_exception}); try again") from None


def check_names(uri: str, names: Iterable[str], problem: str) -> None:
    """Raise ValueError with `problem` and the first relative key with a part that is empty, `.` or `..`."""
    if bad := next((name for name in names if {"", ".", ".."} & set(name.split("/"))), None):
        raise ValueError(f"{uri}: {problem} {bad!r}")


def list_below(uri: str) -> list[Listed]:
    """List all objects below the prefix `s3://bucket/folder`, sorted by key, without the markers of empty folders."""
    bucket, key = split(uri)
    prefix = f"{key.rstrip('/')}/" if key.strip("/") else ""
    with connected(uri) as client:
        pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
        entries = [entry for page in pages for entry in page.get("Contents", []) if not entry["Key"].endswith("/")]
    return [
        Listed(f"s3://{bucket}/{entry['Key']}", entry["ETag"].strip('"'), entry["Size"], "", entry["LastModified"].timestamp())
        for entry in entries
    ]


def delete_below(uri: str) -> None:
    """Delete all objects below the prefix `s3://bucket/folder`, one by one, which every store supports."""
    bucket, key = split(uri)
    if not key.strip("/"):
        raise ValueError(f"{uri}: expected s3://bucket/folder, not a whole bucket")
    with connected(uri) as client:
        pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=f"{key.rstrip('/')}/")
        for entry in [entry for page in pages for entry in page.get("Contents", [])]:
            client.delete_object(Bucket=bucket, Key=entry["Key"])


def check_exists(uri: str) -> None:
    """Raise ValueError unless `uri` is an object or a prefix with objects, with a single listing of two keys."""
    bucket, key = split(uri)
    prefix = f"{key.rstrip('/')}/" if key.strip("/") else ""
    with connected(uri) as client:
        listed = client.list_objects_v2(Bucket=bucket, Prefix=prefix, MaxKeys=2).get("Contents", [])
    if not any(not entry["Key"].endswith("/") for entry in listed):  # an empty folder has a marker
        if key[-1:] in ("", "/"):
            raise MissingError(f"{uri}: no object below this prefix")
        current_version(uri)


def current_version(uri: str) -> Listed:
    """Return the current version of an object; raise MissingError if it does not exist."""
    bucket, key = split(uri)
    with connected(uri) as client:
        try:
            reply = client.head_object(Bucket=bucket, Key=key)
        except client.exceptions.ClientError:
            reply = client.get_object(Bucket=bucket, Key=key)  # only GET returns the reason
            reply["Body"].close()
    etag = reply["ETag"].strip('"')
    is_md5 = re.fullmatch("[0-9a-f]{32}", etag) and _has_plain_etag(reply, bucket)
    return Listed(uri, etag, reply["ContentLength"], etag if is_md5 else _recorded_md5(reply))


def _has_plain_etag(reply: Mapping[str, Any], bucket: str) -> bool:
    """Return whether an ETag is made of MD5s: not with a customer's key, and not in directory buckets."""
    customer_key = reply.get("ServerSideEncryption", "AES256") != "AES256" or "SSECustomerAlgorithm" in reply
    return not customer_key and not bucket.endswith("--x-s3")


def _recorded_md5(reply: Mapping[str, Any]) -> str:
    """Return the MD5 that the uploader recorded, or an empty string."""
    try:
        md5 = base64.b64decode(reply.get("Metadata", {}).get(MD5_METADATA, ""), validate=True)
    except ValueError:
        return ""
    return md5.hex() if len(md5) == hashlib.md5(usedforsecurity=False).digest_size else ""


def check_content(path: Path, listed: Listed) -> None:
    """Compare a downloaded file with the checksum of its object, if the store has one, and delete a damaged file.

    An object uploaded in parts has the MD5 that its uploader recorded, or an ETag made of the parts' MD5s. The latter may be
    computed differently, so a file that it does not fit is downloaded once more and compared.

    Raises:
        ValueError: the content differs, or the object has changed since it was listed.
    """
    md5 = file_md5(path)
    if md5 in (listed.etag, listed.md5) or not re.fullmatch(r"[0-9a-f]{32}(-\d+)?", listed.etag):
        return
    # A listing does not tell whether an ETag is an MD5, so the store is asked about an ETag that differs.
    found = listed if listed.md5 else current_version(listed.uri)
    if found.etag != listed.etag:
        path.unlink()
        raise ValueError(f"{listed.uri}: {_CHANGED}")
    if found.md5 == md5 or (not found.md5 and _fits_parts(path, found)):
        return
    expected = found.md5
    if not expected:
        again = path.with_name(f"{path.name}.again.partial")
        download(found.uri, {again: found})
        expected = file_md5(again)
        again.unlink()
        if expected == md5:
            return
    path.unlink()
    raise ValueError(f"{listed.uri}: MD5 mismatch: expected {expected}, got {md5}; try again")


def _fits_parts(path: Path, found: Listed) -> bool:
    """Return False if the ETag of an object uploaded in parts should be made of the parts' MD5s, but the file's differs."""
    bucket, key = split(found.uri)
    with connected(found.uri) as client:
        try:
            first = client.head_object(Bucket=bucket, Key=key, PartNumber=1)
        except client.exceptions.ClientError:  # not supported
            return True
    size, num_parts = first["ContentLength"], found.etag.partition("-")[2]
    known = _has_plain_etag(first, bucket) and size > 0 and str(-(-found.size // size)) == num_parts
    return not known or etag_of(path, size) == found.etag


def etag_of(path: Path, part: int) -> str:
    """Return S3's ETag of a file uploaded in parts of `part` bytes: its MD5, or the MD5 of its parts' MD5s."""
    with path.open("rb") as file:
        parts = [_md5(chunk) for chunk in iter(lambda: file.read(part), b"")] or [_md5(b"")]
    return parts[0].hex() if len(parts) == 1 else f"{_md5(b''.join(parts)).hex()}-{len(parts)}"


def _md5(content: bytes) -> bytes:
    return hashlib.md5(content, usedforsecurity=False).digest()


def download(uri: str, files: Mapping[Path, Listed]) -> None:
    """Download the given version to each local path, where it appears once complete.

    Raises:
        ValueError: an object changed, or as `connected`.
    """
    from boto3.s3.transfer import ProgressCallbackInvoker

    etags = {split(one.uri): one.etag for one in files.values()}

    def pin_version(params: dict[str, Any], **_: Any) -> dict[str, Any]:
        return {**params, "IfMatch": f'"{etags[params["Bucket"], params["Key"]]}"'}

    with connected(uri) as client, count(sum(one.size for one in files.values()), uri, "B") as bar:
        client.meta.events.register("provide-client-params.s3.GetObject", pin_version)
        with transfers(client) as manager:
            futures = []
            for path, one in files.items():
                path.parent.mkdir(parents=True, exist_ok=True)
                subscribers = [ProgressCallbackInvoker(bar.update)]
                futures.append(manager.download(*split(one.uri), str(path), subscribers=subscribers))
            for (path, one), future in zip(files.items(), futures, strict=True):
                with _explained(one.uri, client.meta.endpoint_url):
                    future.result()
                with path.open("rb") as file:
                    os.fsync(file.fileno())


def transfers(client: Any, part: int = 8 << 20) -> Any:
    """Return boto3's transfer manager, which transfers files larger than `part` bytes in parallel parts."""
    from boto3.s3.transfer import TransferConfig, create_transfer_manager

    config = TransferConfig(multipart_threshold=part + 1, multipart_chunksize=part, preferred_transfer_client="classic")
    return create_transfer_manager(client, config)
