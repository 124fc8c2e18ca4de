"""MLflow, PostgreSQL and S3 killed and restarted while stages use them."""

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import LoggedModelStatus

from helpers import faults, faults_stages
from helpers.faults_stages import output, stage, uri
from helpers.processes import wait_until
from helpers.s3_sources import put
from helpers.services import Server
from helpers.stage_server import Command
from pixelclip.storage.download import local_copy
from pixelclip.storage.files import read_json

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(3600),
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy"),  # MLflow's tables under SQLAlchemy 2.1
]
MOMENTS = 3
DOWN = 2.0
"""Seconds between a kill and the restart."""


def count(name: str, trials: list[Callable[[], None]]) -> None:
    notes = []
    for number, trial in enumerate(trials):
        try:
            trial()
        except AssertionError as error:
            notes.append(f"trial {number}: {error}")
    faults.record(name, len(trials), len(trials) - len(notes))
    assert not notes, "\n".join(notes)


def restart(service: Server) -> None:
    service.kill()
    time.sleep(DOWN)
    service.start()


def duration(command: Command) -> float:
    begun = time.monotonic()
    assert command.wait() == 0
    return time.monotonic() - begun


@pytest.mark.parametrize("name", ["PostgreSQL", "S3", "MLflow"])
def test_training_goes_on_without_its_server(made, server, all_services, mlflow_server, tmp_path, name):
    """What the server missed arrives during the training, at its end, or with the next stage."""
    services = {"PostgreSQL": all_services.postgres.server, "S3": all_services.s3.server, "MLflow": mlflow_server.server}
    words = stage(made, "train").words
    expected, result = output(made / "train"), faults_stages.training(made / "train")[1]
    client = MlflowClient(mlflow_server.uri)

    def trial(step: int) -> None:
        folder = tmp_path / str(step)
        log = folder / "log"
        folder.mkdir()
        command = server.start(*words, "--out", folder / "train", log=log, MLFLOW_TRACKING_URI=mlflow_server.uri)
        assert wait_until(lambda: reached(folder, step) or command.poll() is not None, 120), log.read_text()
        restart(services[name])
        assert command.wait() == 0, log.read_text()[-2000:]
        for each in services.values():
            each.wait()
        assert output(folder / "train") == expected and faults_stages.training(folder / "train")[1] == result
        if "Lost connection to MLflow" in log.read_text():  # the server was not back in time
            evaluate = stage(made, "evaluate").words
            words_of_evaluation = [*evaluate[:2], folder / "train", *evaluate[3:], "--out", folder / "evaluate"]
            command = server.start(*words_of_evaluation, log=log, MLFLOW_TRACKING_URI=mlflow_server.uri)
            assert command.wait() == 0, log.read_text()[-2000:]
        run_id = read_json(folder / "train" / "run.json")["run_id"]
        assert client.get_run(run_id).info.status == "FINISHED"
        history = client.get_metric_history(run_id, "train/loss")
        assert [(point.step, point.value) for point in history] == [(step, point["train/loss"]) for step, point in result]

    count(f"{name} killed and restarted in train", [lambda step=step: trial(step) for step in (1, 5, 9)])


def reached(folder: Path, step: int) -> bool:
    """Return whether the training has logged a step."""
    points = [line for path in folder.rglob("curves.jsonl") for line in path.read_text().split("\n")[:-1]]
    return any(json.loads(line)["step"] >= step for line in points)


@pytest.mark.parametrize("name", ["masks", "evaluate"])
def test_stage_between_s3_folders_survives_a_restart_of_s3(made, server, s3, tmp_path, monkeypatch, name):
    given, local = {"masks": ("--shards", "shards"), "evaluate": ("--labelled", "toy/toy")}[name]
    monkeypatch.setenv("PIXELCLIP_CACHE", str(tmp_path / "cache"))
    client = s3.client()
    put(client, made / local, f"outages/{name}/in")
    words = stage(made, name).words
    words[words.index(given) + 1] = f"s3://data/outages/{name}/in"

    def start(number: str) -> Command:
        folder = tmp_path / number
        (folder / "mlflow").mkdir(parents=True)
        shutil.copyfile(made / "mlflow" / "mlflow.db", folder / "mlflow" / "mlflow.db")
        environment = {"MLFLOW_TRACKING_URI": uri(folder), "PIXELCLIP_CACHE": str(folder / "cache"), **s3.environment()}
        out = f"s3://data/outages/{name}/{number}"
        return server.start(*words, "--out", out, log=folder / "log", **environment)

    seconds = duration(start("undisturbed"))
    expected = output(local_copy(f"s3://data/outages/{name}/undisturbed"))

    def trial(number: int) -> None:
        command = start(str(number))
        time.sleep(seconds * (number + 0.5) / MOMENTS)
        restart(s3.server)
        assert command.wait() == 0, (tmp_path / str(number) / "log").read_text()[-2000:]
        s3.server.wait()
        assert output(local_copy(f"s3://data/outages/{name}/{number}")) == expected

    count(f"S3 killed and restarted in {name} from and to s3://", [lambda n=n: trial(n) for n in range(MOMENTS)])


@pytest.mark.parametrize("name", ["PostgreSQL", "MLflow"])
def test_registration_after_an_outage_is_not_double(made, server, all_services, mlflow_server, tmp_path, name):
    service = {"PostgreSQL": all_services.postgres.server, "MLflow": mlflow_server.server}[name]
    client = MlflowClient(mlflow_server.uri)

    def start(number: str) -> Command:
        folder = tmp_path / number
        if not folder.is_dir():
            shutil.copytree(made / "train", folder / "train")
            shutil.copytree(made / "evaluate", folder / "evaluate")
        words = ["register", "--model", folder / "train", "--evaluation", folder / "evaluate", f"name={name}-{number}"]
        return server.start(*words, "--out", folder / "out", log=folder / "log", MLFLOW_TRACKING_URI=mlflow_server.uri)

    seconds = duration(start("undisturbed"))

    def trial(number: int) -> None:
        log = tmp_path / str(number) / "log"
        command = start(str(number))
        time.sleep(seconds * (number + 0.5) / MOMENTS)
        restart(service)
        code = command.wait()
        assert code == 0 or (code == 2 and "Traceback" not in log.read_text()), log.read_text()[-2000:]
        service.wait()
        mlflow_server.server.wait()
        assert start(str(number)).wait() == 0, log.read_text()[-2000:]
        (version,) = client.search_model_versions(f"name = '{name}-{number}'")
        assert version.run_id and client.get_run(version.run_id).info.status == "FINISHED"
        experiment = client.get_run(version.run_id).info.experiment_id
        models = client.search_logged_models([experiment], f"source_run_id = '{version.run_id}'")
        uploaded = [f"models:/{each.model_id}" for each in models if each.status == LoggedModelStatus.READY]
        assert uploaded == [version.source], "the weights were uploaded twice"
        assert read_json(tmp_path / str(number) / "out" / "registration.json")["version"] == int(version.version) == 1

    count(f"{name} killed and restarted in register", [lambda n=n: trial(n) for n in range(MOMENTS)])
