"""Runs and journal: everything reaches MLflow exactly once, also after a kill, a resume or an outage."""

import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import LoggedModelStatus
from mlflow.entities import Run as MlflowRun
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import TEMPORARILY_UNAVAILABLE
from PIL import Image

from helpers import mlflow_runs, services, tiny
from helpers.mlflow_runs import PROVENANCE, curve, mlflow_on_sqlite
from helpers.services import Mlflow
from pixelclip.tracking import journal
from pixelclip.tracking.description import evaluation_metrics, run_name
from pixelclip.tracking.run import PARENT_RUN, PIPELINE_RUN, Run, lineage_tags
from pixelclip.tracking.server import connect, experiment_id, tracking_uri
from pixelclip.workflow.provenance import flatten

client = mlflow_runs.client


def start(folder: Path, name: str = "demo") -> Run:
    folder.mkdir(exist_ok=True)
    return Run.start(folder, name, PROVENANCE)


def all_runs(client: MlflowClient) -> list[MlflowRun]:
    return client.search_runs([client.get_experiment_by_name("pixelclip").experiment_id])


def test_flatten_and_lineage_walk_the_whole_chain():
    assert flatten(PROVENANCE) == {"train.steps": 3, "train.clip": "toy", "masks.generator": "given"}
    tags = lineage_tags(PROVENANCE)
    assert tags["code.revision"] == "abc"
    assert {key: value for key, value in tags.items() if key.startswith("data.")} == {
        "data.masks.md5": "m1",
        "data.masks.path": "/there/masks",
        "data.shards.md5": "s1",
        "data.shards.path": "/there/shards",
    }


def test_metrics_params_tags_and_files_are_logged(client, tmp_path):
    run = start(tmp_path / "stage")
    assert client.get_run(run.run_id).info.status == "RUNNING"
    for step in range(1, 4):
        run.log({"loss": 1 / step, "speed": 2.0}, step)
    run.values({"final": 0.5})
    (tmp_path / "note.txt").write_text("hello")
    run.artifact(tmp_path / "note.txt", "notes")
    assert run.finish() is True

    logged = client.get_run(run.run_id)
    assert (logged.info.status, logged.info.run_name) == ("FINISHED", "demo")
    assert logged.data.params == {"train.steps": "3", "train.clip": "toy", "masks.generator": "given"}
    assert logged.data.tags["data.shards.md5"] == "s1" and logged.data.tags["code.revision"] == "abc"
    assert curve(client, run.run_id) == [(1, 1.0), (2, 0.5), (3, 1 / 3)]
    assert logged.data.metrics["final"] == 0.5
    assert [file.path for file in client.list_artifacts(run.run_id, "notes")] == ["notes/note.txt"]


def test_run_has_source_user_description_lineage_and_few_tags(client, monkeypatch, tmp_path):
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "ada")
    run = start(tmp_path / "stage")
    run.image(Image.new("RGB", (4, 4)), "segmentations a:b", 3)
    assert run.finish()
    tags = client.get_run(run.run_id).data.tags
    assert (tags["mlflow.source.name"], tags["mlflow.source.git.commit"], tags["mlflow.user"]) == (
        "pixelclip train",
        "abc",
        "ada",
    )
    assert {key for key in tags if key.startswith("data.")} == {"data.shards.md5"}
    assert "Not evaluated yet" in tags["mlflow.note.content"] and "`s1`" in tags["mlflow.note.content"]
    folder = Path(client.download_artifacts(run.run_id, "", str(tmp_path)))
    assert json.loads((folder / "lineage.json").read_text()) == PROVENANCE
    assert [file.name for file in (folder / "images").glob("segmentations a_b+step+3+*.png")]


def test_experiment_gets_kind_and_description(client, tmp_path):
    client.create_experiment("pixelclip", artifact_location=str(tmp_path))  # as before 0.2.0, without a kind
    start(tmp_path / "stage").finish()
    tags = client.get_experiment_by_name("pixelclip").tags
    assert tags["mlflow.experimentKind"] == "custom_model_development" and "PixelCLIP" in tags["mlflow.note.content"]


