"""End in order after SIGTERM or Ctrl-C: a stage saves what it has, and the same command continues."""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_ONE_REQUEST_SECONDS = 1.0
"""Within this time repeated signals are one request: torchrun and KFP pass on what the whole process group received already."""


class Terminated(SystemExit):
    """A signal asked this process to end; the exit code is 128 plus the signal's number (SIGTERM 143, Ctrl-C 130).

    Args:
        number: number of the signal.
        saved: what is done and saved, for the message: `after step 120 of 300`.
    """

    def __init__(self, number: int, saved: str = "") -> None:
        super().__init__(128 + number)
        name = signal.Signals(number).name
        self.reason = f"stopped by {name} {saved}".rstrip()


@contextmanager
def terminable(first: Callable[[], None] = lambda: None) -> Iterator[None]:
    """On SIGTERM or SIGINT call `first`, then raise `Terminated` where the main thread is. In other threads nothing changes."""

    def stop(number: int, _frame: FrameType | None) -> None:
        first()
        raise Terminated(number)

    with _handled_by(stop):
        yield


@contextmanager
def deferred(first: Callable[[], None] = lambda: None) -> Iterator[Callable[[], int]]:
    """Only call `first` and note the signal at SIGTERM or SIGINT; yield a function that returns the signal's number, or 0.

    The caller asks it wherever it can save its state, and raises `Terminated`. If it has not when the block ends, the signal
    is sent again. A second signal, more than a second after the first, acts at once.
    """
    received: list[tuple[int, float]] = []
    previous: dict[Any, Any] = {}

    def note(number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if received and now - received[0][1] > _ONE_REQUEST_SECONDS:
            signal.signal(number, previous[number])
            signal.raise_signal(number)
        elif not received:
            received.append((number, now))
            first()

    with _handled_by(note) as handlers:
        previous.update(handlers)
        yield lambda: received[0][0] if received else 0
    if received:
        signal.raise_signal(received[0][0])


@contextmanager
def _handled_by(handler: Callable[[int, FrameType | None], None]) -> Iterator[dict[signal.Signals, Any]]:
    main = threading.current_thread() is threading.main_thread()  # other threads cannot set handlers
    previous = {number: signal.signal(number, handler) for number in _SIGNALS} if main else {}
    try:
        yield {**previous}
    finally:
        for number, former in previous.items():
            signal.signal(number, former)
