"""What a benchmark is: two ways to do the same work, how their results are compared, and how both are timed."""

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
        what: the work, with its sizes, in one line.
        baseline: does it the way that is to be beaten; one call is what is timed.
        ours: does it as the project does.
        same: takes what both returned; raises AssertionError where it is not the same work, and says how near they are.
        rounds: how often each is timed, by turns.
    """

    what: str
    baseline: Callable[[], Any]
    ours: Callable[[], Any]
    same: Callable[[Any, Any], str]
    rounds: int = 5


def compare(case: Case) -> dict[str, Any]:
    """Times both by turns, after one untimed call of each.

    Returns:
        Medians in seconds, the ratio baseline / ours of every round, their median, and in words how near the results are.
    """
    near = case.same(case.baseline(), case.ours())
    seconds: dict[str, list[float]] = {"baseline": [], "ours": []}
    for turn in range(case.rounds):
        for side in ("baseline", "ours") if turn % 2 == 0 else ("ours", "baseline"):  # neither is always the second
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
        "same": near,
    }


def peak_memory(work: Callable[[], Any]) -> dict[str, int]:
    """Peak resident memory of one call in this process, in bytes: of all there is, and beyond what stood before the call."""
    Path("/proc/self/clear_refs").write_text("5")  # the kernel forgets the peak so far
    before = _status("VmRSS")
    work()
    peak = max(_status("VmHWM"), 1024 * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
    return {"peak": peak, "above": peak - before}


def _status(name: str) -> int:
    """A field of this process's status in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))