def test_run_name_states_data_masks_clip_steps_and_id():
    provenance = PROVENANCE | {"fingerprint": "0123456789"}
    assert run_name(provenance) == "shards, given, toy, 3 steps, 012345"


def test_evaluation_metrics_are_in_groups_and_percent():
    rows = [
        {"class": "dog, puppy", "iou": 40.0},
        {"class": "dog (wild)", "iou": 1.0},
        {"class": "dog", "iou": 2.0},
        {"class": "sky", "iou": None},
    ]
    assert evaluation_metrics({"miou/set": 30.0, "image_recall_clip/set": 0.9}, rows) == {
        "eval/set/miou": 30.0,
        "eval/set/image_recall_clip": 90.0,
        "eval/set/iou/dog": 40.0,
        "eval/set/iou/dog _wild_": 1.0,
        "eval/set/iou/dog 2": 2.0,
    }


def test_system_metrics_are_logged_while_the_run_lasts(client, monkeypatch, tmp_path):
    monkeypatch.setenv("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "true")
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.1")
    run = start(tmp_path / "stage")
    run.monitor_system()
    deadline = time.monotonic() + 20
    while "system/cpu_utilization_percentage" not in client.get_run(run.run_id).data.metrics:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert run.finish()


def test_final_value_of_a_curve_adds_no_point(client, tmp_path):
    run = start(tmp_path / "stage")
    run.log({"loss": 2.0}, 1)
    run.finish()
    resumed = start(tmp_path / "stage")
    for step in (1, 2):
        resumed.log({"loss": 2 / step}, step)
    resumed.values({"loss": 1.0, "final": 0.5})
    assert resumed.finish()
    assert curve(client, run.run_id) == [(1, 2.0), (2, 1.0)]
    assert client.get_run(run.run_id).data.metrics == {"loss": 1.0, "final": 0.5}


def test_long_values_are_cut_at_the_limit_of_mlflow_and_marked(client, tmp_path):
    run = start(tmp_path / "stage")
    texts = {str(length): "x" * (length - 1) + "y" for length in (500, 501, 6000, 6001, 8000, 8001, 20000)}
    run.params({f"long.{name}": text for name, text in texts.items()})
    run.tags({f"long.{name}": text for name, text in texts.items()})
    data = client.get_run(run.run_id).data
    for found, limit in ((data.params, 6000), (data.tags, 8000)):
        for name, text in texts.items():
            assert found[f"long.{name}"] == (text if len(text) <= limit else text[: limit - 3] + "...")


def test_failed_run_has_status_failed(client, tmp_path):
    run = start(tmp_path / "stage")
    run.finish("FAILED")
    assert client.get_run(run.run_id).info.status == "FAILED"


def test_resumed_run_adds_no_step_twice(client, tmp_path):
    first = start(tmp_path / "stage")
    for step in (1, 2, 3):
        first.log({"loss": float(step)}, step)
    first.finish("FAILED")
    second = start(tmp_path / "stage")
    for step in (2, 3, 4):  # it continues from an earlier checkpoint
        second.log({"loss": 10.0 * step}, step)
    second.finish()
    assert second.run_id == first.run_id
    assert curve(client, first.run_id) == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0)]
    assert client.get_run(first.run_id).info.status == "FINISHED"


def fail_once(patch: pytest.MonkeyPatch, method: str, times: int = 1) -> None:
    """Let the server fail in some of its responses."""
    respond, left = getattr(MlflowClient, method), [times]

    def unavailable(self, *args, **kwargs):
        if left[0]:
            left[0] -= 1
            raise MlflowException("API request failed with error code 503 != 200", TEMPORARILY_UNAVAILABLE)
        return respond(self, *args, **kwargs)

    patch.setattr(MlflowClient, method, unavailable)


