"""Compiles the pipeline for a cluster, or runs it here: every parameter is checked before any step starts."""

import contextlib
import io
import os
import shutil
import sys
import uuid
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from kfp import compiler, local

from pixelclip.config import STAGES, load_all, nearest
from pixelclip.fetch_data import has_secret, without_login
from pixelclip.s3 import is_s3
from pixelclip.server import connect, tracking_uri
from pixelclip.stage import METRICS
from pixelclip.storage import read_json
from pixelclip.tracking import PIPELINE_RUN
from pixelclip_pipelines.cluster_config import image_of, read
from pixelclip_pipelines.docker_runner import containers
from pixelclip_pipelines.pixelclip import SETTING_OF, build, pixelclip

LOG = "pipeline.log"
RUNNERS = ("subprocess", "docker")
_OPTIONS = ("images", "labelled", "repo", "revision", "workspace", "settings")
_NOT_PASSED = ("toy.", "fetch_data.")  # stands before the pipeline; has parameters of its own


def arguments(
    images: str,
    labelled: str,
    workspace: str,
    params: Path | None,
    overrides: Mapping[str, Any],
    repo: str = "",
    revision: str = "",
) -> dict[str, Any]:
    """The pipeline's arguments, all of them checked.

    Args:
        images: folder of unlabelled images.
        labelled: labelled set.
        workspace: folder shared by runs, or empty.
        params: a YAML file with settings.
        overrides: pipeline parameters by name, or settings as `stage.setting`.
        repo: DVC repository in which images and labelled set are paths; empty: they are folders.
        revision: branch, tag or commit of `repo`.

    Raises:
        ValueError: an unknown parameter or setting, a value that is not allowed, a login in `repo`, one thing said in two ways.
    """
    for name, value in (("images", images), ("labelled", labelled)):
        if not value:
            raise ValueError(f"{name} must name a folder")
    if has_secret(repo):
        raise ValueError(
            f"--repo {without_login(repo)} was given with a login, which KFP would keep and show, and its log here, too; "
            "give it without, and the login by git's own variables, see docs/cluster.md"
        )
    if revision and not repo:
        raise ValueError(f"revision {revision!r} without repo: only data of a DVC repository have revisions")
    chosen: dict[str, Any] = {}
    for name, value in overrides.items():
        if name in _OPTIONS:
            raise ValueError(f"pipeline parameter {name!r} is not given as NAME=VALUE here, see --help")
        if "." not in name and name not in SETTING_OF:
            raise ValueError(
                f"unknown pipeline parameter {name!r}{nearest(name, SETTING_OF)}; "
                f"parameters are {', '.join(SETTING_OF)}, every other setting is written STAGE.SETTING"
            )
        setting = SETTING_OF.get(name, name)
        if setting in chosen:
            raise ValueError(f"{setting} is given twice")
        chosen[setting] = value
    configs = load_all(params, chosen)
    values = {f"{stage}.{name}": value for stage, config in configs.items() for name, value in config.model_dump().items()}
    if values["masks.part"]:
        raise ValueError(f"masks.part {values['masks.part']}: the pipeline makes all parts; how many says cluster.yaml (parts)")
    defaults = {f"{s}.{name}": field.default for s, kind in STAGES.items() for name, field in kind.model_fields.items()}
    named = {name: values[setting] for name, setting in SETTING_OF.items()}
    others = {
        setting: value
        for setting, value in values.items()
        if setting not in SETTING_OF.values() and not setting.startswith(_NOT_PASSED) and value != defaults[setting]
    }
    data = {"images": images, "labelled": labelled, "repo": repo, "revision": revision}
    return {**data, "workspace": workspace, "settings": others, **named}


def compile_to(path: Path, cluster: Path | None = None, nodes: int = 1, image: str = "") -> None:
    """Writes the pipeline as YAML for a cluster.

    Args:
        path: YAML file to write.
        cluster: settings of the cluster; see `cluster_config.read`.
        nodes: how many nodes train.
        image: container image, before PIXELCLIP_IMAGE and that of the cluster.

    Raises:
        ValueError: `path` is no YAML file, or the settings of the cluster are wrong.
    """
    if path.suffix not in (".yaml", ".yml"):
        raise ValueError(f"{path}: the compiled pipeline is a .yaml file")
    there = read(cluster)
    built = build(there, nodes, image_of(there, image))
    path.parent.mkdir(parents=True, exist_ok=True)
    compiler.Compiler().compile(built, str(path))


