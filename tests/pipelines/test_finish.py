"""The end of a pipeline run: its MLflow run and its TrainJob, for each state that a real KFP recorded."""

import json
from types import SimpleNamespace

import pytest
from kfp import dsl

from helpers import kfp_steps, tiny
from helpers.json_server import JsonHandler, served
from helpers.trainjob_server import ends, fake_kubernetes, kubeconfig
from pixelclip.tracking.run import PIPELINE_RUN
from pixelclip_components.finish.component import finish
from pixelclip_pipelines import finish as module
from pixelclip_pipelines.finish import close_run

RUNS = kfp_steps.RECORDED.parent / "api"
STATES = {path.stem.partition("-")[2] for path in kfp_steps.RECORDED.glob("finish-*.json")}
ENV = ("KF_PIPELINES_ENDPOINT", "ML_PIPELINE_SERVICE_HOST", "ML_PIPELINE_SERVICE_PORT", "MLFLOW_RUN_ID")


def ended(state: str) -> dsl.PipelineTaskFinalStatus:
    """Return the status that KFP's executor makes of a recorded input."""
    recorded = json.loads((kfp_steps.RECORDED / f"finish-{state}.json").read_text())
    status = recorded["inputs"]["parameterValues"]["status"]
    return dsl.PipelineTaskFinalStatus(
        status["state"], status["pipelineJobResourceName"], status["pipelineTaskName"], None, None
    )


@pytest.fixture
def kfp(monkeypatch):
    """Yield a server of KFP's API that answers with one run; `answers` are status codes of its first answers."""
    held = SimpleNamespace(run={}, answers=[], asked=[], tokens=[])

    class Handler(JsonHandler):
        def do_GET(self):
            held.asked.append(self.path)
            held.tokens.append(self.headers.get("Authorization"))
            self.answer(held.answers.pop(0) if held.answers else 200, held.run)

    for name in ENV:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("time.sleep", lambda _: None)
    with served(Handler) as url:
        monkeypatch.setenv("ML_PIPELINE_SERVICE_HOST", url.rpartition(":")[0].removeprefix("http://"))
        monkeypatch.setenv("ML_PIPELINE_SERVICE_PORT", url.rpartition(":")[2])
        yield held


@pytest.fixture
def client(tmp_path, monkeypatch, kfp):
    return tiny.mlflow_at(monkeypatch, tmp_path)


def started(client, tag: str, monkeypatch) -> str:
    monkeypatch.setenv(PIPELINE_RUN, tag)
    experiment = client.get_experiment_by_name("pixelclip")
    number = experiment.experiment_id if experiment else client.create_experiment("pixelclip")
    return client.create_run(number, tags={"kfp.run_id": tag}).info.run_id


# MLflow.


def test_states_were_recorded():
    assert {"COMPLETE", "FAILED", "RUNNING"} == STATES


@pytest.mark.parametrize(
    ("state", "run", "expected"),
    [
        ("COMPLETE", "running", "FINISHED"),
        ("FAILED", "running", "FAILED"),
        ("RUNNING", "canceling", "KILLED"),
        ("RUNNING", "running", "FAILED"),
    ],
    ids=["complete", "exit code", "terminated", "timeout or lost driver"],
)
def test_run_is_closed_with_the_status_of_the_steps(client, kfp, monkeypatch, state, run, expected):
    kfp.run = json.loads((RUNS / f"run-{run}.json").read_text())
    other = started(client, "b", monkeypatch)
    mine = [started(client, "a", monkeypatch) for _ in range(2)]
    client.set_terminated(mine[1], "FINISHED")  # train succeeded; a later step failed
    finish.python_func(ended(state))
    assert [client.get_run(run).info.status for run in mine] == [expected] * 2
    assert client.get_run(other).info.status == "RUNNING"
    assert kfp.asked == (["/apis/v2beta1/runs/a"] if state == "RUNNING" else [])


def test_kfp_is_asked_again_with_the_pods_token(client, kfp, monkeypatch, tmp_path):
    run = started(client, "a", monkeypatch)
    (tmp_path / "token").write_text("secret\n")
    monkeypatch.setenv("KF_PIPELINES_SA_TOKEN_PATH", str(tmp_path / "token"))
    kfp.run, kfp.answers = {"state": "CANCELING"}, [503, 503]
    close_run("RUNNING")
    assert client.get_run(run).info.status == "KILLED" and kfp.tokens == ["Bearer secret"] * 3


