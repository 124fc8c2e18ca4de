"""A version of a registered model: create it with the model's weights and code, find it, fetch it, describe it."""

import atexit
import contextlib
import re
import shutil
import tempfile
import warnings
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import mlflow.pyfunc
from mlflow import MlflowClient
from mlflow.entities import LoggedModelStatus
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.models import Model
from mlflow.store.artifact.utils.models import get_model_name_and_version
from mlflow.utils.validation import MAX_TAG_VAL_LENGTH
from packaging.requirements import Requirement
from pydantic import BaseModel

import pixelclip
from pixelclip.config import RegisterConfig
from pixelclip.evaluation.protocol import first_resize
from pixelclip.inference import serving
from pixelclip.inference.prediction import INFERENCE
from pixelclip.models.checkpoint import CONFIG, WEIGHTS
from pixelclip.models.tokenizer import TOKENIZER_FILES
from pixelclip.registry.model_card import model_card
from pixelclip.storage.files import read_json, write_json
from pixelclip.storage.urls import public_url
from pixelclip.tracking.description import NOTE
from pixelclip.tracking.journal import RUN
from pixelclip.tracking.pages import run_page
from pixelclip.tracking.run import Run, cut
from pixelclip.tracking.server import artifact_address, connect, is_missing, public_uri, reason_of, transfer, ui_address
from pixelclip.workflow.stage import PROVENANCE

REGISTRATION = "registration.json"
EVALUATION = "evaluation"
"""Tag of a version: artifact path of its evaluation in the run."""
LICENCES = ("licence", "data_licence")
"""Tags of a version: the settings of `register` with these names, if stated."""
_DESCRIPTION = 5000  # characters that MLflow's database accepts
_ABOUT = (
    "PixelCLIP models for open-vocabulary segmentation. The alias `champion` is the version to use: `models:/{name}@champion`. "
    "`challenger` is the last version that the gate rejected, `previous` the former champion. The description of a version is "
    "its model card."
)
_copies = contextlib.ExitStack()
atexit.register(_copies.close)  # MLflow's own temporary folders stay
RESIZE = "resize"
"""Tag of a version: its input size (see `input_size`), `640 2560` or `640 2560 side 512`; versions without it do not resize."""


def create_name(client: MlflowClient, name: str) -> None:
    """Create a registered model with a description unless it exists.

    Raises:
        ValueError: MLflow rejects the name.
    """
    try:
        client.create_registered_model(name, description=_ABOUT.format(name=name))
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise ValueError(f"register.name {name!r} is rejected by MLflow at {public_uri()}: {reason_of(error)}") from None


def find(client: MlflowClient, name: str, model_md5: str, resize: Mapping[str, int]) -> ModelVersion | None:
    """Return the latest version with exactly these weights and this `resize` (see `create`), or None."""
    versions = client.search_model_versions(f"name = '{name}' and tags.`model.md5` = '{model_md5}'")
    same = [version for version in versions if version.tags.get(RESIZE, _resize_tag({})) == _resize_tag(resize)]
    return max(same, key=lambda version: int(version.version), default=None)


def create(
    client: MlflowClient, model: Path, provenance: Mapping[str, Any], name: str, resize: Mapping[str, int]
) -> ModelVersion:
    """Log a model and the code to serve it to the run that trained it, and create a version of `name` from it.

    A model that an interrupted registration has uploaded completely is used.

    Args:
        client: a connected client.
        model: model folder.
        provenance: of the model.
        name: registered model.
        resize: the evaluation's `input_size`; `Predictor.load` uses it for the registered model.
    """
    run_id = Run.trained(client, model, provenance)
    tags = {"model.md5": provenance["output"]["md5"], RESIZE: _resize_tag(resize)}
    model_id = _uploaded(client, run_id, tags) or _upload(client, model, run_id, tags, resize)
    return client.create_model_version(name, source=f"models:/{model_id}", run_id=run_id, model_id=model_id, tags=tags)


