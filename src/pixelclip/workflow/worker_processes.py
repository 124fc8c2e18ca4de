"""Worker processes that leave signals to their parent and end when it does."""

import atexit
import multiprocessing
import multiprocessing.util  # registers its exit function, before which ours must run
import os
import signal
import threading
from collections.abc import Sequence
from multiprocessing.context import ForkServerContext

_PRELOADED = "pixelclip.workflow.ignored_signals"


def worker_context(preload: Sequence[str]) -> ForkServerContext:
    """Return the context of worker processes, forked from a server that imports these modules once."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([_PRELOADED, *preload])
    return context


def start_worker(*_: object) -> None:
    """Initialize a worker: it ignores SIGTERM and Ctrl-C, which its parent handles, and ends when its parent is gone.

    A terminal, or Kubernetes at the end of a pod, signals all processes. Without their parent, workers that wait for it would
    keep their shared memory for ever.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    if parent := multiprocessing.parent_process():
        parent.join()
        os._exit(1)


@atexit.register
def _kill_workers() -> None:
    """Kill the workers that an error left. Multiprocessing would terminate them, which they ignore, and wait for ever."""
    for worker in multiprocessing.active_children():
        if worker.daemon:
            worker.kill()
