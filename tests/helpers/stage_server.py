"""Runs commands of pixelclip in forked processes, so that a trial of a fault does not import torch again.

As a module: a server that has imported the stages and forks one process per line of JSON on stdin.
"""

import atexit
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from helpers.processes import living, wait_until

SHARED_MEMORY = Path("/dev/shm")


class StageServer:
    """Starts commands of pixelclip, each in a session of its own."""

    def __init__(self) -> None:
        words = [sys.executable, "-W", "ignore", "-m", "helpers.stage_server"]
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
        self._server = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)

    def start(self, *words: object, log: Path, **environment: str) -> "Command":
        """Start a command; its output is appended to `log`."""
        self._ask({"start": [str(word) for word in words], "log": str(log), "environment": environment})
        return Command(int(self._answer()), self)

    def code(self, pid: int) -> int | None:
        """Return the exit code of a command, or None while it runs; negative after a signal that it did not handle."""
        self._ask({"poll": pid})
        return json.loads(self._answer())

    def _ask(self, message: dict[str, Any]) -> None:
        assert self._server.stdin
        self._server.stdin.write(json.dumps(message) + "\n")
        self._server.stdin.flush()

    def _answer(self) -> str:
        assert self._server.stdout
        return self._server.stdout.readline()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with self._server:  # closes its pipes and waits
            pass


class Command:
    """A command under way."""

    def __init__(self, pid: int, server: StageServer) -> None:
        self.pid, self._server = pid, server

    def poll(self) -> int | None:
        return self._server.code(self.pid)

    def wait(self, seconds: float = 300.0) -> int:
        """Return the exit code."""
        wait_until(lambda: self.poll() is not None, seconds)
        code = self.poll()
        assert code is not None, f"did not end in {seconds} s"
        return code

    def send(self, number: int) -> None:
        """Send a signal to this process alone."""
        with suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def processes(self) -> list[int]:
        """Return all living processes of its session."""
        return living(self.pid)


def shared_memory() -> set[str]:
    """Return the names of all segments of shared memory, without the files of MLflow's servers (`tmp...`)."""
    return {path.name for path in SHARED_MEMORY.iterdir() if not path.name.startswith("tmp")}


def _serve() -> None:
    from pixelclip import evaluate, evaluate_clip, masks, register, shards, train  # noqa: F401  (imported before the fork)
    from pixelclip.cli.app import main

    codes: dict[int, int] = {}
    for line in sys.stdin:
        message = json.loads(line)
        if "poll" in message:
            pid = message["poll"]
            if pid not in codes:
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    codes[pid] = os.waitstatus_to_exitcode(status)
            print(json.dumps(codes.get(pid)), flush=True)
            continue
        pid = os.fork()
        if pid:
            print(pid, flush=True)
        else:
            _run(main, message["start"], message["log"], message["environment"])


def _run(main: Callable[[], None], words: Sequence[str], log: str, environment: dict[str, str]) -> None:
    """Run a command in a forked process and end it."""
    os.setsid()
    output = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    null = os.open(os.devnull, os.O_RDONLY)
    for number, target in ((null, 0), (output, 1), (output, 2)):
        os.dup2(number, target)
    os.environ.update(environment)
    sys.argv = ["pixelclip", *words]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    code: Any = 1
    try:
        main()
    except SystemExit as end:
        code = end.code
    except BaseException:
        import traceback

        traceback.print_exc()
    sys.stdout.flush()
    atexit._run_exitfuncs()  # as at the end of any interpreter: ends worker processes
    os._exit(code if isinstance(code, int) else int(bool(code)))


if __name__ == "__main__":
    _serve()