@pytest.mark.parametrize(("marked", "expected"), [("RUNNING", "FAILED"), ("KILLED", "KILLED")])
def test_without_kfps_word_the_mark_of_a_terminated_step_counts(client, kfp, monkeypatch, capsys, marked, expected):
    run = started(client, "a", monkeypatch)
    client.update_run(run, status=marked)
    kfp.answers = [401, 401, 401]
    close_run("RUNNING")
    assert client.get_run(run).info.status == expected
    assert "does not say whether the run was terminated (HTTP Error 401" in capsys.readouterr().out


@pytest.mark.parametrize(("registered", "expected"), [(True, "FINISHED"), (False, "FAILED")])
def test_unknown_status_is_derived_from_the_registry(client, kfp, monkeypatch, registered, expected):
    run = started(client, "a", monkeypatch)
    if registered:
        client.create_registered_model("m")
        client.create_model_version("m", source="file:///nowhere", run_id=run)
    close_run("RUNNING")
    assert client.get_run(run).info.status == expected


def test_run_of_the_mlflow_plugin_is_not_closed(client, monkeypatch, capsys):
    run = started(client, "a", monkeypatch)
    monkeypatch.setenv("MLFLOW_RUN_ID", run)
    close_run("FAILED")
    assert client.get_run(run).info.status == "RUNNING" and "closed by the plugin" in capsys.readouterr().out


def test_without_training_no_run_is_closed(client, monkeypatch, capsys):
    monkeypatch.setenv(PIPELINE_RUN, "a")
    close_run("FAILED")
    assert "no MLflow run of its own to close" in capsys.readouterr().out
    monkeypatch.delenv(PIPELINE_RUN)
    with pytest.raises(ValueError, match=PIPELINE_RUN):
        close_run("FAILED")


# TrainJob.


@pytest.fixture
def kubernetes(tmp_path, monkeypatch):
    with fake_kubernetes() as server:
        path = kubeconfig(tmp_path / "kubeconfig", server.url)
        monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(path))
        yield server


@pytest.mark.parametrize("state", sorted(STATES))
@pytest.mark.parametrize("complete", [True, False])
def test_unfinished_trainjob_is_deleted_in_every_state(client, kubernetes, monkeypatch, state, complete):
    run = started(client, "a", monkeypatch)
    conditions = [ends("Complete")] if complete else []
    kubernetes.jobs["pixelclip-a"] = {"metadata": {}, "status": {"conditions": conditions}}
    kubernetes.jobs["pixelclip-b"] = {"metadata": {}}
    finish.python_func(ended(state), nodes=2)
    assert list(kubernetes.jobs) == (["pixelclip-a"] if complete else []) + ["pixelclip-b"]
    assert client.get_run(run).info.status != "RUNNING"


def test_mlflow_run_is_closed_although_the_trainjob_cannot_be_deleted(client, kubernetes, monkeypatch):
    run = started(client, "a", monkeypatch)
    kubernetes.jobs["pixelclip-a"], kubernetes.refuse = {"metadata": {}}, 403
    with pytest.raises(RuntimeError, match="cannot be deleted"):
        finish.python_func(ended("FAILED"), nodes=2)
    assert client.get_run(run).info.status == "FAILED"


def test_trainjob_is_deleted_in_runs_of_the_mlflow_plugin_and_without_mlflow(client, kubernetes, monkeypatch):
    monkeypatch.setenv(PIPELINE_RUN, "a")
    kubernetes.jobs["pixelclip-a"] = {"metadata": {}}
    monkeypatch.setattr(module, "connect", lambda: (_ for _ in ()).throw(ValueError("MLflow cannot be reached")))
    with pytest.raises(ValueError, match="cannot be reached"):
        finish.python_func(ended("RUNNING"), nodes=2)
    assert kubernetes.jobs == {}
    kubernetes.jobs["pixelclip-a"] = {"metadata": {}}
    monkeypatch.setenv("MLFLOW_RUN_ID", "of the plugin")
    finish.python_func(ended("RUNNING"), nodes=2)
    assert kubernetes.jobs == {}