@pytest.mark.parametrize("method", ["get_run", "update_run", "log_batch"])
def test_training_resumes_in_its_run_while_the_server_fails(client, monkeypatch, tmp_path, method):
    first = start(tmp_path / "stage")
    first.log({"loss": 1.0}, 1)
    first.finish("FAILED")
    fail_once(monkeypatch, method)
    second = start(tmp_path / "stage")
    second.log({"loss": 2.0}, 2)
    assert second.finish() is True
    assert second.run_id == first.run_id
    assert [run.info.status for run in all_runs(client)] == ["FINISHED"]
    assert curve(client, first.run_id) == [(1, 1.0), (2, 2.0)]


def test_training_resumes_without_its_server_and_delivers_later(client, monkeypatch, tmp_path, capsys):
    first = start(tmp_path / "stage")
    first.log({"loss": 1.0}, 1)
    first.finish("FAILED")
    state = json.loads((tmp_path / "stage" / "run.json").read_text())
    store, gone = state["tracking_uri"], f"http://127.0.0.1:{services.free_ports(1)[0]}"
    (tmp_path / "stage" / "run.json").write_text(json.dumps(state | {"tracking_uri": gone}))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", gone)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr("pixelclip.tracking.run._CLOSE_SECONDS", 1.0)
    second = start(tmp_path / "stage")
    second.log({"loss": 2.0}, 2)
    assert second.finish() is False
    output = capsys.readouterr().out
    assert f"MLflow at {gone} cannot be reached" in output and f"training continues in MLflow run {first.run_id}" in output
    (tmp_path / "stage" / "run.json").write_text(json.dumps(state))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    third = start(tmp_path / "stage")
    assert third.finish() is True
    assert [run.info.run_id for run in all_runs(client)] == [first.run_id]
    assert curve(client, first.run_id) == [(1, 1.0), (2, 2.0)]


@pytest.mark.parametrize("recorded", ["http://host:5000", "http://bot:old-secret@host:5000"])  # versions before 0.2.0 wrote it
def test_server_is_recognised_by_its_uri_without_the_password(client, monkeypatch, tmp_path, recorded):
    (tmp_path / "run.json").write_text(json.dumps({"run_id": "r", "tracking_uri": recorded, "delivered": 1}))
    (tmp_path / "curves.jsonl").write_text("".join(f'{{"step": {step}, "time": 0, "metrics": {{}}}}\n' for step in (1, 2)))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://bot:new@secret/x@host:5000")
    assert len(journal.Journal(client, tmp_path, "r").points) == 1
    assert json.loads((tmp_path / "run.json").read_text())["tracking_uri"] == "http://host:5000"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://bot:new@other:5000")
    assert len(journal.Journal(client, tmp_path, "r").points) == 2


def test_failing_server_that_is_not_the_one_of_the_run_is_an_error(client, monkeypatch, tmp_path):
    start(tmp_path / "stage").finish("FAILED")
    elsewhere = tiny.mlflow_at(monkeypatch, tmp_path / "elsewhere")
    fail_once(monkeypatch, "get_run")
    with pytest.raises(ValueError, match=r"MLflow at sqlite:.*elsewhere.* rejected the run: .* 503 != 200$"):
        start(tmp_path / "stage")
    assert elsewhere.get_experiment_by_name("pixelclip") is None  # no second run was started


def test_attaching_while_the_server_fails_is_an_error(client, monkeypatch, tmp_path):
    start(tmp_path / "model").finish()
    (tmp_path / "evaluation").mkdir()
    fail_once(monkeypatch, "get_run")
    with pytest.raises(ValueError, match=r"rejected the run: .* 503 != 200$"):
        Run.attach(tmp_path / "model", tmp_path / "evaluation", PROVENANCE)
    assert len(all_runs(client)) == 1


def test_incomplete_last_line_of_the_journal_is_removed(client, tmp_path):
    first = start(tmp_path / "stage")
    first.log({"loss": 1.0}, 1)
    first.finish("FAILED")
    journal = tmp_path / "stage" / "curves.jsonl"
    with journal.open("a") as file:
        file.write('{"step": 2, "time": 12, "metr')
    second = start(tmp_path / "stage")
    second.log({"loss": 2.0}, 2)
    second.finish()
    assert [json.loads(line)["step"] for line in journal.read_text().splitlines()] == [1, 2]
    assert curve(client, second.run_id) == [(1, 1.0), (2, 2.0)]


