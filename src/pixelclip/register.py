"""STAGE register: the gate in front of MLflow's registry.

A model is always registered. It becomes `champion` only if its gain over CLIP reaches `register.min_gain` and it beats the
present champion on the same labelled set under the same protocol; otherwise it is the `challenger`, and the reason is said.
"""

import hashlib
import json
import math
import shutil
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import mlflow
from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from pixelclip import __version__, serve
from pixelclip.checkpoint import CONFIG, WEIGHTS
from pixelclip.config import RegisterConfig
from pixelclip.stage import METRICS, PROVENANCE, Metrics, Stage, describe
from pixelclip.storage import read_json, write_json
from pixelclip.tracking import RUN, Run, connect, lineage, tracking_uri

REGISTRATION = "registration.json"
_REQUIRED = ("numpy", "open_clip_torch", "pillow", "pydantic", "pyyaml", "safetensors", "torch", "torchvision")


@dataclass(frozen=True)
class Figures:
    """What the gate looks at: mIoU and gain in points, and what they were measured on (labelled set and protocol)."""

    miou: float
    gain: float
    measured_on: str


@dataclass(frozen=True)
class Decision:
    """Whether a model becomes champion, and why."""

    champion: bool
    reason: str


def decide(candidate: Figures, champion: Figures | None, min_gain: float) -> Decision:
    """The gate.

    Raises:
        ValueError: a figure is not a finite number.
    """
    for figures in filter(None, (candidate, champion)):
        if not (math.isfinite(figures.miou) and math.isfinite(figures.gain)):
            raise ValueError(f"the gate needs finite figures, found mIoU {figures.miou} and gain {figures.gain}")
    if candidate.gain < min_gain:
        return Decision(False, f"gain {candidate.gain:.2f} over CLIP is below register.min_gain {min_gain:g}")
    if champion is None:
        return Decision(True, f"gain {candidate.gain:.2f} over CLIP, and there was no champion")
    if champion.measured_on != candidate.measured_on:
        return Decision(
            False,
            "the champion was measured on another labelled set or protocol; measure it on this one: pixelclip evaluate "
            "--model models:/NAME@champion, then pixelclip register with that evaluation",
        )
    versus = f"mIoU {candidate.miou:.2f} against the champion's {champion.miou:.2f}"
    return Decision(candidate.miou > champion.miou, versus)


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
    provenance, evaluated = read_json(model / PROVENANCE), read_json(evaluation / PROVENANCE)
    if evaluated["stage"] != "evaluate":
        raise ValueError(f"{evaluation}: is no evaluation, stage {evaluated['stage']!r} made it")
    if evaluated["inputs"]["model"]["md5"] != provenance["output"]["md5"]:
        raise ValueError(f"{evaluation}: is the evaluation of another model than {model}")
    figures, name = _figures(evaluation, evaluated)
    client = connect()
    stage = Stage("register", out, {"model": describe(model), "evaluation": describe(evaluation)}, config)
    if stage.finished:
        if _version_of(client, config.name, provenance["output"]["md5"]) is not None:
            return stage.reuse()
        shutil.rmtree(stage.out)  # registered elsewhere, or in a registry that is gone
    with stage:
        version = _version_of(client, config.name, provenance["output"]["md5"])
        if version is None:
            version = _create_version(client, model, stage.folder, provenance, config.name)
        tags = {
            "miou": repr(figures.miou),
            "gain": repr(figures.gain),
            "labelled.name": name,
            "measured_on": figures.measured_on,
        }
        for key, value in (tags | lineage(evaluated)).items():
            client.set_model_version_tag(config.name, version.version, key, value)
        decision = _through_gate(client, config, version, figures)
        role = "champion" if decision.champion else "challenger"
        client.set_model_version_tag(config.name, version.version, "gate", f"{role}: {decision.reason}")
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


