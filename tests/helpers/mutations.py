"""Damage files at random and count what reading them gives."""

import re
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

import numpy as np

_NUMBER = re.compile(rb"-?\d+(\.\d+)?")
_NUMBERS = [b"0", b"-1", b"1", b"3", b"255", b"65536", b"1000000000000", b"9" * 400, b"1.5", b"1e999", b"NaN", b"true", b"null"]
_SECONDS = 20.0  # a trial that takes longer hangs
SURVIVED = ("right result", "clean error", "other content")
"""Outcomes that are no fault; the others are `silently different`, and crashes with their error."""


@dataclass
class Kind:
    """A kind of file.

    Args:
        data: a valid file.
        read: read a file as the product does.
        truth: what an independent reader finds in a file. If `read` finds the same in a damaged one, the damage has made it a
            valid file with other content. None for files with checksums, where this cannot happen.
    """

    data: bytes
    read: Callable[[bytes], Any]
    truth: Callable[[bytes], Any] | None = None


class HangError(BaseException):
    """A trial took too long."""


def count_outcomes(kind: Kind, trials: int, seed: int = 0) -> Counter[str]:
    """Read damaged versions of a file and count the outcomes."""
    random, right, outcomes = np.random.default_rng(seed), kind.read(kind.data), Counter[str]()
    assert kind.truth is None or kind.truth(kind.data) == right
    for _ in range(trials):
        outcomes[_outcome(kind, right, mutate(kind.data, random))] += 1
    return outcomes


def _outcome(kind: Kind, right: Any, data: bytes) -> str:
    try:
        with _limited():
            found = kind.read(data)
    except ValueError as error:
        lines = str(error).splitlines()  # several wrong settings are one line each
        if type(error) is ValueError and max(map(len, lines)) < 1000:
            return "clean error"
        return f"crash: {type(error).__name__}: {lines[0][:200]}"
    except (Exception, HangError) as error:
        return f"crash: {type(error).__name__}: {str(error)[:200]}"
    if found == right:
        return "right result"
    try:
        same = kind.truth is not None and kind.truth(data) == found
    except Exception:  # the independent reader finds no valid file
        same = False
    return "other content" if same else "silently different"


@contextmanager
def _limited() -> Iterator[None]:
    def stop(number: int, frame: FrameType | None) -> None:
        raise HangError

    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, _SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def mutate(data: bytes, random: np.random.Generator) -> bytes:
    """Truncate a file, change bytes, copy a part over another or in between, or replace a number."""
    start, other = (int(random.integers(len(data))) for _ in range(2))
    length = int(random.integers(1, min(len(data), 600) + 1))
    match random.integers(5):
        case 0:
            return data[:start]
        case 1:
            changed = bytearray(data)
            for index in random.integers(len(data), size=random.integers(1, 5)):
                changed[index] ^= int(random.integers(1, 256))
            return bytes(changed)
        case 2:
            part = data[other : other + length]
            return data[:start] + part + data[start + len(part) :]
        case 3:
            return data[:start] + data[other : other + length] + data[start:]
        case _:
            numbers = list(_NUMBER.finditer(data))
            if not numbers:
                return data[:start] + data[start + 1 :]
            found = numbers[random.integers(len(numbers))]
            return data[: found.start()] + _NUMBERS[random.integers(len(_NUMBERS))] + data[found.end() :]
