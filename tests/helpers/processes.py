"""Processes seen from outside, and waiting for what they do."""

import time
from collections.abc import Callable
from pathlib import Path


def session_of(pid: int) -> int | None:
    """Return the session of a living process; None for a zombie or no process."""
    try:
        state, _, _, session = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:4]
    except OSError:
        return None
    return None if state == "Z" else int(session)


def living(session: int) -> list[int]:
    """Return all living processes of a session."""
    pids = [int(path.name) for path in Path("/proc").glob("[0-9]*")]
    return [pid for pid in pids if session_of(pid) == session]


def wait_until(condition: Callable[[], object], seconds: float = 20.0) -> bool:
    """Wait for a condition; return whether it came true."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.01)
    return bool(condition())