def _figures(evaluation: Path, evaluated: Mapping[str, Any]) -> tuple[Figures, str]:
    metrics = read_json(evaluation / METRICS)
    names = [key.removeprefix("gain/") for key in metrics if key.startswith("gain/")]
    if len(names) != 1 or f"miou/{names[0]}" not in metrics:
        raise ValueError(f"{evaluation / METRICS}: one gain/NAME with its miou/NAME is needed, found {sorted(metrics)}")
    protocol = {key: value for key, value in evaluated["settings"].items() if key not in ("name", "clip", "max_bad_share")}
    identity = json.dumps([evaluated["inputs"]["labelled"]["md5"], protocol], sort_keys=True)
    measured_on = hashlib.md5(identity.encode(), usedforsecurity=False).hexdigest()
    return Figures(metrics[f"miou/{names[0]}"], metrics[f"gain/{names[0]}"], measured_on), names[0]


def _version_of(client: MlflowClient, name: str, model_md5: str) -> ModelVersion | None:
    """The registered version of these very weights, if there is one."""
    try:
        found = client.search_model_versions(f"name = '{name}'")
    except MlflowException:
        return None
    same = [version for version in found if version.tags.get("model.md5") == model_md5]
    return max(same, key=lambda version: int(version.version)) if same else None


def _create_version(client: MlflowClient, model: Path, folder: Path, provenance: Mapping[str, Any], name: str) -> ModelVersion:
    tracked = Run.attach(model, folder, provenance)
    tracked.finish()
    before = client.get_run(tracked.run_id).info.status
    requirements = [f"{package}=={metadata.version(package)}" for package in _REQUIRED]
    with mlflow.start_run(run_id=tracked.run_id), tempfile.TemporaryDirectory() as copy, warnings.catch_warnings():
        # The signature is stated, so no example is needed to guess it.
        warnings.filterwarnings("ignore", ".*input example was not provided", UserWarning)
        logged = mlflow.pyfunc.log_model(
            name="model",
            python_model=serve.__file__,
            artifacts={serve.ARTIFACT: str(_weights_only(model, Path(copy)))},
            signature=serve.SIGNATURE,
            pip_requirements=[f"pixelclip=={__version__}", *requirements],
        )
    client.update_run(tracked.run_id, status=before)  # leaving `with` finished it, but it may be somebody else's
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise ValueError(f"registry name {name!r} is refused by MLflow: {error.message}") from None
    return client.create_model_version(
        name,
        source=logged.model_uri,
        run_id=tracked.run_id,
        model_id=logged.model_id,
        tags={"model.md5": provenance["output"]["md5"]},
    )


def _weights_only(model: Path, folder: Path) -> Path:
    """A copy of what inference needs: a training leaves pictures and curves beside it."""
    copy = folder / serve.ARTIFACT
    copy.mkdir()
    for name in (WEIGHTS, CONFIG, PROVENANCE, RUN):
        if (model / name).is_file():
            shutil.copyfile(model / name, copy / name)
    return copy


def _through_gate(client: MlflowClient, config: RegisterConfig, version: ModelVersion, figures: Figures) -> Decision:
    aliases = client.get_registered_model(config.name).aliases
    number = str(aliases.get("champion", ""))
    if number == str(version.version):
        return Decision(True, "it is the champion already; its figures are brought up to date")
    champion = None
    if number:
        tags = client.get_model_version(config.name, number).tags
        champion = Figures(float(tags.get("miou", "nan")), float(tags.get("gain", "nan")), tags.get("measured_on", ""))
    decision = decide(figures, champion, config.min_gain)
    if decision.champion:
        if number:
            client.set_registered_model_alias(config.name, "previous", number)
        client.set_registered_model_alias(config.name, "champion", version.version)
        if str(aliases.get("challenger", "")) == str(version.version):
            client.delete_registered_model_alias(config.name, "challenger")
    else:
        client.set_registered_model_alias(config.name, "challenger", version.version)
    return decision


def fetch(uri: str, folder: Path | None = None) -> Path:
    """Returns the model folder of `models:/NAME@ALIAS` or `models:/NAME/VERSION`, downloaded to `folder`.

    Raises:
        ValueError: MLflow is unreachable, or knows no such model.
    """
    connect()
    try:
        root = Path(mlflow.artifacts.download_artifacts(uri, dst_path=None if folder is None else str(folder)))
    except MlflowException as error:
        raise ValueError(f"{uri}: no such model at {tracking_uri()}: {error.message}") from None
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
