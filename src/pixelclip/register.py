"""STAGE register: the gate in front of MLflow's registry.

A model is always registered. It becomes `champion` only if its gain over CLIP reaches `register.min_gain` and it beats the
present champion on the same labelled set under the same protocol (`promote.pass_gate`); otherwise it is the `challenger`,
and the reason is said. What was measured stands in the version's tags, and the whole evaluation among its run's artifacts.
"""

import hashlib
import json
import math
import shutil
import tempfile
import warnings
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import mlflow
from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from packaging.requirements import Requirement
from pydantic import BaseModel, RootModel, ValidationError

from pixelclip import serve
from pixelclip.checkpoint import CONFIG, WEIGHTS, read_config
from pixelclip.config import RegisterConfig
from pixelclip.journal import RUN
from pixelclip.promote import CHALLENGER, CHAMPION, Figures, pass_gate, registry
from pixelclip.protocol import PROTOCOL, conditions_of
from pixelclip.server import connect, first_line, is_missing, tracking_uri, transfer
from pixelclip.stage import METRICS, PROVENANCE, Metrics, Stage, describe
from pixelclip.storage import read_json, write_json
from pixelclip.tracking import Run, lineage

REGISTRATION = "registration.json"
EVALUATION = "evaluation"
"""Tag of a version: where among its run's artifacts its evaluation stands."""
_LONGEST = 60  # characters of a damaged entry that are shown


def run(model: Path, evaluation: Path, out: Path, config: RegisterConfig) -> Metrics:
    """Registers a model and passes it through the gate; done twice, it is registered once.

    Args:
        model: model folder.
        evaluation: what `evaluate` wrote about this model.
        out: folder to make: `registration.json`.
        config: settings.

    Returns:
        `register/version` and `register/champion` (1 or 0).

    Raises:
        ValueError: the evaluation is of another model, a figure is missing or not finite, or MLflow is unreachable.
    """
    provenance, evaluated = (_read(folder / PROVENANCE, _Provenance) for folder in (model, evaluation))
    if evaluated["stage"] != "evaluate":
        raise ValueError(f"{evaluation}: is no evaluation, stage {evaluated['stage']!r} made it")
    if "model" not in evaluated["inputs"]:
        raise ValueError(f"{evaluation / PROVENANCE}: is damaged: inputs.model is missing")
    if evaluated["inputs"]["model"]["md5"] != provenance["output"]["md5"]:
        raise ValueError(f"{evaluation}: is the evaluation of another model than {model}")
    figures, name = _figures(model, evaluation, evaluated)
    stage = Stage("register", out, {"model": describe(model), "evaluation": describe(evaluation)}, config)
    with registry(config.name) as client:
        if stage.finished:
            if _version_of(client, config.name, provenance["output"]["md5"]) is not None:
                return stage.reuse()
            shutil.rmtree(stage.out)  # registered elsewhere, or in a registry that is gone
        with stage:
            _create_name(client, config.name)
            version = _version_of(client, config.name, provenance["output"]["md5"])
            if version is None:
                version = _create_version(client, model, provenance, config.name)
            place = f"evaluations/{figures.measured_on[:12]}-{provenance['output']['md5'][:12]}"
            with transfer():
                for file in (PROVENANCE, METRICS):
                    client.log_artifact(version.run_id, str(evaluation / file), place)
            for key, value in lineage(evaluated).items():
                client.set_model_version_tag(config.name, version.version, key, value)
            measured = {
                "miou": repr(figures.miou),
                "gain": repr(figures.gain),
                "labelled.name": name,
                "measured_on": figures.measured_on,
                "min_gain": repr(config.min_gain),
                EVALUATION: place,
            }
            decision = pass_gate(client, config.name, str(version.version), challenge=True, measured=measured)
            role = CHAMPION if decision.champion else CHALLENGER
            print(f"register: {config.name} version {version.version} is {role}: {decision.reason}", flush=True)
            registration = {
                "name": config.name,
                "version": int(version.version),
                "role": role,
                "reason": decision.reason,
                "run_id": version.run_id,
                "model_uri": f"models:/{config.name}/{version.version}",
                "tracking_uri": tracking_uri(),
            }
            write_json(stage.folder / REGISTRATION, registration)
            metrics = {"register/version": float(version.version), "register/champion": float(decision.champion)}
            return stage.finish(metrics, files=[REGISTRATION])


class _Content(BaseModel):
    md5: str


class _Provenance(BaseModel):
    """What registering reads of the provenance of a model and of its evaluation."""

    stage: str
    settings: dict[str, Any]
    inputs: dict[str, _Content]
    output: _Content


class _Protocol(BaseModel):
    name: str
    side: int | None


class _Metrics(RootModel[dict[str, float]]):
    pass


def _read(file: Path, kind: type[BaseModel]) -> dict[str, Any]:
    """A JSON file that holds at least what `kind` says; raises ValueError that names it and its first fault."""
    document = read_json(file)
    if not isinstance(document, dict):
        raise ValueError(f"{file}: is damaged: named entries are expected, found {str(document)[:_LONGEST]}")
    try:
        kind.model_validate(document, strict=True)
    except ValidationError as error:
        fault = error.errors()[0]
        name = ".".join(str(part) for part in fault["loc"])
        found = f"{name} is missing" if fault["type"] == "missing" else f"{name}: {fault['msg']}"
        shown = "" if fault["type"] == "missing" else f" (found {str(fault['input'])[:_LONGEST]})"
        raise ValueError(f"{file}: is damaged: {found}{shown}") from None
    return document