def write_card(
    client: MlflowClient, version: ModelVersion, model: Path, evaluation: Path | None, config: RegisterConfig, picture: str = ""
) -> None:
    """Set the description of a version and of its run: the model card, with a picture among the files of the run.

    The licences in it also become tags of the version.
    """
    uri = f"models:/{version.name}/{version.version}"
    address = artifact_address(version.run_id, picture) if picture else ""
    named = {"name": f"{version.name}, version {version.version}", "uri": uri, "picture": address}
    licences = {key: getattr(config, key) for key in LICENCES}
    card = model_card(model, evaluation, **named, **licences)
    client.update_model_version(version.name, version.version, description=cut(card, _DESCRIPTION))
    client.set_tag(version.run_id, NOTE, cut(card, MAX_TAG_VAL_LENGTH))
    for key, value in licences.items():
        if value:
            client.set_model_version_tag(version.name, version.version, key, value)
        elif key in version.tags:
            client.delete_model_version_tag(version.name, version.version, key)


def licences_of(uri: str) -> dict[str, str]:
    """Return the licences that a registered version was registered with, by the names in `LICENCES`.

    Args:
        uri: as in `fetch`; a model that is logged but not registered (`models:/m-ID`) has none.

    Raises:
        ValueError: MLflow is unreachable or has no such model.
    """
    client = connect()
    try:
        named = get_model_name_and_version(client, uri)
        tags = client.get_model_version(*named).tags if len(named) > 1 else {}
    except MlflowException as error:
        raise ValueError(f"{uri}: cannot be read from {public_uri()}: {reason_of(error)}") from None
    return {key: tags[key] for key in LICENCES if key in tags}


def _uploaded(client: MlflowClient, run_id: str, tags: Mapping[str, str]) -> str | None:
    """Return the ID of a completely uploaded model of a run with these tags."""
    experiment = client.get_run(run_id).info.experiment_id
    query = " AND ".join([f"source_run_id = '{run_id}'", *(f"tags.`{name}` = '{value}'" for name, value in tags.items())])
    found = client.search_logged_models([experiment], query)
    return next((str(each.model_id) for each in found if each.status == LoggedModelStatus.READY), None)


def _upload(client: MlflowClient, model: Path, run_id: str, tags: dict[str, str], resize: Mapping[str, int]) -> str:
    """Upload a model of a run, and the code to serve it; return its ID."""
    run = client.get_run(run_id)
    logged = client.create_logged_model(
        run.info.experiment_id, name="model", source_run_id=run_id, tags=tags, params=run.data.params
    )
    with transfer(), tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        # The signature is explicit, so MLflow needs no example to infer it.
        warnings.filterwarnings("ignore", ".*input example was not provided", UserWarning)
        # Not mlflow.pyfunc.log_model, which needs an active run: it would reopen the run, and a kill would leave it open.
        Model.log(
            artifact_path=None,
            flavor=mlflow.pyfunc,
            run_id=run_id,
            model_id=logged.model_id,
            python_model=serving.__file__,
            artifacts={serving.ARTIFACT: str(_inference_files(model, Path(folder), resize))},
            signature=serving.SIGNATURE,
            code_paths=[str(copy_code(Path(pixelclip.__file__).parent, Path(folder)))],
            pip_requirements=_requirements(),
        )
    return str(logged.model_id)


def copy_code(package: Path, folder: Path) -> Path:
    """Copy a package without assets to `folder/code`, because a served model includes its code."""
    copy = folder / "code" / package.name
    for file in package.rglob("*.py"):
        path = file.relative_to(package)
        if "assets" not in path.parts:
            (copy / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, copy / path)
    return copy


