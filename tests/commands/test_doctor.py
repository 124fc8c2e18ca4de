"""Doctor: every check against a real service or its real absence."""

import json
import os
import sys
import threading
from collections import namedtuple
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from helpers import services, tiny
from pixelclip.commands import doctor
from pixelclip.commands.doctor import Finding, as_json, as_text, run

DIGEST = "sha256:" + "ab" * 32
Answer = namedtuple("Answer", "status headers body")


@pytest.fixture(autouse=True)
def unconfigured(monkeypatch, tmp_path) -> None:
    """A machine without any configuration, in an empty folder."""
    for name in list(os.environ):
        if name.startswith(("AWS_", "MLFLOW_", "KFP_", "KF_", "PIXELCLIP_", "DOCKER_")) or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


@pytest.fixture
def closed() -> str:
    """A port without a server."""
    return f"127.0.0.1:{services.free_ports(1)[0]}"


class Web:
    """An HTTP server with a fixed answer per path."""

    def __init__(self) -> None:
        self.answers: dict[str, Answer] = {}
        self.asked: list[tuple[str, str, str]] = []
        web = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                web.asked.append((self.command, self.path, self.headers.get("Authorization", "")))
                path = self.path.split("?")[0]
                status, headers, body = web.answers.get(path, Answer(404, {}, b""))
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

            do_HEAD = do_POST = do_GET  # noqa: N815

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.host = f"127.0.0.1:{self.server.server_address[1]}"


@pytest.fixture
def web() -> Iterator[Web]:
    made = Web()
    thread = threading.Thread(target=made.server.serve_forever, args=(0.01,))
    thread.start()
    yield made
    made.server.shutdown()
    thread.join()
    made.server.server_close()


def test_nothing_fails_where_nothing_is_configured(monkeypatch):
    findings = {finding.what: finding for finding in run()}
    assert list(findings) == ["GPU", "shared memory", "disk", "S3", "MLflow", "DVC remote", "KFP", "image"]
    for what in ("S3", "MLflow", "DVC remote", "KFP", "image"):
        assert findings[what].state == "not configured", findings[what]
        assert findings[what].advice
    assert findings["GPU"].state == ("ok" if torch.cuda.is_available() else "missing")
    assert list(Path.cwd().iterdir()) == []


def test_text_and_json_contain_the_same_findings():
    findings = [Finding("GPU", "missing", "none", "buy one"), Finding("shared memory", "ok", "8 GiB")]
    assert as_text(findings).splitlines() == [
        "GPU            missing         none; buy one",
        "shared memory  ok              8 GiB",
    ]
    assert json.loads(as_json(findings))[0] == {"what": "GPU", "state": "missing", "said": "none", "advice": "buy one"}


@pytest.mark.parametrize("words", [[], ["--json"]])
def test_exit_code_is_1_if_a_check_failed(monkeypatch, capsys, closed, words):

    from pixelclip.cli.app import main

    for endpoint, code in (("", 0), (f"http://{closed}", 1)):
        monkeypatch.setenv("KFP_ENDPOINT", endpoint)
        monkeypatch.setattr(doctor, "shared_memory", lambda: Finding("shared memory", "ok", ""))
        monkeypatch.setattr(doctor, "disk", lambda: Finding("disk", "ok", ""))
        monkeypatch.setattr(sys, "argv", ["pixelclip", "doctor", *words])
        with pytest.raises(SystemExit) as ended:
            main()
        assert int(ended.value.code or 0) == code
        message = capsys.readouterr().out
        if words:
            assert [entry["what"] for entry in json.loads(message) if entry["state"] == "failed"] == ["KFP"] * code
        else:
            assert message.count("\n") == 8


def test_hanging_or_broken_check_does_not_hide_others(monkeypatch):
    forever = threading.Event()
    monkeypatch.setattr(doctor, "shared_memory", forever.wait)
    monkeypatch.setattr(doctor.cache, "root", lambda: 1 / 0)
    findings = {finding.what: finding for finding in run(seconds=3)}
    forever.set()
    assert (findings["shared memory"].state, findings["shared memory"].said) == ("failed", "no answer within 3 s")
    assert (findings["disk"].state, findings["disk"].said) == ("failed", "ZeroDivisionError: division by zero")
    assert findings["KFP"].state == "not configured"


