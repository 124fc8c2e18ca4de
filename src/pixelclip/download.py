"""Local copies of what a URI names: resumed, verified, cached and shared by processes."""

import base64
import os
import re
import shutil
import string
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from http.client import HTTPException, InvalidURL
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import quote, unquote
from urllib.request import Request, urlopen

from tqdm import tqdm

from pixelclip import cache, s3
from pixelclip.storage import file_md5

_WAITS = (1.0, 2.0, 4.0, 8.0)  # seconds before each further attempt at a download
_CONNECTIONS = 8  # objects of a folder at once
_CHUNK = 1 << 16  # bytes; also the most that a broken connection loses


def local_copy(uri: str) -> Path:
    """Gives a local path for what `uri` names: a local path as it is, anything else downloaded once.

    Downloads stay in PIXELCLIP_CACHE or `~/.cache/pixelclip`, which processes share, by uri and version (ETag, or
    Last-Modified and length). One that stopped halfway is continued. Without a connection the newest finished copy serves.

    Args:
        uri: a file or folder, `http://...`, `https://...`, or `s3://bucket/key` (with the usual AWS variables), which may be
            a folder too: everything below the key is copied.

    Raises:
        ValueError: there is no such file, it may not be read, boto3 is missing, or the download broke off every time.
    """
    scheme, separator, rest = uri.partition("://")
    if not separator:
        if not Path(uri).exists():
            raise ValueError(f"{uri}: no such file or folder")
        return Path(uri)
    opened = {"http": _http, "https": _http, "s3": _s3}.get(scheme.lower())
    if opened is None or rest.startswith("/") or not rest:
        raise ValueError(f"{uri}: a local path, http://host/file, https://host/file or s3://bucket/key is expected")
    try:
        if opened is _s3 and s3.split(uri)[1][-1:] in ("", "/"):
            raise _NoSuchKeyError(f"{uri}: there is nothing below it")
        with opened(uri) as ask:
            copy = _fetch(uri, ask, cache.home(uri), _file_name(uri))
    except _NoSuchKeyError:
        listed = s3.list_below(uri)
        if not listed:
            raise
        copy = _fetch_folder(uri, listed)
    cache.touch(copy)
    return copy


def here(path: Path | str) -> Path:
    """A local path as it is, even if nothing is there; of what a URI names the local copy, see `local_copy`."""
    return local_copy(str(path)) if "://" in str(path) else Path(path)


class _NoSuchKeyError(ValueError):
    """S3 has no object of that key; there may be some below it."""


class _TransferError(Exception):
    """What another attempt may cure; `reached` where a server answered."""

    def __init__(self, reason: object, reached: bool = True) -> None:
        super().__init__(str(reason) or type(reason).__name__)
        self.reached = reached


class _ChangedError(_TransferError):
    """What is there now is another version than the one that is asked for."""


@dataclass(frozen=True)
class _Reply:
    """A server's answer to HEAD or GET."""

    status: int
    headers: dict[str, str]  # names in lower case
    body: Any  # read(bytes) and close(), or None
    errors: tuple[type[Exception], ...]  # of `body`

    @property
    def size(self) -> int | None:
        """Bytes of the whole file."""
        part = self.headers.get("content-range", "").rpartition("/")[2]
        given = part if self.status == 206 else self.headers.get("content-length", "")
        return int(given) if given.isdecimal() else None

    @property
    def first(self) -> int | None:
        """The byte of the file that the body starts with."""
        found = re.match(r"bytes (\d+)-", self.headers.get("content-range", ""))
        return (int(found[1]) if found else None) if self.status == 206 else 0

    @property
    def version(self) -> str:
        """What changes with the file; empty where the server tells nothing."""
        modified = self.headers.get("last-modified")
        return self.headers.get("etag") or (f"{modified} {self.size}" if modified else "")

    @property
    def validator(self) -> str:
        """What If-Range takes, which is no weak ETag; empty where a download cannot be continued."""
        etag = self.headers.get("etag", "")
        return etag if etag and not etag.startswith("W/") else self.headers.get("last-modified", "")

    def differs(self, other: "_Reply") -> bool:
        """Whether both are surely not about the same bytes; servers may leave headers out of either."""
        sizes = {self.size, other.size} - {None}
        pairs = [(self.headers.get(name), other.headers.get(name)) for name in ("etag", "last-modified")]
        mine, theirs = next((pair for pair in pairs if all(pair)), (None, None))
        return len(sizes) > 1 or mine != theirs

    def read(self, count: int) -> bytes:
        try:
            return self.body.read(count)
        except self.errors as error:
            raise _TransferError(error) from None

    def close(self) -> None:
        if self.body is not None:
            self.body.close()


