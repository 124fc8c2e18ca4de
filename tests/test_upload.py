"""Uploads: verified, unchanged files left alone. Against moto's server."""

import os

import pytest
from conftest import write_files

from pixelclip import upload as module
from pixelclip.download import local_copy
from pixelclip.s3 import list_below
from pixelclip.upload import upload, upload_folder

PART = 5 << 20  # the smallest part that S3 accepts


@pytest.mark.parametrize("size", [0, 10, PART, 2 * PART, 2 * PART + 7])
def test_uploaded_file_is_downloaded_unchanged(bucket, tmp_path, monkeypatch, size):
    monkeypatch.setattr(module, "_PART", PART)
    (tmp_path / "file").write_bytes(content := os.urandom(size))
    upload(tmp_path / "file", "s3://data/some/key")
    assert bucket.get_object(Bucket="data", Key="some/key")["Body"].read() == content
    assert local_copy("s3://data/some/key").read_bytes() == content
    (listed,) = list_below("s3://data/some")
    assert (listed.etag, listed.size) == (module._etag(tmp_path / "file"), size)


def test_unchanged_files_are_not_uploaded_again(bucket, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_PART", PART)
    write_files(tmp_path, {"a": b"a", "big": bytes(PART + 1), "sub/b": b"b", "last": b"last"})
    upload_folder(tmp_path, "s3://data/set", last="last")
    write_files(tmp_path, {"sub/b": b"c", "new": b"new"})
    sent = []
    monkeypatch.setattr(module, "_upload", lambda client, path, uri, etag: sent.append(uri))
    upload_folder(tmp_path, "s3://data/set", last="new")
    assert sent == ["s3://data/set/sub/b", "s3://data/set/new"]


def test_damaged_upload_is_an_error(bucket, tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"right")
    monkeypatch.setattr(module, "_etag", lambda path: "0" * 32)
    with pytest.raises(ValueError, match=r"s3://data/file: 5 bytes with md5 \w+ arrived, 5 with 0+ were sent"):
        upload(tmp_path / "file", "s3://data/file")
