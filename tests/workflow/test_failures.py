"""Which failures may pass, for errors as the real clients raise them."""

import socket
import urllib.request
from http.server import BaseHTTPRequestHandler

import pytest
from kubernetes import client as kubernetes
from mlflow import MlflowClient

from helpers.json_server import served
from pixelclip.fetch_data import commit_of
from pixelclip.storage.s3 import list_below
from pixelclip.tracking.server import connect
from pixelclip.workflow.failures import FAILURE_FILE, exit_code, may_pass, report


@pytest.fixture
def closed() -> str:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return f"http://127.0.0.1:{free.getsockname()[1]}"


def caught(action, *given) -> Exception:
    with pytest.raises(Exception) as found:  # noqa: PT011  (each client has its own)
        action(*given)
    return found.value


def answering(status: int):
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def do_GET(self):
            self.send_response(status)
            self.send_header("Content-Length", "0")
            self.end_headers()

    return served(Handler)


def api_of(url: str) -> kubernetes.CustomObjectsApi:
    configuration = kubernetes.Configuration(host=url)
    configuration.retries = False
    return kubernetes.CustomObjectsApi(kubernetes.ApiClient(configuration))


def test_closed_connections_of_all_clients_may_pass(closed, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", closed)
    assert may_pass(caught(connect)), "a ValueError raised from None"
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    assert may_pass(caught(MlflowClient(closed).search_experiments))
    monkeypatch.setattr("pixelclip.storage.s3._ATTEMPTS", 1)
    for name, value in {"AWS_ENDPOINT_URL": closed, "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}.items():
        monkeypatch.setenv(name, value)
    assert may_pass(caught(list_below, "s3://bucket/folder"))
    assert may_pass(caught(api_of(closed).list_cluster_custom_object, "g", "v1", "jobs"))
    assert may_pass(caught(commit_of, f"{closed}/data.git", "main"))


@pytest.mark.parametrize(("status", "passes"), [(503, True), (429, True), (404, False), (403, False)])
def test_answers_of_a_server(status, passes):
    with answering(status) as url:
        refused = caught(urllib.request.urlopen, url)
        assert may_pass(refused) is passes
        refused.close()
        assert may_pass(caught(api_of(url).list_cluster_custom_object, "g", "v1", "jobs")) is passes


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ValueError("train.steps: must be positive"), 2),
        (FileNotFoundError(2, "No such file", "/images"), 2),
        (RuntimeError("a bug"), 1),
        (KeyError("x"), 1),
        (ConnectionResetError(104, "reset"), 75),
        (TimeoutError(), 75),
    ],
)
def test_exit_codes(error, code):
    assert exit_code(error) == code


def test_first_process_reports_its_failure(monkeypatch, tmp_path):
    report(ValueError("x"), "ignored without the variable")
    monkeypatch.setenv(FAILURE_FILE, str(tmp_path / "failure"))
    report(ValueError("x"), "train.steps: -5")
    report(ConnectionResetError(), "the other process is gone")
    assert (tmp_path / "failure").read_text() == "2 train.steps: -5"
