"""Real servers that follow an alias: roll-outs, roll-backs and broken versions under a stream of requests."""

import json
import os
import shutil
import signal
import sys
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, repeat
from pathlib import Path
from unittest.mock import Mock

import mlflow
import pytest
import torch
from mlflow import MlflowClient
from mlflow.models import Model
from safetensors.torch import load_file, save_file

import pixelclip
from helpers import services, tiny
from helpers.processes import living, wait_until
from helpers.serving import body_of, photo
from pixelclip.commands import rollout
from pixelclip.inference import serving
from pixelclip.models.checkpoint import WEIGHTS
from pixelclip.registry.model_version import copy_code
from pixelclip.storage.files import write_json
from pixelclip.workflow.stage import PROVENANCE

pytestmark = [
    pytest.mark.services,
    pytest.mark.timeout(900),
    pytest.mark.filterwarnings("ignore:.*An input example was not provided"),
]

NAME = "follow"
URI = f"models:/{NAME}@champion"
_LOAD_SECONDS = 300  # at most, to load a version; a few on an idle machine


@pytest.fixture
def registry(monkeypatch, tmp_path) -> MlflowClient:
    client = tiny.mlflow_at(monkeypatch, tmp_path / "mlflow")
    client.create_registered_model(NAME)
    return client


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    base = tmp_path_factory.mktemp("rollout")
    return tiny.model_folder(base / "model", tiny.clip_folder(base / "clip"))


def add(client: MlflowClient, model: Path, tmp_path: Path, change: tuple[str, str] = ("", "")) -> str:
    """Register a version with its own code, in which a text may be replaced; return its number."""
    number = len(client.search_model_versions(f"name = '{NAME}'")) + 1
    saved = tmp_path / f"version{number}"
    code = copy_code(Path(pixelclip.__file__).parent, tmp_path / f"code{number}")
    file = code / "inference" / "serving.py"
    assert change[0] in file.read_text()
    file.write_text(file.read_text().replace(*change))
    mlflow.pyfunc.save_model(
        saved,
        mlflow_model=Model(),
        python_model=str(file),
        artifacts={serving.ARTIFACT: str(model)},
        signature=serving.SIGNATURE,
        code_paths=[str(code)],
        pip_requirements=[],
    )
    return str(client.create_model_version(NAME, source=str(saved)).version)


def changed(model: Path, copy: Path) -> Path:
    """Copy a model and change a byte of its weights, against the checksum in its provenance."""
    shutil.copytree(model, copy)
    weights = bytearray((copy / WEIGHTS).read_bytes())
    weights[-1] ^= 1
    (copy / WEIGHTS).write_bytes(weights)
    return copy


def diverged(model: Path, copy: Path) -> Path:
    """Copy a model as if its training had ended with weights that are not numbers."""
    shutil.copytree(model, copy)
    file = copy / WEIGHTS
    save_file({name: torch.full_like(weight, float("nan")) for name, weight in load_file(file).items()}, file)
    write_json(copy / PROVENANCE, tiny.provenance(copy, model.parent / "clip"))
    return copy


@dataclass
class Stream:
    """Threads that send requests all the time, and the answers: status, version, and form of the list of classes."""

    address: str
    answers: list[tuple[int, str, str]] = field(default_factory=list)
    ended: threading.Event = field(default_factory=threading.Event)

    def send(self, body: bytes) -> None:
        while not self.ended.is_set():
            request = urllib.request.Request(f"{self.address}/invocations", body, {"Content-Type": "application/json"})
            try:
                with urllib.request.urlopen(request, timeout=60) as reply:
                    (row,) = json.load(reply)["predictions"]
                    self.answers.append((reply.status, reply.headers["pixelclip-model"], type(row["classes"]).__name__))
            except OSError as error:
                self.answers.append((getattr(error, "code", 0), str(error), ""))

    def wait_for(self, count: int) -> None:
        """Wait for further answers."""
        enough = len(self.answers) + count
        assert wait_until(lambda: len(self.answers) >= enough, 60)

    def versions(self) -> list[str]:
        """Return the versions in the order of the answers, without repetitions; fail if a request failed."""
        assert all(status == 200 for status, *_ in self.answers), [each for each in self.answers if each[0] != 200][:3]
        models = [model for _, model, _ in self.answers]
        return [model for model, former in zip(models, ["", *models], strict=False) if model != former]


