"""Local copies of URIs: verified, cached and shared between processes. Large http(s) downloads resume."""

import base64
import os
import re
import shutil
import string
import time
from collections.abc import Callable
from email.message import Message
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import quote, unquote
from urllib.request import Request, urlopen

from pixelclip.storage import cache, s3
from pixelclip.storage.files import file_md5
from pixelclip.storage.progress import count
from pixelclip.storage.urls import public_url, scrubbed

_WAITS = (1.0, 2.0, 4.0, 8.0)  # seconds before each retry of an http(s) request
_CHUNK = 1 << 16  # bytes; the most that a failed connection costs


def local_copy(uri: str) -> Path:
    """Return the local copy of a URI, downloaded once; an existing local path is returned unchanged.

    Downloads are cached by URI and version (ETag, or Last-Modified and length). Without a connection the newest complete
    copy is used.

    Args:
        uri: a local path, `http://...`, `https://...`, or `s3://bucket/key` (with the usual AWS variables). The key may name
            a folder: all objects below it are copied.

    Raises:
        ValueError: the file does not exist or is not readable, boto3 is missing, or every attempt failed.
    """
    scheme, separator, rest = uri.partition("://")
    if not separator:
        if not Path(uri).exists():
            raise ValueError(f"{uri}: no such file or folder")
        return Path(uri)
    fetch = {"http": _from_http, "https": _from_http, "s3": _from_s3}.get(scheme.lower())
    if fetch is None or rest.startswith("/") or not rest:
        raise ValueError(f"{public_url(uri)}: expected a local path, http://host/file, https://host/file or s3://bucket/key")
    name = _file_name(uri)
    try:
        copy = fetch(uri, name)
    except s3.UnreachableError as error:
        copies = [path for path in cache.folder_of(uri).glob("*/*") if path.name == name]
        if not copies:
            raise ValueError(f"{error}, and no complete copy is in {cache.root()}") from None
        copy = max(copies, key=lambda path: path.stat().st_mtime)
        print(f"{error}; using the cached copy {copy}", flush=True)
    cache.touch(copy)
    return copy


def check_exists(uri: str) -> None:
    """Check that a local path or URI exists, without downloading it.

    Raises:
        ValueError: it does not, or its store rejects the request or cannot be reached.
    """
    if s3.is_s3(uri):
        s3.check_exists(uri)
    elif uri.lower().startswith(("http://", "https://")):
        _retry(uri, lambda: _head(uri))
    else:
        local_copy(uri)  # a local path is not copied


def local_path(path: Path | str) -> Path:
    """Return the local copy of a URI; a local path is returned unchanged, even if it does not exist."""
    return local_copy(str(path)) if "://" in str(path) else Path(path)


def _file_name(uri: str) -> str:
    """Return the last part of a URI's path as a name that every file system accepts."""
    host, _, path = uri.partition("://")[2].partition("/")
    path = path.rstrip("/") or host if s3.is_s3(uri) else unquote(re.split(r"[?#]", path)[0])
    name = path.rstrip("/").rpartition("/")[2].replace("\0", "")
    return os.fsdecode(os.fsencode(name)[-200:]) if name not in ("", ".", "..") else "file"


def _cached(uri: str, version: str, name: str, fetch: Callable[[Path], None]) -> Path:
    """Return the cached copy of one version; if there is none, let one process at a time fetch it.

    Args:
        uri: the URI.
        version: changes with the content; empty if unknown, which fetches the copy every time.
        name: file or folder name of the copy.
        fetch: writes the content to a path; a failed attempt may leave a part there to resume.
    """
    path = cache.folder_of(uri) / cache.short_hash(version) / name
    partial = path.with_name(f"{name}.partial")
    try:
        if version and path.exists():
            return path
        with cache.locked(uri):
            if version and path.exists():  # another process fetched it
                return path
            for entry in cache.folder_of(uri).glob("*/*"):
                if entry.name != name and entry != partial:  # left by an interrupted download
                    shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
            path.parent.mkdir(exist_ok=True)
            fetch(partial)
            partial.replace(path)
            cache.trim(path)
    except OSError as error:
        reason = f"cannot write to the cache ({error}); set PIXELCLIP_CACHE to another folder"
        raise ValueError(f"{public_url(uri)}: {reason}") from None
    return path


def _from_s3(uri: str, name: str) -> Path:
    try:
        if s3.split(uri)[1][-1:] in ("", "/"):
            raise s3.MissingError(f"{uri}: no object below this prefix")
        found = s3.current_version(uri)
    except s3.MissingError:
        if not (listed := s3.list_below(uri)):
            raise
        return _from_prefix(uri, listed, name)

    def fetch(path: Path) -> None:
        s3.download(uri, {path: found})
        s3.check_content(path, found)

    return _cached(uri, f'"{found.etag}"', name, fetch)


