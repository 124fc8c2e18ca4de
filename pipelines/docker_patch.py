"""Workaround for kubeflow/pipelines#13332; delete this module when KFP's DockerRunner reports the exit code of every container.

KFP 2.17 auto-removes finished containers. If one is gone before its exit code is read, KFP reports success; this hides about
one failure in ten. `patched` replaces the function that does so, `run_docker_container`.
"""

import codecs
import contextlib
import functools
import importlib.metadata
import inspect
import io
import json
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from docker.errors import APIError, DockerException
from kfp.local import docker_task_handler
from requests import RequestException

from pixelclip.storage.files import read_json
from pixelclip_pipelines.artifacts import LOCATION

_PARAMETERS = ["client", "image", "command", "volumes", "container_run_args"]
_WITHOUT_FILE = ("system.Metrics", "system.ClassificationMetrics", "system.SlicedClassificationMetrics")
_ENGINE_FAILED = 125  # as `docker run`


@contextlib.contextmanager
def patched(stopped: threading.Event) -> Iterator[None]:
    """Make KFP run its containers with `run_container`.

    Args:
        stopped: once set, no further container starts.

    Raises:
        ValueError: this version of kfp has no function with this name and these parameters.
    """
    original = getattr(docker_task_handler, "run_docker_container", None)
    if original is None or list(inspect.signature(original).parameters) != _PARAMETERS:
        raise ValueError(
            f"kfp {importlib.metadata.version('kfp')} runs containers in a way that pixelclip does not support; "
            "see requirements.txt"
        )
    docker_task_handler.run_docker_container = functools.partial(run_container, stopped=stopped)
    try:
        yield
    finally:
        docker_task_handler.run_docker_container = original


def run_container(
    client: Any, image: str, command: Sequence[str], volumes: Mapping[str, Any], stopped: threading.Event, **options: Any
) -> int:
    """Run one step in a container, print its output, and remove the container after reading its exit code.

    The arguments are those of docker's `ContainerCollection.create`, except that `command` replaces the image's entry point,
    as on a cluster, and no container starts once `stopped` is set.

    Returns:
        The exit code, which is also nonzero if the engine failed or a declared output is missing.
    """
    for folder in volumes:  # the engine would create missing folders as root
        Path(folder).mkdir(parents=True, exist_ok=True)
    # A plain container component has no executor and declares no outputs.
    declared = json.loads(command[command.index("--executor_input") + 1])["outputs"] if "--executor_input" in command else {}
    if declared:
        Path(declared["outputFile"]).unlink(missing_ok=True)  # left by an earlier attempt
    try:
        entry = {"entrypoint": list(command[:1]), "command": list(command[1:])}
        container = client.containers.create(image, **entry, volumes=volumes, **options)
        try:
            code = _ENGINE_FAILED if stopped.is_set() else _exit_code(container)
        finally:
            remove(container)
    except (DockerException, RequestException) as error:
        print(f"Docker: {error}")
        return _ENGINE_FAILED
    if code == 0 and declared and (missing := missing_outputs(declared)):
        print(f"The step ended without an error, but declared outputs are missing: {', '.join(missing)}")
        return 1
    return code


def _exit_code(container: Any) -> int:
    # Attach before the start: a followed log may lack a last line without a newline.
    with contextlib.closing(container.attach(stream=True)) as output:
        container.start()
        for line in _lines(output):
            print(line)
    code = int(container.wait()["StatusCode"])
    if code:
        container.reload()
        reason = ": out of memory" if container.attrs["State"]["OOMKilled"] else ": killed" if code == 137 else ""
        print(f"Container {container.short_id} ended with exit code {code}{reason}")
    return code


def remove(container: Any) -> None:
    """Remove a container, running or not."""
    try:
        container.remove(force=True)
    except APIError as error:
        if error.status_code not in (404, 409):  # already gone, or being removed
            print(f"Container {container.short_id} could not be removed: {error}")


def _lines(chunks: Iterable[bytes]) -> Iterator[str]:
    """Split a stream into lines. Chunks may end inside a line or a character; the `\\r` of a progress bar ends a line."""
    newlines, rest = io.IncrementalNewlineDecoder(None, translate=True), ""
    for text in codecs.iterdecode(chunks, "utf-8", "replace"):
        *lines, rest = (rest + newlines.decode(text)).split("\n")
        yield from lines
    if rest:
        yield rest


def missing_outputs(declared: Mapping[str, Any]) -> list[str]:
    """Return the names of declared outputs that a finished step did not write."""
    file = Path(declared["outputFile"])
    written = read_json(file) if file.is_file() else {}
    values = written.get("parameterValues", {})
    parameters = declared.get("parameters", {}).items()
    missing = [name for name, output in parameters if name not in values and not Path(output["outputFile"]).exists()]
    for name, output in declared.get("artifacts", {}).items():
        kind = output["artifacts"][0].get("type", {}).get("schemaTitle")
        artifacts = written.get("artifacts", {}).get(name, {}).get("artifacts", [])
        paths = [artifact.get("metadata", {}).get(LOCATION) or artifact["uri"] for artifact in artifacts]
        if not paths or not all("://" in path or kind in _WITHOUT_FILE or Path(path).exists() for path in paths):
            missing.append(name)
    return missing if missing or file.is_file() else [file.name]
