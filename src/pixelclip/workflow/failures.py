"""Which failures may pass when a step is repeated: those of a network. Bad input never does."""

import os
from collections.abc import Iterator
from contextlib import suppress

from pixelclip.storage.urls import scrubbed

BAD_INPUT = 2
"""Exit code after an error in the input, the settings or the environment."""
MAY_PASS = 75
"""Exit code after a failure that may pass, as in sysexits.h (EX_TEMPFAIL)."""
FAILURE_FILE = "PIXELCLIP_FAILURE_FILE"
"""Environment variable with a file for the exit code and message of a failure, for a parent that would otherwise restart."""
_NETWORK = {
    "builtins.ConnectionError",
    "builtins.TimeoutError",
    "socket.gaierror",
    "http.client.HTTPException",
    "urllib3.exceptions.MaxRetryError",
    "urllib3.exceptions.ProtocolError",
    "urllib3.exceptions.TimeoutError",
    "requests.exceptions.ChunkedEncodingError",
    "requests.exceptions.ConnectionError",
    "requests.exceptions.Timeout",
    "botocore.exceptions.ConnectionError",
    "botocore.exceptions.HTTPClientError",
    "boto3.exceptions.RetriesExceededError",
    "s3transfer.exceptions.RetriesExceededError",
}
_WORDS_OF_GIT = (
    "connection refused",
    "connection reset",
    "connection timed out",
    "could not resolve host",
    "temporary failure in name resolution",
)
_TOO_MANY_REQUESTS = 429


def may_pass(error: BaseException) -> bool:
    """Return whether the cause of an error may pass: a network fault, a server's 5xx or 429, or an error that says so.

    An error says so by an attribute `may_pass`. Errors that were replaced by a message (`raise ... from None`) count.
    """
    return any(getattr(each, "may_pass", False) or _is_network(each) or _is_overload(each) for each in _chain(error))


def exit_code(error: BaseException) -> int:
    """Return the exit code of a process that ends with this error."""
    if may_pass(error):
        return MAY_PASS
    return BAD_INPUT if isinstance(error, ValueError | OSError) else 1


def first_line(error: BaseException, *urls: str) -> str:
    """Return the first line of an error's message without secrets (see `scrubbed`), or the error's type if there is none."""
    return scrubbed((str(error).strip().splitlines() or [type(error).__name__])[0], *urls)


def report(error: BaseException, message: str) -> None:
    """Write exit code and message to the file of FAILURE_FILE, if it is set and no other process has."""
    if path := os.environ.get(FAILURE_FILE):
        with suppress(OSError), open(path, "x") as file:  # noqa: PTH123  (mode x: only the first process writes)
            file.write(f"{exit_code(error)} {message}")


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _is_network(error: BaseException) -> bool:
    if any(words in str(error).lower() for words in _WORDS_OF_GIT):
        return True
    # By name, so that nothing is imported only to be compared with.
    return any(f"{kind.__module__}.{kind.__qualname__}" in _NETWORK for kind in type(error).__mro__)


def _is_overload(error: BaseException) -> bool:
    if getattr(error, "error_code", None) == "TEMPORARILY_UNAVAILABLE":  # MLflow
        return True
    answer = getattr(error, "response", None)  # of requests, or a dictionary of botocore
    metadata = answer.get("ResponseMetadata", {}) if isinstance(answer, dict) else {}
    statuses = (getattr(error, "status", None), getattr(error, "code", None), getattr(answer, "status_code", None))
    found = (*statuses, metadata.get("HTTPStatusCode"))
    return any(isinstance(status, int) and (status >= 500 or status == _TOO_MANY_REQUESTS) for status in found)
