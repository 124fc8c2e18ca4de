"""Progress of long loops: a bar on a terminal, plain lines elsewhere, for example in a log of Kubeflow Pipelines."""

import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from typing import Generic, Never, Self, TypeVar

from tqdm import tqdm

SECONDS = 30.0
"""A plain line is printed at least this often, if there is progress."""
_SHARE = 0.05  # and after this share of the whole, but at most once a second
_SHORTEST = 1.0
_KIB = 1024

_T = TypeVar("_T")
Report = Callable[[int, int | None, float | None, Mapping[str, str]], None]


def track(
    items: Iterable[_T],
    title: str,
    unit: str,
    total: int | None = None,
    start: int = 0,
    enabled: bool = True,
    report: Report | None = None,
) -> "Progress[_T]":
    """Iterate over items and show the progress.

    Args:
        items: the items, without those that were done before.
        title: name of the work.
        unit: name of an item, in singular: `image`, `step`, `file`.
        total: number of all items; by default `start` and the length of `items`, if it has one.
        start: number of items done before.
        enabled: whether anything is shown; in a process group only by the main process.
        report: also called with every plain line: items done, total, seconds left, values of `show`.
    """
    if total is None and isinstance(items, Sized):
        total = start + len(items)
    return Progress(title, unit, total, start, enabled, items, report)


def count(total: int | None, title: str, unit: str, start: int = 0) -> "Progress[None]":
    """Count items by `update`; with the unit `B` they are bytes. See `track`."""
    return Progress(title, unit, total, start)


class Progress(Generic[_T]):
    """A bar of tqdm if stderr is a terminal, else lines on stderr: one every 30 s or 5 %, and a summary at the end.

    See `track` for the arguments.
    """

    def __init__(
        self,
        title: str,
        unit: str,
        total: int | None = None,
        start: int = 0,
        enabled: bool = True,
        items: Iterable[_T] | None = None,
        report: Report | None = None,
    ) -> None:
        self._title, self._unit, self._total, self._enabled = title, unit, total, enabled
        self._items, self._done, self._start, self._report = items, start, start, report
        self._values: dict[str, str] = {}
        self._lock = threading.Lock()  # transfers report from several threads
        self._began = self._printed = time.monotonic()
        self._printed_done = start
        self._bar: tqdm[Never] | None = None
        if enabled and sys.stderr.isatty():
            in_bytes = unit == "B"
            divisor = _KIB if in_bytes else 1000
            self._bar = tqdm(
                total=total, initial=start, desc=title, unit=unit, unit_scale=in_bytes, unit_divisor=divisor, file=sys.stderr
            )

    def __iter__(self) -> Iterator[_T]:
        with self:
            for item in self._items or ():
                yield item
                self.update()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """End the bar, or print the summary of completed work."""
        if self._bar is not None:
            self._bar.close()
        elif self._enabled and kind is None and self._done > self._start:
            self._print(f"{self._amount(self._done)} in {clock(time.monotonic() - self._began)}", rate=True)

    def update(self, number: int = 1) -> None:
        """Count more items."""
        with self._lock:
            self._done += number
            if self._bar is not None:
                self._bar.update(number)
            elif self._enabled and self._due():
                self._printed, self._printed_done = time.monotonic(), self._done
                share = f" ({100 * self._done / self._total:.0f} %)" if self._total else ""
                self._print(f"{self._amount(self._done, self._total)}{share}", rate=True, left=True)

    def show(self, **values: str) -> None:
        """Set values to show beside the progress, such as the loss; `images_s` replaces the rate of the items."""
        self._values = values
        if self._bar is not None:
            self._bar.set_postfix(values, refresh=False)

    def _due(self) -> bool:
        since = time.monotonic() - self._printed
        if since >= SECONDS:
            return True
        whole = (self._total or 0) - self._start
        return since >= _SHORTEST and whole > 0 and self._done - self._printed_done >= _SHARE * whole

    def _print(self, amount: str, rate: bool = False, left: bool = False) -> None:
        parts = [amount, *(f"{name} {value}" for name, value in self._values.items() if name != "images_s")]
        seconds = time.monotonic() - self._began
        speed = (self._done - self._start) / seconds if seconds > 0 else 0.0
        if "images_s" in self._values:
            parts.append(f"{self._values['images_s']} images/s")
        elif rate and speed:
            parts.append(f"{_bytes(speed)}/s" if self._unit == "B" else f"{speed:.3g} {self._unit}s/s")
        seconds_left = (self._total - self._done) / speed if self._total and speed else None
        if left and seconds_left is not None:
            parts.append(f"{clock(seconds_left)} left")
        print(f"{self._title}: {', '.join(parts)}", file=sys.stderr, flush=True)
        if self._report:
            self._report(self._done, self._total, seconds_left, self._values)

    def _amount(self, done: int, total: int | None = None) -> str:
        of = f" of {_bytes(total) if self._unit == 'B' else total}" if total else ""
        if self._unit == "B":
            return f"{_bytes(done)}{of}"
        return f"{done}{of} {self._unit}{'' if (total or done) == 1 else 's'}"


def clock(seconds: float) -> str:
    """Format a duration as hours:minutes:seconds."""
    minutes, rest = divmod(round(max(0.0, seconds)), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def _bytes(number: float) -> str:
    for prefix in ("", "Ki", "Mi", "Gi"):
        if number < _KIB:
            return f"{number:.3g} {prefix}B"
        number /= _KIB
    return f"{number:.3g} TiB"