_Ask = Callable[[str, int, str], _Reply]  # method, first byte, validator that the file must still have


def _fetch(uri: str, ask: _Ask, folder: Path, name: str) -> Path:
    head = path = None
    for wait in (*_WAITS, None):
        try:
            head = _head(ask)
            path = folder / cache.key(head.version) / name
            if not (head.version and path.is_file()):
                with cache.locked(uri):
                    if not (head.version and path.is_file()):  # another process may have brought it
                        _download(uri, ask, head, path)
                        cache.trim(path)
            return path
        except _TransferError as error:
            failure = error
        except OSError as error:
            raise _unkept(uri, error) from None
        if head is None and not failure.reached and (copy := _newest(folder, name)):
            print(f"{uri}: cannot be reached ({failure}); the copy in the cache is used: {copy}", flush=True)
            return copy
        if wait is not None:
            print(f"{uri}: {failure}; again in {wait:g} s", flush=True)
            time.sleep(wait)
    if head is None or path is None:
        missing = "" if failure.reached else f", and no finished copy is in {folder.parent}"
        raise ValueError(f"{uri}: asked {len(_WAITS) + 1} times: {failure}{missing}")
    arrived = _partial(path).stat().st_size if _partial(path).is_file() else 0
    size = "an unknown number of" if head.size is None else f"{head.size:,}"
    then = "continues" if head.validator else "starts again"
    raise ValueError(f"{uri}: {arrived:,} of {size} bytes arrived ({failure}); the same command {then}")


def _fetch_folder(uri: str, listed: list[s3.Listed]) -> Path:
    """Brings all objects below a prefix; those of an interrupted call that are whole are not asked for again."""
    bucket, prefix = s3.split(uri.rstrip("/") + "/")
    names = [s3.split(one.uri)[1].removeprefix(prefix) for one in listed]
    if bad := [name for name in names if {"", ".", ".."} & set(name.split("/"))]:
        raise ValueError(f"{uri}: cannot be a folder here, it holds the key {prefix}{bad[0]}")
    version = cache.key(" ".join(f"{one.uri} {one.etag}" for one in listed))
    folder = cache.home(uri) / version / (_file_name(uri.rstrip("/")) if prefix else bucket)
    partial, halves = _partial(folder), folder.with_name(f"{folder.name}.halves.partial")
    if folder.is_dir():
        return folder
    with cache.locked(uri), s3.connected(uri, attempts=1) as client, ThreadPoolExecutor(_CONNECTIONS) as pool:
        if folder.is_dir():  # another process brought it
            return folder
        shutil.rmtree(halves, ignore_errors=True)  # of an interrupted call
        halves.mkdir(parents=True)
        bar = tqdm(total=sum(one.size for one in listed), desc=folder.name, unit="B", unit_scale=True, unit_divisor=1024)

        def bring(number: int) -> None:
            one, path = listed[number], partial / names[number]
            if path.is_file() and path.stat().st_size == one.size:
                bar.update(one.size)
                return
            path.parent.mkdir(parents=True, exist_ok=True)
            _bring(one, _ask_s3(client, one.uri), halves / str(number), bar).replace(path)

        with bar:
            work = [pool.submit(bring, number) for number in range(len(listed))]
            try:
                for done in work:
                    done.result()
            except OSError as error:
                raise _unkept(uri, error) from None
            finally:
                pool.shutdown(cancel_futures=True)
        shutil.rmtree(halves)
        partial.replace(folder)
    cache.trim(folder)
    return folder


