"""Status, logs and end of a run: KFP's answers about real runs (tests/fixtures/kfp/runs), from a small server of its API."""

import json
import os
from datetime import UTC, datetime
from pathlib import Path

import pytest
import yaml
from kfp import compiler

from helpers import kfp_server
from helpers.command_line import pixelclip  # noqa: F401
from helpers.kubernetes_server import fake_cluster
from pixelclip_pipelines import runs
from pixelclip_pipelines.cluster_config import Cluster
from pixelclip_pipelines.pixelclip import build
from pixelclip_pipelines.run_steps import steps_of
from pixelclip_pipelines.submit import TOKEN, Target

kfp, run = kfp_server.kfp, kfp_server.run
FOLDER = Path(__file__).parents[1] / "fixtures" / "kfp" / "runs"
RUNS = sorted(path.stem for path in FOLDER.glob("*.json"))
NOW = datetime(2026, 11, 28, 13, 20, tzinfo=UTC)
LOG = """time="2026-11-28T11:44:58.110Z" level=info msg="capturing logs" argo=true
I1128 11:44:58.201114      19 launcher_v2.go:199] publish success.
[KFP Executor 2026-11-28 11:45:00,310 INFO]: Looking for component `shards` in --component_module_path `/tmp/x.py`
[KFP Executor 2026-11-28 11:45:00,311 INFO]: Got executor_input:
{
    "inputs": {}
}
MLflow run: http://mlflow.example/#/experiments/1/runs/abc
{}
I1128 11:45:01.001114      19 launcher_v2.go:151] Stopping Heartbeat
F1128 11:45:02.123456      19 main.go:56] failed to execute component: exit status {}
"""
ENDS = {  # what the last pod of the failed step wrote: its own last lines, and its exit code if it wrote one
    "failed-exit-code": ("Traceback (most recent call last):\n  File x\nValueError: /data/images: contains no image (.jpg)", 1),
    "failed-out-of-memory": ("train: 10 of 40 steps", 137),
    "failed-retried-many-times": ("pixelclip: /data/images: no such folder of images", 2),
    "failed-setting-out-of-range": (
        "pixelclip: settings: train.steps: Input should be greater than or equal to 1, found -5",
        2,
    ),
    "failed-timeout": ("train: 10 of 40 steps", None),
    "failed-train-job-import": ("ImportError: cannot import name 'PipelineTask' from 'kfp.dsl'", 1),
    "terminated-after-pod-deleted": ("train: 10 of 40 steps", None),
    "terminated-in-train": ("train: 10 of 40 steps", None),
    "terminated-train-job": ("TrainJob pixelclip-run: started", None),
}


def recorded(name):
    return json.loads((FOLDER / f"{name}.json").read_text())


def log_of(words, code):
    lines = LOG.replace("{}\nI1128 11:45:01", f"{words}\nI1128 11:45:01").splitlines()
    return "\n".join(lines[:-1] if code is None else [*lines[:-1], lines[-1].replace("{}", str(code))]) + "\n"


def pods_of(run, state):
    """Return the pods below the executors with this state, by the names that KFP lists and Argo's template."""
    tasks = run["run_details"]["task_details"]
    executors = [task for task in tasks if (task.get("display_name"), task.get("state")) == ("executor", state)]
    ids = [child["pod_name"].rpartition("-") for task in executors for child in task.get("child_tasks", [])]
    return [f"{workflow}-retry-system-container-impl-{number}" for workflow, _, number in ids]


@pytest.fixture(scope="session")
def compiled(tmp_path_factory):
    """Return the compiled pipeline as KFP answers with it: the parts in one document."""
    file = tmp_path_factory.mktemp("compiled") / "pipeline.yaml"
    compiler.Compiler().compile(build(Cluster.model_validate({"steps": {"train": {"timeout": "50s"}}})), str(file))
    # The recorded runs are of 0.1.0, where the step fetch_labelled was a second fetch_data.
    pipeline, platform = yaml.safe_load_all(file.read_text().replace("fetch-labelled", "fetch-data-2"))
    return {"pipeline_spec": pipeline, "platform_spec": platform}


