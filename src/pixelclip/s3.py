"""Stores that speak S3 (AWS, MinIO, Ceph, ...): the connection, what its errors mean, what is below a prefix."""

from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any

TIMEOUT = 30.0  # seconds without a byte
_ATTEMPTS = 6  # botocore waits longer before each of them, up to 20 s
REASONS = {
    "NoSuchBucket": "there is no such bucket",
    "NoSuchKey": "there is no such key in the bucket",
    "AccessDenied": "these credentials may not do that, or there is no such key",
    "InvalidAccessKeyId": "wrong credentials, see AWS_ACCESS_KEY_ID",
    "SignatureDoesNotMatch": "wrong credentials, see AWS_SECRET_ACCESS_KEY",
    "InvalidToken": "wrong credentials, see AWS_SESSION_TOKEN",
    "ExpiredToken": "the credentials have expired, see AWS_SESSION_TOKEN",
}
"""What a store's error codes mean."""


@dataclass(frozen=True)
class Listed:
    """What a listing tells of an object; `etag` without quotes."""

    uri: str
    etag: str
    size: int


def is_s3(uri: object) -> bool:
    """Whether something names an object or a prefix in a store."""
    return str(uri).lower().startswith("s3://")


def split(uri: str) -> tuple[str, str]:
    """Bucket and key of `s3://bucket/key`; the key is empty for a whole bucket.

    Raises:
        ValueError: there is no bucket in it.
    """
    bucket, _, key = uri.partition("://")[2].partition("/")
    if not is_s3(uri) or not bucket:
        raise ValueError(f"{uri}: s3://bucket/key is expected")
    return bucket, key


@contextmanager
def connected(uri: str, attempts: int = _ATTEMPTS) -> Iterator[Any]:
    """A boto3 client by the usual AWS variables and files (AWS_ENDPOINT_URL for other stores than Amazon's).

    Args:
        uri: what it is for; error messages begin with it.
        attempts: how often botocore asks when the store is overloaded or cannot be reached.

    Raises:
        ValueError: boto3 is missing, a setting is unusable, or, of what is done inside, the store refuses or is lost.
    """
    try:
        import boto3.session
        from botocore import exceptions as boto
        from botocore.config import Config
    except ImportError:
        raise ValueError(f"{uri}: boto3 is missing; pip install 'pixelclip[s3]'") from None
    config = Config(
        connect_timeout=10,
        read_timeout=TIMEOUT,
        retries={"mode": "standard", "total_max_attempts": attempts},
        # Its own checksums in a trailer are unknown to many stores; uploads say their MD5 instead, which all of them check.
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    try:
        client = boto3.session.Session().client("s3", config=config)
    except (boto.BotoCoreError, ValueError) as error:
        raise ValueError(f"{uri}: {error}") from None
    with closing(client):
        try:
            yield client
        except boto.ClientError as error:
            raise ValueError(f"{uri}: {refusal(error.response, client.meta.endpoint_url)}") from None
        except (boto.NoCredentialsError, boto.PartialCredentialsError) as error:
            raise ValueError(f"{uri}: {error}; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE") from None
        except boto.BotoCoreError as error:
            raise ValueError(f"{uri}: {' '.join(str(error).split())}") from None


def refusal(answer: dict[str, Any], endpoint: str) -> str:
    """Why a store refused, from a ClientError's response."""
    status, code = answer["ResponseMetadata"]["HTTPStatusCode"], answer["Error"].get("Code", "")
    reason = REASONS.get(code) or answer["Error"].get("Message") or "refused"
    return f"{reason} ({code}, status {status}, {endpoint})"


def list_below(uri: str) -> list[Listed]:
    """Every object below a prefix `s3://bucket/folder`, in the order of keys; markers of empty folders are left out.

    Raises:
        ValueError: as `connected`.
    """
    bucket, key = split(uri)
    prefix = f"{key.rstrip('/')}/" if key.strip("/") else ""
    with connected(uri) as client:
        pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
        return [
            Listed(f"s3://{bucket}/{entry['Key']}", entry["ETag"].strip('"'), entry["Size"])
            for page in pages
            for entry in page.get("Contents", [])
            if not entry["Key"].endswith("/")
        ]
