"""Uploads to moto's server: content, checksums of the requests, unchanged files skipped."""

import hashlib
import os
from base64 import b64encode

import pytest
from botocore.httpsession import URLLib3Session

from helpers.fake_data import write_files
from pixelclip.storage.download import local_copy
from pixelclip.storage.s3 import etag_of, list_below
from pixelclip.storage.upload import upload, upload_folder

PART = 5 << 20  # minimum of S3


@pytest.mark.parametrize("size", [0, 10, PART, 2 * PART, 2 * PART + 7])
def test_uploaded_file_is_downloaded_unchanged(bucket, tmp_path, monkeypatch, size):
    monkeypatch.setattr("pixelclip.storage.upload._PART", PART)
    (tmp_path / "file").write_bytes(content := os.urandom(size))
    upload(tmp_path / "file", "s3://data/some/key")
    assert bucket.get_object(Bucket="data", Key="some/key")["Body"].read() == content
    assert local_copy("s3://data/some/key").read_bytes() == content
    (listed,) = list_below("s3://data/some")
    assert (listed.etag, listed.size) == (etag_of(tmp_path / "file", PART), size)


def test_unchanged_files_are_not_uploaded_again(bucket, tmp_path, monkeypatch):
    monkeypatch.setattr("pixelclip.storage.upload._PART", PART)
    write_files(tmp_path, {"a": b"a", "big": bytes(PART + 1), "sub/b": b"b", "last": b"last"})
    upload_folder(tmp_path, "s3://data/set", last="last")
    write_files(tmp_path, {"sub/b": b"c", "new": b"new"})
    sent = []
    monkeypatch.setattr("pixelclip.storage.upload._upload", lambda client, path, uri: sent.append(uri))
    upload_folder(tmp_path, "s3://data/set", last="new")
    assert sent == ["s3://data/set/sub/b", "s3://data/set/new"]


def test_request_has_the_checksums_of_its_content(bucket, tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"content")
    sent, send = [], URLLib3Session.send
    monkeypatch.setattr(URLLib3Session, "send", lambda self, request: sent.append(request) or send(self, request))
    upload(tmp_path / "file", "s3://data/file")
    assert [request.headers["X-Amz-Content-SHA256"] for request in sent] == [hashlib.sha256(b"content").hexdigest().encode()]
    assert [request.headers["Content-MD5"] for request in sent] == [b64encode(hashlib.md5(b"content").digest())]