def _bring(one: s3.Listed, ask: _Ask, half: Path, bar: "tqdm[Any]") -> Path:
    """Brings one object of a folder to `half`, of the very version that was listed."""
    listed = _Reply(200, {"etag": f'"{one.etag}"', "content-length": str(one.size)}, None, ())
    arrived = 0
    for wait in (*_WAITS, None):
        try:
            if arrived == 0 or arrived != one.size:
                _receive(ask, listed, half, arrived, bar)
            return half
        except _ChangedError:
            raise ValueError(f"{one.uri}: changed in the store since its folder was listed; try again") from None
        except _TransferError as error:
            failure = error
        arrived = half.stat().st_size if half.is_file() else 0
        if wait is not None:
            print(f"{one.uri}: {failure}; again in {wait:g} s", flush=True)
            time.sleep(wait)
    raise ValueError(f"{one.uri}: {arrived:,} of {one.size:,} bytes arrived ({failure}); the same command continues")


def _unkept(uri: str, error: OSError) -> ValueError:
    return ValueError(f"{uri}: cannot be kept ({error}); PIXELCLIP_CACHE names another folder")


def _head(ask: _Ask) -> _Reply:
    try:
        reply = ask("HEAD", 0, "")
    except ValueError:  # signed URLs allow only GET, and S3 tells the reason of a refusal only there
        reply = ask("GET", 0, "")
    reply.close()
    return reply


def _download(uri: str, ask: _Ask, head: _Reply, path: Path) -> None:
    for other in path.parent.parent.iterdir():  # what is left of versions that changed before they were finished
        if other.is_dir() and other != path.parent and not (other / path.name).exists():
            shutil.rmtree(other)
    path.parent.mkdir(exist_ok=True)
    partial = _partial(path)
    there = partial.stat().st_size if partial.is_file() else 0
    start = there if head.validator and head.size is not None and there <= head.size else 0
    if start == 0 or start != head.size:
        with tqdm(total=head.size, initial=start, desc=path.name, unit="B", unit_scale=True, unit_divisor=1024) as bar:
            _receive(ask, head, partial, start, bar)
    promised = _promised_md5(uri, head.headers)
    if promised and (found := file_md5(partial)) != promised:
        partial.unlink()
        raise _TransferError(f"md5 {found} arrived, {promised} was promised")
    partial.replace(path)


def _receive(ask: _Ask, head: _Reply, partial: Path, start: int, bar: "tqdm[Any]") -> None:
    with closing(ask("GET", start, head.validator)) as reply:
        if reply.differs(head):
            raise _ChangedError("the file changed on the server")
        if reply.first not in (0, start):
            raise _TransferError(f"byte {start:,} was asked for, {reply.headers.get('content-range')} arrived")
        bar.update(reply.first - start)  # back to nothing where the server does not continue
        size = head.size if reply.size is None else reply.size
        with partial.open("ab" if reply.first else "wb") as file:
            while chunk := reply.read(_CHUNK):
                file.write(chunk)
                bar.update(len(chunk))
            file.flush()
            os.fsync(file.fileno())
            if size not in (None, file.tell()):
                raise _TransferError("the connection broke off")


