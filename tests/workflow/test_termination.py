"""SIGTERM and Ctrl-C: where they end a process, with which exit code, and that workers end with their parent."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from helpers.processes import living, session_of, wait_until
from pixelclip.workflow import termination
from pixelclip.workflow.termination import Terminated, deferred, terminable

SIGNALS = {signal.SIGTERM: 143, signal.SIGINT: 130}


@pytest.mark.parametrize(("number", "code"), SIGNALS.items())
def test_signal_raises_and_the_former_handler_comes_back(number, code):
    before = signal.getsignal(number)
    with pytest.raises(Terminated) as ended, terminable():
        signal.raise_signal(number)
    assert ended.value.code == code
    assert ended.value.reason == f"stopped by {number.name}"
    assert signal.getsignal(number) is before


def test_deferred_signal_is_noted_and_sent_again_if_nobody_acts_on_it():
    reached = []

    def work() -> None:
        with terminable(lambda: reached.append("first")), deferred() as received:
            reached.append(received())
            signal.raise_signal(signal.SIGTERM)
            reached.append(received())

    with pytest.raises(Terminated):
        work()
    assert reached == [0, signal.SIGTERM, "first"]


def test_deferred_signal_that_the_caller_acts_on_is_not_sent_again():
    def work() -> None:
        with deferred() as received:
            signal.raise_signal(signal.SIGTERM)
            raise Terminated(received(), "after step 3 of 5")

    with terminable():
        with pytest.raises(Terminated) as ended:
            work()
        assert ended.value.reason == "stopped by SIGTERM after step 3 of 5"


def test_second_signal_acts_at_once_unless_it_repeats_the_first(monkeypatch):
    """Torchrun passes on the signal that a terminal has sent to all processes."""
    reached = []

    def work() -> None:
        with terminable(), deferred():
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGTERM)
            reached.append("repeated")
            monkeypatch.setattr(termination, "_ONE_REQUEST_SECONDS", 0.0)
            signal.raise_signal(signal.SIGTERM)
            reached.append("second")

    with pytest.raises(Terminated) as ended:
        work()
    assert reached == ["repeated"]
    assert ended.value.code == 143


def test_other_threads_install_no_handlers():
    seen = []

    def work() -> None:
        with terminable(), deferred() as received:
            seen.append(received())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [0]


WORKERS = """
import sys
from concurrent.futures import ProcessPoolExecutor
from pixelclip.workflow.worker_processes import start_worker, worker_context
import os, signal, time

if __name__ == "__main__":
    with ProcessPoolExecutor(2, worker_context([]), start_worker) as pool:
        print(*{pool.submit(os.getpid).result() for _ in range(20)}, flush=True)
        print(sum(pool.map(abs, [time.sleep(1) or 1, 2])), flush=True)
        time.sleep(60)
"""


def start(tmp_path: Path) -> tuple["subprocess.Popen[str]", list[int]]:
    (tmp_path / "workers.py").write_text(WORKERS)
    words = [sys.executable, str(tmp_path / "workers.py")]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout
    return process, [int(word) for word in process.stdout.readline().split()]


def test_workers_end_when_their_parent_is_killed(tmp_path):
    process, pids = start(tmp_path)
    with process:
        process.kill()
    assert wait_until(lambda: not any(map(session_of, pids)))


@pytest.mark.parametrize("number", SIGNALS)
def test_workers_and_their_server_survive_a_signal_to_the_whole_group(tmp_path, number):
    process, pids = start(tmp_path)
    with process:
        for pid in living(process.pid):
            if pid != process.pid:
                os.kill(pid, number)
        assert process.stdout
        assert process.stdout.readline() == "3\n"
        assert all(map(session_of, pids))
        process.kill()


LEAVES_A_WORKER = """
import time
from pixelclip.workflow.worker_processes import start_worker, worker_context

def work(ready):
    start_worker()
    ready.set()
    time.sleep(60)

if __name__ == "__main__":
    context = worker_context([])
    ready = context.Event()
    context.Process(target=work, args=(ready,), daemon=True).start()
    ready.wait()
"""


def test_process_ends_though_a_worker_ignores_signals(tmp_path):
    """As after an error whose traceback keeps a loader alive: at exit, multiprocessing terminates and joins its workers."""
    (tmp_path / "script.py").write_text(LEAVES_A_WORKER)
    subprocess.run([sys.executable, str(tmp_path / "script.py")], check=True, timeout=20)
