"""Compiles the pipeline for a cluster, or runs it here: every parameter is checked before any step starts."""

import os
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kfp import compiler, local

from pixelclip.config import STAGES, load_all, nearest
from pixelclip.stage import METRICS
from pixelclip.tracking import PIPELINE_RUN, connect, tracking_uri
from pixelclip_pipelines.pixelclip import SETTING_OF, pixelclip

_PATHS = ("images", "labelled", "workspace")


def arguments(images: str, labelled: str, workspace: str, params: Path | None, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The pipeline's arguments, all of them checked.

    Args:
        images: folder of unlabelled images.
        labelled: labelled set.
        workspace: folder shared by runs, or empty.
        params: a YAML file with settings.
        overrides: pipeline parameters by name, or settings as `stage.setting`.

    Raises:
        ValueError: an unknown parameter or setting, a value that is not allowed, or one thing said in two ways.
    """
    chosen: dict[str, Any] = {}
    for name, value in overrides.items():
        if name in _PATHS or name == "settings":
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
    defaults = {f"{s}.{name}": field.default for s, kind in STAGES.items() for name, field in kind.model_fields.items()}
    named = {name: values[setting] for name, setting in SETTING_OF.items()}
    others = {
        setting: value
        for setting, value in values.items()
        if setting not in SETTING_OF.values() and not setting.startswith("toy.") and value != defaults[setting]
    }
    return {"images": images, "labelled": labelled, "workspace": workspace, "settings": others, **named}


def compile_to(path: Path) -> None:
    """Writes the pipeline as YAML for a cluster (image: PIXELCLIP_IMAGE).

    Raises:
        ValueError: `path` is no YAML file.
    """
    if path.suffix not in (".yaml", ".yml"):
        raise ValueError(f"{path}: the compiled pipeline is a .yaml file")
    path.parent.mkdir(parents=True, exist_ok=True)
    compiler.Compiler().compile(pixelclip, str(path))


def run_locally(images: Path, labelled: Path, out: Path, params: Path | None, overrides: Mapping[str, Any]) -> None:
    """Runs the pipeline in subprocesses of this machine; finished stages in `out` are reused.

    Args:
        images: folder of unlabelled images.
        labelled: labelled set.
        out: the workspace; `metrics.json` and `report.html` are put there at the end.
        params: a YAML file with settings.
        overrides: see `arguments`.

    Raises:
        ValueError: a wrong parameter, or MLflow unreachable: before any step starts.
        SystemExit: a step failed.
    """
    for folder in (images, labelled):
        if not folder.is_dir():
            raise ValueError(f"{folder}: no such folder")
    given = arguments(str(images.absolute()), str(labelled.absolute()), str(out.absolute()), params, overrides)
    connect()
    out.mkdir(parents=True, exist_ok=True)
    # Steps are processes of their own: they inherit where MLflow is and which run they belong to.
    os.environ["MLFLOW_TRACKING_URI"] = _absolute(tracking_uri())
    os.environ[PIPELINE_RUN] = str(uuid.uuid4())
    artifacts = out / ".kfp"
    local.init(local.SubprocessRunner(use_venv=False), pipeline_root=str(artifacts), raise_on_error=True)
    try:
        pixelclip(**given)
    except RuntimeError as error:  # kfp's word for a failed step, whose own message stands above
        raise SystemExit(f"pixelclip: {error}\nWhat is finished stays in {out}; the same command continues.") from None
    shutil.rmtree(artifacts, ignore_errors=True)  # every result stands in the workspace
    for name in (METRICS, "report.html"):
        shutil.copyfile(out / "evaluate" / name, out / name)


def _absolute(uri: str) -> str:
    prefix = "sqlite:///"
    return f"{prefix}{Path(uri.removeprefix(prefix)).absolute()}" if uri.startswith(prefix) else uri
