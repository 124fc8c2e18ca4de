"""Step `train` when a process is killed, gets bad input, or is terminated: real torchrun processes and signals."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from mlflow import MlflowClient

from helpers import kfp_steps, tiny, training
from helpers.json_server import JsonHandler, served
from helpers.processes import wait_until
from pixelclip.config import TrainConfig
from pixelclip.tracking.run import PIPELINE_RUN
from pixelclip_pipelines import supervisor
from pixelclip_pipelines.finish import finish
from pixelclip_pipelines.steps import train_by

clip, shards = training.clip, training.shards
LIMIT = 120.0


def workers(out: Path) -> dict[int, int]:
    """Return the processes that train into `out`: rank to process ID."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            command = (path / "cmdline").read_bytes().split(b"\0")
            environment = dict(each.split(b"=", 1) for each in (path / "environ").read_bytes().split(b"\0") if b"=" in each)
        except OSError:
            continue
        if str(out).encode() in command and b"RANK" in environment and b"torch.distributed.run" not in command:
            found[int(environment[b"RANK"])] = int(path.name)
    return found


def wait_for(condition: Callable[[], object]) -> None:
    assert wait_until(condition, LIMIT), "the training did not get there"


def steps_of(folder: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / "curves.jsonl").read_text().splitlines()]


@pytest.fixture
def client(monkeypatch, tmp_path) -> MlflowClient:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return tiny.mlflow_at(monkeypatch, tmp_path / "mlflow")


@pytest.mark.slow
def test_killed_rank_of_two_is_restarted_from_the_checkpoint(shards, clip, tmp_path, monkeypatch, client, capfd):
    monkeypatch.setenv(supervisor.RETRIES, "2")
    config = TrainConfig(**{**training.SETTINGS, "steps": 60, "checkpoint_every": 5}, clip=str(clip))
    out = tmp_path / "killed"
    killed: list[int] = []

    def kill() -> None:
        wait_for(lambda: list(tmp_path.glob(".killed.*.partial/state.safetensors")))
        killed.append(len(steps_of(next(tmp_path.glob(".killed.*.partial")))))
        os.kill(workers(out)[1], signal.SIGKILL)

    thread = threading.Thread(target=kill)
    thread.start()
    metrics = train_by(2, shards, out, config)
    thread.join()
    log = capfd.readouterr().out
    assert "train: attempt 2 of 3, after a process failed, starts in 0 s and continues after the last checkpoint" in log
    assert "train: continues an interrupted run" in log and "attempt 3" not in log
    assert 5 <= killed[0] < 60
    assert steps_of(out) == list(range(1, 61)), "every step once"
    (run,) = client.search_runs([client.get_experiment_by_name("pixelclip").experiment_id])
    assert run.info.status == "FINISHED"
    monkeypatch.delenv(supervisor.RETRIES)
    alone = train_by(1, shards, tmp_path / "alone", config)
    assert metrics["train/loss"] == pytest.approx(alone["train/loss"], abs=1e-3)


@pytest.mark.slow
def test_one_process_is_restarted_too(shards, clip, tmp_path, monkeypatch, client, capfd):
    monkeypatch.setenv(supervisor.RETRIES, "1")
    monkeypatch.setenv(supervisor.ATTEMPT, "2")
    monkeypatch.setenv(supervisor.BACKOFF, "1")
    config = TrainConfig(**{**training.SETTINGS, "steps": 60, "checkpoint_every": 5}, clip=str(clip))

    def kill() -> None:
        wait_for(lambda: list(tmp_path.glob(".killed.*.partial/state.safetensors")))
        os.kill(workers(tmp_path / "killed")[0], signal.SIGKILL)

    thread = threading.Thread(target=kill)
    thread.start()
    train_by(1, shards, tmp_path / "killed", config)
    thread.join()
    assert "train: attempt 3 of 3, after a process failed, starts in 1 s" in capfd.readouterr().out
    assert steps_of(tmp_path / "killed") == list(range(1, 61))


def test_torchrun_does_not_restart_after_bad_input(clip, tmp_path, monkeypatch, client, capfd):
    monkeypatch.setenv(supervisor.RETRIES, "3")
    config = TrainConfig(**training.SMALL, clip=str(clip))
    with pytest.raises(SystemExit) as ended:
        train_by(1, tmp_path / "nothing", tmp_path / "model", config)
    assert ended.value.code == 2
    shown = "".join(capfd.readouterr())
    assert "no such folder or manifest of shards" in shown and "attempt 2" not in shown
    assert not (tmp_path / "model").exists()