def run_locally(
    images: Path | str,
    labelled: Path | str,
    out: Path,
    params: Path | None,
    overrides: Mapping[str, Any],
    repo: str = "",
    revision: str = "",
    runner: str = "subprocess",
) -> None:
    """Runs the pipeline on this machine; finished stages in `out` are reused.

    Args:
        images: folder of unlabelled images, or `s3://bucket/folder`.
        labelled: labelled set, found as they are.
        out: the workspace; `metrics.json` and `report.html` are put there at the end, KFP's whole log in `pipeline.log`.
        params: a YAML file with settings.
        overrides: see `arguments`.
        repo: DVC repository in which `images` and `labelled` are paths; empty: they are folders.
        revision: branch, tag or commit of `repo`.
        runner: what a step is: a `subprocess` of this environment, or a container of the project's image (`docker`).

    Raises:
        ValueError: a wrong parameter, MLflow unreachable, no Docker engine or no image: before any step starts.
        SystemExit: a step failed.
    """
    if runner not in RUNNERS:
        raise ValueError(f"runner {runner!r}: must be one of {', '.join(RUNNERS)}")
    data = []
    for path in (images, labelled):
        as_given = bool(repo) or is_s3(path)
        if not (as_given or Path(path).is_dir()):
            raise ValueError(f"{path}: no such folder")
        data.append(str(path if as_given else Path(path).absolute()))
    given = arguments(*data, str(out.absolute()), params, overrides, repo, revision)
    connect()
    # Steps are processes of their own: they inherit where MLflow is and which run they belong to.
    os.environ["MLFLOW_TRACKING_URI"] = _absolute(tracking_uri())
    os.environ[PIPELINE_RUN] = str(uuid.uuid4())
    os.environ.setdefault("TQDM_MININTERVAL", "15")  # a step's bar is not on a terminal: every refresh is a line
    artifacts = out / ".kfp"
    steps = containers(given, out) if runner == "docker" else contextlib.nullcontext(local.SubprocessRunner(use_venv=False))
    with steps as chosen:
        out.mkdir(parents=True, exist_ok=True)
        local.init(chosen, pipeline_root=str(artifacts), raise_on_error=True)
        try:
            warnings.filterwarnings("ignore", ".*custom or non-Python base image", RuntimeWarning)  # it is this project's
            with (out / LOG).open("a") as log, contextlib.redirect_stdout(_Terse(sys.stdout, log)):
                pixelclip(**given)
        except RuntimeError as error:  # kfp's word for a failed step, whose own message stands above
            raise SystemExit(f"pixelclip: {error}\nWhat is finished stays in {out}; the same command continues.") from None
    shutil.rmtree(artifacts, ignore_errors=True)  # every result stands in the workspace
    for name in (METRICS, "report.html"):
        shutil.copyfile(out / "evaluate" / name, out / name)
    registered = read_json(out / "register" / "registration.json")
    print(f"\n{(out / 'evaluate' / 'table.txt').read_text()}")
    print(f"{registered['model_uri']} is {registered['role']}: {registered['reason']}")
    print(f"results: {out}   MLflow: {tracking_uri()}")


class _Terse(io.TextIOBase):
    """Keeps all of KFP's words in a log file and shows those of the stages.

    KFP's executor prints its whole input as JSON, between "Got executor_input" and a closing brace, before every step.
    """

    def __init__(self, shown: TextIO, log: TextIO) -> None:
        self._shown, self._log, self._rest, self._in_json = shown, log, "", False

    def write(self, text: str) -> int:
        """Takes text line by line."""
        self._log.write(text)
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            plain = line.strip()
            if "Got executor_input" in plain:
                self._in_json = True
            elif self._in_json:
                self._in_json = line.rstrip() not in ("}", "    }")
            elif plain and "[KFP Executor" not in plain and "Looking for component" not in plain:
                self._shown.write(f"{line}\n")
        self._shown.flush()
        return len(text)


def _absolute(uri: str) -> str:
    prefix = "sqlite:///"
    return f"{prefix}{Path(uri.removeprefix(prefix)).absolute()}" if uri.startswith(prefix) else uri
