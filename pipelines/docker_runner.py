"""Run the steps of a pipeline in containers of the project's image, with KFP's DockerRunner."""

import contextlib
import os
import re
import threading
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import docker
from docker.errors import DockerException, ImageNotFound
from docker.types import DeviceRequest, Mount
from kfp import local

from pixelclip.workflow.termination import terminable
from pixelclip_components import IMAGE
from pixelclip_pipelines.docker_patch import patched, remove
from pixelclip_pipelines.parameters import parse

_LABEL = "pixelclip.run"
_FORWARDED = re.compile(r"(MLFLOW|AWS|GIT_CONFIG|PIXELCLIP|HF|TQDM|OMP|CUDA)_\w+|(https?|no)_proxy", re.IGNORECASE)
_SHARED_MEMORY = "16g"  # an upper limit; Docker's default of 64 MB is too small for PyTorch's data loaders


@contextlib.contextmanager
def containers(arguments: Mapping[str, Any], out: Path) -> Iterator[local.DockerRunner]:
    """Run steps in containers of the image PIXELCLIP_IMAGE.

    A container runs as the caller, in the host's network and the current folder, mounts `out` and the paths in `arguments` at
    the same paths, and gets the caller's variables for MLflow, AWS and pixelclip. All containers are removed when the context
    ends.

    Args:
        arguments: arguments of the pipeline.
        out: the workspace.

    Yields:
        The runner for `kfp.local.init`.

    Raises:
        ValueError: no engine answers, the image is missing, or this version of kfp is not supported.
    """
    run, stopped = str(uuid.uuid4()), threading.Event()
    with patched(stopped), contextlib.closing(_engine()) as client:
        try:
            image = client.images.get(IMAGE)
        except ImageNotFound:
            raise ValueError(
                f"image {IMAGE} (PIXELCLIP_IMAGE) is not on this machine: `make image` builds pixelclip's image, "
                f"`docker pull {IMAGE}` fetches one from a registry"
            ) from None

        def remove_all() -> None:
            stopped.set()
            for container in client.containers.list(all=True, filters={"label": f"{_LABEL}={run}"}, ignore_removed=True):
                remove(container)

        try:
            with terminable(remove_all):  # at once, because KFP waits for the threads that run the steps of a loop
                yield local.DockerRunner(labels={_LABEL: run}, **_options(arguments, out, image))
        finally:
            remove_all()


def _engine() -> Any:
    try:
        client = docker.from_env()
        client.ping()
    except DockerException as error:
        raise ValueError(f"no Docker engine answers ({error}); start one, or set DOCKER_HOST") from None
    return client


def _options(arguments: Mapping[str, Any], out: Path, image: Any) -> dict[str, Any]:
    """Return DockerRunner's options: user, network, environment, mounts and GPUs of every container."""
    environment = {name: value for name, value in os.environ.items() if _FORWARDED.fullmatch(name)}
    environment.pop("PIXELCLIP_REVISION", None)  # set by the image
    environment["PIXELCLIP_IMAGE"] = (image.attrs.get("RepoDigests") or [image.id])[0]
    writable = {out.absolute()}
    for name, folder in (("PIXELCLIP_CACHE", "pixelclip"), ("HF_HOME", "huggingface")):  # otherwise each step downloads again
        writable.add(Path(environment.setdefault(name, str(out.absolute() / ".cache" / folder))))
    if database := environment.get("MLFLOW_TRACKING_URI", "").partition("sqlite:///")[2]:
        writable.add(Path(database).absolute().parent)
    for path in writable:
        path.mkdir(parents=True, exist_ok=True)
    files = {Path(value) for value in environment.values() if value.startswith("/") and Path(value).is_file()}
    values = [*arguments.values(), *parse(arguments.get("settings", "")).values()]
    readable = files.union(*(_paths(value) for value in values if isinstance(value, str))) - writable
    gpus = any(Path("/dev").glob("nvidia[0-9]*")) and os.environ.get("CUDA_VISIBLE_DEVICES") != ""
    return {
        "user": f"{os.getuid()}:{os.getgid()}",
        "group_add": os.getgroups(),
        "network_mode": "host",
        "working_dir": str(Path.cwd()),
        "shm_size": _SHARED_MEMORY,
        "environment": environment,
        "mounts": [
            *(Mount(str(path), str(path), type="bind") for path in sorted(writable)),
            *(Mount(str(path), str(path), type="bind", read_only=True) for path in sorted(readable)),
        ],
        "device_requests": [DeviceRequest(count=-1, capabilities=[["gpu"]])] if gpus else [],
    }


def _paths(text: str) -> Iterator[Path]:
    """Yield the paths in a value: the value itself, or a file after a name and a colon (`ViT-B-16:weights.safetensors`)."""
    for part in {text, text.rpartition(":")[2]}:
        with contextlib.suppress(OSError):  # the text is longer than a path may be
            if part and Path(part).exists():
                yield Path(part).absolute()