def test_small_shared_memory_and_full_disk_fail(monkeypatch, tmp_path):
    small = namedtuple("usage", "total used free")(64 << 20, 0, 64 << 20)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: small)
    assert doctor.shared_memory().state == doctor.disk().state == "failed"
    assert "0.06 GiB" in doctor.shared_memory().said and "--shm-size" in doctor.shared_memory().advice
    assert str(Path.cwd()) in doctor.disk().said
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: small._replace(total=8 << 30, free=80 << 30))
    assert doctor.shared_memory().state == doctor.disk().state == "ok"


@pytest.mark.parametrize(("code", "message"), [(0, "H100, but torch cannot use it"), (9, "has failed")])
def test_broken_driver_fails(monkeypatch, tmp_path, code, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\necho '{'H100' if code == 0 else 'NVIDIA-SMI has failed'}'\nexit {code}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    finding = doctor.gpu()
    assert finding.state == "failed" and message in finding.said and finding.advice


def test_unreachable_s3_fails(monkeypatch, closed):
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setattr("pixelclip.storage.s3._ATTEMPTS", 2)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{closed}")
    finding = doctor.storage("s3://data/images")
    assert (
        finding.state == "failed" and "Unable to locate credentials" in finding.said and "AWS_ACCESS_KEY_ID" in finding.advice
    )
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "somebody")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    finding = doctor.storage("s3://data/images")
    assert finding.state == "failed" and closed in finding.said and "AWS_ENDPOINT_URL" in finding.advice


@pytest.mark.services
def test_s3_checks_keys_bucket_and_prefix(s3, monkeypatch):
    s3.client().put_object(Bucket="data", Key="doctor/a", Body=b"a")
    assert doctor.storage("").state == doctor.storage("s3://data").state == doctor.storage("s3://data/doctor").state == "ok"
    assert "data, dvc, mlflow" in doctor.storage("").said
    for uri, message in (("s3://nowhere", "status 404"), ("s3://data/nothing/", "no object below nothing/")):
        assert doctor.storage(uri).state == "failed" and message in doctor.storage(uri).said
    for name in ("AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID"):
        monkeypatch.setenv(name, "wrong")
        finding = doctor.storage("s3://data")
        assert finding.state == "failed" and f"wrong credentials, see {name}" in finding.said
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "reader")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", s3.reader)
    assert doctor.storage("s3://data").state == "ok"
    assert "s3://mlflow: access denied" in doctor.storage("s3://mlflow").said


def test_mlflow_reachable_and_unreachable(monkeypatch, tmp_path, closed):
    client = tiny.mlflow_at(monkeypatch, tmp_path / "mlflow")
    client.create_registered_model("one")
    finding = doctor.mlflow()
    assert finding.state == "ok" and "its registry has 1 models" in finding.said
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://user:geheim@{closed}")
    finding = doctor.mlflow(5)
    assert finding.state == "failed" and closed in finding.said and "geheim" not in finding.said and finding.advice


def test_mlflow_that_rejects_the_host_fails(monkeypatch, web):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://{web.host}")
    web.answers["/health"] = Answer(200, {}, b"OK")
    web.answers["/api/2.0/mlflow/experiments/search"] = Answer(403, {}, b"Invalid Host header")
    finding = doctor.mlflow(5)
    assert finding.state == "failed" and "403" in finding.said and "--allowed-hosts" in finding.advice


@pytest.mark.services
def test_mlflow_server_version_and_registry(mlflow_server):
    finding = doctor.mlflow()
    assert finding.state == "ok"
    assert finding.said.startswith(f"{mlflow_server.uri}: server 3.") and "its registry has" in finding.said


def test_dvc_remote_in_a_local_folder(monkeypatch, tmp_path):
    tiny.dvc_repository(tmp_path / "repo", str(tmp_path / "remote"), {"data": {"a": b"a"}}, {})
    assert doctor.dvc_remote(str(tmp_path / "repo")) == Finding("DVC remote", "ok", f"{tmp_path}/remote can be read")
    monkeypatch.chdir(tmp_path / "repo")
    assert doctor.dvc_remote("").state == "ok"
    (tmp_path / "remote").rename(tmp_path / "moved")
    assert doctor.dvc_remote("").state == "failed" and "does not exist" in doctor.dvc_remote("").said
    (tmp_path / "repo" / ".dvc" / "config").write_text("")
    tiny.git(tmp_path / "repo", "commit", "-qam", "no remote")
    assert doctor.dvc_remote("").state == "not configured"
    finding = doctor.dvc_remote(str(tmp_path / "none"))
    assert finding.state == "failed" and "not a readable git repository" in finding.said


