"""A process that runs `pixelclip gc` and can kill itself between two of its operations."""

import contextlib
import multiprocessing
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

_EVENTS = {"os.rename", "os.remove", "os.rmdir", "http.client.send"}
"""Audit events of deletions in folders, and of requests to KFP and S3."""
_CHANGES = ("INSERT", "UPDATE", "DELETE")


def collect(words: Sequence[str], environment: Mapping[str, str], log: Path, kill_at: int = 0) -> tuple[int, int]:
    """Run `pixelclip gc WORDS`; return its exit code and the number of its operations.

    Args:
        words: arguments.
        environment: variables of the process.
        log: file for its output; its parent is the current folder.
        kill_at: number of the operation before which the process is killed by SIGKILL; 0 for never.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pixelclip.cli.app", "pixelclip.commands.gc", "pixelclip_pipelines.stored_runs"])
    count = context.Value("i", 0)
    process = context.Process(target=_run, args=(words, dict(environment), log, kill_at, count))
    process.start()
    process.join()
    return int(process.exitcode or 0), int(count.value)


def _run(words: Sequence[str], environment: Mapping[str, str], log: Path, kill_at: int, count: object) -> None:
    from sqlalchemy import event
    from sqlalchemy.engine import Engine

    from pixelclip.cli.app import main

    os.environ.update(environment)
    os.chdir(log.parent)
    sys.argv = ["pixelclip", "gc", *words]

    def step() -> None:
        count.value += 1  # type: ignore[attr-defined]
        if count.value == kill_at:  # type: ignore[attr-defined]
            os.kill(os.getpid(), signal.SIGKILL)

    def statement(_connection: object, _cursor: object, text: str, *_: object) -> None:
        if text.startswith(_CHANGES):
            step()

    with log.open("w") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        event.listen(Engine, "before_cursor_execute", statement)
        sys.addaudithook(lambda name, _: step() if name in _EVENTS else None)
        main()
