"""Compile the pipeline for a cluster, or run it on this machine. All parameters are checked before any step starts."""

import contextlib
import io
import os
import shutil
import sys
import threading
import time
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

import psutil
from kfp import compiler, local
from kfp.dsl.base_component import BaseComponent

from pixelclip.registry.model_version import read_registration
from pixelclip.storage.s3 import is_s3
from pixelclip.tracking.pages import run_page
from pixelclip.tracking.run import PIPELINE_RUN
from pixelclip.tracking.server import connect, public_uri, tracking_uri, ui_address
from pixelclip.workflow.stage import METRICS
from pixelclip.workflow.termination import Terminated, deferred
from pixelclip_pipelines.cluster_config import Cluster, image_of, read
from pixelclip_pipelines.docker_runner import containers
from pixelclip_pipelines.parameters import arguments
from pixelclip_pipelines.pixelclip import build

LOG = "pipeline.log"
RUNNERS = ("subprocess", "docker")
_STOP_SECONDS = 0.2


def compile_to(path: Path, cluster: Path | None = None, nodes: int = 1, image: str = "", labelled: bool = True) -> None:
    """Write the pipeline as YAML for a cluster.

    Args:
        path, cluster, image: see `write_yaml`.
        nodes: number of training nodes.
        labelled: whether the pipeline evaluates; see `pixelclip.build`.

    Raises the errors of `write_yaml`.
    """
    write_yaml(path, lambda settings, image: build(settings, nodes, image, labelled), cluster, image)


def write_yaml(
    path: Path, builder: Callable[[Cluster, str], BaseComponent], cluster: Path | None = None, image: str = ""
) -> None:
    """Build a pipeline for a cluster, and write it as YAML.

    Args:
        path: YAML file to write.
        builder: returns the pipeline for the settings of a cluster and a container image.
        cluster: settings of the cluster; see `cluster_config.read`.
        image: container image; overrides PIXELCLIP_IMAGE and the cluster's.

    Raises:
        ValueError: `path` is not a YAML file, or the settings of the cluster are invalid.
    """
    if path.suffix not in (".yaml", ".yml"):
        raise ValueError(f"{path}: the compiled pipeline must be a .yaml file")
    settings = read(cluster)
    pipeline = builder(settings, image_of(settings, image))
    path.parent.mkdir(parents=True, exist_ok=True)
    compiler.Compiler().compile(pipeline, str(path))


def run_locally(
    images: Path | str,
    labelled: Path | str | None,
    out: Path,
    params: Path | None,
    overrides: Mapping[str, Any],
    repo: str = "",
    revision: str = "",
    runner: str = "subprocess",
) -> None:
    """Run the pipeline on this machine. Finished stages in `out` are reused.

    Args:
        images, labelled, params, overrides, repo, revision: see `arguments`; a folder may be `s3://bucket/folder`.
        out: the workspace; finally also contains KFP's whole log in `pipeline.log`, and with a labelled set `metrics.json` and
            `report.html`.
        runner: run each step as a `subprocess` of this environment, or in a container of the project's image (`docker`).

    Raises:
        ValueError: an invalid parameter, no MLflow, no Docker engine or no image; raised before any step starts.
        SystemExit: a step failed.
    """
    if runner not in RUNNERS:
        raise ValueError(f"runner {runner!r}: must be one of {', '.join(RUNNERS)}")
    given = [images] if labelled is None else [images, labelled]
    places = [str(path) if repo or is_s3(path) else str(Path(path).absolute()) for path in given]
    if missing := [place for place in places if not (repo or is_s3(place) or Path(place).is_dir())]:
        raise ValueError(f"{missing[0]}: no such folder")
    truth = None if labelled is None else places[1]
    checked = arguments(places[0], truth, str(out.absolute()), params, overrides, repo, revision)
    connect()
    # Steps are separate processes, which inherit MLflow's address and the ID of the run.
    os.environ["MLFLOW_TRACKING_URI"] = _absolute(tracking_uri())
    os.environ[PIPELINE_RUN] = str(uuid.uuid4())
    artifacts = out / ".kfp"
    steps = containers(checked, out) if runner == "docker" else _processes()
    with steps as kfp_runner:
        out.mkdir(parents=True, exist_ok=True)
        local.init(kfp_runner, pipeline_root=str(artifacts), raise_on_error=True)
        try:
            warnings.filterwarnings(
                "ignore", ".*custom or non-Python base image", RuntimeWarning
            )  # the image is this project's
            with (out / LOG).open("a") as log, contextlib.redirect_stdout(_StageOutput(sys.stdout, log)):
                build(labelled=truth is not None)(**checked)
        except Terminated as stop:
            print(f"pipeline: {stop.reason}; the same command continues", flush=True)
            raise
        except RuntimeError as error:  # raised by kfp for a failed step, which has printed its own message
            raise SystemExit(f"pixelclip: {error}\nFinished stages are kept in {out}; the same command resumes.") from None
    shutil.rmtree(artifacts, ignore_errors=True)  # all results are in the workspace
    if truth is None:
        registered = read_registration(out / "register_unmeasured")
    else:
        registered = read_registration(out / "register")
        for name in (METRICS, "report.html"):
            shutil.copyfile(out / "evaluate" / name, out / name)
        print(f"\n{(out / 'evaluate' / 'table.txt').read_text()}")
    print(f"{registered['model_uri']} is {registered['role']}: {registered['reason']}")
    page = run_page(ui, registered["run_id"], registered["experiment_id"]) if (ui := ui_address()) else public_uri()
    print(f"results: {out}   MLflow: {page}")


@contextlib.contextmanager
def _processes() -> Iterator[local.SubprocessRunner]:
    """Yield the runner of steps in processes; a request to end goes to them, and this process waits until they have."""
    with deferred(lambda: threading.Thread(target=_stop_steps, daemon=True).start()) as received:
        try:
            yield local.SubprocessRunner(use_venv=False)
        except BaseException:
            if not (number := received()):
                raise
            stop = Terminated(number)
            print(f"pipeline: {stop.reason}; the same command continues", flush=True)
            raise stop from None


def _stop_steps() -> None:
    """Send SIGTERM to every step once, also to those that KFP still starts, until this process ends."""
    stopped: set[int] = set()
    while True:
        for process in psutil.Process().children(recursive=True):
            if process.pid not in stopped:
                stopped.add(process.pid)
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.terminate()
        time.sleep(_STOP_SECONDS)


class _StageOutput(io.TextIOBase):
    """Write KFP's whole output to a log and show only the output of the stages.

    Before every step KFP's executor prints its input as JSON, between "Got executor_input" and a closing brace.
    """

    def __init__(self, shown: TextIO, log: TextIO) -> None:
        self._shown, self._log, self._rest, self._in_json = shown, log, "", False

    def write(self, text: str) -> int:
        """Filter text line by line."""
        self._log.write(text)
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            if "Got executor_input" in line:
                self._in_json = True
            elif self._in_json:
                self._in_json = line.rstrip() not in ("}", "    }")
            elif line.strip() and "[KFP Executor" not in line and "Looking for component" not in line:
                self._shown.write(f"{line}\n")
        self._shown.flush()
        return len(text)


def _absolute(uri: str) -> str:
    prefix = "sqlite:///"
    return f"{prefix}{Path(uri.removeprefix(prefix)).absolute()}" if uri.startswith(prefix) else uri