def load(kfp, name, compiled=None):
    answer = recorded(name)
    kfp.kept["runs"][answer["run_id"]] = answer
    if compiled and "sweep" not in name and "train-job" not in name:
        kfp.kept["versions"][answer["pipeline_version_reference"]["pipeline_version_id"]] = {"pipeline_spec": compiled}
    if name in ENDS:
        kfp.logs |= dict.fromkeys(pods_of(answer, "FAILED"), log_of(*ENDS[name]))
    return answer


@pytest.mark.parametrize("name", RUNS)
def test_status_of_a_real_run(kfp, compiled, name):
    answer = load(kfp, name, compiled)
    status = runs.status(Target(kfp.url), answer["run_id"], NOW)
    text = "\n".join(status.lines) + "\n"
    if os.environ.get("PIXELCLIP_RENEW"):
        (FOLDER / f"{name}.txt").write_text(text.replace(kfp.url, "KFP_URL"))
    expected = (FOLDER / f"{name}.txt").read_text().replace("KFP_URL", kfp.url)
    assert text == expected
    assert status.exit_code == {"SUCCEEDED": 0, "FAILED": 1}.get(answer["state"], 3)


@pytest.mark.parametrize("name", RUNS)
def test_every_pod_of_a_real_run_belongs_to_one_step(name):
    answer = recorded(name)
    pods = sum(bool(task.get("display_name", "").startswith("executor(")) for task in answer["run_details"]["task_details"])
    attempts = [attempt for step in steps_of(answer) for attempt in step.attempts]
    assert len(attempts) == len({attempt.hash for attempt in attempts}) == pods


def test_status_without_the_compiled_pipeline_shows_the_steps_that_were_reached(kfp):
    answer = load(kfp, "running-in-loop")
    lines = runs.status(Target(kfp.url), answer["run_id"], NOW).lines
    assert [line.split()[-1] for line in lines[:5]] == ["pin_revision", "fetch_data", "fetch_data_2", "shards", "evaluate_clip"]
    assert len(lines) == 7


def test_status_finds_the_mlflow_run_in_the_log_of_the_training(kfp):
    answer = load(kfp, "succeeded-cached")
    kfp.logs = dict.fromkeys(pods_of(answer, "SUCCEEDED"), log_of("train: 300 of 300 steps", None))
    assert (
        runs.status(Target(kfp.url), answer["run_id"]).lines[-1]
        == "MLflow: http://mlflow.example/#/experiments/1/runs/abc?workflowType=machine_learning"
    )


def test_mlflow_ui_replaces_the_address_inside_the_cluster(kfp):
    answer = load(kfp, "succeeded-with-mlflow-plugin")
    Path("cluster.yaml").write_text("mlflow_ui: https://mlflow.example/")
    last = runs.status(Target(kfp.url), answer["run_id"]).lines[-1]
    page = "https://mlflow.example/#/experiments/2/runs/f8ddfd346623416ba4323141902fcf27"
    assert last == f"MLflow: {page}?workflowType=machine_learning"


def waiting_for_its_first_pod():
    """Return the run of a missing ConfigMap as it was before it was terminated."""
    answer = recorded("terminated-missing-configmap")
    answer |= {"state": "RUNNING", "finished_at": "1970-01-01T00:00:00Z", "state_history": answer["state_history"][:2]}
    tasks = []
    for task in answer["run_details"]["task_details"]:
        if task["start_time"] < "2026-11-28T12:04:36" and "finish" not in task["display_name"]:
            is_open = task["display_name"] in ("pin-revision", "pin-revision(0)", "executor", "executor(0)")
            state = "PENDING" if task["display_name"] == "executor(0)" else "RUNNING"
            change = {"state": state, "end_time": "0001-01-01T00:00:00Z", "state_history": task["state_history"][:1]}
            tasks.append(task | change if is_open else task)
    for task in tasks:
        if task["display_name"] == "executor":  # the second attempt came later
            first = f"pixelclip-4fn52-{fnv1a('pixelclip-4fn52(0).root(0).exit-handler-1(0).pin-revision(0).executor(0)')}"
            task["child_tasks"] = [child for child in task["child_tasks"] if child["pod_name"] == first]
    answer["run_details"]["task_details"] = tasks
    return answer


