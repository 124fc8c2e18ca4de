"""Shared inputs and fixtures. Of the code under test they change only waits and retries of downloads."""

import inspect
import io
import json
import os
import signal
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import numpy as np
import pytest
import services
import two_ranks
from moto.server import ThreadedMotoServer
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as rle

from pixelclip import download, shard_sources


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


def pixels(height: int, width: int, seed: int = 0) -> NDArray[np.uint8]:
    """Make an image of four flat quarters with a little noise."""
    generator = np.random.default_rng(seed)
    quarters = generator.integers(0, 256, (2, 2, 3))
    image = quarters[(np.arange(height) * 2 // height)[:, None], np.arange(width) * 2 // width]
    return np.clip(image + generator.integers(-2, 3, image.shape), 0, 255).astype(np.uint8)


def encoded(image: NDArray[Any] | Image.Image, kind: str = "JPEG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(buffer, kind, **options)
    return buffer.getvalue()


def annotation(masks: NDArray[Any]) -> bytes:
    """Encode masks [N, H, W] as SA-1B's annotation JSON."""
    codes = [rle.encode(np.asfortranarray(mask, dtype=np.uint8)) for mask in masks]
    entries = [
        {"segmentation": {"size": list(c["size"]), "counts": c["counts"].decode()}, "area": int(rle.area(c))} for c in codes
    ]
    return json.dumps({"image": {"image_id": 0}, "annotations": entries}).encode()


def write_tar(path: Path, members: dict[str, bytes], kind: int = tarfile.PAX_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=kind) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def read_tar(path: Path) -> dict[str, bytes]:
    """Read every file of a tar by the standard library."""
    with tarfile.open(path) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar if member.isfile()}


def write_files(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PIXELCLIP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(download, "_WAITS", (0.0, 0.0))
    monkeypatch.setattr(shard_sources, "_local_copies", {})  # would name copies in the folder of another test
    monkeypatch.setattr("pixelclip.s3._ATTEMPTS", 2)
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


def die(*_: object, **__: object) -> None:
    """Kill this process, as the kernel does when memory runs out. Worker processes import this small file quickly."""
    os.kill(os.getpid(), signal.SIGKILL)
