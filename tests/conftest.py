"""Shared fixtures. The only code under test that they change is the waits and retries of downloads."""

import inspect
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from moto.server import ThreadedMotoServer

from helpers import services, two_ranks
from pixelclip.data import shard_sources
from pixelclip.storage import download


@pytest.fixture(autouse=True, scope="session")
def shallow_stacks() -> Iterator[None]:
    """Shorten `inspect.stack`, which kfp calls in every setter of a task; under pytest each call would take 0.1 s."""

    def two(context: int = 1) -> list[tuple[Any, ...]]:
        frames = (sys._getframe(1), sys._getframe(2))
        return [(frame, frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name, None, None) for frame in frames]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inspect, "stack", two)
        yield


@pytest.fixture(autouse=True, scope="session")
def stop_server_of_ranks() -> Iterator[None]:
    yield
    two_ranks.stop()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PIXELCLIP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(download, "_WAITS", (0.0, 0.0))
    monkeypatch.setattr(shard_sources, "_local_copies", {})  # otherwise it names copies in the folder of another test
    monkeypatch.setattr("pixelclip.storage.s3._ATTEMPTS", 2)
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "cache"


@pytest.fixture
def account(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    files = {"AWS_CONFIG_FILE": os.devnull, "AWS_SHARED_CREDENTIALS_FILE": os.devnull}
    keys = {"AWS_ACCESS_KEY_ID": "somebody", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}
    for name, value in (files | keys | {"AWS_EC2_METADATA_DISABLED": "true"}).items():
        monkeypatch.setenv(name, value)


@pytest.fixture(scope="session")
def moto() -> Iterator[str]:
    served = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    served.start()
    host, port = served.get_host_and_port()
    yield f"http://{host}:{port}"
    served.stop()


@pytest.fixture
def bucket(moto: str, account: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Client of an S3 server with a bucket `data`."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", moto)
    client = boto3.client("s3")
    client.create_bucket(Bucket="data")
    yield client
    for entry in client.list_objects_v2(Bucket="data").get("Contents", []):
        client.delete_object(Bucket="data", Key=entry["Key"])
    client.close()


@pytest.fixture(scope="session")
def all_services(tmp_path_factory: pytest.TempPathFactory) -> Iterator[services.Services]:
    """Running S3 and PostgreSQL, and an MLflow that may still be starting; for tests marked `services`."""
    with services.services(tmp_path_factory.mktemp("services")) as running:
        yield running


@pytest.fixture
def s3(all_services: services.Services, monkeypatch: pytest.MonkeyPatch) -> services.S3:
    """Running S3 server, with its keys in the environment."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in all_services.s3.environment().items():
        monkeypatch.setenv(name, value)
    _up(all_services.s3.server)
    return all_services.s3


@pytest.fixture
def mlflow_server(all_services: services.Services, monkeypatch: pytest.MonkeyPatch) -> services.Mlflow:
    """Running MLflow server; the environment has its address and no keys of S3."""
    for name in [name for name in os.environ if name.startswith(("MLFLOW_", "AWS_", "PIXELCLIP_PIPELINE"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", all_services.mlflow.uri)
    for server in (all_services.s3.server, all_services.postgres.server, all_services.mlflow.server):
        _up(server)
    return all_services.mlflow


def _up(server: services.Server) -> None:
    if server.process is None:
        server.start()
    server.wait()