def test_status_names_what_a_pod_waits_for(kfp, tmp_path):
    answer = waiting_for_its_first_pod()
    kfp.kept["runs"][answer["run_id"]] = answer
    lines = runs.status(Target(kfp.url), answer["run_id"], NOW).lines
    assert lines[0].endswith("pin_revision: its pod has not started; try pixelclip pipeline doctor")
    with fake_cluster(tmp_path / "no-kubeconfig") as cluster:
        (task,) = [task for task in answer["run_details"]["task_details"] if task["display_name"] == "executor"]
        workflow, _, number = task["child_tasks"][0]["pod_name"].rpartition("-")
        waiting = {"reason": "CreateContainerConfigError", "message": 'configmap "pixelclip" not found'}
        status = {"phase": "Pending", "containerStatuses": [container("wait", {}), container("main", {"waiting": waiting})]}
        cluster.add("pods", f"{workflow}-retry-system-container-impl-{number}", status=status)
        lines = runs.status(Target(kfp.url), answer["run_id"], NOW).lines
        assert lines[0] == ('PENDING      1:15:25  pin_revision: CreateContainerConfigError: configmap "pixelclip" not found')
        scheduled = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/3 nodes are available"}
        cluster.add("pods", f"{workflow}-retry-system-container-impl-{number}", status={"conditions": [scheduled]})
        lines = runs.status(Target(kfp.url), answer["run_id"], NOW).lines
        assert lines[0].endswith("pin_revision: Unschedulable: 0/3 nodes are available")


def container(name, state):
    return {"name": name, "state": state, "image": "i", "imageID": "", "ready": False, "restartCount": 0}


def fnv1a(text):
    value = 2166136261
    for byte in text.encode():
        value = ((value ^ byte) * 16777619) % 2**32
    return value


def test_status_command(kfp, run):
    answer = load(kfp, "failed-out-of-memory")
    code, out, err = run("status", answer["run_id"])
    assert (code, err) == (1, "") and "train: out of memory (137)" in out and out.count("\n") == 13
    code, _, err = run("status", "x")
    assert code == 2 and "runs x not found" in err and err.count("\n") == 1


@pytest.mark.parametrize("state", ["SUCCEEDED", "FAILED", "CANCELED", "RUNNING", "PENDING", "CANCELING", None])
def test_exit_code_of_a_run_without_steps(kfp, run, state):
    created = kfp.add("runs", {"state": state, "experiment_id": "e", "created_at": "2026-11-28T13:00:00Z"})
    code, out, _ = run("status", created["run_id"])
    assert code == {"SUCCEEDED": 0, "FAILED": 1, "CANCELED": 1}.get(state, 3) and len(out.splitlines()) == 2


def test_watch_prints_what_changes_until_the_end(kfp, monkeypatch):
    answer, printed, waited = load(kfp, "running-in-loop"), [], []
    ended = recorded("succeeded-parts-3") | {"run_id": answer["run_id"]}

    def wait(seconds):
        waited.append(seconds)
        if len(waited) == 3:
            kfp.kept["runs"][answer["run_id"]] = ended

    monkeypatch.setattr(runs.time, "sleep", wait)
    assert runs.watch(Target(kfp.url), answer["run_id"], printed.append, poll=5) == 0
    assert waited == [5, 5, 5]
    names = [line.split()[2] for line in printed[:5]]
    assert sum("shards" in line for line in printed) == 2 and names[0] == "pin_revision"  # running, then succeeded
    assert sum("masks/" in line for line in printed) == 3 and printed[-1].startswith("SUCCEEDED")