def test_points_are_split_into_several_requests(client, tmp_path):
    run = start(tmp_path / "stage")
    for step in range(1, 121):
        run.log({f"curve{i}": float(step * i) for i in range(10)}, step)
    assert run.finish()
    for i in (0, 9):
        assert curve(client, run.run_id, f"curve{i}") == [(step, float(step * i)) for step in range(1, 121)]


def test_run_of_the_environment_is_used_and_not_ended(client, monkeypatch, tmp_path):
    env_run = client.create_run(client.create_experiment("theirs")).info.run_id
    monkeypatch.setenv("MLFLOW_RUN_ID", env_run)
    run = start(tmp_path / "stage")
    run.log({"loss": 1.0}, 1)
    assert run.finish()
    assert run.run_id == env_run
    assert client.get_run(env_run).info.status == "RUNNING"
    assert curve(client, env_run) == [(1, 1.0)]
    # The next stage delivers the rest and does not end it either.
    with (tmp_path / "stage" / "curves.jsonl").open("a") as file:
        file.write('{"step": 2, "time": 1, "metrics": {"loss": 2.0}}\n')
    (tmp_path / "next").mkdir()
    Run.attach(tmp_path / "stage", tmp_path / "next", PROVENANCE).finish()
    assert curve(client, env_run) == [(1, 1.0), (2, 2.0)]
    assert client.get_run(env_run).info.status == "RUNNING"


def test_stages_of_one_pipeline_run_share_a_run(client, monkeypatch, tmp_path):
    start(tmp_path / "alone").finish()
    monkeypatch.setenv(PIPELINE_RUN, "p1")
    first = start(tmp_path / "one")
    first.finish()
    again = start(tmp_path / "two")
    assert again.run_id == first.run_id
    assert client.get_run(first.run_id).info.status == "RUNNING"
    again.finish()
    monkeypatch.setenv(PIPELINE_RUN, "p2")
    other = start(tmp_path / "three")
    other.finish()
    assert other.run_id != first.run_id
    assert len(all_runs(client)) == 3


@pytest.mark.parametrize("variable", [PIPELINE_RUN, "MLFLOW_RUN_ID"])
def test_training_restarted_in_an_empty_folder_adds_no_step_twice(client, monkeypatch, tmp_path, variable):
    """A retried pod without a workspace joins its run with an empty journal."""
    monkeypatch.setenv(variable, client.create_run(experiment_id(client)).info.run_id)
    first = start(tmp_path / "one")
    client.log_metric(first.run_id, "theirs", 1.0, step=10**6)  # not from our training
    for step in (10, 20, 30):
        first.log({"loss": float(step)} | ({"rate": 1.0} if step < 30 else {}), step)
    first.finish("FAILED")
    second = start(tmp_path / "two")
    for step in (10, 20, 30, 40, 50):
        second.log({"loss": step + 0.5, "rate": 2.0}, step)
    assert second.finish() is True
    assert second.run_id == first.run_id
    assert curve(client, first.run_id) == [(10, 10.0), (20, 20.0), (30, 30.0), (40, 40.5), (50, 50.5)]
    assert curve(client, first.run_id, "rate") == [(10, 1.0), (20, 1.0), (30, 2.0), (40, 2.0), (50, 2.0)]
    # Its own journal is complete, for a server without the run.
    client.delete_run(first.run_id)
    monkeypatch.delenv(variable)
    (tmp_path / "evaluation").mkdir()
    attached = Run.attach(tmp_path / "two", tmp_path / "evaluation", PROVENANCE)
    attached.finish()
    assert curve(client, attached.run_id) == [(step, step + 0.5) for step in (10, 20, 30, 40, 50)]


