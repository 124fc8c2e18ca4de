"""Run a step of KFP in several attempts: `python3 -m pixelclip_pipelines.supervisor --step NAME --retries N ARGUMENTS`.

KFP 2.17 repeats a step only if its pod was lost, not if its container failed. This process takes the place of
`kfp.dsl.executor_main` and runs it in a child process. It does so again after a wait if the child was killed (137 is usually
memory) or the network failed, and never after bad input. It imports little, so that it is small beside the child.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from types import FrameType
from typing import NoReturn

from pixelclip.storage.urls import scrubbed
from pixelclip.workflow.failures import MAY_PASS, exit_code

ATTEMPT, RETRIES = "PIXELCLIP_ATTEMPT", "PIXELCLIP_RETRIES"
"""Environment variables of an attempt: its number from 1, and the number of retries that are left."""
BACKOFF, BACKOFF_FACTOR = "PIXELCLIP_BACKOFF", "PIXELCLIP_BACKOFF_FACTOR"
_KILLED = 128


def delay(attempt: int) -> float:
    """Return the seconds to wait before an attempt (2 or more), from BACKOFF and BACKOFF_FACTOR."""
    return float(os.environ.get(BACKOFF, "0")) * float(os.environ.get(BACKOFF_FACTOR, "1")) ** (attempt - 2)


def supervise(command: Sequence[str], step: str, retries: int) -> int:
    """Run a command until it succeeds, fails for good, or has no retries left.

    Args:
        command: command of one attempt.
        step: name for messages.
        retries: attempts after the first.

    Returns:
        The exit code of the last attempt; 128 plus the signal if it was killed.

    Raises:
        SystemExit: this process received SIGTERM or SIGINT, which it passed on.
    """
    running: list[subprocess.Popen[bytes]] = []

    def stop(number: int, _frame: FrameType | None) -> NoReturn:
        signal.signal(number, signal.SIG_IGN)
        for process in running:
            process.send_signal(number)
        raise SystemExit(_KILLED + number)

    previous = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        for attempt in range(1, retries + 2):
            print(f"{step}: attempt {attempt} of {retries + 1}", flush=True)
            environment = {ATTEMPT: str(attempt), RETRIES: str(retries + 1 - attempt)}
            with subprocess.Popen(command, env=os.environ | environment) as process:
                running[:] = [process]
                code = process.wait()
            running.clear()
            code = _KILLED - code if code < 0 else code
            if not code:
                return 0
            reason = _reason(code)
            if not reason or attempt > retries:
                print(f"{step}: attempt {attempt} of {retries + 1} failed with exit code {code}{reason}", flush=True)
                return code
            seconds = delay(attempt + 1)
            print(
                f"{step}: attempt {attempt} of {retries + 1} failed with exit code {code}{reason}; "
                f"the next one starts in {seconds:g} s and continues what is there",
                flush=True,
            )
            time.sleep(seconds)
        raise AssertionError("unreachable")
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _reason(code: int) -> str:
    """Return why a failure may pass, or nothing if it will not."""
    if code == MAY_PASS:
        return " (a failure that may pass)"
    if code == _KILLED + signal.SIGKILL:
        return " (killed, usually for its memory)"
    if code > _KILLED and code - _KILLED in set(signal.Signals):
        return f" ({signal.Signals(code - _KILLED).name})"
    return ""


def _execute() -> int:
    """Run KFP's executor in this process; return its exit code after printing an error in one line if it is not a bug."""
    from kfp.dsl.executor_main import executor_main

    try:
        executor_main()
    except Exception as error:
        code = exit_code(error)
        if code == 1:
            traceback.print_exc()
        else:
            print(f"pixelclip: {scrubbed(str(error))}", file=sys.stderr, flush=True)
        return code
    return 0


def main() -> int:
    """Run the step that the command line describes; return its exit code."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--step", required=True)
    parser.add_argument("--retries", type=int, required=True)
    parser.add_argument("--backoff", type=float, default=0)
    parser.add_argument("--backoff-factor", type=float, default=1)
    options, executor = parser.parse_known_args()
    if ATTEMPT in os.environ:
        sys.argv = [sys.argv[0], *executor]
        return _execute()
    os.environ[BACKOFF], os.environ[BACKOFF_FACTOR] = str(options.backoff), str(options.backoff_factor)
    command = [sys.executable, "-m", "pixelclip_pipelines.supervisor", *sys.argv[1:]]
    return supervise(command, options.step, options.retries)


if __name__ == "__main__":
    sys.exit(main())
