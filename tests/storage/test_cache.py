"""The shared cache: complete folders, the origin of a copy, the size limit."""

import os
from contextlib import nullcontext
from dataclasses import replace

import pytest

from pixelclip.storage import s3
from pixelclip.storage.cache import origin, trim
from pixelclip.storage.download import local_copy
from pixelclip.storage.files import write_atomically
from pixelclip.storage.s3 import Listed, list_below


def test_prefix_is_copied_to_a_folder(bucket, cache):
    for name in ("a.txt", "sub/b.txt", "sub/empty/"):
        bucket.put_object(Bucket="data", Key=f"set/{name}", Body=name.encode() if name[-1] != "/" else b"")
    bucket.put_object(Bucket="data", Key="settled", Body=b"no part of it")
    for uri in ("s3://data/set", "s3://data/set/"):
        folder = local_copy(uri)
        assert folder.name == "set"
        assert {str(p.relative_to(folder)): p.read_text() for p in folder.rglob("*.txt")} == {
            "a.txt": "a.txt",
            "sub/b.txt": "sub/b.txt",
        }
    bucket.put_object(Bucket="data", Key="set/a.txt", Body=b"new")
    assert (local_copy("s3://data/set") / "a.txt").read_text() == "new"
    assert (folder / "a.txt").read_text() == "a.txt"  # the old copy stays for its readers


def test_interrupted_folder_keeps_its_complete_files(bucket, cache, monkeypatch):
    for name in "abc":
        bucket.put_object(Bucket="data", Key=f"set/{name}", Body=name.encode())
    whole = local_copy("s3://data/set")
    partial = whole.with_name("set.partial")
    whole.rename(partial)
    (partial / "b").rename(partial / "b.0123abCD")  # s3transfer's name of an incomplete file
    before = (partial / "a").stat().st_mtime_ns
    assert local_copy("s3://data/set") == whole
    assert (whole / "b").read_text() == "b" and (whole / "a").stat().st_mtime_ns == before
    assert sorted(path.name for path in whole.iterdir()) == ["a", "b", "c"] and not partial.exists()


@pytest.mark.parametrize("damaged", ["a", "sub/b"])
def test_byte_that_changes_in_flight_is_noticed_in_a_folder(bucket, cache, monkeypatch, damaged):
    for name in ("a", "sub/b", "c"):
        bucket.put_object(Bucket="data", Key=f"set/{name}", Body=name.encode() * 100)
    right, wanted = s3.download, []

    def flip(uri, files):
        right(uri, files)
        wanted.append(sorted(one.uri.partition("set/")[2] for one in files.values()))
        for path, one in files.items():
            if one.uri.endswith(f"set/{damaged}") and len(wanted) == 1:
                content = bytearray(path.read_bytes())
                content[7] ^= 1
                path.write_bytes(content)

    monkeypatch.setattr(s3, "download", flip)
    with pytest.raises(ValueError, match=rf"^s3://data/set/{damaged}: MD5 mismatch: expected \w+, got \w+; try again$"):
        local_copy("s3://data/set")
    folder = local_copy("s3://data/set")
    assert (folder / damaged).read_bytes() == damaged.encode() * 100
    assert wanted == [["a", "c", "sub/b"], [damaged]]


def test_folder_with_etags_that_are_no_md5_is_copied(bucket, cache, monkeypatch):
    bucket.put_object(Bucket="data", Key="set/a", Body=b"1")
    listed = list_below
    monkeypatch.setattr(s3, "list_below", lambda uri: [replace(one, etag="0" * 32) for one in listed(uri)])
    monkeypatch.setattr(s3, "download", lambda uri, files: [write_atomically(path, b"1") for path in files])
    for reply, message in (
        (Listed("s3://data/set/a", "0" * 32, 1), ""),  # encrypted with a customer's key
        (Listed("s3://data/set/a", "1" * 32, 1, "1" * 32), "s3://data/set/a: changed in the store during the download"),
    ):
        monkeypatch.setattr(s3, "current_version", lambda uri, reply=reply: reply)
        with pytest.raises(ValueError, match=message) if message else nullcontext():
            assert (local_copy("s3://data/set/") / "a").read_bytes() == b"1"
            bucket.put_object(Bucket="data", Key="set/b", Body=b"2")  # another version of the folder


