"""Run a module in two ranks: `two_ranks.start(WORDS)`.

Both are forked from a server process that has already imported the slow packages, with the variables that torchrun would set.
Some tests use torchrun itself.
"""

import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

_server: list[subprocess.Popen[str]] = []


def start(*words: str, threads: int = 1) -> str:
    """Run two ranks of `python -m WORDS` and return their stdout; fail with their stderr if one fails."""
    if not _server:
        command, pipe = [sys.executable, "-W", "ignore", "-m", "helpers.two_ranks"], subprocess.PIPE
        tests = Path(__file__).parents[1]
        environment = os.environ | {"PYTHONPATH": str(tests)}
        _server.append(subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment))
    server = _server[0]
    assert server.stdin and server.stdout
    with tempfile.TemporaryDirectory() as folder:
        job = {"words": words, "environment": dict(os.environ), "threads": threads, "folder": folder}
        print(json.dumps(job), file=server.stdin, flush=True)
        code = int(server.stdout.readline())
        stdout, stderr = (Path(folder, name).read_text() for name in ("out", "err"))
    assert code == 0, stderr[-3000:]
    return stdout


def stop() -> None:
    """Stop the server process."""
    while _server:
        server = _server.pop()
        server.communicate()


def _serve() -> None:
    import pixelclip.evaluate
    import pixelclip.train  # noqa: F401
    from helpers import gradients  # noqa: F401

    for line in sys.stdin:
        job = json.loads(line)
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        running = {_fork(rank, port, job) for rank in (0, 1)}
        code = 0
        while running:
            pid, status = os.wait()
            running.discard(pid)
            if failed := os.waitstatus_to_exitcode(status):
                code = code or failed
                for other in running:  # otherwise it waits for the failed rank forever
                    os.kill(other, signal.SIGTERM)
        print(code, flush=True)


def _fork(rank: int, port: int, job: dict[str, Any]) -> int:
    if pid := os.fork():
        return pid
    import torch

    signal.alarm(250)  # time limit of a job in seconds
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(Path(job["folder"], name), os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.environ.clear()
    variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update(job["environment"] | {name: str(value) for name, value in variables.items()})
    torch.set_num_threads(job["threads"])
    sys.argv = job["words"]
    code = 0
    try:
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    _serve()
