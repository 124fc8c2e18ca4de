"""The TrainJob launcher: the kubernetes client against a small server of its API."""

import json
import os
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from helpers.kubernetes_server import ends, fake_kubernetes, kubeconfig
from pixelclip.config import TrainConfig, load, parse_overrides
from pixelclip_components.train_job.component import train_job
from pixelclip_pipelines import trainjob
from pixelclip_pipelines.cluster_config import Cluster
from pixelclip_pipelines.trainjob import template, train_on_nodes

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


def test_failed_training_fails_the_step(kubernetes, space):
    kubernetes.fate = [None, ends("Failed", "DeadlineExceeded", "no node was found")]
    with pytest.raises(RuntimeError, match="TrainJob pixelclip-run-1 failed: DeadlineExceeded no node was found"):
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
    monkeypatch.setattr(trainjob, "_MAX_FAILURES", 3)
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


def test_sigterm_deletes_the_job(kubernetes, space):
    before = signal.getsignal(signal.SIGTERM)

    def stop() -> None:
        while not kubernetes.jobs:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop).start()
    with pytest.raises(SystemExit):
        train_on_nodes(job(space), str(space), TrainConfig())
    assert kubernetes.log == ["create pixelclip-run-1", "delete pixelclip-run-1"] and not kubernetes.jobs
    assert signal.getsignal(signal.SIGTERM) is before


def test_paths_off_the_volume_are_rejected(kubernetes, space, tmp_path):
    with pytest.raises(ValueError, match="the parameter `workspace`"):
        train_on_nodes(job(space), "", TrainConfig())
    with pytest.raises(ValueError, match=r"elsewhere/masks: must be below .*volume"):
        train_on_nodes(job(space), str(tmp_path / "elsewhere"), TrainConfig())
    assert kubernetes.log == []


def test_component_points_to_the_trained_model(kubernetes, space):
    kubernetes.fate = [ends("Complete")]
    model, logged = SimpleNamespace(uri="s3://bucket/model", path=str(space / "kfp" / "model"), metadata={}), {}
    chosen = {"clip": "toy", "steps": 3, "batch_size": 4, "concepts": 5, "seed": 6}
    metrics = SimpleNamespace(log_metric=logged.__setitem__)
    train_job.python_func(model, metrics, **chosen, settings={"train.side": 32.0}, job=job(space), workspace=str(space))
    assert (model.metadata["location"], model.uri) == (str(space / "train"), "s3://bucket/model")
    assert logged == {"train/loss": 0.25}
    assert "train.side=32" in kubernetes.jobs["pixelclip-run-1"]["spec"]["trainer"]["args"]