def running_train_job():
    """Return the run with a TrainJob as it was before it was terminated."""
    answer = recorded("terminated-train-job")
    answer |= {"state": "RUNNING", "finished_at": "1970-01-01T00:00:00Z", "state_history": answer["state_history"][:2]}
    open_tasks = [task for task in answer["run_details"]["task_details"] if task.get("state") == "FAILED"]
    for task in open_tasks:
        task |= {"state": "RUNNING", "end_time": "0001-01-01T00:00:00Z"}
    return answer


def test_status_shows_the_last_progress_of_a_trainjob(kfp):
    answer = running_train_job()
    kfp.kept["runs"][answer["run_id"]] = answer
    lines = [
        "TrainJob pixelclip-run: started; its logs: kubectl logs -f",
        "TrainJob pixelclip-run: progress: 1 of 2 nodes up (node 1: has no pod yet)",
        "TrainJob pixelclip-run: progress: step 120 of 1000 (12 %), loss 0.1234, 0:14:20 left; 2 of 2 nodes up",
        "TrainJob pixelclip-run: Kubernetes does not answer (Connection refused); retrying",
    ]
    step = "train_job: step 120 of 1000 (12 %), loss 0.1234, 0:14:20 left; 2 of 2 nodes up"
    assert not [line for line in runs.status(Target(kfp.url), answer["run_id"], NOW).lines if "step 120" in line]
    kfp.logs = dict.fromkeys(pods_of(answer, "RUNNING"), "\n".join(lines))
    (line,) = [line for line in runs.status(Target(kfp.url), answer["run_id"], NOW).lines if "train_job" in line]
    assert line.startswith("RUNNING ") and line.endswith(step)


def test_logs_of_all_attempts(kfp, run):
    answer = load(kfp, "terminated-after-pod-deleted")
    code, out, err = run("logs", answer["run_id"], "train")
    assert (code, err) == (0, "")
    titles = [line for line in out.splitlines() if line.startswith("---")]
    assert titles == ["--- train, attempt 1 of 2", "--- train, attempt 2 of 2"] and out.count("train: 10 of 40 steps") == 2
    code, _, err = run("logs", answer["run_id"], "evaluate")
    assert code == 2 and "no log" in err and "evaluate is SKIPPED" in err
    code, _, err = run("logs", answer["run_id"], "tarin")
    assert code == 2 and "has no such step; its steps are pin_revision, fetch_data" in err


def test_logs_of_one_part(kfp, run):
    answer = load(kfp, "succeeded-parts-3")
    kfp.logs = {pod: f"log of {pod}" for pod in pods_of(answer, "SUCCEEDED")}
    parts = [run("logs", answer["run_id"], f"masks/{number}")[1] for number in (1, 2, 3)]
    assert len(set(parts)) == 3 and all(part.count("log of") == 1 for part in parts)
    _, out, _ = run("logs", answer["run_id"], "masks")
    assert out.count("--- masks/") == 3 and all(part.strip() in out for part in parts)


def test_cancel(kfp, run):
    answer = load(kfp, "running-in-loop")
    assert run("cancel", answer["run_id"])[0] == 0
    assert kfp.kept["runs"][answer["run_id"]]["state"] == "CANCELING"
    ended = load(kfp, "succeeded-cached")
    code, _, err = run("cancel", ended["run_id"])
    assert code == 2 and "has already ended: SUCCEEDED" in err


def test_a_refused_log_is_an_error(kfp, run, monkeypatch):
    answer = load(kfp, "failed-timeout")
    kfp.token = "right"
    monkeypatch.setenv(TOKEN, "right")
    assert run("status", answer["run_id"])[0] == 1
    monkeypatch.setenv(TOKEN, "wrong")
    code, _, err = run("status", answer["run_id"])
    assert code == 2 and "rejected the request (401" in err
