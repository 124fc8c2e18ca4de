"""Progress of a training in its TrainJob: a real HTTPS server with the checks of Kubeflow Trainer's, and its API's models."""

import json
from dataclasses import dataclass, field

import pytest
from kubeflow_trainer_api.models.trainer_v1alpha1_update_train_job_status_request import (
    TrainerV1alpha1UpdateTrainJobStatusRequest as UpdateRequest,
)

from helpers import https_server, training
from helpers.json_server import JsonHandler
from pixelclip.tracking import trainjob
from pixelclip.tracking.trainjob import TrainJobStatus
from pixelclip.train import run

PATH = "/apis/trainer.kubeflow.org/v1alpha1/namespaces/team/trainjobs/pixelclip-run-1/status"
shards, clip, config = training.shards, training.clip, training.config


@dataclass
class Trainer:
    """Status server of Kubeflow Trainer: the status that it received, and how it answers."""

    token: str = "t-1"
    status: int = 200
    received: list[UpdateRequest] = field(default_factory=list)


@pytest.fixture
def trainer(tmp_path, monkeypatch):
    held = Trainer()

    class Handler(JsonHandler):
        def do_POST(self):
            body = self.body()
            if (self.path, self.headers["Authorization"]) != (PATH, f"Bearer {held.token}"):
                self.answer(403, {"kind": "Status", "message": "Forbidden", "code": 403})
                return
            if held.status == 200:
                held.received.append(UpdateRequest.from_json(body))
                assert held.received[-1].trainer_status.last_updated_time is not None  # the CRD rejects a status without it
            self.answer(held.status, json.loads(body))

    (tmp_path / "token").write_text("t-1\n")
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # a proxy must not be asked
    with https_server.served(Handler, tmp_path) as (url, certificate):
        monkeypatch.setenv("KUBEFLOW_TRAINER_STATUS_URL", f"{url}{PATH}")
        monkeypatch.setenv("KUBEFLOW_TRAINER_STATUS_CA_CERT", str(certificate))
        monkeypatch.setenv("KUBEFLOW_TRAINER_STATUS_TOKEN", str(tmp_path / "token"))
        yield held


def metrics_of(request: UpdateRequest) -> dict[str, str]:
    return {metric.name: metric.value for metric in request.trainer_status.metrics}


def test_training_reports_its_last_step(trainer, shards, config, tmp_path):
    metrics = run(shards, tmp_path / "out", config(steps=2))
    last = trainer.received[-1].trainer_status
    assert (last.progress_percentage, last.estimated_remaining_seconds) == (100, 0)
    sent = metrics_of(trainer.received[-1])
    assert (sent["step"], sent["steps"]) == ("2", "2") and sent["loss"] == f"{metrics['train/loss']:.4f}"


def test_progress_fits_the_api(trainer):
    status = TrainJobStatus()
    status.send(120, 1000, 859.4, {"loss": "0.1234", "images_s": "12.0", "empty": "", "long": "x" * 99})
    status.send(7, None, None, {})
    first, second = trainer.received
    assert (first.trainer_status.progress_percentage, first.trainer_status.estimated_remaining_seconds) == (12, 860)
    assert metrics_of(first) == {"step": "120", "steps": "1000", "loss": "0.1234", "images_s": "12.0", "long": "x" * 64}
    assert (second.trainer_status.progress_percentage, second.trainer_status.estimated_remaining_seconds) == (None, None)
    assert metrics_of(second) == {"step": "7"}


def test_renewed_token_is_read_again(trainer, tmp_path):
    status = TrainJobStatus()
    status.send(1, 2, None, {})
    trainer.token = "t-2"
    (tmp_path / "token").write_text("t-2")
    status.send(2, 2, None, {})
    assert len(trainer.received) == 2


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda trainer, patch: setattr(trainer, "status", 500), "HTTP Error 500"),
        (lambda trainer, patch: setattr(trainer, "token", "another"), "HTTP Error 403"),
        (lambda trainer, patch: patch.setenv("KUBEFLOW_TRAINER_STATUS_TOKEN", "/nowhere/token"), "No such file"),
        (lambda trainer, patch: patch.setenv("KUBEFLOW_TRAINER_STATUS_URL", "https://127.0.0.1:9/status"), "refused"),
        (lambda trainer, patch: patch.delenv("KUBEFLOW_TRAINER_STATUS_CA_CERT"), "CERTIFICATE_VERIFY_FAILED"),
    ],
    ids=["failing", "rejected", "no token", "unreachable", "untrusted"],
)
def test_failing_server_is_one_warning_and_tried_later(trainer, monkeypatch, capsys, change, reason):
    change(trainer, monkeypatch)
    status = TrainJobStatus()
    monkeypatch.setattr(trainjob, "_PAUSE", 0.0)
    for step in (1, 2):
        status.send(step, 9, None, {})
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("cannot send the progress to Kubeflow Trainer (") and reason in line
    assert not trainer.received


def test_failed_server_is_left_alone_for_a_while(trainer):
    status = TrainJobStatus()
    trainer.status = 500
    status.send(1, 9, None, {})
    trainer.status = 200
    status.send(2, 9, None, {})
    assert not trainer.received


def test_nothing_is_sent_outside_of_a_trainjob(trainer, monkeypatch, capsys):
    monkeypatch.delenv("KUBEFLOW_TRAINER_STATUS_URL")
    TrainJobStatus().send(1, 9, None, {})
    assert not trainer.received and capsys.readouterr().out == ""