@pytest.mark.services
def test_dvc_remote_on_s3(s3, tmp_path, monkeypatch):
    tiny.dvc_repository(tmp_path / "repo", "s3://dvc/doctor", {"data": {"a": b"a"}}, {})
    assert doctor.dvc_remote(str(tmp_path / "repo")) == Finding("DVC remote", "ok", "s3://dvc/doctor can be read")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    finding = doctor.dvc_remote(str(tmp_path / "repo"))
    assert finding.state == "failed" and "SignatureDoesNotMatch" in finding.said and "AWS_" in finding.advice


@pytest.mark.parametrize(
    ("answer", "state", "message"),
    [
        (Answer(200, {}, b'{"tag_name": "2.17.0", "multi_user": false}'), "ok", "KFP 2.17.0, SDK 2."),
        (Answer(200, {}, b'{"multi_user": false}'), "ok", "KFP of unknown version"),
        (Answer(200, {}, b'{"tag_name": "1.8.5"}'), "failed", "KFP 1.8.5, SDK 2."),
        (Answer(200, {}, b"<html>log in</html>"), "failed", "expected KFP's API, got"),
        (Answer(401, {}, b""), "failed", "rejected the request (401 Unauthorized); set a token in KFP_TOKEN"),
        (Answer(404, {}, b""), "failed", "rejected the request (404 Not Found)"),
        (Answer(200, {}, b"{"), "failed", "expected KFP's API, got"),
    ],
)
def test_kubeflow_pipelines_health_and_version(monkeypatch, web, answer, state, message):
    monkeypatch.setenv("KFP_TOKEN", "secret")
    web.answers["/apis/v2beta1/healthz"] = answer
    (finding,) = [entry for entry in run(kfp=f"http://{web.host}/") if entry.what == "KFP"]
    assert finding.state == state and message in finding.said
    assert ("GET", "/apis/v2beta1/healthz", "Bearer secret") in web.asked


def test_unreachable_kubeflow_pipelines_fails(closed):
    finding = doctor.pipelines(f"http://{closed}", 5)
    assert finding.state == "failed" and closed in finding.said and "KFP_ENDPOINT" in finding.advice
    assert doctor.pipelines("no address", 5).state == "failed"


def fake_docker(monkeypatch, folder: Path, *found: str) -> None:
    """A docker program that finds an image where `found` says: manifest (its registry), image (the local engine)."""
    folder.mkdir()
    program = folder / "docker"
    cases = "".join(f"{word}) exit 0;;\n" for word in found)
    program.write_text(f'#!/bin/sh\ncase "$1" in\n{cases}esac\necho "no such $1: $3" >&2\nexit 1\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


@pytest.mark.parametrize(
    ("found", "state", "message"),
    [
        (("manifest", "image"), "ok", "r.example/pixelclip:v1 can be pulled"),
        (("manifest",), "ok", "r.example/pixelclip:v1 can be pulled"),
        (("image",), "ok", "r.example/pixelclip:v1 is in the local engine; its registry: no such manifest"),
        ((), "failed", "r.example/pixelclip:v1: no such manifest: r.example/pixelclip:v1"),
    ],
)
def test_image_in_registry_or_local_engine(monkeypatch, tmp_path, found, state, message):
    fake_docker(monkeypatch, tmp_path / "bin", *found)
    finding = doctor.container_image("r.example/pixelclip:v1")
    assert finding.state == state and finding.said.startswith(message) and finding.advice
    if "manifest" in found:
        assert "digest" in finding.advice and doctor.container_image(f"r.example/pixelclip@{DIGEST}").advice == ""


def test_image_is_not_checked_without_docker(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    finding = doctor.container_image("r.example/pixelclip:v1")
    assert finding.state == "missing" and "docker is not installed" in finding.said
