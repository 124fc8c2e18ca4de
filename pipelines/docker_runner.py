"""Steps in containers of the project's image: what KFP's DockerRunner is told, and how a container's end is seen.

KFP 2.17 has the engine remove a container as it ends, and takes one that is gone before its exit code is read for a success:
about one failure in ten is reported as done (https://github.com/kubeflow/pipelines/issues/13332). While `containers` is
open, `run_container` stands in for that one function of KFP.
"""

import codecs
import contextlib
import functools
import importlib.metadata
import inspect
import io
import json
import os
import re
import signal
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import docker
from docker.errors import APIError, DockerException, ImageNotFound
from docker.types import DeviceRequest, Mount
from kfp import local
from kfp.local import docker_task_handler
from requests import RequestException

from pixelclip.stage import LOCATION
from pixelclip.storage import read_json
from pixelclip_components import IMAGE

_REPLACED = "run_docker_container"
_ITS_PARAMETERS = ["client", "image", "command", "volumes", "container_run_args"]
_LABEL = "pixelclip.run"
_PASSED = re.compile(r"(MLFLOW|AWS|GIT_CONFIG|PIXELCLIP|HF|TQDM|OMP|CUDA)_\w+|(https?|no)_proxy", re.IGNORECASE)
_OF_THE_IMAGE = ("PIXELCLIP_REVISION", "PIXELCLIP_IMAGE")
_SHARED_MEMORY = "16g"  # an upper limit; Docker's own of 64 MB is too little for PyTorch's data loaders
_NO_FILE = ("system.Metrics", "system.ClassificationMetrics", "system.SlicedClassificationMetrics")
_ENGINE_FAILED = 125  # as `docker run` says it


@contextlib.contextmanager
def containers(arguments: Mapping[str, Any], out: Path) -> Iterator[local.DockerRunner]:
    """Runs the steps of a pipeline in containers of the image that PIXELCLIP_IMAGE named.

    A container runs as the caller, in the caller's network and folder, sees `out` and what `arguments` name at their own
    places, and has the caller's variables of MLflow, AWS and pixelclip. None is left when the context ends.

    Args:
        arguments: of the pipeline.
        out: the workspace.

    Yields:
        The runner for `kfp.local.init`.

    Raises:
        ValueError: no engine answers, it does not have the image, or this version of kfp is not known.
    """
    replaced = getattr(docker_task_handler, _REPLACED, None)
    if replaced is None or list(inspect.signature(replaced).parameters) != _ITS_PARAMETERS:
        version = importlib.metadata.version("kfp")
        raise ValueError(f"kfp {version} runs containers in a way that pixelclip does not know; see requirements.txt")
    client, image = _engine_and_image()
    run, stopped = str(uuid.uuid4()), threading.Event()

    def remove_all() -> None:
        stopped.set()
        for container in client.containers.list(all=True, filters={"label": f"{_LABEL}={run}"}, ignore_removed=True):
            _remove(container)

    docker_task_handler.run_docker_container = functools.partial(run_container, stopped=stopped)
    try:
        with _interrupted_by(remove_all):
            yield local.DockerRunner(labels={_LABEL: run}, **_options(arguments, out, image))
    finally:
        docker_task_handler.run_docker_container = replaced
        remove_all()
        client.close()


@contextlib.contextmanager
def _interrupted_by(action: Callable[[], None]) -> Iterator[None]:
    """Does `action` on SIGINT and SIGTERM before anything else: the steps of a loop run in threads that KFP waits for."""

    def interrupt(number: int, frame: object) -> None:
        action()
        raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():  # signals are not for it to handle
        yield
        return
    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run_container(
    client: Any, image: str, command: Sequence[str], volumes: Mapping[str, Any], stopped: threading.Event, **options: Any
) -> int:
    """Runs one step in a container, shows what it prints, and removes the container once its end has been seen.

    Args:
        client: of the Docker engine.
        image: its image.
        command: what the container runs instead of the image's entry point, as on a cluster.
        volumes: folders of this machine, each with its place in the container.
        stopped: set when no container shall start any more.
        options: as `docker.models.containers.ContainerCollection.create` takes them.

    Returns:
        The exit code; not 0 either where the engine failed or an output that the step declared is not there.
    """
    for folder in volumes:  # the engine would make a missing one, but as root
        Path(folder).mkdir(parents=True, exist_ok=True)
    declared = _declared_outputs(command)
    if declared:
        Path(declared["outputFile"]).unlink(missing_ok=True)  # of an attempt before
    try:
        code = _run(client, image, command, stopped, volumes=volumes, **options)
    except (DockerException, RequestException) as error:
        print(f"Docker: {error}")
        return _ENGINE_FAILED
    if code == 0 and declared and (missing := _missing(declared)):
        print(f"The step ended without an error, but what it declared is not there: {', '.join(missing)}")
        return 1
    return code


