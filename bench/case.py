"""Comparison of two implementations of the same work: their results, time and memory."""

import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Case:
    """One comparison.

    Attributes:
        what: the work and its sizes, in one line.
        baseline: calls the reference implementation once.
        ours: calls pixelclip's implementation once.
        same: describes the difference of the two results; raises AssertionError if it is too large.
        rounds: number of timed calls of each.
    """

    what: str
    baseline: Callable[[], Any]
    ours: Callable[[], Any]
    same: Callable[[Any, Any], str]
    rounds: int = 5


def compare(case: Case) -> dict[str, Any]:
    """Time both implementations alternately after one untimed call of each.

    Returns:
        Median seconds, the ratio baseline / ours of every round, the median ratio, and the description of the difference.
    """
    difference = case.same(case.baseline(), case.ours())
    seconds: dict[str, list[float]] = {"baseline": [], "ours": []}
    for turn in range(case.rounds):
        for side in ("baseline", "ours") if turn % 2 == 0 else ("ours", "baseline"):  # alternate who is first
            start = time.perf_counter()
            getattr(case, side)()
            seconds[side].append(time.perf_counter() - start)
    ratios = [old / new for old, new in zip(seconds["baseline"], seconds["ours"], strict=True)]
    return {
        "what": case.what,
        "seconds_baseline": statistics.median(seconds["baseline"]),
        "seconds_ours": statistics.median(seconds["ours"]),
        "ratios": [round(ratio, 3) for ratio in ratios],
        "ratio": statistics.median(ratios),
        "same": difference,
    }


def peak_memory(work: Callable[[], Any]) -> dict[str, int]:
    """Return the peak resident memory of one call in bytes, and its excess over the memory before the call."""
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = _status("VmRSS")
    work()
    peak = max(_status("VmHWM"), 1024 * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
    return {"peak": peak, "above": peak - before}


def _status(name: str) -> int:
    """Read a field of /proc/self/status in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))
