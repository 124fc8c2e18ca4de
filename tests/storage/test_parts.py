"""Downloads of objects that were uploaded in parts, whose ETag is not their MD5."""

import os

import pytest

from pixelclip.storage import s3
from pixelclip.storage.download import local_copy
from pixelclip.storage.upload import upload

PART = 5 << 20  # minimum of S3
CONTENT = os.urandom(2 * PART + 7)


@pytest.fixture
def flips(monkeypatch):
    """Set how many of the next downloads have one changed byte; lists what was downloaded."""
    right, seen, damaged = s3.download, [], [0]

    def flip(uri, files):
        right(uri, files)
        for path, one in files.items():
            seen.append(one.uri)
            if len(seen) <= damaged[0]:
                content = bytearray(path.read_bytes())
                content[len(seen) * 100] ^= 1
                path.write_bytes(content)

    monkeypatch.setattr(s3, "download", flip)
    return damaged, seen


def put_parts(bucket, key, sizes, **options):
    """Upload `CONTENT` as other programs do."""
    named = {"Bucket": "data", "Key": key}
    named["UploadId"] = bucket.create_multipart_upload(**named, **options)["UploadId"]
    parts, start = [], 0
    for number, size in enumerate(sizes, 1):
        reply = bucket.upload_part(**named, PartNumber=number, Body=CONTENT[start : start + size])
        parts.append({"PartNumber": number, "ETag": reply["ETag"]})
        start += size
    bucket.complete_multipart_upload(**named, MultipartUpload={"Parts": parts})


def test_own_upload_records_its_md5(bucket, flips, tmp_path, monkeypatch):
    monkeypatch.setattr("pixelclip.storage.upload._PART", PART)
    (tmp_path / "file").write_bytes(CONTENT)
    upload(tmp_path / "file", "s3://data/set/own")
    damaged, seen = flips
    damaged[0] = 2
    for uri in ("s3://data/set/own", "s3://data/set"):
        with pytest.raises(ValueError, match=r"^s3://data/set/own: MD5 mismatch: expected \w{32}, got \w{32}; try again$"):
            local_copy(uri)
    assert local_copy("s3://data/set/own").read_bytes() == CONTENT
    assert (local_copy("s3://data/set") / "own").read_bytes() == CONTENT
    assert seen == ["s3://data/set/own"] * 4


def test_etag_of_parts_is_compared(bucket, flips):
    put_parts(bucket, "other", [PART, PART, 7])
    damaged, seen = flips
    damaged[0] = 1
    with pytest.raises(ValueError, match=r"^s3://data/other: MD5 mismatch: expected \w{32}, got \w{32}; try again$"):
        local_copy("s3://data/other")
    assert local_copy("s3://data/other").read_bytes() == CONTENT
    assert seen == ["s3://data/other"] * 3


@pytest.mark.parametrize("metadata", ["no base64", "c2hvcnQ="])
def test_parts_of_different_sizes_are_downloaded_twice(bucket, flips, cache, metadata):
    put_parts(bucket, "uneven", [PART + 3, PART, 4], Metadata={"md5chksum": metadata})
    _, seen = flips
    copy = local_copy("s3://data/uneven")
    assert copy.read_bytes() == CONTENT and len(seen) == 2
    assert [path.name for path in copy.parent.iterdir()] == ["uneven"]