def test_run_of_the_environment_takes_precedence_over_an_interrupted_one(client, monkeypatch, tmp_path):
    """Kubeflow's MLflow plugin creates a new run for a retried task; with a workspace the training resumes."""
    first = start(tmp_path / "stage")
    first.log({"loss": 1.0}, 1)
    first.finish("FAILED")
    experiment = client.create_experiment("theirs")
    env_run = client.create_run(experiment, tags={"mlflow.parentRunId": "of the pipeline"}).info.run_id
    monkeypatch.setenv("MLFLOW_RUN_ID", env_run)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", experiment)
    monkeypatch.setenv(PARENT_RUN, "another")
    second = start(tmp_path / "stage")
    second.log({"loss": 2.0}, 2)
    second.finish()
    assert second.run_id == env_run
    assert curve(client, env_run) == [(1, 1.0), (2, 2.0)]
    assert client.get_run(env_run).data.tags["mlflow.parentRunId"] == "of the pipeline"
    assert client.get_run(env_run).info.status == "RUNNING"


def test_unknown_run_of_the_environment_is_named(client, monkeypatch, tmp_path):
    trained = start(tmp_path / "model")
    trained.finish()
    monkeypatch.setenv("MLFLOW_RUN_ID", "0" * 32)
    with pytest.raises(ValueError, match=r"rejected the run 0{32} \(MLFLOW_RUN_ID\): .*not found"):
        start(tmp_path / "stage")
    (tmp_path / "evaluation").mkdir()
    with pytest.raises(ValueError, match=r"rejected the run 0{32} \(MLFLOW_RUN_ID\): .*not found"):
        Run.attach(tmp_path / "model", tmp_path / "evaluation", PROVENANCE)


def test_child_runs_do_not_join_the_run_of_the_pipeline(client, monkeypatch, tmp_path):
    experiment = experiment_id(client)
    monkeypatch.setenv(PIPELINE_RUN, "p1")
    monkeypatch.setenv(PARENT_RUN, "above")
    children = [start(tmp_path / name) for name in ("one", "two")]
    for child in children:
        child.finish()
    assert children[0].run_id != children[1].run_id
    monkeypatch.delenv(PARENT_RUN)
    whole = client.create_run(experiment, tags={"kfp.run_id": "p1"}).info.run_id
    joined = start(tmp_path / "three")
    joined.finish()
    assert joined.run_id == whole
    for child in children:
        assert client.get_run(child.run_id).data.tags["mlflow.parentRunId"] == "above"


def test_evaluation_in_another_run_also_adds_metrics_to_the_training(client, monkeypatch, tmp_path):
    trained = start(tmp_path / "model")
    trained.log({"loss": 1.0}, 1)
    trained.finish()
    location = (tmp_path / "artifacts").as_uri()
    env_run = client.create_run(client.create_experiment("theirs", artifact_location=location)).info.run_id
    monkeypatch.setenv("MLFLOW_RUN_ID", env_run)
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "report.html").write_text("hello")
    attached = Run.attach(tmp_path / "model", tmp_path / "evaluation", PROVENANCE)
    attached.params({"evaluate.side": 3})
    attached.tags({"protocol": "whole"})
    attached.values({"miou": 30.0})
    attached.artifact(tmp_path / "report.html")
    assert attached.finish() and attached.run_id == env_run
    own, training = (client.get_run(run_id) for run_id in (env_run, trained.run_id))
    assert (own.data.metrics, training.data.metrics) == ({"miou": 30.0}, {"loss": 1.0, "miou": 30.0})
    assert own.data.tags["protocol"] == training.data.tags["protocol"] == "whole"
    assert own.data.params == {"evaluate.side": "3"}
    assert [[f.path for f in client.list_artifacts(run.info.run_id)] for run in (own, training)] == [
        ["report.html"],
        ["lineage.json"],
    ]
    assert (own.info.status, training.info.status) == ("RUNNING", "FINISHED")


def test_experiment_is_taken_from_the_environment(client, monkeypatch, tmp_path):
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "mine")
    run = start(tmp_path / "stage")
    run.finish()
    assert client.get_run(run.run_id).info.experiment_id == client.get_experiment_by_name("mine").experiment_id


