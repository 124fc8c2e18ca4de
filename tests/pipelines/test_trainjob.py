"""The TrainJob launcher: the kubernetes client against a small server of its API."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace

import pytest
from kubeflow_trainer_api.models.trainer_v1alpha1_train_job import TrainerV1alpha1TrainJob

from helpers.trainjob_server import ends, fake_kubernetes, kubeconfig
from pixelclip.config import TrainConfig
from pixelclip.settings import load, parse_overrides
from pixelclip.workflow.failures import exit_code
from pixelclip_components.train_job.component import train_job
from pixelclip_pipelines import launcher
from pixelclip_pipelines.cluster_config import Cluster
from pixelclip_pipelines.launcher import delete_unfinished, train_on_nodes
from pixelclip_pipelines.trainjob import template

JOBS = "/apis/trainer.kubeflow.org/v1alpha1/namespaces/default/trainjobs"


@pytest.fixture
def kubernetes(monkeypatch, tmp_path):
    with fake_kubernetes() as server:
        path = kubeconfig(tmp_path / "kubeconfig", server.url)
        monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(path))
        monkeypatch.setenv("PIXELCLIP_PIPELINE_RUN", "run-1")
        yield server


@pytest.fixture
def space(tmp_path) -> Path:
    """Return a workspace with the result of a training run."""
    trained = tmp_path / "volume" / "a" / "train"
    trained.mkdir(parents=True)
    (trained / "metrics.json").write_text('{"train/loss": 0.25}')
    return trained.parent


def job(space: Path) -> str:
    """Return the job of the compiled pipeline, with shorter pauses than cluster.yaml allows."""
    cluster = Cluster.model_validate({"volume": {"claim": "shared", "mount": str(space.parent)}})
    created = template(cluster, 2, "r/p:1")
    created["metadata"]["annotations"] = dict.fromkeys(created["metadata"]["annotations"], "0.01")
    return json.dumps(created)


def test_training_on_nodes_returns_its_metrics(kubernetes, space, monkeypatch):
    monkeypatch.setenv("MLFLOW_RUN_ID", "mine")
    kubernetes.fate = [None, None, ends("Complete")]
    assert train_on_nodes(job(space), str(space), TrainConfig(steps=7, clip="toy")) == {"train/loss": 0.25}
    created = kubernetes.jobs["pixelclip-run-1"]
    arguments = created["spec"]["trainer"]["args"]
    assert arguments[:4] == ["--masks", f"{space}/masks", "--out", f"{space}/train"]
    assert load("train", overrides=parse_overrides(arguments[4:])) == TrainConfig(
        steps=7, clip="toy"
    )  # as the command reads it
    assert len(arguments[4:]) == len(TrainConfig.model_fields)
    variables = {each["name"]: each.get("value") for each in created["spec"]["trainer"]["env"]}
    assert (variables["PIXELCLIP_PIPELINE_RUN"], variables["MLFLOW_RUN_ID"]) == ("run-1", "mine")
    assert kubernetes.log == ["create pixelclip-run-1"]


def test_trainjob_command_is_valid_on_the_command_line(kubernetes, space):
    import typer

    from pixelclip.cli.app import app

    kubernetes.fate = [ends("Complete")]
    train_on_nodes(job(space), str(space), TrainConfig())
    trainer = kubernetes.jobs["pixelclip-run-1"]["spec"]["trainer"]
    assert trainer["command"][-3:] == ["-m", "pixelclip", "train"]
    command = typer.main.get_command(app).commands["train"]
    context = command.make_context("train", list(trainer["args"]))
    assert Path(context.params["out"]) == space / "train"


def test_progress_and_nodes_are_printed_when_they_change(kubernetes, space, capsys):
    def running(number: int) -> dict:
        labels = {"batch.kubernetes.io/job-completion-index": str(number)}
        metadata = {"name": f"node-{number}", "labels": labels, "creationTimestamp": "2026-11-29T12:00:00Z"}
        return {"metadata": metadata, "status": {"phase": "Running"}}

    def at(step: int, loss: str) -> dict:
        now = datetime.now(UTC).isoformat()
        metrics = [{"name": name, "value": value} for name, value in {"step": str(step), "steps": "9", "loss": loss}.items()]
        return {"trainerStatus": {"metrics": metrics, "estimatedRemainingSeconds": 60, "lastUpdatedTime": now}}

    kubernetes.pods = [running(0), running(1)]
    kubernetes.fate = [None, at(3, "0.5"), at(3, "0.5"), at(6, "0.25"), ends("Complete")]
    train_on_nodes(job(space), str(space), TrainConfig(steps=9))
    lines = [line for line in capsys.readouterr().out.splitlines() if "progress" in line]
    assert lines == [
        "TrainJob pixelclip-run-1: progress: 2 of 2 nodes up",
        "TrainJob pixelclip-run-1: progress: step 3 of 9 (33 %), loss 0.5, 0:01:00 left; 2 of 2 nodes up",
        "TrainJob pixelclip-run-1: progress: step 6 of 9 (66 %), loss 0.25, 0:01:00 left; 2 of 2 nodes up",
    ]
    assert set(kubernetes.selectors) == {
        "jobset.sigs.k8s.io/jobset-name=pixelclip-run-1,jobset.sigs.k8s.io/replicatedjob-name=node"
    }


def test_missing_right_to_list_pods_is_said_once(kubernetes, space, capsys):
    kubernetes.fate = [None, None, None, ends("Complete")]
    train_on_nodes(job(space), str(space), TrainConfig())
    assert capsys.readouterr().out.count("its nodes are not shown: pods is forbidden to pipeline-runner") == 1
    assert len(kubernetes.selectors) == 1


def test_failed_training_fails_the_step(kubernetes, space):
    kubernetes.fate = [None, ends("Failed", "DeadlineExceeded", "no node was found")]
    with pytest.raises(RuntimeError, match="TrainJob pixelclip-run-1 failed: DeadlineExceeded no node was found"):
        train_on_nodes(job(space), str(space), TrainConfig())


def test_nodes_report_whether_a_retry_can_help(kubernetes, space):
    """Kubernetes says only that the job failed; the nodes write the reason to the shared volume."""
    kubernetes.fate = [ends("Complete")]
    train_on_nodes(job(space), str(space), TrainConfig())
    variables = {each["name"]: each.get("value") for each in kubernetes.jobs["pixelclip-run-1"]["spec"]["trainer"]["env"]}
    failure = Path(variables["PIXELCLIP_FAILURE_FILE"])
    assert failure.parent == space, "on the volume"
    for written, kind, code, message in (
        ("2 masks: no such folder", ValueError, 2, "masks: no such folder"),
        ("75 MLflow cannot be reached", RuntimeError, 75, "MLflow cannot be reached"),
        ("", RuntimeError, 75, "JobFailed"),
    ):
        kubernetes.jobs["pixelclip-run-1"] = {"metadata": {}}
        kubernetes.fate = [None, None, ends("Failed", "JobFailed")]
        failure.write_text(written) if written else failure.unlink()
        with pytest.raises(kind, match=f"TrainJob pixelclip-run-1 failed: {message}") as failed:
            train_on_nodes(job(space), str(space), TrainConfig())
        assert exit_code(failed.value) == code


def test_reason_of_an_earlier_failure_is_removed(kubernetes, space):
    (space / ".train.failure").write_text("2 masks: no such folder")
    kubernetes.fate = [ends("Failed", "JobFailed")]
    with pytest.raises(RuntimeError, match="JobFailed"):
        train_on_nodes(job(space), str(space), TrainConfig())


def test_deleted_job_fails_the_step(kubernetes, space):
    kubernetes.fate = [None, "gone"]
    with pytest.raises(RuntimeError, match="was deleted before it ended"):
        train_on_nodes(job(space), str(space), TrainConfig())


def test_retry_waits_for_a_running_job(kubernetes, space):
    kubernetes.jobs["pixelclip-run-1"] = {"metadata": {"name": "pixelclip-run-1"}}
    kubernetes.fate = [None, None, ends("Complete")]
    train_on_nodes(job(space), str(space), TrainConfig())
    assert kubernetes.log == []


def test_retry_replaces_a_failed_job(kubernetes, space):
    kubernetes.jobs["pixelclip-run-1"] = {"status": {"conditions": [ends("Failed")]}}
    kubernetes.fate = [ends("Complete")]
    train_on_nodes(job(space), str(space), TrainConfig())
    assert kubernetes.log == ["delete pixelclip-run-1", "create pixelclip-run-1"]


def test_transient_api_errors_are_retried(kubernetes, space, capsys):
    kubernetes.jobs["pixelclip-run-1"] = {"metadata": {}}
    kubernetes.fate = [None, 500, 503, None, ends("Complete")]
    train_on_nodes(job(space), str(space), TrainConfig())
    assert capsys.readouterr().out.count("does not answer") == 2


@pytest.mark.parametrize("code", [401, 403])
def test_lost_rights_end_the_wait(kubernetes, space, code):
    kubernetes.jobs["pixelclip-run-1"] = {"metadata": {}}
    kubernetes.fate = [None, code]
    with pytest.raises(RuntimeError, match="cannot be watched: try later"):
        train_on_nodes(job(space), str(space), TrainConfig())


def test_persistent_api_errors_end_the_wait(kubernetes, space, monkeypatch):
    monkeypatch.setattr(launcher, "_MAX_FAILURES", 3)
    kubernetes.jobs["pixelclip-run-1"] = {"metadata": {}}
    kubernetes.fate = [None, *[500] * 9]
    with pytest.raises(RuntimeError, match="cannot be watched"):
        train_on_nodes(job(space), str(space), TrainConfig())


def test_rejected_job_gives_the_reason(kubernetes, space):
    kubernetes.refuse = 403
    with pytest.raises(RuntimeError, match="cannot be created: 403 trainjobs is forbidden to pipeline-runner"):
        train_on_nodes(job(space), str(space), TrainConfig())


def test_unreachable_api_server_is_reported(kubernetes, space, tmp_path):
    written = tmp_path / "kubeconfig"
    written.write_text(written.read_text().replace(kubernetes.url, "http://127.0.0.1:9"))
    with pytest.raises(RuntimeError, match=r"TrainJob pixelclip-run-1 cannot be created: .*Connection refused"):
        train_on_nodes(job(space), str(space), TrainConfig())


LAUNCHER = """
import sys
from pixelclip.config import TrainConfig
from pixelclip_pipelines.launcher import train_on_nodes
train_on_nodes(open(sys.argv[1]).read(), sys.argv[2], TrainConfig())
"""


def test_sigterm_deletes_the_job_within_the_time_that_kfp_leaves(kubernetes, space, tmp_path):
    """KFP kills the process 1.4 s after SIGTERM. Here the API server does not answer the request under way."""
    (tmp_path / "job.json").write_text(job(space))
    kubernetes.fate = ["hang"]
    words = [sys.executable, "-c", LAUNCHER, str(tmp_path / "job.json"), str(space)]
    environment = os.environ | {"KUBECONFIG": str(tmp_path / "kubeconfig")}
    with subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 30
        while kubernetes.polls < 2 and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(1.4)
        process.kill()
        printed = process.stdout.read() if process.stdout else ""
    assert process.returncode == 128 + signal.SIGTERM
    assert kubernetes.log == ["create pixelclip-run-1", "delete pixelclip-run-1"] and not kubernetes.jobs
    assert printed.splitlines()[-1] == "TrainJob pixelclip-run-1: SIGTERM; deleted"


def test_sigterm_between_two_polls_deletes_the_job(kubernetes, space, monkeypatch):
    slow = json.loads(job(space))
    slow["metadata"]["annotations"] = dict.fromkeys(slow["metadata"]["annotations"], "60")
    before = signal.getsignal(signal.SIGTERM)
    paused, sleep = threading.Event(), time.sleep

    def note(seconds: float) -> None:
        paused.set()
        sleep(seconds)

    monkeypatch.setattr(time, "sleep", note)

    def stop() -> None:
        paused.wait(30)
        sleep(0.2)  # a signal just before the system call would not end it
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop).start()
    start = time.monotonic()
    with pytest.raises(SystemExit) as ended:
        train_on_nodes(json.dumps(slow), str(space), TrainConfig())
    assert ended.value.code == 128 + signal.SIGTERM and time.monotonic() - start < 30
    assert kubernetes.log == ["create pixelclip-run-1", "delete pixelclip-run-1"] and not kubernetes.jobs
    assert signal.getsignal(signal.SIGTERM) is before


def test_launching_pod_owns_the_job(kubernetes, space, monkeypatch):
    monkeypatch.setenv("KFP_POD_NAME", "pixelclip-4zjps-2111814482")
    monkeypatch.setenv("KFP_POD_UID", "u-1")
    kubernetes.fate = [ends("Complete")]
    train_on_nodes(job(space), str(space), TrainConfig())
    created = {name: value for name, value in kubernetes.jobs["pixelclip-run-1"].items() if name != "status"}
    (owner,) = created["metadata"]["ownerReferences"]
    assert owner == {"apiVersion": "v1", "kind": "Pod", "name": "pixelclip-4zjps-2111814482", "uid": "u-1"}
    assert TrainerV1alpha1TrainJob.from_dict(created).metadata.owner_references[0].uid == "u-1"


def test_retry_in_a_new_pod_takes_over_a_running_job(kubernetes, space, monkeypatch, capsys):
    """The job would be deleted with the pod of the first attempt."""
    first = {"apiVersion": "v1", "kind": "Pod", "name": "first", "uid": "u-1"}
    running = {"metadata": {"name": "pixelclip-run-1", "resourceVersion": "7", "ownerReferences": [first]}, "spec": {"a": 1}}
    kubernetes.jobs["pixelclip-run-1"] = json.loads(json.dumps(running))
    monkeypatch.setenv("KFP_POD_NAME", "second")
    monkeypatch.setenv("KFP_POD_UID", "u-2")
    kubernetes.fate = [None, ends("Complete")]
    train_on_nodes(job(space), str(space), TrainConfig())
    taken = kubernetes.jobs["pixelclip-run-1"]
    assert [owner["uid"] for owner in taken["metadata"]["ownerReferences"]] == ["u-2"]
    assert taken["metadata"]["resourceVersion"] == "7" and taken["spec"] == {"a": 1}
    kubernetes.jobs["pixelclip-run-1"], kubernetes.refuse = running, 403
    kubernetes.fate = [None, ends("Complete")]
    train_on_nodes(job(space), str(space), TrainConfig())
    assert "cannot be assigned to this pod (trainjobs is forbidden" in capsys.readouterr().out


def test_job_that_is_being_deleted_is_created_anew(kubernetes, space, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda _: None)
    kubernetes.jobs["pixelclip-run-1"] = {"metadata": {"deletionTimestamp": "2026-11-28T12:00:00Z"}}
    kubernetes.fate = [None, None, "gone", ends("Complete")]
    train_on_nodes(job(space), str(space), TrainConfig())
    assert kubernetes.log == ["create pixelclip-run-1"]


@pytest.mark.parametrize(
    ("existing", "log"),
    [
        ([], ["delete pixelclip-run-1"]),
        ([ends("Failed")], ["delete pixelclip-run-1"]),
        ([ends("Complete")], []),
        (None, []),
    ],
    ids=["running", "failed", "complete", "missing"],
)
def test_unfinished_job_is_deleted_at_the_end(kubernetes, existing, log):
    if existing is not None:
        kubernetes.jobs["pixelclip-run-1"] = {"metadata": {}, "status": {"conditions": existing}}
    delete_unfinished()
    assert kubernetes.log == log


def test_missing_right_to_delete_is_reported(kubernetes):
    kubernetes.jobs["pixelclip-run-1"], kubernetes.refuse = {"metadata": {}}, 403
    with pytest.raises(RuntimeError, match="TrainJob pixelclip-run-1 cannot be deleted: trainjobs is forbidden"):
        delete_unfinished()


def test_paths_off_the_volume_are_rejected(kubernetes, space, tmp_path):
    with pytest.raises(ValueError, match="the parameter `workspace`"):
        train_on_nodes(job(space), "", TrainConfig())
    with pytest.raises(ValueError, match=r"elsewhere/masks: must be below .*volume"):
        train_on_nodes(job(space), str(tmp_path / "elsewhere"), TrainConfig())
    assert kubernetes.log == []


def test_component_points_to_the_trained_model(kubernetes, space):
    kubernetes.fate = [ends("Complete")]
    model = SimpleNamespace(uri="s3://bucket/model", path=str(space / "kfp" / "model"), metadata={})
    chosen = {"clip": "toy", "steps": 3, "batch_size": 4, "concepts": 5, "seed": 6}
    train_job.python_func(model, **chosen, settings={"train.side": 32.0}, job=job(space), workspace=str(space))
    assert (model.metadata["location"], model.uri) == (str(space / "train"), "s3://bucket/model")
    assert model.metadata["train/loss"] == 0.25
    assert "train.side=32" in kubernetes.jobs["pixelclip-run-1"]["spec"]["trainer"]["args"]