def fetch(uri: str, folder: Path | None = None) -> Path:
    """Download `models:/NAME@ALIAS` or `models:/NAME/VERSION` and return its model folder.

    Args:
        uri: the model.
        folder: where to; by default a temporary folder that exists as long as this process.

    Raises:
        ValueError: MLflow is unreachable or has no such model, or the URI names no version.
    """
    client = connect()
    if name := re.fullmatch("models:/([^/@]+)", uri):
        raise ValueError(_without_version(client, name[1]))
    folder = folder or Path(_copies.enter_context(tempfile.TemporaryDirectory(prefix="pixelclip-")))
    try:
        with transfer():
            root = Path(mlflow.artifacts.download_artifacts(uri, dst_path=str(folder)))
    except MlflowException as error:
        missing = is_missing(error) or error.error_code == "INVALID_PARAMETER_VALUE"  # the latter for an unknown alias
        problem = "no such model at" if missing else "cannot be fetched from"
        raise ValueError(f"{uri}: {problem} {public_uri()}: {reason_of(error)}") from None
    weights = list(root.rglob(WEIGHTS))
    if len(weights) != 1:
        raise ValueError(f"{uri}: is not a pixelclip model: it has {len(weights)} files {WEIGHTS}")
    folder = weights[0].parent
    if not (folder / INFERENCE).is_file():  # registered before 0.2.0, when images were not resized first
        write_json(folder / INFERENCE, first_resize({}))
    return folder


def _without_version(client: MlflowClient, name: str) -> str:
    """Return the error for `models:/NAME`, with the model's aliases."""
    try:
        aliases = client.get_registered_model(name).aliases
    except MlflowException as error:
        return f"models:/{name}: no such model at {public_uri()}: {reason_of(error)}"
    hint = " or ".join(f"models:/{name}@{alias}" for alias in sorted(aliases)) or f"models:/{name}/1; it has no alias"
    return f"models:/{name}: names no version; write {hint}"


def markdown(out: Path) -> str:
    """Format a registration for the KFP page: version, role, reason, and a link to the run."""
    registration = read_registration(out)
    ui, run_id = ui_address(registration["tracking_uri"]), registration["run_id"]
    run = f"[run `{run_id}`]({run_page(ui, run_id, registration['experiment_id'])})" if ui else f"run `{run_id}`"
    place = ui or public_url(registration["tracking_uri"])
    return (
        f"**{registration['model_uri']}** is **{registration['role']}**: {registration['reason']}\n\nMLflow {run} at {place}\n"
    )


class _Registration(BaseModel):
    name: str
    version: int
    role: str
    reason: str
    run_id: str
    experiment_id: str = ""  # 0.1.0 has none
    model_uri: str
    tracking_uri: str


def read_registration(out: Path) -> dict[str, Any]:
    """Read the `registration.json` of a finished registration; raise ValueError if it is missing or damaged."""
    return {"experiment_id": ""} | dict(read_json(out / REGISTRATION, _Registration))


def _requirements() -> list[str]:
    """Return the package's requirements without extras, pinned to the installed versions."""
    requirements = [Requirement(line) for line in metadata.requires("pixelclip") or []]
    return [f"{each.name}=={metadata.version(each.name)}" for each in requirements if each.marker is None]


def _resize_tag(resize: Mapping[str, int]) -> str:
    edges = ("shortest_edge", "longest_edge")
    sides = (f"{name} {side}" for name, side in resize.items() if name not in edges)
    return " ".join([*(str(resize.get(edge, 0)) for edge in edges), *sides])


def _inference_files(model: Path, folder: Path, resize: Mapping[str, int]) -> Path:
    """Copy the files that inference needs, without the pictures and curves of training, and add `inference.json`."""
    copy = folder / serving.ARTIFACT
    copy.mkdir()
    for name in (WEIGHTS, CONFIG, PROVENANCE, RUN, *TOKENIZER_FILES):
        if (model / name).is_file():
            shutil.copyfile(model / name, copy / name)
    write_json(copy / INFERENCE, dict(resize))
    return copy