def _figures(model: Path, evaluation: Path, evaluated: Mapping[str, Any]) -> tuple[Figures, str]:
    metrics = _read(evaluation / METRICS, _Metrics)
    names = [key.removeprefix("gain/") for key in metrics if key.startswith("gain/")]
    if len(names) != 1 or f"miou/{names[0]}" not in metrics:
        raise ValueError(f"{evaluation / METRICS}: one gain/NAME with its miou/NAME is needed, found {sorted(metrics)}")
    figures = {key: metrics[f"{key}/{names[0]}"] for key in ("miou", "gain")}
    for key, value in figures.items():
        if not math.isfinite(value):
            raise ValueError(f"{evaluation / METRICS}: the gate needs finite figures, found {key}/{names[0]} {value}")
    return Figures(figures["miou"], figures["gain"], _measured_on(model, evaluation, evaluated)), names[0]


def _measured_on(model: Path, evaluation: Path, evaluated: Mapping[str, Any]) -> str:
    """Identifies what two models' figures must have in common: labelled set, given masks, protocol.

    What the set is called does not count, nor the side where it is the model's own: models of two sides are compared, each
    as it was trained to see.
    """
    conditions = conditions_of(_read(evaluation / PROTOCOL, _Protocol), evaluated["inputs"])
    del conditions["name"]
    if conditions["side"] == read_config(model)["side"]:
        conditions["side"] = "the model's"
    return hashlib.md5(json.dumps(conditions, sort_keys=True).encode(), usedforsecurity=False).hexdigest()


def _create_name(client: MlflowClient, name: str) -> None:
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise ValueError(f"register.name {name!r} is refused by MLflow at {tracking_uri()}: {first_line(error)}") from None


def _version_of(client: MlflowClient, name: str, model_md5: str) -> ModelVersion | None:
    """The registered version of these very weights, if there is one."""
    try:
        found = client.search_model_versions(f"name = '{name}'")
    except MlflowException as error:
        if is_missing(error):
            return None
        raise
    same = [version for version in found if version.tags.get("model.md5") == model_md5]
    return max(same, key=lambda version: int(version.version)) if same else None


def _create_version(client: MlflowClient, model: Path, provenance: Mapping[str, Any], name: str) -> ModelVersion:
    run_id = Run.trained(client, model, provenance)
    before = client.get_run(run_id).info.status
    try:
        with transfer(), mlflow.start_run(run_id=run_id), tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            # The signature is stated, so no example is needed to guess it.
            warnings.filterwarnings("ignore", ".*input example was not provided", UserWarning)
            logged = mlflow.pyfunc.log_model(
                name="model",
                python_model=serve.__file__,
                artifacts={serve.ARTIFACT: str(_weights_only(model, Path(folder)))},
                signature=serve.SIGNATURE,
                code_paths=[str(_code(Path(folder)))],
                pip_requirements=_requirements(),
            )
    finally:
        client.update_run(run_id, status=before)  # leaving `with` ended it, as FAILED too, but it may be somebody else's
    return client.create_model_version(
        name,
        source=logged.model_uri,
        run_id=run_id,
        model_id=logged.model_id,
        tags={"model.md5": provenance["output"]["md5"]},
    )


def _requirements() -> list[str]:
    """What the package needs without its extras, as it is installed here."""
    needed = [Requirement(line) for line in metadata.requires("pixelclip") or []]
    return [f"{each.name}=={metadata.version(each.name)}" for each in needed if each.marker is None]


def _code(folder: Path) -> Path:
    """A copy of this package's modules, without its assets: a served model brings the code that it was registered with."""
    package = Path(serve.__file__).parent
    copy = folder / "code" / package.name
    copy.mkdir(parents=True)
    for file in package.glob("*.py"):
        shutil.copyfile(file, copy / file.name)
    return copy


def _weights_only(model: Path, folder: Path) -> Path:
    """A copy of what inference needs: a training leaves pictures and curves beside it."""
    copy = folder / serve.ARTIFACT
    copy.mkdir()
    for name in (WEIGHTS, CONFIG, PROVENANCE, RUN):
        if (model / name).is_file():
            shutil.copyfile(model / name, copy / name)
    return copy


def fetch(uri: str, folder: Path | None = None) -> Path:
    """Returns the model folder of `models:/NAME@ALIAS` or `models:/NAME/VERSION`, downloaded to `folder`.

    Raises:
        ValueError: MLflow is unreachable, or knows no such model.
    """
    connect()
    try:
        with transfer():
            root = Path(mlflow.artifacts.download_artifacts(uri, dst_path=None if folder is None else str(folder)))
    except MlflowException as error:
        missing = is_missing(error) or error.error_code == "INVALID_PARAMETER_VALUE"  # the latter of an alias
        what = "no such model at" if missing else "cannot be fetched from"
        raise ValueError(f"{uri}: {what} {tracking_uri()}: {first_line(error)}") from None
    found = list(root.rglob(WEIGHTS))
    if len(found) != 1:
        raise ValueError(f"{uri}: is no model of pixelclip ({len(found)} files {WEIGHTS} in it)")
    return found[0].parent


def markdown(out: Path) -> str:
    """The registration in words, for the KFP page: version, role and reason, with a link to the run where there is one."""
    there = read_json(out / REGISTRATION)
    run = f"run `{there['run_id']}`"
    if there["tracking_uri"].startswith("http"):
        run = f"[{run}]({there['tracking_uri'].rstrip('/')}/#/runs/{there['run_id']})"
    return f"**{there['model_uri']}** is **{there['role']}**: {there['reason']}\n\nMLflow {run} at {there['tracking_uri']}\n"