def test_attaching_adds_to_the_run_and_does_not_end_it(client, tmp_path):
    model, stage = tmp_path / "model", tmp_path / "evaluation"
    trained = start(model)
    trained.log({"loss": 1.0}, 1)
    trained.finish()
    stage.mkdir()
    client.update_run(trained.run_id, status="FAILED")
    attached = Run.attach(model, stage, PROVENANCE)
    attached.values({"miou": 30.0})
    assert attached.finish()
    assert attached.run_id == trained.run_id
    assert client.get_run(trained.run_id).data.metrics == {"loss": 1.0, "miou": 30.0}
    assert client.get_run(trained.run_id).info.status == "FAILED"


@pytest.mark.parametrize("owned", [True, False])
def test_open_run_of_a_finished_training_is_closed_only_if_the_training_owned_it(client, monkeypatch, tmp_path, owned):
    run_id = client.create_run(experiment_id(client)).info.run_id
    if not owned:
        monkeypatch.setenv("MLFLOW_RUN_ID", run_id)
    trained = start(tmp_path / "model")
    trained.finish()
    monkeypatch.delenv("MLFLOW_RUN_ID", raising=False)
    client.update_run(trained.run_id, status="RUNNING")
    for _ in range(2):  # the stages that follow
        assert Run.trained(client, tmp_path / "model", PROVENANCE) == trained.run_id
        assert client.get_run(trained.run_id).info.status == ("FINISHED" if owned else "RUNNING")


@pytest.mark.parametrize("missing", ["another store", "a deleted run"])
def test_server_without_the_run_receives_the_whole_history(client, monkeypatch, tmp_path, missing):
    model, stage = tmp_path / "model", tmp_path / "evaluation"
    trained = start(model)
    for step in (1, 2):
        trained.log({"loss": float(step)}, step)
    trained.finish()
    if missing == "another store":
        client = tiny.mlflow_at(monkeypatch, tmp_path / "elsewhere")
    else:
        client.delete_run(trained.run_id)
    stage.mkdir()
    attached = Run.attach(model, stage, PROVENANCE)
    attached.finish()
    (new,) = all_runs(client)
    assert new.info.run_id == attached.run_id != trained.run_id
    assert new.info.status == "FINISHED"
    assert curve(client, attached.run_id) == [(1, 1.0), (2, 2.0)]
    assert new.data.params["masks.generator"] == "given"


def test_logged_model_of_an_outage_is_replaced_by_the_next_attempt(client, monkeypatch, tmp_path):
    best = tmp_path / "best"
    best.mkdir()
    (best / "weights").write_text("w")
    run = start(tmp_path / "stage")
    run.model(best, "train/miou_set", 30.0, 5)
    upload = MlflowClient.log_model_artifacts

    def fails_once(self, *words):
        monkeypatch.setattr(MlflowClient, "log_model_artifacts", upload)
        raise MlflowException("down", TEMPORARILY_UNAVAILABLE)

    monkeypatch.setattr(MlflowClient, "log_model_artifacts", fails_once)
    assert run.finish()
    (logged,) = client.search_logged_models([experiment_id(client)], f"source_run_id = '{run.run_id}'")
    assert (logged.status, [metric.value for metric in logged.metrics]) == (LoggedModelStatus.READY, [30.0])


def test_unfinished_logged_model_of_a_training_that_ended_in_an_outage_is_deleted(client, monkeypatch, tmp_path):
    best, model = tmp_path / "best", tmp_path / "model"
    best.mkdir()
    (best / "weights").write_text("w")
    run = start(model)
    run.model(best, "train/miou_set", 30.0, 5)

    def fails(self, *words):
        raise MlflowException("down", TEMPORARILY_UNAVAILABLE)

    def models() -> list[LoggedModelStatus]:
        found = client.search_logged_models([experiment_id(client)], f"source_run_id = '{run.run_id}'")
        return [each.status for each in found]

    with monkeypatch.context() as outage:
        outage.setattr(MlflowClient, "log_model_artifacts", fails)
        outage.setattr("pixelclip.tracking.run._CLOSE_SECONDS", 0)
        assert not run.finish()
    assert models() == [LoggedModelStatus.PENDING]
    stage = tmp_path / "evaluation"
    stage.mkdir()
    Run.attach(model, stage, PROVENANCE).finish()
    assert models() == [] and client.get_run(run.run_id).info.status == "FINISHED"