@contextmanager
def stream(address: str, threads: int = 3) -> Iterator[Stream]:
    flow = Stream(address)
    bodies = [body_of([(photo(50, 30, seed), "dog|puppy,grass,sky")]) for seed in range(threads)]
    senders = [threading.Thread(target=flow.send, args=(body,)) for body in bodies]
    for sender in senders:
        sender.start()
    try:
        yield flow
    finally:
        flow.ended.set()
        for sender in senders:
            sender.join()


@contextmanager
def following(log: Path) -> Iterator[tuple[str, services.Server]]:
    """Run `pixelclip serve run --follow 1`; yield its address and the server."""
    (port,) = services.free_ports(1)
    words = [sys.executable, "-m", "pixelclip", "serve", "run", URI, "--port", str(port), "--follow", "1"]
    address = f"http://127.0.0.1:{port}"
    server = services.Server(
        "serve", words, log, partial(services.get, f"{address}/ping"), os.environ | {"OMP_NUM_THREADS": "1"}
    )
    with services.running(server):
        server.wait(_LOAD_SECONDS)
        yield address, server


def state(address: str) -> dict:
    with urllib.request.urlopen(f"{address}/model", timeout=10) as reply:
        return json.load(reply)


def serves(address: str, model: str) -> bool:
    return state(address)["model"] == model


def rejects(address: str, model: str) -> bool:
    return (state(address)["rejected"] or {}).get("model") == model


def processes_of(server: services.Server) -> list[int]:
    """Return the server's child processes that serve a version; each leads a session of its own."""
    children = Path(f"/proc/{server.process.pid}/task").glob("*/children")
    return [pid for path in children for pid in map(int, path.read_text().split()) if living(pid)]


def test_roll_out_and_roll_back_lose_no_request(registry, folder, tmp_path):
    first = add(registry, folder, tmp_path, ('as_text = options["format_version"] == 1', "as_text = True"))
    second = add(registry, folder, tmp_path)
    registry.set_registered_model_alias(NAME, "champion", first)
    one, two = f"models:/{NAME}/{first}", f"models:/{NAME}/{second}"
    with following(tmp_path / "log") as (address, server):
        assert state(address) == {"model": one, "follows": URI, "rollouts": {"switched": 1, "rejected": 0}, "rejected": None}
        with stream(address) as flow:
            for version, uri in ((second, two), (first, one)):
                registry.set_registered_model_alias(NAME, "champion", version)
                assert wait_until(partial(serves, address, uri), _LOAD_SECONDS)
                flow.wait_for(12)
        # Answers of a request that began before a switch may arrive after it, so only the last ones must be of one version.
        seen = flow.versions()
        assert set(seen) == {one, two} and seen[0] == seen[-1] == one
        assert [model for _, model, _ in flow.answers[-9:]] == [one] * 9
        # Each version ran its own code: the first answers with texts, the second with lists.
        assert {(model, kind) for _, model, kind in flow.answers} == {(one, "str"), (two, "list")}
        assert wait_until(lambda: len(processes_of(server)) == 1)
        metrics = urllib.request.urlopen(f"{address}/metrics", timeout=10).read().decode()
        assert f'pixelclip_model_info{{model="{one}"}} 1\n' in metrics
        assert 'pixelclip_rollouts_total{result="switched"} 3\n' in metrics


