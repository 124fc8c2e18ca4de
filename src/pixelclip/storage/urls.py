"""URLs without secrets, for everything that is written or printed."""

import re
from collections.abc import Mapping
from typing import Any, TypeVar
from urllib.parse import unquote

_T = TypeVar("_T")
_SCHEME = r"[A-Za-z][A-Za-z0-9+.-]*"
_HOST_AND_PORT = re.compile(r"(localhost|[^:]*\.[^:]*|\[.*\]):\d{0,5}")


def public_url(text: str) -> str:
    """Return a URL, also one behind a prefix (`NAME:https://...`), without its secrets; any other text is unchanged.

    User, password or token are removed, and so are the query and the fragment, where signatures and tokens are. Keys of `s3://`
    and paths of `file://` may contain `?` and `#`, and keep them. A password may contain `@` and `/` as they are: in doubt
    too much is removed, except that `a.user:123/secret@host` looks like a host with its port and stays.
    """
    start, separator, rest = text.partition("://")
    scheme = re.search(f"{_SCHEME}$", start)
    if not separator or not scheme:
        return text
    while (shorter := _without_login(rest)) != rest:  # what is left may look like a login again
        rest = shorter
    if scheme[0].lower() not in ("s3", "file"):
        rest = re.split(r"[?#]", rest, maxsplit=1)[0]
    return f"{start}://{public_url(rest)}"


def _without_login(rest: str) -> str:
    """Remove user and password from a URL without its scheme."""
    authority = re.split(r"[/?#]", rest, maxsplit=1)[0]
    user, at, _ = authority.partition("@")
    if at and ":" not in user:
        return rest[authority.rindex("@") + 1 :]
    if not at and (":" not in authority or _HOST_AND_PORT.fullmatch(authority)):
        return rest
    return rest.rpartition("@")[2]  # a password, which may contain `@` and `/`


def has_secret(url: str) -> bool:
    """Return whether a URL may contain a password, token or signature; the user in an ssh:// URL is none of them."""
    return public_url(url) != re.sub(r"(?<=ssh://)[^/@:]*@", "", url)


def public(document: _T) -> _T:
    """Apply `public_url` to all texts in a JSON document."""
    cleaned: Any = document
    if isinstance(document, str):
        cleaned = public_url(document)
    elif isinstance(document, Mapping):
        cleaned = {key: public(value) for key, value in document.items()}
    elif isinstance(document, list | tuple):
        cleaned = [public(value) for value in document]
    return cleaned


def scrubbed(text: str, *urls: str) -> str:
    """Remove secrets from a text, such as an error message of a library.

    Args:
        text: may contain URLs, each up to the next white space.
        urls: URLs whose secrets may also occur in parts, as in "invalid port: 'pass'".
    """
    for url in filter(has_secret, urls):
        text = text.replace(url, public_url(url))
        for part in _secret_parts(url):
            text = re.sub(rf"(?<![A-Za-z0-9]){re.escape(part)}(?![A-Za-z0-9])", "***", text)
    text = re.sub(r"\b(https?:/)(?=[^/\s])", r"\1/", text)  # a URL that was taken for a path
    return re.sub(rf"{_SCHEME}://\S+", lambda found: public_url(found[0]), text)


def _secret_parts(url: str) -> list[str]:
    """Return the parts of the secrets of a URL between its delimiters, the longest first."""
    rest, kept = (each.partition("://")[2] for each in (url, public_url(url)))
    login, _, query = rest.partition(kept) if kept else (rest, "", "")
    user, colon, password = login.rpartition("@")[0].partition(":")
    values = [pair.partition("=")[2] or pair for pair in re.split("[?#&]", query)]
    parts = [*re.split("[@/:?#]", password if colon else user), *values]
    return sorted({*parts, *map(unquote, parts)} - {""}, key=len, reverse=True)
