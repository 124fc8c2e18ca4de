"""Local copies of remote files, from servers with all kinds of failures."""

import base64
import hashlib
import os
import re
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import boto3
import pytest

from helpers.processes import wait_until
from pixelclip.storage import s3
from pixelclip.storage.download import local_copy

BODY = bytes(range(256)) * 2000  # 512,000 bytes: several chunks
OTHER = BODY[::-1]


class Served(ThreadingHTTPServer):
    """A server that returns one file at every path and fails on demand."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.body = BODY
        self.headers: dict[str, str] = {"ETag": '"one"'}
        self.ranges = True  # support Range
        self.conditions = True  # support If-Range and If-Match
        self.lengths = ["HEAD", "GET"]  # the methods that send Content-Length
        self.heads = 200  # the status of a HEAD
        self.statuses: list[int] = []  # of the next answers
        self.cuts: list[int] = []  # bytes after which the next bodies break off
        self.reset = False  # a cut is a TCP reset
        self.before_get: Callable[[], None] = lambda: None
        self.pause = threading.Event()  # bodies wait for it halfway
        self.pause.set()
        self.gets: list[str] = []  # the Range of every GET
        self.wanted: list[str | None] = []  # the If-Range or If-Match of every GET
        self.asked = 0

    def url(self, path: str = "/weights.pth") -> str:
        return f"http://127.0.0.1:{self.server_address[1]}{path}"

    def become(self, body: bytes, etag: str) -> None:
        self.body, self.headers = body, {"ETag": etag}

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore clients that disconnect."""


