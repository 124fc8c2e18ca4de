"""Files: atomic writes, digests, errors that name the file."""

import hashlib
import os
import stat
from pathlib import Path
from typing import Annotated

import pytest
from pydantic import BaseModel, Field

from helpers.fake_data import write_files
from pixelclip.storage.files import digest, file_md5, files_below, parse_json, read_json, write_atomically, write_json


def test_written_file_is_complete_and_leaves_no_temporary_file(tmp_path: Path) -> None:
    path = tmp_path / "new" / "näme.txt"
    write_atomically(path, "grün")
    write_atomically(path, b"second")
    assert path.read_bytes() == b"second"
    assert list(path.parent.iterdir()) == [path]


def test_file_mode_follows_the_umask(tmp_path: Path) -> None:
    write_atomically(tmp_path / "written", b"")
    (tmp_path / "plain").touch()
    assert stat.S_IMODE((tmp_path / "written").stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


def test_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def fail(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="no space left"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_json_round_trip_and_nan_is_rejected(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"a": [1, 2.5, None, "ü"]})
    assert read_json(tmp_path / "a.json") == {"a": [1, 2.5, None, "ü"]}
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(tmp_path / "b.json", {"a": float("nan")})
    assert not (tmp_path / "b.json").exists()


@pytest.mark.parametrize("content", [b"", b"{", b'{"a": 1', b"\xff\xfe\xfa", None])
def test_unreadable_json_names_the_file(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "bad.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=r"bad\.json: "):
        read_json(path)


class Sample(BaseModel):
    name: str
    sizes: list[Annotated[int, Field(ge=0)]]
    parent: "Sample | None" = None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[" * 99999, "cannot be read as JSON: .*recursion"),
        (b'{"name": "a", "sizes": [' + b"9" * 5000 + b"]}", "cannot be read as JSON: Exceeds the limit"),
        (b"\xff", "cannot be read as JSON: "),
        (b"[]", r"Input should be an object \(found \[\]\)$"),
        (b'{"name": "a"}', "entry 'sizes' is missing$"),
        (b'{"name": 1, "sizes": []}', r"name: Input should be a valid string \(found 1\)$"),
        (b'{"name": "a", "sizes": [1, -2]}', r"sizes\.1: Input should be greater than or equal to 0 \(found -2\)$"),
        (b'{"name": "a", "sizes": [true]}', r"sizes\.0: Input should be a valid integer \(found True\)$"),
        (b'{"name": "a", "sizes": "' + b"x" * 9999 + b'"}', r"sizes: Input should be a valid list \(found 'x+\.\.\.\)$"),
        (b'{"name": "a", "sizes": [], "parent": {"sizes": []}}', r"entry 'parent\.name' is missing$"),
        (b'{"name": "a", "sizes": [], "parent": ' * 300 + b"null" + b"}" * 300, "parent.*Recursion error"),
    ],
)
def test_json_that_does_not_fit_is_one_line(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "bad.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"^\S+/bad\.json: {message}") as refusal:
        read_json(path, Sample)
    assert "\n" not in str(refusal.value) and len(str(refusal.value)) < 400 + len(str(path))


def test_json_that_fits_is_returned_unchanged(tmp_path: Path) -> None:
    document = {"name": "a", "sizes": [1], "more": {"kept": [1.5]}}
    write_json(tmp_path / "a.json", document)
    assert read_json(tmp_path / "a.json", Sample) == document
    assert parse_json('{"a": 1}', "text", dict[str, float]) == {"a": 1}


def test_files_below_are_sorted_without_hidden_files(tmp_path: Path) -> None:
    write_files(tmp_path, dict.fromkeys(["b/2", "b/10", "a", "c d/é", ".hidden", ".git/x", "b/.x", "Thumbs.db"], b""))
    assert [path.relative_to(tmp_path).as_posix() for path in files_below(tmp_path)] == ["a", "b/10", "b/2", "c d/é"]


def test_unreadable_folder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_files(tmp_path, {"a": b"1", "b/c/locked/x": b"2", "b/z": b"3"})
    scandir = os.scandir

    def denied(path: str | Path):  # root may read every folder, so permissions cannot be removed
        if Path(path).name == "locked":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", denied)
    for read in (files_below, digest):
        with pytest.raises(ValueError, match=r"^.*/b/c/locked: folder cannot be read: Permission denied$"):
            read(tmp_path)


def test_links_are_followed_except_to_parents(tmp_path: Path) -> None:
    write_files(tmp_path, {"data/a": b"1", "elsewhere/b": b"2"})
    (tmp_path / "data" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "loop").symlink_to(tmp_path / "data")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "data")
    found = files_below(tmp_path / "data")
    assert [path.relative_to(tmp_path / "data").as_posix() for path in found] == ["a", "link/b"]


def test_digest_depends_on_content_and_name_but_not_time(tmp_path: Path) -> None:
    folder = write_files(tmp_path / "x", {"a": b"1", "b/c": b"23"})
    before = digest(folder)
    assert (before["num_files"], before["size"]) == (2, 3)
    os.utime(folder / "a", (0, 0))
    assert digest(folder) == before
    (folder / "b" / "c").write_bytes(b"24")
    other_content = digest(folder)
    (folder / "b" / "c").write_bytes(b"23")
    (folder / "a").rename(folder / "d")
    other_name = digest(folder)
    assert len({before["md5"], other_content["md5"], other_name["md5"]}) == 3
    assert digest(folder, [folder / "d"])["num_files"] == 1


def test_digest_of_a_file_is_its_md5(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"content")
    assert digest(tmp_path / "a")["md5"] == file_md5(tmp_path / "a") == hashlib.md5(b"content").hexdigest()
    with pytest.raises(ValueError, match="none: no such file or folder"):
        digest(tmp_path / "none")


def test_digest_accepts_undecodable_names_and_dangling_links(tmp_path: Path) -> None:
    (tmp_path / os.fsdecode(b"\xff.jpg")).write_bytes(b"1")
    (tmp_path / "link").symlink_to(tmp_path / "none")
    before = digest(tmp_path)
    assert (before["num_files"], before["size"]) == (2, 1)
    (tmp_path / "none").write_bytes(b"1")
    assert digest(tmp_path)["md5"] != before["md5"]