@pytest.mark.slow
def test_terminated_training_ends_as_killed(shards, clip, tmp_path, monkeypatch, client):
    """SIGTERM to the step as KFP sends it, to its process group, and SIGKILL to all its processes 1.4 s later."""
    monkeypatch.setenv(PIPELINE_RUN, "e4b33c46")
    document = json.loads((kfp_steps.RECORDED / "train.json").read_text())
    parameters = document["inputs"]["parameterValues"]
    small = {**training.SETTINGS, "steps": 10_000, "checkpoint_every": 5}
    parameters |= {"clip": str(clip), "steps": small.pop("steps"), "workspace": str(tmp_path / "space")}
    parameters |= {name: small.pop(name) for name in ("batch_size", "concepts")}
    parameters["settings"] = {f"train.{name}": value for name, value in small.items()}
    (masks,) = document["inputs"]["artifacts"]["masks"]["artifacts"]
    masks["metadata"]["location"] = str(shards)
    text = json.dumps(document).replace("minio://", f"{tmp_path}/minio/").replace('"/minio/', f'"{tmp_path}/minio/')
    (tmp_path / "step.py").write_text(kfp_steps.source("train"))
    words = [sys.executable, "-m", "pixelclip_pipelines.supervisor", "--step", "train", "--retries", "2"]
    words += ["--component_module_path", str(tmp_path / "step.py"), "--function_to_execute", "train", "--executor_input", text]
    environment = os.environ | {"_KFP_RUNTIME": "true"}
    partial = tmp_path / "space"
    with subprocess.Popen(words, env=environment, start_new_session=True, stdout=subprocess.DEVNULL) as process:
        wait_for(lambda: list(partial.glob(".train.*.partial/state.safetensors")) or process.poll() is not None)
        pids = list(workers(partial / "train").values())
        assert pids
        os.killpg(process.pid, signal.SIGTERM)
        time.sleep(1.4)
        for pid in pids:
            if Path(f"/proc/{pid}").exists():
                os.kill(pid, signal.SIGKILL)
        process.kill()
    (run,) = client.search_runs([client.get_experiment_by_name("pixelclip").experiment_id])

    class Kfp(JsonHandler):
        def do_GET(self):
            self.answer(200, json.loads((kfp_steps.RECORDED.parent / "api" / "run-canceling.json").read_text()))

    with served(Kfp) as url:
        monkeypatch.setenv("KF_PIPELINES_ENDPOINT", url)
        finish("RUNNING", nodes=1)
    assert client.get_run(run.info.run_id).info.status == "KILLED"


@pytest.mark.slow
def test_signal_to_one_of_two_processes_stops_both_after_the_same_step(shards, clip, tmp_path, client):
    settings = {**training.SETTINGS, "steps": 60, "checkpoint_every": 100, "clip": str(clip)}
    (tmp_path / "params.yaml").write_text(yaml.safe_dump({"train": settings}))

    def command(out: Path) -> list[str]:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "pixelclip"]
        return [*torchrun, "train", "--masks", str(shards), "--out", str(out), "--params", str(tmp_path / "params.yaml")]

    subprocess.run(command(tmp_path / "whole"), check=True, capture_output=True)
    out = tmp_path / "stopped"
    with subprocess.Popen(command(out), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        wait_for(lambda: [path for path in tmp_path.glob(".stopped.*.partial") if (path / "curves.jsonl").is_file()])
        os.kill(workers(out)[1], signal.SIGTERM)
        printed, _ = process.communicate()
    assert process.returncode != 0
    (stopped,) = re.findall(r"train: stopped by SIGTERM after step (\d+) of 60; the same command continues", printed)
    (folder,) = tmp_path.glob(".stopped.*.partial")
    assert steps_of(folder) == list(range(1, int(stopped) + 1))
    assert {run.info.status for run in client.search_runs(["1"])} == {"FINISHED", "KILLED"}
    printed = subprocess.run(command(out), check=True, capture_output=True, text=True).stdout
    assert f"train: resuming after step {stopped}" in printed
    assert training.losses(out) == training.losses(tmp_path / "whole")
    assert {run.info.status for run in client.search_runs(["1"])} == {"FINISHED"}