@pytest.mark.parametrize("size", [3, 12 << 20], ids=["small", "of several parts"])
def test_folder_never_mixes_versions(bucket, cache, monkeypatch, size):
    old, new = b"o" * size, b"n" * size
    for name in "abc":
        bucket.put_object(Bucket="data", Key=f"set/{name}", Body=old)

    def list_and_change(uri):
        listed = list_below(uri)
        bucket.put_object(Bucket="data", Key="set/b", Body=new)
        return listed

    with monkeypatch.context() as patch:
        patch.setattr(s3, "list_below", list_and_change)
        with pytest.raises(ValueError, match=r"^s3://data/set/b: changed in the store during the download; try again$"):
            local_copy("s3://data/set")
    folder = local_copy("s3://data/set")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {"a": old, "b": new, "c": old}


def test_object_deleted_after_the_listing_is_named(bucket, cache, monkeypatch):
    bucket.put_object(Bucket="data", Key="set/a", Body=b"a")
    monkeypatch.setattr(s3, "list_below", lambda uri: [*list_below(uri), Listed("s3://data/set/b", "0" * 32, 1)])
    with pytest.raises(ValueError, match=r"^s3://data/set/b: there is no such key in the bucket"):
        local_copy("s3://data/set")


def test_full_disk_is_an_error_that_names_the_setting(bucket, cache, monkeypatch):
    bucket.put_object(Bucket="data", Key="set/a", Body=b"a")

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(ValueError, match=r"s3://data/set: cannot write to the cache .*No space left.*PIXELCLIP_CACHE"):
        local_copy("s3://data/set")


@pytest.mark.parametrize("key", ["set/../../evil", "set//a", "set/./a"])
def test_key_that_leaves_the_folder_is_rejected(bucket, cache, key):
    bucket.put_object(Bucket="data", Key=key, Body=b"")
    with pytest.raises(ValueError, match="cannot be copied to a folder: it contains the key"):
        local_copy("s3://data/set/")


def test_origin_of_a_copy(bucket, cache, tmp_path):
    bucket.put_object(Bucket="data", Key="set/sub/a.txt", Body=b"a")
    assert origin(local_copy("s3://data/set/sub/a.txt")) == "s3://data/set/sub/a.txt"
    assert origin(local_copy("s3://data/set/") / "sub" / "a.txt") == "s3://data/set/sub/a.txt"
    assert origin(tmp_path / "a.txt") == str(tmp_path / "a.txt")


def test_least_recently_used_copies_are_removed_first(bucket, cache, monkeypatch):
    copies = []
    for number in range(4):
        bucket.put_object(Bucket="data", Key=f"{number}", Body=bytes(1000))
        copies.append(local_copy(f"s3://data/{number}"))
        os.utime(copies[-1].parent, (1e9 + number, 1e9 + number))
    local_copy("s3://data/0")  # used again
    monkeypatch.setenv("PIXELCLIP_CACHE_GB", "2.5e-6")
    trim(copies[1])
    assert [copy.is_file() for copy in copies] == [True, True, False, False]
    monkeypatch.setenv("PIXELCLIP_CACHE_GB", "1e-9")
    bucket.put_object(Bucket="data", Key="5", Body=bytes(1000))
    assert local_copy("s3://data/5").is_file()  # larger than the limit, but requested
    assert not copies[0].exists()


@pytest.mark.parametrize("text", ["0", "-1", "many", "nan"])
def test_invalid_size_limit_is_rejected(cache, tmp_path, monkeypatch, text):
    monkeypatch.setenv("PIXELCLIP_CACHE_GB", text)
    with pytest.raises(ValueError, match=f"PIXELCLIP_CACHE_GB '{text}': must be a positive number"):
        trim(tmp_path)