@pytest.mark.parametrize("pages", ["", "https://mlflow.example"])
def test_start_prints_the_url_of_the_run(client, monkeypatch, tmp_path, capsys, pages):
    monkeypatch.setenv("PIXELCLIP_MLFLOW_UI", pages)
    run = start(tmp_path / "stage")
    page = f"{pages}/#/experiments/{experiment_id(client)}/runs/{run.run_id}?workflowType=machine_learning"
    expected = page if pages else f"{run.run_id} at {tracking_uri()}"
    assert f"MLflow run: {expected}\n" in capsys.readouterr().out


def test_unreachable_server_is_an_error_at_the_start(client, monkeypatch, tmp_path):
    uri = f"http://127.0.0.1:{services.free_ports(1)[0]}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with pytest.raises(ValueError, match=f"MLflow at {uri} cannot be reached .*MLFLOW_TRACKING_URI"):
        start(tmp_path / "stage")


def test_unreachable_server_names_the_variable_of_its_address(client, monkeypatch):
    uri = f"http://127.0.0.1:{services.free_ports(1)[0]}"
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    monkeypatch.setenv("PIXELCLIP_MLFLOW_URI", uri)
    with pytest.raises(ValueError, match=f"MLflow at {uri} cannot be reached .*PIXELCLIP_MLFLOW_URI"):
        connect()


def test_file_that_is_not_a_database_is_an_error(client, tmp_path):
    (tmp_path / "mlflow" / "mlflow.db").write_text("no database")
    with pytest.raises(ValueError, match=r"mlflow\.db cannot be used .*MLFLOW_TRACKING_URI"):
        connect()


@pytest.fixture(scope="module", autouse=True)
def early_server(request, tmp_path_factory) -> Iterator[Mlflow | None]:
    """Started before the first test of this module, because it takes many seconds."""
    wanted = any("server" in item.fixturenames for item in request.session.items if item.module is request.module)
    folder = tmp_path_factory.mktemp("server")
    files = ["--default-artifact-root", str(folder / "files")]  # within reach without the server, as the database is
    made = mlflow_on_sqlite(folder, files) if wanted else None
    if made:
        made.server.start()
    yield made
    if made:
        made.server.kill()


@pytest.fixture
def server(early_server, client, monkeypatch) -> Mlflow:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", early_server.uri)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    if early_server.server.process is None:
        early_server.server.start()
    early_server.server.wait()
    return early_server


def test_curves_of_an_outage_are_delivered_when_the_store_is_back(client, tmp_path, capsys):
    run = start(tmp_path / "stage")
    run.log({"loss": 1.0}, 1)
    assert not run.journal.pending
    store = tmp_path / "mlflow" / "mlflow.db"
    kept = store.read_bytes()
    store.write_bytes(b"no database")
    for step in (2, 3):
        run.log({"loss": float(step)}, step)
    run.values({"final": 0.5})
    assert not run.journal.flush(0)
    store.write_bytes(kept)
    assert run.finish() is True
    assert curve(client, run.run_id) == [(1, 1.0), (2, 2.0), (3, 3.0)]
    assert client.get_run(run.run_id).data.metrics["final"] == 0.5
    lines = [line for line in capsys.readouterr().out.splitlines() if "MLflow at " in line]
    assert len(lines) == 2 and lines[0].startswith("cannot reach") and "again" in lines[1]


