"""The steps under KFP's MLflow plugin, which creates a run for the pipeline run and below it one for each task.

The plugin is played by this test: names, variables and order are those of a run that a real KFP 2.17.0 recorded.
"""

import pytest
from mlflow import MlflowClient

from helpers import mlflow_runs, tiny
from helpers.mlflow_runs import PROVENANCE, curve
from helpers.registrations import evaluation
from pixelclip.config import RegisterConfig
from pixelclip.register import run as register
from pixelclip.tracking.run import PIPELINE_RUN, Run
from pixelclip.tracking.server import tracking_uri
from pixelclip_pipelines.finish import finish

client = mlflow_runs.client
NAME = "plugin, own env left out"
pytestmark = pytest.mark.filterwarnings("ignore:.*An input example was not provided")


class Plugin:
    """Create a run per task, set the variables of its pod, and close the run with the task."""

    def __init__(self, client: MlflowClient, folder) -> None:
        self.client = client
        self.experiment = client.create_experiment("kfp", artifact_location=(folder / "files").as_uri())
        self.root = client.create_run(self.experiment, run_name=NAME).info.run_id
        self.runs: dict[str, str] = {}

    def task(self, name: str, patch: pytest.MonkeyPatch, step) -> None:
        tags = {"mlflow.parentRunId": self.root}
        run_id = self.runs[name] = self.client.create_run(self.experiment, run_name=name, tags=tags).info.run_id
        patch.setenv("MLFLOW_RUN_ID", run_id)
        patch.setenv("MLFLOW_EXPERIMENT_ID", self.experiment)
        step()
        assert self.client.get_run(run_id).info.status == "RUNNING", "the plugin ends the run"
        self.client.set_terminated(run_id, "FINISHED")


def test_every_task_uses_the_run_of_the_plugin(client, monkeypatch, tmp_path):
    monkeypatch.setenv(PIPELINE_RUN, "p1")
    # The pod has both addresses; the plugin's counts.
    monkeypatch.setenv("PIXELCLIP_MLFLOW_URI", "http://127.0.0.1:9")
    plugin = Plugin(client, tmp_path)
    model = tiny.model_folder(tmp_path / "model", tiny.clip_folder(tmp_path / "clip"))
    evaluated = evaluation(tmp_path / "evaluation", model, 30.0, 5.0)

    def train() -> None:
        run = Run.start(model, "train", PROVENANCE)
        run.log({"loss": 0.5}, 1)
        run.finish()

    def evaluate() -> None:
        run = Run.attach(model, evaluated, PROVENANCE)
        run.values({"miou/set": 30.0})
        run.tags({"protocol": "whole"})
        run.finish()

    plugin.task("train", monkeypatch, train)
    plugin.task("evaluate", monkeypatch, evaluate)
    plugin.task(
        "register", monkeypatch, lambda: register(model, evaluated, tmp_path / "out", RegisterConfig(name="m", min_gain=1))
    )
    plugin.task("finish", monkeypatch, lambda: finish("COMPLETE", nodes=1))

    # Nothing besides the plugin's runs, with its names, parents and ends.
    found = {run.info.run_id: run for run in client.search_runs([plugin.experiment])}
    assert set(found) == {plugin.root, *plugin.runs.values()}
    assert client.get_experiment_by_name("pixelclip") is None
    assert found[plugin.root].info.run_name == NAME and found[plugin.root].info.status == "RUNNING"
    for name, run_id in plugin.runs.items():
        assert (found[run_id].info.run_name, found[run_id].info.status) == (name, "FINISHED")
        assert found[run_id].data.tags["mlflow.parentRunId"] == plugin.root
    # The model belongs to the run of `train`, which has everything about it.
    assert client.get_model_version("m", "1").run_id == plugin.runs["train"]
    trained, evaluation_run = found[plugin.runs["train"]].data, found[plugin.runs["evaluate"]].data
    assert curve(client, plugin.runs["train"]) == [(1, 0.5)]
    assert trained.metrics == {"loss": 0.5, "miou/set": 30.0} and evaluation_run.metrics == {"miou/set": 30.0}
    assert (
        trained.tags["kfp.run_id"] == "p1" and trained.tags["code.revision"] == "abc" and trained.params["train.steps"] == "3"
    )
    assert trained.tags["protocol"] == evaluation_run.tags["protocol"] == "whole"


def test_exit_handler_without_a_plugin_run_leaves_the_plugins_runs(client, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv(PIPELINE_RUN, "p1")
    plugin = Plugin(client, tmp_path)
    tags = {"mlflow.parentRunId": plugin.root, "kfp.run_id": "p1"}
    nested = client.create_run(plugin.experiment, tags=tags).info.run_id
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", plugin.experiment)
    finish("FAILED", nodes=1)
    assert client.get_run(nested).info.status == "RUNNING"
    assert "has no MLflow run of its own to close" in capsys.readouterr().out


def test_own_variable_counts_only_without_the_plugins(monkeypatch):
    for name in ("MLFLOW_TRACKING_URI", "PIXELCLIP_MLFLOW_URI"):
        monkeypatch.delenv(name, raising=False)
    assert tracking_uri() == "sqlite:///runs/mlflow.db"
    monkeypatch.setenv("PIXELCLIP_MLFLOW_URI", "http://ours")
    assert tracking_uri() == "http://ours"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://plugins")
    assert tracking_uri() == "http://plugins"