def _from_prefix(uri: str, listed: list[s3.Listed], name: str) -> Path:
    """Return a folder with all objects below a prefix; complete files of an interrupted call are not downloaded again."""
    bucket, prefix = s3.split(uri.rstrip("/") + "/")
    names = [one.uri.removeprefix(f"s3://{bucket}/{prefix}") for one in listed]
    s3.check_names(uri, names, "cannot be copied to a folder: it contains the key")

    def fetch(folder: Path) -> None:
        wanted = {folder / name: one for name, one in zip(names, listed, strict=True)}
        for path in [path for path in folder.rglob("*") if path.is_file() and path not in wanted]:
            path.unlink()  # incomplete
        s3.download(uri, {path: one for path, one in wanted.items() if not path.is_file() or path.stat().st_size != one.size})
        for path, one in wanted.items():  # also those of an interrupted call, which ended before the check
            s3.check_content(path, one)

    return _cached(uri, " ".join(f"{one.uri} {one.etag}" for one in listed), name, fetch)


class _TransferError(Exception):
    """A failure worth a retry; its cause is a URLError if the server cannot be reached."""


def _from_http(uri: str, name: str) -> Path:
    head = _retry(uri, lambda: _head(uri))
    modified = head["Last-Modified"]
    version = head["ETag"] or (f"{modified} {head['Content-Length']}" if modified else "")
    return _cached(uri, version, name, lambda path: _retry(uri, lambda: _receive(uri, head, path)))


def _retry(uri: str, attempt: Callable[[], Any]) -> Any:
    for wait in (*_WAITS, None):
        try:
            return attempt()
        except _TransferError as error:
            if wait is None:
                kind = s3.UnreachableError if isinstance(error.__cause__, URLError) else ValueError
                raise kind(f"{public_url(uri)}: {error} (attempt {len(_WAITS) + 1} of {len(_WAITS) + 1})") from None
            print(f"{public_url(uri)}: {error}; retrying in {wait:g} s", flush=True)
            time.sleep(wait)


def _request(uri: str, method: str, headers: dict[str, str] | None = None) -> Any:
    if not uri.startswith(public_url(uri)):  # urllib would take them for a part of the host
        raise ValueError(f"{public_url(uri)}: a URL with user and password is not supported; use a signed URL, or s3://")
    headers = {"User-Agent": "pixelclip"} | (headers or {})
    try:
        return urlopen(Request(quote(uri, string.punctuation), headers=headers, method=method), timeout=30)
    except HTTPError as error:
        error.close()
        reason = f"status {error.code} {error.reason}".splitlines()[0]
        if error.code in (408, 425, 429) or (error.code >= 500 and error.code != 501):  # 501: unknown method
            raise _TransferError(reason) from None
        raise ValueError(f"{public_url(uri)}: {reason}") from None
    except URLError as error:
        raise _TransferError(f"cannot be reached ({error.reason})") from error
    except ValueError as error:  # includes http.client.InvalidURL
        raise ValueError(f"{public_url(uri)}: {scrubbed(str(error))}") from None
    except (OSError, HTTPException) as error:
        raise _TransferError(str(error) or type(error).__name__) from None


def _head(uri: str) -> Message:
    try:
        reply = _request(uri, "HEAD")
    except ValueError:  # signed URLs allow only GET
        reply = _request(uri, "GET")
    reply.close()
    return reply.headers


def _receive(uri: str, head: Message, path: Path) -> None:
    """Download the version with the headers `head`; resume the part at `path` if the server can compare versions."""
    etag, size = head["ETag"] or "", int(head["Content-Length"] or -1)
    validator = head["Last-Modified"] if etag.startswith("W/") else etag or head["Last-Modified"]  # If-Range takes no weak ETag
    start = path.stat().st_size if path.is_file() and validator else 0
    headers = {"Range": f"bytes={start}-", "If-Range": validator} if 0 < start < size else {}
    with _request(uri, "GET", headers) as reply:
        name = "ETag" if etag else "Last-Modified"
        if head[name] and reply.headers[name] not in (None, head[name]):
            raise ValueError(f"{public_url(uri)}: changed on the server during the download; try again")
        resumed = reply.status == 206
        if resumed and not str(reply.headers["Content-Range"]).startswith(f"bytes {start}-"):
            raise _TransferError(f"expected bytes from {start:,}, got {reply.headers['Content-Range']}")
        with path.open("ab" if resumed else "wb") as file:
            if reply.headers["Content-Length"]:
                announced, size = size, file.tell() + int(reply.headers["Content-Length"])
                if 0 < announced != size:  # a proxy has cut or extended the answer
                    raise _TransferError(f"expected {announced:,} bytes, the answer has {size:,}")
            with count(max(size, 0) or None, public_url(uri), "B", file.tell()) as bar:
                while chunk := _read(reply):
                    bar.update(file.write(chunk))
            file.flush()
            os.fsync(file.fileno())
            if size not in (-1, file.tell()):
                raise _TransferError(f"connection lost after {file.tell():,} of {size:,} bytes")
    expected = head["Content-MD5"]
    if expected and expected != (md5 := base64.b64encode(bytes.fromhex(file_md5(path))).decode()):
        path.unlink()
        raise _TransferError(f"MD5 mismatch: expected {expected}, got {md5}")


def _read(reply: Any) -> bytes:
    try:
        return bytes(reply.read(_CHUNK))
    except (OSError, HTTPException) as error:
        raise _TransferError(f"connection lost ({error or type(error).__name__})") from None