class Answer(BaseHTTPRequestHandler):
    server: Served

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.server.asked += 1
        status = self.server.statuses.pop(0) if self.server.statuses else self.server.heads
        self._head(status, len(self.server.body) if status == 200 else 0)

    def do_GET(self) -> None:
        server = self.server
        server.asked += 1
        if self.path == "/moved":
            self.send_response(302)
            self.send_header("Location", server.url())
            self.end_headers()
            return
        server.gets.append(self.headers.get("Range", ""))
        server.wanted.append(self.headers.get("If-Range") or self.headers.get("If-Match"))
        server.before_get()
        if server.statuses:
            return self._head(server.statuses.pop(0), 0)
        etag = server.headers.get("ETag") or server.headers.get("Last-Modified")
        if server.conditions and self.headers.get("If-Match", etag) != etag:
            return self._head(412, 0)
        start, extra = 0, {}
        found = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if found and server.ranges and (not server.conditions or self.headers.get("If-Range", etag) == etag):
            start = int(found[1])
            extra = {"Content-Range": f"bytes {start}-{len(server.body) - 1}/{len(server.body)}"}
        body = server.body[start:]
        self._head(206 if extra else 200, len(body), extra)
        cut = server.cuts.pop(0) if server.cuts else len(body)
        self.wfile.write(body[: cut // 2])
        server.pause.wait(10)
        self.wfile.write(body[cut // 2 : cut])
        if cut < len(body) and server.reset:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()

    def _head(self, status: int, length: int, extra: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {**self.server.headers, **(extra or {})}.items():
            self.send_header(name, value)
        if self.command in self.server.lengths:
            self.send_header("Content-Length", str(length))
        self.end_headers()


@pytest.fixture
def server(cache: Path) -> Iterator[Served]:
    with Served() as served:
        thread = threading.Thread(target=served.serve_forever, args=(0.01,))
        thread.start()
        yield served
        served.pause.set()
        served.shutdown()
        thread.join()


def unfinished(cache: Path) -> list[Path]:
    return [path for path in cache.rglob("*.partial") if path.is_file()]


def test_local_path_is_returned_unchanged(tmp_path: Path) -> None:
    (tmp_path / "a#b?.pth").touch()
    assert local_copy(str(tmp_path / "a#b?.pth")) == tmp_path / "a#b?.pth"
    assert local_copy(str(tmp_path)) == tmp_path
    with pytest.raises(ValueError, match="none: no such file or folder"):
        local_copy(str(tmp_path / "none"))


@pytest.mark.parametrize("uri", ["ftp://host/a", "gs://bucket/a", "http://", "https:///a", "s3://", "s3:///a", "://a"])
def test_unsupported_uri_is_rejected(cache: Path, uri: str) -> None:
    with pytest.raises(ValueError, match=rf"{re.escape(uri)}: expected a local path, "):
        local_copy(uri)


@pytest.mark.parametrize("uri", ["s3://bucket", "s3://bucket/", "http://[1/a", "http://host:port/a", f"http://{'a' * 64}/"])
def test_malformed_uri_is_rejected(cache: Path, uri: str) -> None:
    with pytest.raises(ValueError, match=re.escape(uri)):
        local_copy(uri)


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/a/sam_vit_b.pth", "sam_vit_b.pth"),
        ("/a/w.pt?token=x/y.z#part", "w.pt"),
        ("/gr%C3%BCn%20a%2Fb.tar", "b.tar"),
        ("/grün a.tar", "grün a.tar"),
        ("", "file"),
        ("/a/..", "file"),
        (f"/{'x' * 1000}.safetensors", "x" * 188 + ".safetensors"),
    ],
)
def test_copy_keeps_the_file_name(server: Served, cache: Path, path: str, name: str) -> None:
    copy = local_copy(server.url(path))
    assert copy.name == name
    assert copy.is_relative_to(cache)
    assert copy.read_bytes() == BODY


def test_complete_copy_is_not_downloaded_again(server: Served, cache: Path) -> None:
    first = local_copy(server.url())
    assert local_copy(server.url()) == first
    assert server.gets == [""]
    assert not unfinished(cache)


def test_read_only_cache_still_serves(server: Served, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = local_copy(server.url())

    def fail(*_: object, **__: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "mkdir", fail)
    assert local_copy(server.url()) == copy
    with pytest.raises(ValueError, match=r"/else: cannot write to the cache .*Read-only.*PIXELCLIP_CACHE"):
        local_copy(server.url("/else"))


def test_default_cache_is_in_the_home_folder(server: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIXELCLIP_CACHE", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert local_copy(server.url()).is_relative_to(tmp_path / ".cache" / "pixelclip")


@pytest.mark.parametrize("reset", [False, True])
def test_interrupted_download_resumes(server: Served, cache: Path, reset: bool) -> None:
    server.cuts, server.reset = [300_000], reset
    assert local_copy(server.url()).read_bytes() == BODY
    assert len(server.gets) == 2
    assert re.fullmatch(r"bytes=\d+-", server.gets[1]) if reset else server.gets[1] == "bytes=300000-"
    assert not unfinished(cache)


def test_download_restarts_if_the_server_does_not_support_ranges(server: Served) -> None:
    server.ranges, server.cuts = False, [300_000]
    assert local_copy(server.url()).read_bytes() == BODY
    assert server.gets == ["", "bytes=300000-"]


def test_failed_download_reports_the_bytes_and_the_next_call_resumes(server: Served, cache: Path) -> None:
    server.cuts = [100_000, 50_000, 20_000]
    with pytest.raises(ValueError, match=r"weights\.pth: connection lost after 170,000 of 512,000 bytes \(attempt 3 of 3\)"):
        local_copy(server.url())
    assert server.gets == ["", "bytes=100000-", "bytes=150000-"]
    assert server.wanted == [None, '"one"', '"one"']
    assert [path.stat().st_size for path in unfinished(cache)] == [170_000]
    assert local_copy(server.url()).read_bytes() == BODY
    assert server.gets[3:] == ["bytes=170000-"]


@pytest.mark.parametrize("partial", [BODY, BODY + b"?"])
def test_partial_file_of_wrong_length_is_replaced(server: Served, partial: bytes) -> None:
    copy = local_copy(server.url())
    copy.unlink()
    Path(f"{copy}.partial").write_bytes(partial)
    assert local_copy(server.url()).read_bytes() == BODY


def test_change_between_two_calls_never_mixes_versions(server: Served, cache: Path) -> None:
    server.cuts = [100_000, 0, 0]
    with pytest.raises(ValueError, match="100,000 of 512,000"):
        local_copy(server.url())
    server.become(OTHER, '"two"')
    assert local_copy(server.url()).read_bytes() == OTHER
    assert server.gets[-1] == ""
    assert not unfinished(cache)


@pytest.mark.parametrize("conditions", [True, False])
@pytest.mark.parametrize("half", [False, True])
def test_change_between_two_requests_never_mixes_versions(server: Served, cache: Path, conditions: bool, half: bool) -> None:
    server.conditions, server.cuts = conditions, [100_000] * half
    server.before_get = lambda: server.become(OTHER, '"two"') if len(server.gets) == 1 + half else None
    with pytest.raises(ValueError, match=r"weights\.pth: changed on the server during the download; try again"):
        local_copy(server.url())
    assert server.gets == ["", *["bytes=100000-"] * half]
    assert local_copy(server.url()).read_bytes() == OTHER
    assert not unfinished(cache)


def test_new_version_is_downloaded_and_the_old_copy_stays(server: Served) -> None:
    old = local_copy(server.url())
    server.become(OTHER, '"two"')
    new = local_copy(server.url())
    assert (old.read_bytes(), new.read_bytes()) == (BODY, OTHER)


@pytest.mark.parametrize(
    ("headers", "again"),
    [
        ({"ETag": 'W/"weak"'}, ""),
        ({"Last-Modified": "Mon, 02 Nov 2026 10:00:00 GMT"}, "bytes=100000-"),
        ({}, ""),
    ],
)
def test_server_without_a_strong_etag(server: Served, headers: dict[str, str], again: str) -> None:
    server.headers, server.cuts = headers, [100_000]
    copy = local_copy(server.url())
    assert copy.read_bytes() == BODY
    assert server.gets == ["", again]
    local_copy(server.url())
    assert len(server.gets) == (2 if headers else 3)  # without a version the copy may be stale
    server.body = BODY[:1000]
    if "ETag" not in headers:
        assert local_copy(server.url()).read_bytes() == BODY[:1000]


def test_missing_length_and_empty_file(server: Served) -> None:
    server.lengths = []
    assert local_copy(server.url("/a")).read_bytes() == BODY
    server.lengths, server.cuts = ["GET"], [1000]
    assert local_copy(server.url("/b")).read_bytes() == BODY
    server.lengths, server.body = ["HEAD", "GET"], b""
    assert local_copy(server.url("/c")).read_bytes() == b""


def test_redirects_are_followed(server: Served) -> None:
    server.heads = 405
    assert local_copy(server.url("/moved")).read_bytes() == BODY


@pytest.mark.parametrize("status", [403, 405, 501])
def test_server_that_rejects_head(server: Served, status: int) -> None:
    server.heads = status
    copy = local_copy(server.url())
    assert copy.read_bytes() == BODY
    assert local_copy(server.url()) == copy


@pytest.mark.parametrize("status", [401, 404, 410])
def test_refusal_is_not_retried_and_names_the_status(server: Served, status: int) -> None:
    server.statuses = [status] * 9
    with pytest.raises(ValueError, match=rf"{re.escape(server.url())}: status {status} "):
        local_copy(server.url())
    assert server.asked == 2


def test_overloaded_server_is_retried(server: Served, capsys: pytest.CaptureFixture[str]) -> None:
    server.statuses = [503, 429]
    assert local_copy(server.url()).read_bytes() == BODY
    assert "weights.pth: status 503 Service Unavailable; retrying in 0 s" in capsys.readouterr().out
    server.statuses = [503] * 3
    with pytest.raises(ValueError, match=r"pth: status 503 Service Unavailable \(attempt 3 of 3\)"):
        local_copy(server.url())


def test_content_md5_is_verified(server: Served, cache: Path) -> None:
    def md5_of(body: bytes) -> str:
        return base64.b64encode(hashlib.md5(body).digest()).decode()

    server.headers["Content-MD5"] = md5_of(OTHER)
    with pytest.raises(ValueError, match=r"weights\.pth: MD5 mismatch: expected \S+, got \S+ "):
        local_copy(server.url())
    assert not [path for path in cache.rglob("*.p*") if path.is_file()]
    server.headers["Content-MD5"] = md5_of(BODY)
    assert local_copy(server.url()).read_bytes() == BODY


def test_damaged_partial_file_is_replaced(server: Served) -> None:
    server.headers["Content-MD5"] = base64.b64encode(hashlib.md5(BODY).digest()).decode()
    copy = local_copy(server.url())
    copy.unlink()
    Path(f"{copy}.partial").write_bytes(bytes(1000))
    assert local_copy(server.url()).read_bytes() == BODY
    assert server.gets == ["", "bytes=1000-", ""]


def test_newest_complete_copy_is_used_offline(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with Served() as served:
        thread = threading.Thread(target=served.serve_forever, args=(0.01,))
        thread.start()
        url = served.url()
        old = local_copy(url)
        served.become(OTHER, '"two"')
        new = local_copy(url)
        os.utime(old, (0, 0))
        served.shutdown()
        thread.join()
    capsys.readouterr()
    assert local_copy(url) == new
    message = capsys.readouterr().out.splitlines()[-1]
    assert f"{url}: cannot be reached" in message
    assert str(new) in message
    other = url.replace("weights", "other")
    with pytest.raises(ValueError, match=rf"{other}: cannot be reached .*refused.*, and no complete copy is in {cache}"):
        local_copy(other)


def test_full_disk_is_not_taken_for_a_network_error(server: Served, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(ValueError, match=r"weights\.pth: cannot write to the cache .*No space left.*PIXELCLIP_CACHE"):
        local_copy(server.url())
    assert server.gets == [""]


def downloading(url: str) -> subprocess.Popen[str]:
    code = "import sys; from pixelclip.storage.download import local_copy; print(local_copy(sys.argv[1]), flush=True)"
    return subprocess.Popen([sys.executable, "-c", code, url], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


def test_only_one_of_several_processes_downloads(server: Served) -> None:
    server.pause.clear()
    with downloading(server.url()) as first:
        assert wait_until(lambda: server.gets)
        with downloading(server.url()) as second:
            assert second.stdout is not None
            assert "waiting for another process" in second.stdout.readline()
            server.pause.set()
            path = second.communicate(timeout=20)[0].strip()
            assert first.communicate(timeout=20)[0].strip() == path
    assert Path(path).read_bytes() == BODY
    assert server.gets == [""]


def test_only_one_of_several_threads_downloads(server: Served) -> None:
    with ThreadPoolExecutor(8) as pool:
        copies = set(pool.map(local_copy, [server.url()] * 8))
    assert len(copies) == len(server.gets) == 1


def test_next_process_resumes_a_killed_download(server: Served, cache: Path) -> None:
    server.pause.clear()
    with downloading(server.url()) as process:
        assert wait_until(lambda: [path for path in unfinished(cache) if path.stat().st_size])
        process.kill()
    received = unfinished(cache)[0].stat().st_size
    server.pause.set()
    assert local_copy(server.url()).read_bytes() == BODY
    assert server.gets == ["", f"bytes={received}-"]


@pytest.mark.parametrize("key", ["sam.pth", "a b/grün #1?x=%2F.pth", "deep//er/.hidden"])
def test_s3_objects_are_downloaded_once(bucket: Any, monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    bucket.put_object(Bucket="data", Key=key, Body=BODY)
    copy = local_copy(f"s3://data/{key}")
    assert copy.name == key.rpartition("/")[2]
    assert copy.read_bytes() == BODY
    monkeypatch.setattr(s3, "download", None)
    assert local_copy(f"s3://data/{key}") == copy


def test_changed_s3_object_is_downloaded_again(bucket: Any) -> None:
    bucket.put_object(Bucket="data", Key="changing", Body=BODY)
    old = local_copy("s3://data/changing")
    bucket.put_object(Bucket="data", Key="changing", Body=OTHER)
    assert local_copy("s3://data/changing").read_bytes() == OTHER
    assert old.read_bytes() == BODY


def test_s3_object_of_several_parts(bucket: Any) -> None:
    part = os.urandom(5 << 20)
    upload = bucket.create_multipart_upload(Bucket="data", Key="parts")["UploadId"]
    named = {"Bucket": "data", "Key": "parts", "UploadId": upload}
    tags = [bucket.upload_part(**named, PartNumber=n, Body=body)["ETag"] for n, body in ((1, part), (2, b"end"))]
    bucket.complete_multipart_upload(
        **named, MultipartUpload={"Parts": [{"PartNumber": n, "ETag": tag} for n, tag in enumerate(tags, 1)]}
    )
    assert local_copy("s3://data/parts").read_bytes() == part + b"end"


def test_presigned_url(bucket: Any) -> None:
    bucket.put_object(Bucket="data", Key="signed.pth", Body=BODY)
    url = bucket.generate_presigned_url("get_object", Params={"Bucket": "data", "Key": "signed.pth"})
    copy = local_copy(url)
    assert (copy.name, copy.read_bytes()) == ("signed.pth", BODY)


def test_s3_errors_name_the_cause(bucket: Any, moto: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"s3://data/none: there is no such key in the bucket .*NoSuchKey, status 404"):
        local_copy("s3://data/none")
    with pytest.raises(ValueError, match=r"s3://nowhere/a: there is no such bucket .*NoSuchBucket"):
        local_copy("s3://nowhere/a")
    with pytest.raises(ValueError, match=r"s3://b!d/a: .*[Ii]nvalid bucket name"):
        local_copy("s3://b!d/a")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "not a url")
    with pytest.raises(ValueError, match=r"s3://data/a: Invalid endpoint"):
        local_copy("s3://data/a")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_ENDPOINT_URL", moto)
    with pytest.raises(ValueError, match=r"s3://data/a: Partial credentials .*"):
        local_copy("s3://data/a")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    with pytest.raises(ValueError, match="s3://data/a: Unable to locate credentials; set AWS_ACCESS_KEY_ID and"):
        local_copy("s3://data/a")


def test_invalid_s3_credentials(bucket: Any, moto: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def authenticate_after(requests: bytes) -> None:
        headers = {"Content-Type": "text/plain"}
        urlopen(Request(f"{moto}/moto-api/reset-auth", data=requests, headers=headers)).close()

    bucket.put_object(Bucket="data", Key="a", Body=BODY)
    people = boto3.client("iam")
    people.create_user(UserName="stranger")
    keys = people.create_access_key(UserName="stranger")["AccessKey"]
    people.close()
    authenticate_after(b"0")
    try:
        with pytest.raises(ValueError, match=r"s3://data/a: wrong credentials, see AWS_ACCESS_KEY_ID .*status 403"):
            local_copy("s3://data/a")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", keys["AccessKeyId"])
        with pytest.raises(ValueError, match=r"s3://data/a: wrong credentials, see AWS_SECRET_ACCESS_KEY "):
            local_copy("s3://data/a")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", keys["SecretAccessKey"])
        with pytest.raises(ValueError, match="s3://data/a: access denied, or no such key "):
            local_copy("s3://data/a")
    finally:
        authenticate_after(b"inf")


def test_missing_boto3_names_the_extra(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "boto3.session", None)
    with pytest.raises(ValueError, match=r"s3://data/a: boto3 is missing; pip install 'pixelclip\[s3\]'"):
        local_copy("s3://data/a")


def test_s3_download_is_retried_pinned_to_its_version_and_served_offline(
    server: Served, account: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.url(""))
    server.cuts = [100_000, 200_000]
    assert local_copy("s3://data/a").read_bytes() == BODY
    assert server.wanted == ['"one"'] * 3
    server.become(BODY, '"two"')
    server.gets, server.cuts = [], [100_000]
    server.before_get = lambda: server.become(OTHER, '"three"') if len(server.gets) == 2 else None
    with pytest.raises(ValueError, match="s3://data/a: changed in the store during the download; try again"):
        local_copy("s3://data/a")
    copy = local_copy("s3://data/a")
    assert copy.read_bytes() == OTHER
    assert [path.name for path in copy.parent.iterdir()] == ["a"]
    server.become(BODY, '"four"')
    server.cuts = [1000] * 9
    with pytest.raises(ValueError, match=r"s3://data/a: connection lost at every attempt \(.*\); try again"):
        local_copy("s3://data/a")
    with socket.create_server(("127.0.0.1", 0)) as unused:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{unused.getsockname()[1]}")
    capsys.readouterr()
    assert local_copy("s3://data/a") == copy
    assert "s3://data/a: Could not connect to the endpoint" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"s3://data/b: Could not connect to the endpoint .*, and no complete copy is in"):
        local_copy("s3://data/b")


def test_s3_etag_is_an_md5_only_of_plain_objects(
    server: Served, account: None, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.url(""))
    server.headers = {"ETag": f'"{hashlib.md5(OTHER).hexdigest()}"', "x-amz-server-side-encryption": "AES256"}
    with pytest.raises(ValueError, match=r"s3://data/a: MD5 mismatch: expected \w+, got \w+"):
        local_copy("s3://data/a")
    server.headers["x-amz-server-side-encryption"] = "aws:kms"
    assert local_copy("s3://data/a").read_bytes() == BODY
    assert local_copy(server.url()).read_bytes() == BODY
