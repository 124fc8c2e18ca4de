"""Attempts of a step: real processes that are killed, lose the network or get bad input."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from helpers.json_server import JsonHandler, served
from pixelclip_pipelines import supervisor
from pixelclip_pipelines.supervisor import supervise

# Each attempt adds its number to a file, as a stage adds to its partial output, and ends as the list says.
STEP = """
import os, signal, sys, time
attempt, left = int(os.environ["PIXELCLIP_ATTEMPT"]), os.environ["PIXELCLIP_RETRIES"]
with open(sys.argv[1], "a") as file:
    file.write(f"{attempt}/{left} ")
end = sys.argv[1 + attempt]
if end.startswith("SIG"):
    os.kill(os.getpid(), getattr(signal, end))
if end == "sleep":
    time.sleep(60)
sys.exit(int(end))
"""


@pytest.fixture
def waits(monkeypatch):
    waited: list[float] = []
    monkeypatch.setattr("time.sleep", waited.append)
    monkeypatch.setenv(supervisor.BACKOFF, "30")
    monkeypatch.setenv(supervisor.BACKOFF_FACTOR, "2")
    return waited


@pytest.mark.parametrize(
    ("ends", "code", "attempts", "delays"),
    [
        (["0"], 0, "1/2 ", []),
        (["SIGKILL", "0"], 0, "1/2 2/1 ", [30]),
        (["137", "75", "0"], 0, "1/2 2/1 3/0 ", [30, 60]),
        (["SIGKILL", "SIGKILL", "SIGKILL"], 137, "1/2 2/1 3/0 ", [30, 60]),
        (["SIGSEGV", "2"], 2, "1/2 2/1 ", [30]),
        (["2"], 2, "1/2 ", []),
        (["1"], 1, "1/2 ", []),
    ],
    ids=["success", "killed once", "memory, then network", "always killed", "crash, then bad input", "bad input", "bug"],
)
def test_attempts(tmp_path, waits, capfd, ends, code, attempts, delays):
    command = [sys.executable, "-S", "-c", STEP, str(tmp_path / "partial"), *ends]
    assert supervise(command, "masks", 2) == code
    assert (tmp_path / "partial").read_text() == attempts
    assert waits == delays
    log = capfd.readouterr().out
    for number in range(1, len(attempts.split()) + 1):
        assert f"masks: attempt {number} of 3\n" in log
    assert ("failed with exit code" in log) is bool(delays or code)


def test_log_says_why_and_when_the_next_attempt_starts(tmp_path, waits, capfd):
    supervise([sys.executable, "-S", "-c", STEP, str(tmp_path / "partial"), "SIGKILL", "2"], "masks", 3)
    assert capfd.readouterr().out.splitlines() == [
        "masks: attempt 1 of 4",
        "masks: attempt 1 of 4 failed with exit code 137 (killed, usually for its memory); "
        "the next one starts in 30 s and continues what is there",
        "masks: attempt 2 of 4",
        "masks: attempt 2 of 4 failed with exit code 2",
    ]


@pytest.mark.parametrize("during", ["attempt", "wait"])
def test_sigterm_ends_attempt_and_supervisor(tmp_path, monkeypatch, during):
    monkeypatch.setenv(supervisor.BACKOFF, "60")
    ends = ["sleep"] if during == "attempt" else ["SIGKILL", "0"]

    def stop() -> None:
        while not (tmp_path / "partial").is_file():
            time.sleep(0.01)
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop).start()
    start = time.monotonic()
    with pytest.raises(SystemExit) as ended:
        supervise([sys.executable, "-S", "-c", STEP, str(tmp_path / "partial"), *ends], "masks", 2)
    assert ended.value.code == 128 + signal.SIGTERM and time.monotonic() - start < 30
    assert (tmp_path / "partial").read_text() == "1/2 "


# A component of KFP: it downloads a file. Its first attempt finds no server.
COMPONENT = """
from kfp import dsl
from kfp.dsl import *

def fetch(url: str, out: str, metrics: dsl.Output[dsl.Metrics]):
    import urllib.request
    from pathlib import Path

    with Path(out).open("a") as file:
        file.write("attempt ")
    if not url:
        raise ValueError("url: must not be empty")
    metrics.log_metric("bytes", len(urllib.request.urlopen(url, timeout=5).read()))
"""


def executed(folder: Path, url: str) -> list[str]:
    """Return the command of a step, as in the compiled pipeline."""
    (folder / "step.py").write_text(COMPONENT)
    artifact = {"name": "metrics", "type": {"schemaTitle": "system.Metrics"}, "uri": str(folder / "metrics")}
    document = {
        "inputs": {"parameterValues": {"url": url, "out": str(folder / "partial")}},
        "outputs": {"artifacts": {"metrics": {"artifacts": [artifact]}}, "outputFile": str(folder / "output.json")},
    }
    options = ["--step", "fetch_data", "--retries", "2", "--backoff", "3", "--backoff-factor", "1"]
    module = ["--component_module_path", str(folder / "step.py"), "--function_to_execute", "fetch"]
    executor = [*module, "--executor_input", json.dumps(document)]
    return [sys.executable, "-m", "pixelclip_pipelines.supervisor", *options, *executor]


def test_component_continues_after_a_network_fault(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]

    class Handler(JsonHandler):
        def do_GET(self):
            self.answer(200, "data")

    environment = os.environ | {"_KFP_RUNTIME": "true"}
    command = executed(tmp_path, f"http://127.0.0.1:{port}/data")
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout
        lines = []
        for line in process.stdout:
            lines.append(line.rstrip("\n"))
            if "the next one starts" in line:
                break
        with served(Handler, port):
            rest = process.stdout.read()
            assert process.wait() == 0, rest
    shown = "\n".join(lines)
    assert "pixelclip: <urlopen error [Errno 111] Connection refused>" in lines, shown
    assert "Traceback" not in shown
    assert "fetch_data: attempt 1 of 3 failed with exit code 75 (a failure that may pass); the next one starts in 3 s" in shown
    assert "fetch_data: attempt 2 of 3" in rest
    assert (tmp_path / "partial").read_text() == "attempt attempt "
    output = json.loads((tmp_path / "output.json").read_text())
    assert output["artifacts"]["metrics"]["artifacts"][0]["metadata"] == {"bytes": 6}


def test_component_does_not_repeat_bad_input(tmp_path):
    environment = os.environ | {"_KFP_RUNTIME": "true"}
    done = subprocess.run(executed(tmp_path, ""), env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.splitlines()[-1] == "pixelclip: url: must not be empty"
    assert (tmp_path / "partial").read_text() == "attempt " and "Traceback" not in done.stderr + done.stdout


def test_supervisor_is_small():
    """It shares the memory of the pod with the step."""
    code = "import sys, pixelclip_pipelines.supervisor; print({'torch', 'kfp', 'mlflow', 'numpy'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "set()"