def _promised_md5(uri: str, headers: dict[str, str]) -> str | None:
    try:
        content = base64.b64decode(headers.get("content-md5", ""), validate=True)
    except ValueError:
        content = b""
    if len(content) == 16:
        return content.hex()
    # S3's ETag is no MD5 after multipart uploads (it has a dash), under a key of one's own, and in directory buckets.
    encrypted = {value for name, value in headers.items() if name.startswith("x-amz-server-side-encryption")} - {"AES256"}
    plain = re.match(r"s3://(?![^/]*--x-s3/)", uri, re.IGNORECASE) and not encrypted
    found = re.fullmatch(r'"?([0-9a-f]{32})"?', headers.get("etag", ""))
    return found[1] if plain and found else None


@contextmanager
def _http(uri: str) -> Iterator[_Ask]:
    errors = (OSError, HTTPException)

    def ask(method: str, start: int, validator: str) -> _Reply:
        headers = {"User-Agent": "pixelclip"} | ({"Range": f"bytes={start}-", "If-Range": validator} if start else {})
        try:
            answer = urlopen(Request(quote(uri, string.punctuation), headers=headers, method=method), timeout=s3.TIMEOUT)
        except HTTPError as error:
            error.close()
            raise _refusal(uri, error.code, f"status {error.code} {error.reason}".splitlines()[0]) from None
        except (InvalidURL, ValueError) as error:
            raise ValueError(f"{uri}: {error}") from None
        except URLError as error:
            raise _TransferError(error.reason, reached=False) from None
        except errors as error:
            raise _TransferError(error) from None
        return _Reply(answer.status, {name.lower(): value for name, value in answer.headers.items()}, answer, errors)

    yield ask


@contextmanager
def _s3(uri: str) -> Iterator[_Ask]:
    with s3.connected(uri, attempts=1) as client:
        yield _ask_s3(client, uri)


def _ask_s3(client: Any, uri: str) -> _Ask:
    from botocore import exceptions as boto

    bucket, key = s3.split(uri)

    def ask(method: str, start: int, validator: str) -> _Reply:
        call = client.head_object if method == "HEAD" else client.get_object
        try:
            only = {"IfMatch": validator} if validator else {}
            answer = call(Bucket=bucket, Key=key, **only, **({"Range": f"bytes={start}-"} if start else {}))
        except boto.ClientError as error:
            status, code = error.response["ResponseMetadata"]["HTTPStatusCode"], error.response["Error"].get("Code", "")
            reason = s3.refusal(error.response, client.meta.endpoint_url)
            if code == "NoSuchKey":
                raise _NoSuchKeyError(f"{uri}: {reason}") from None
            raise _refusal(uri, 503 if code == "RequestTimeout" else status, reason) from None
        except (boto.ConnectionError, boto.HTTPClientError) as error:
            raise _TransferError(error, reached=not isinstance(error, boto.ConnectionError)) from None
        about = answer["ResponseMetadata"]
        return _Reply(about["HTTPStatusCode"], about["HTTPHeaders"], answer.get("Body"), (boto.BotoCoreError, OSError))

    return ask


def _refusal(uri: str, status: int, reason: str) -> Exception:
    if status == 412:
        return _ChangedError(reason)
    if status in (408, 425, 429) or (status >= 500 and status != 501):  # 501: a method that will not come
        return _TransferError(reason)
    return ValueError(f"{uri}: {reason}")


def _file_name(uri: str) -> str:
    """The last part of a URI's path, as a name that every file system takes."""
    scheme, _, rest = uri.partition("://")
    path = rest.partition("/")[2]
    if scheme.lower() != "s3":
        path = unquote(re.split(r"[?#]", path)[0])
    name = path.rstrip("/").rpartition("/")[2].replace("\0", "")
    return os.fsdecode(os.fsencode(name)[-200:]) if name not in ("", ".", "..") else "file"


def _partial(path: Path) -> Path:
    return path.with_name(f"{path.name}.partial")


def _newest(folder: Path, name: str) -> Path | None:
    copies = [path for path in folder.glob("*/*") if path.name == name and path.is_file()]
    return max(copies, key=lambda path: path.stat().st_mtime, default=None)
