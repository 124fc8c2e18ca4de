"""Use the Hugging Face hub, or only its cache if the hub cannot be reached."""

from collections.abc import Iterator
from contextlib import contextmanager
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from huggingface_hub import constants

_SECONDS = 5.0  # time limit of the test whether the hub can be reached


@contextmanager
def cached_or_online(needed: bool = True) -> Iterator[str]:
    """Let the hub's client use only its cache if the hub cannot be reached; online, it would retry for a minute.

    Args:
        needed: False skips the test.

    Yields:
        Why the hub cannot be reached; empty if it can, or if the user has chosen to work offline.
    """
    unreachable = _unreachable() if needed and not constants.HF_HUB_OFFLINE else ""
    before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE or bool(unreachable)
    try:
        yield unreachable
    finally:
        constants.HF_HUB_OFFLINE = before


def _unreachable() -> str:
    """Return why the Hugging Face hub cannot be reached; empty if it answers."""
    try:
        urlopen(Request(constants.ENDPOINT, method="HEAD"), timeout=_SECONDS).close()
    except HTTPError as error:
        error.close()  # an answer
    except (OSError, ValueError) as error:
        return f"{constants.ENDPOINT} cannot be reached: {getattr(error, 'reason', error)}"
    return ""