def test_broken_versions_are_never_switched_to(registry, folder, tmp_path):
    first = f"models:/{NAME}/{add(registry, folder, tmp_path)}"
    registry.set_registered_model_alias(NAME, "champion", "1")
    with following(tmp_path / "log") as (address, server):
        (process,) = processes_of(server)
        with stream(address) as flow:
            for broken, reason in ((changed, "records MD5"), (diverged, "smoke request")):
                version = add(registry, broken(folder, tmp_path / broken.__name__), tmp_path)
                registry.set_registered_model_alias(NAME, "champion", version)
                assert wait_until(partial(rejects, address, f"models:/{NAME}/{version}"), _LOAD_SECONDS)
                assert reason in state(address)["rejected"]["reason"]
            flow.wait_for(3)
        # The old version crashes while the alias points to a broken one.
        os.kill(process, signal.SIGKILL)
        assert wait_until(lambda: state(address)["rollouts"]["switched"] == 2, _LOAD_SECONDS)
        with stream(address) as again:
            again.wait_for(3)
            assert rejects(address, f"models:/{NAME}/{version}"), "the crash does not undo the rejection"
            registry.set_registered_model_alias(NAME, "champion", "1")
            assert wait_until(lambda: state(address)["rejected"] is None, _LOAD_SECONDS)
            registry.delete_registered_model_alias(NAME, "champion")
            assert wait_until(lambda: "the alias cannot be read" in (tmp_path / "log").read_text())
            again.wait_for(3)
    assert flow.versions() == again.versions() == [first]


def test_crashed_version_is_loaded_again_and_ends_with_its_server(registry, folder, tmp_path):
    add(registry, folder, tmp_path)
    registry.set_registered_model_alias(NAME, "champion", "1")
    with following(tmp_path / "log") as (address, server):
        (process,) = processes_of(server)
        os.kill(process, signal.SIGKILL)
        assert wait_until(lambda: state(address)["rollouts"]["switched"] == 2, _LOAD_SECONDS)
        assert "its process ended (SIGKILL, often for lack of memory)" in (tmp_path / "log").read_text()
        (process,) = processes_of(server)
        os.kill(server.process.pid, signal.SIGKILL)  # nothing can be tidied up
        assert wait_until(lambda: not living(process))


def test_crashed_version_is_tried_until_it_is_loaded(monkeypatch, tmp_path, capsys):
    """Neither a lack of memory for a process nor an MLflow that is away ends the attempts."""
    model = f"models:/{NAME}/1"
    crashed, failing, loaded = (Mock(model=model, requests=0) for _ in range(3))
    crashed.process.is_alive.return_value = False
    failing.wait.side_effect = ValueError("MLflow is away")
    monkeypatch.setattr(rollout, "Version", Mock(side_effect=[crashed, OSError("no memory"), failing, loaded]))
    monkeypatch.setattr(rollout, "version_of", Mock(side_effect=chain([model], repeat(ValueError("MLflow is away")))))
    versions = rollout.Rollout(URI, tmp_path, 0.01)
    versions.start()
    watch = threading.Thread(target=versions.watch)
    watch.start()
    try:
        assert wait_until(lambda: versions.state()["rollouts"]["switched"] == 2)
        assert versions.state()["model"] == model and watch.is_alive()
    finally:
        versions.stop()
        watch.join()
    log = capsys.readouterr().err
    assert "s: no memory\n" in log and f"{model} cannot be loaded again: MLflow is away; next attempt" in log
    for version in (crashed, failing, loaded):
        version.stop.assert_called_once()


def test_broken_first_version_is_an_error(registry, folder, tmp_path):
    add(registry, diverged(folder, tmp_path / "diverged"), tmp_path)
    registry.set_registered_model_alias(NAME, "champion", "1")
    with (
        pytest.raises(RuntimeError, match=f"models:/{NAME}/1: is not served: the .*smoke request"),
        following(tmp_path / "log"),
    ):
        pass