def _run(client: Any, image: str, command: Sequence[str], stopped: threading.Event, **options: Any) -> int:
    container = client.containers.create(image, entrypoint=list(command[:1]), command=list(command[1:]), **options)
    try:
        if stopped.is_set():  # perhaps too late for whoever removed what there was
            return _ENGINE_FAILED
        # Attached, because a log that is followed may lack a last line without an end.
        with contextlib.closing(container.attach(stream=True)) as printed:
            container.start()
            for line in _lines(printed):
                print(line)
        code = int(container.wait()["StatusCode"])
        if code:
            container.reload()
            killed = ": it used up its memory" if container.attrs["State"]["OOMKilled"] else ": killed" if code == 137 else ""
            print(f"Container {container.short_id} ended with exit code {code}{killed}")
        return code
    finally:
        _remove(container)


def _remove(container: Any) -> None:
    try:
        container.remove(force=True)
    except APIError as error:
        if error.status_code not in (404, 409):  # gone, or being removed: what was wanted
            print(f"Container {container.short_id} could not be removed: {error}")


def _lines(chunks: Iterable[bytes]) -> Iterator[str]:
    """Lines of a stream whose chunks may end inside of a line or of a letter; a progress bar's refresh is a line."""
    decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder("utf-8")("replace"), translate=True)
    rest = ""
    for chunk in chunks:
        *lines, rest = (rest + decoder.decode(chunk)).split("\n")
        yield from lines
    if rest := rest + decoder.decode(b"", final=True):
        yield rest


def _declared_outputs(command: Sequence[str]) -> dict[str, Any]:
    """The outputs in the message that KFP gives to a step; none for a container without such a message."""
    if "--executor_input" not in command:
        return {}
    return dict(json.loads(command[list(command).index("--executor_input") + 1])["outputs"])


def _missing(declared: Mapping[str, Any]) -> list[str]:
    """The declared outputs that are not there after a step's end."""
    written = Path(declared["outputFile"])
    made = read_json(written) if written.is_file() else {}
    missing = []
    for name, output in declared.get("parameters", {}).items():
        if name not in made.get("parameterValues", {}) and not Path(output["outputFile"]).exists():
            missing.append(name)
    for name, output in declared.get("artifacts", {}).items():
        kind = output["artifacts"][0].get("type", {}).get("schemaTitle")
        found = made.get("artifacts", {}).get(name, {}).get("artifacts", [])
        places = [artifact.get("metadata", {}).get(LOCATION) or artifact["uri"] for artifact in found]
        there = all("://" in place or kind in _NO_FILE or Path(place).exists() for place in places)
        if not (places and there):
            missing.append(name)
    return missing if missing or written.is_file() else [written.name]


def _engine_and_image() -> tuple[Any, Any]:
    try:
        client = docker.from_env()
        client.ping()
    except DockerException as error:
        raise ValueError(f"no Docker engine answers ({error}); start one, or name it in DOCKER_HOST") from None
    try:
        return client, client.images.get(IMAGE)
    except ImageNotFound:
        client.close()
        raise ValueError(
            f"image {IMAGE} (PIXELCLIP_IMAGE) is not on this machine: `make image` builds pixelclip's own, "
            f"`docker pull {IMAGE}` fetches one from a registry"
        ) from None


def _options(arguments: Mapping[str, Any], out: Path, image: Any) -> dict[str, Any]:
    environment = {name: value for name, value in os.environ.items() if _PASSED.fullmatch(name) and name not in _OF_THE_IMAGE}
    environment["PIXELCLIP_IMAGE"] = (image.attrs.get("RepoDigests") or [image.id])[0]
    folders = {out.absolute()}
    for name, below in (("PIXELCLIP_CACHE", "pixelclip"), ("HF_HOME", "huggingface")):  # else each step downloads anew
        folders.add(Path(environment.setdefault(name, str(out.absolute() / ".cache" / below))))
    database = environment.get("MLFLOW_TRACKING_URI", "").partition("sqlite:///")[2]
    if database:
        folders.add(Path(database).absolute().parent)
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
    files = {Path(value) for value in environment.values() if value.startswith("/") and Path(value).is_file()}
    named = {path for text in _texts(arguments) for path in _paths(text)} | files
    gpus = any(Path("/dev").glob("nvidia[0-9]*")) and os.environ.get("CUDA_VISIBLE_DEVICES") != ""
    return {
        "user": f"{os.getuid()}:{os.getgid()}",
        "group_add": os.getgroups(),
        "network_mode": "host",
        "working_dir": str(Path.cwd()),
        "shm_size": _SHARED_MEMORY,
        "environment": environment,
        "mounts": [
            *(Mount(str(path), str(path), type="bind") for path in sorted(folders)),
            *(Mount(str(path), str(path), type="bind", read_only=True) for path in sorted(named - folders)),
        ],
        "device_requests": [DeviceRequest(count=-1, capabilities=[["gpu"]])] if gpus else [],
    }


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list):
        for each in value.values() if isinstance(value, Mapping) else value:
            yield from _texts(each)


def _paths(text: str) -> Iterator[Path]:
    """The paths that a setting names: itself, or a file after a name and a colon (`ViT-B-16:weights.safetensors`)."""
    for part in {text, text.rpartition(":")[2]}:
        with contextlib.suppress(OSError):  # longer than a path may be
            if part and Path(part).exists():
                yield Path(part).absolute()
