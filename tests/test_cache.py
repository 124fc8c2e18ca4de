"""The shared cache: whole folders, where a copy came from, and the bound that it keeps."""

import os

import pytest

from pixelclip import s3
from pixelclip.cache import origin, trim
from pixelclip.download import local_copy
from pixelclip.s3 import Listed, list_below


def test_a_prefix_is_a_folder_that_is_whole_or_not_there(bucket, cache):
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
    assert (folder / "a.txt").read_text() == "a.txt"  # who works with the old one keeps it


def test_an_interrupted_folder_is_continued(bucket, cache, monkeypatch):
    for name in "abc":
        bucket.put_object(Bucket="data", Key=f"set/{name}", Body=name.encode())
    whole = local_copy("s3://data/set")
    partial = whole.with_name("set.partial")
    whole.rename(partial)
    (partial / "b").unlink()
    before = (partial / "a").stat().st_mtime_ns
    assert local_copy("s3://data/set") == whole
    assert (whole / "b").read_text() == "b" and (whole / "a").stat().st_mtime_ns == before
    assert not partial.exists()


@pytest.mark.parametrize("size", [3, 12 << 20], ids=["small", "of several parts"])
def test_a_folder_is_never_a_mixture_of_versions(bucket, cache, monkeypatch, size):
    old, new = b"o" * size, b"n" * size
    for name in "abc":
        bucket.put_object(Bucket="data", Key=f"set/{name}", Body=old)

    def list_and_change(uri):
        listed = list_below(uri)
        bucket.put_object(Bucket="data", Key="set/b", Body=new)
        return listed

    with monkeypatch.context() as patch:
        patch.setattr(s3, "list_below", list_and_change)
        with pytest.raises(ValueError, match=r"^s3://data/set/b: changed in the store since its folder was listed; try again$"):
            local_copy("s3://data/set")
    folder = local_copy("s3://data/set")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {"a": old, "b": new, "c": old}


def test_an_object_that_is_deleted_meanwhile_is_named(bucket, cache, monkeypatch):
    bucket.put_object(Bucket="data", Key="set/a", Body=b"a")
    monkeypatch.setattr(s3, "list_below", lambda uri: [*list_below(uri), Listed("s3://data/set/b", "0" * 32, 1)])
    with pytest.raises(ValueError, match=r"^s3://data/set/b: there is no such key in the bucket"):
        local_copy("s3://data/set")


def test_a_disk_that_is_full_is_named_as_for_a_file(bucket, cache, monkeypatch):
    bucket.put_object(Bucket="data", Key="set/a", Body=b"a")

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(ValueError, match=r"s3://data/set: cannot be kept .*No space left.*PIXELCLIP_CACHE"):
        local_copy("s3://data/set")


@pytest.mark.parametrize("key", ["set/../../evil", "set//a", "set/./a"])
def test_keys_that_are_no_paths_below_are_refused(bucket, cache, key):
    bucket.put_object(Bucket="data", Key=key, Body=b"")
    with pytest.raises(ValueError, match="cannot be a folder here, it holds the key"):
        local_copy("s3://data/set/")


def test_a_copy_knows_its_origin(bucket, cache, tmp_path):
    bucket.put_object(Bucket="data", Key="set/sub/a.txt", Body=b"a")
    assert origin(local_copy("s3://data/set/sub/a.txt")) == "s3://data/set/sub/a.txt"
    assert origin(local_copy("s3://data/set/") / "sub" / "a.txt") == "s3://data/set/sub/a.txt"
    assert origin(tmp_path / "a.txt") == str(tmp_path / "a.txt")


def test_the_copies_unused_for_longest_go_first(bucket, cache, monkeypatch):
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
    assert local_copy("s3://data/5").is_file()  # larger than the bound, but asked for
    assert not copies[0].exists()


@pytest.mark.parametrize("text", ["0", "-1", "many", "nan"])
def test_a_bound_that_is_no_number_is_named(cache, tmp_path, monkeypatch, text):
    monkeypatch.setenv("PIXELCLIP_CACHE_GB", text)
    with pytest.raises(ValueError, match=f"PIXELCLIP_CACHE_GB '{text}': a positive number is expected"):
        trim(tmp_path)