def test_a_server_that_does_not_respond_blocks_training_only_briefly(client, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(journal, "_SECONDS", 1)
    run = start(tmp_path / "stage")
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts connections and never responds
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{silent.getsockname()[1]}")
        run.journal._client = MlflowClient(os.environ["MLFLOW_TRACKING_URI"])
        start_time = time.monotonic()
        for step in range(1, 101):
            run.log({"loss": float(step)}, step)
        assert 1 < time.monotonic() - start_time < 5
        assert len(run.journal.points) == 100 and capsys.readouterr().out.count("cannot reach MLflow") == 1
    assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "20"


def test_pause_after_failures_grows_and_ends_with_a_success(client, monkeypatch, tmp_path):
    now, sent = [1000.0], []
    monkeypatch.setattr(journal.time, "monotonic", lambda: now[0])
    run = start(tmp_path / "stage")
    run.journal._send_points = lambda: (sent.append(now[0]), 1 / 0)
    for step in range(1, 100):
        run.log({"loss": 1.0}, step)
        now[0] += 1.0
    assert [time - 1000 for time in sent] == [0, 1, 3, 7, 15, 31, 63]
    del run.journal._send_points
    now[0] += 100
    for step in range(100, 103):
        run.log({"loss": 1.0}, step)
        assert not run.journal.pending


def test_killed_server_costs_neither_training_nor_curves(server, monkeypatch, tmp_path, capsys):
    run = start(tmp_path / "model")
    run.log({"loss": 1.0}, 1)
    server.server.kill()
    for step in (2, 3):
        run.log({"loss": float(step)}, step)
    monkeypatch.setattr("pixelclip.tracking.run._CLOSE_SECONDS", 2.0)
    assert run.finish() is False
    output = capsys.readouterr().out
    assert f"Lost connection to MLflow at {server.uri} (" in output and run.run_id in output
    lines = [json.loads(line) for line in (tmp_path / "model" / "curves.jsonl").read_text().splitlines()]
    assert [(line["step"], line["metrics"]["loss"]) for line in lines] == [(1, 1.0), (2, 2.0), (3, 3.0)]

    # The next stage delivers: here to the server's database, since a restart takes long (see the slow test).
    (tmp_path / "evaluation").mkdir()
    with pytest.raises(ValueError, match="cannot be reached"):
        Run.attach(tmp_path / "model", tmp_path / "evaluation", PROVENANCE)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.store)
    monkeypatch.setattr("pixelclip.tracking.run._CLOSE_SECONDS", 30.0)
    attached = Run.attach(tmp_path / "model", tmp_path / "evaluation", PROVENANCE)
    assert attached.finish() is True
    assert attached.run_id == run.run_id
    store = MlflowClient(server.store)
    assert curve(store, run.run_id) == [(1, 1.0), (2, 2.0), (3, 3.0)]
    assert store.get_run(run.run_id).info.status == "FINISHED"


@pytest.mark.slow
def test_restarted_server_receives_everything(server, monkeypatch, tmp_path, capsys):
    client = MlflowClient(server.store)
    # By the same process.
    run = start(tmp_path / "stage")
    run.log({"loss": 1.0}, 1)
    server.server.kill()
    for step in (2, 3):
        run.log({"loss": float(step)}, step)
    (tmp_path / "note.txt").write_text("hello")
    run.artifact(tmp_path / "note.txt")
    assert not run.journal.flush(0)
    server.server.start()
    server.server.wait()
    run.log({"loss": 4.0}, 4)
    assert run.finish() is True
    assert curve(client, run.run_id) == [(step, float(step)) for step in (1, 2, 3, 4)]
    assert client.get_run(run.run_id).info.status == "FINISHED"
    assert "note.txt" in [file.path for file in MlflowClient(server.uri).list_artifacts(run.run_id)]
    assert "reached MLflow" in capsys.readouterr().out

    # By the next stage.
    late = start(tmp_path / "model")
    late.log({"loss": 1.0}, 1)
    server.server.kill()
    late.log({"loss": 2.0}, 2)
    monkeypatch.setattr("pixelclip.tracking.run._CLOSE_SECONDS", 1.0)
    assert late.finish() is False
    monkeypatch.setattr("pixelclip.tracking.run._CLOSE_SECONDS", 30.0)
    server.server.start()
    server.server.wait()
    (tmp_path / "evaluation").mkdir()
    attached = Run.attach(tmp_path / "model", tmp_path / "evaluation", PROVENANCE)
    attached.values({"miou": 30.0})
    assert attached.finish() is True
    assert attached.run_id == late.run_id
    assert curve(client, late.run_id) == [(1, 1.0), (2, 2.0)]
    assert client.get_run(late.run_id).info.status == "FINISHED"
    assert client.get_run(late.run_id).data.metrics["miou"] == 30.0
