"""STAGE register: register a model in MLflow and promote it to champion if it passes the gate.

Every model is registered. It becomes `champion` only if its gain over CLIP reaches `register.min_gain` and it beats the current
champion on the same labelled set and protocol; otherwise it becomes `challenger`, and without an evaluation `unmeasured`. Tags
on the version hold the metrics and the reason; the full evaluation is stored as artifacts of the run.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion

from pixelclip.config import BEST, EvaluateConfig, RegisterConfig
from pixelclip.evaluation.protocol import check_evaluation, conditions_of, input_size, read_protocol
from pixelclip.models.checkpoint import read_config
from pixelclip.registry import model_version
from pixelclip.registry.gate import GateMetrics
from pixelclip.registry.model_card import SEGMENTATIONS
from pixelclip.registry.model_version import EVALUATION, REGISTRATION
from pixelclip.registry.promotion import CHALLENGER, CHAMPION, GATE, UNMEASURED, pass_gate, registry, write_metrics
from pixelclip.storage.files import write_json
from pixelclip.tracking.run import lineage_tags
from pixelclip.tracking.server import public_uri, transfer
from pixelclip.workflow.provenance import read_provenance
from pixelclip.workflow.stage import METRICS, PROVENANCE, Metrics, Stage, describe, read_metrics


def run(model: Path, evaluation: Path | None, out: Path, config: RegisterConfig) -> Metrics:
    """Register a model and promote it if it passes the gate; the same weights are registered once per input size.

    Args:
        model: model folder.
        evaluation: output of `evaluate` for this model. Without it the version is `unmeasured`: it has no alias, and
            the gate cannot make it champion. A later registration with an evaluation measures the same version, unless the
            evaluation has another input size than the default one.
        out: output folder, for `registration.json`.
        config: settings.

    Returns:
        `register/version` and `register/champion` (1 or 0).

    Raises:
        ValueError: the evaluation is of a different model, a metric is missing or not finite, or MLflow is unreachable.
    """
    provenance = read_provenance(model / PROVENANCE)
    md5 = provenance["output"]["md5"]
    side = read_config(model)["side"]
    inputs, resize = {"model": describe(model)}, input_size(EvaluateConfig().model_dump(), side)
    measured: tuple[Path, dict[str, Any], dict[str, str]] | None = None
    if evaluation:
        evaluated = check_evaluation(evaluation, model)
        measured = evaluation, evaluated, _gate_tags(model, evaluation, evaluated, config, md5)
        inputs["evaluation"], resize = describe(evaluation), input_size(evaluated["settings"], side)
    stage = Stage("register", out, inputs, config)
    with registry(config.name) as client:
        if stage.finished:
            if model_version.find(client, config.name, md5, resize) is not None:
                return stage.reuse()
            shutil.rmtree(stage.out)  # the recorded version is not in this registry, or was deleted
        with stage:
            model_version.create_name(client, config.name)
            version = model_version.find(client, config.name, md5, resize)
            if version is None:
                version = model_version.create(client, model, provenance, config.name, resize)
            number = str(version.version)
            if measured:
                role, reason = _measured(client, version, model, config, *measured)
            else:
                role, reason = _unmeasured(client, version, model, config, provenance)
            print(f"register: {config.name} version {number} is {role}: {reason}", flush=True)
            registration = {
                "name": config.name,
                "version": int(number),
                "role": role,
                "reason": reason,
                "run_id": version.run_id,
                "experiment_id": str(client.get_run(version.run_id).info.experiment_id),
                "model_uri": f"models:/{config.name}/{number}",
                "tracking_uri": public_uri(),
            }
            write_json(stage.folder / REGISTRATION, registration)
            values = {"register/version": float(number), "register/champion": float(role == CHAMPION)}
            return stage.finish(values, files=[REGISTRATION])


def _gate_tags(model: Path, evaluation: Path, evaluated: Mapping[str, Any], config: RegisterConfig, md5: str) -> dict[str, str]:
    """Return the tags that the gate and `lineage` read."""
    metrics, labelled_name = _metrics(model, evaluation, evaluated)
    return {
        "miou": repr(metrics.miou),
        "gain": repr(metrics.gain),
        "labelled.name": labelled_name,
        "measured_on": metrics.measured_on,
        "min_gain": repr(config.min_gain),
        EVALUATION: f"evaluations/{metrics.measured_on[:12]}-{md5[:12]}",
    }


def _measured(
    client: MlflowClient,
    version: ModelVersion,
    model: Path,
    config: RegisterConfig,
    evaluation: Path,
    evaluated: Mapping[str, Any],
    tags: Mapping[str, str],
) -> tuple[str, str]:
    """Attach an evaluation to a version and pass the gate; return role and reason."""
    name, number, folder = version.name, str(version.version), tags[EVALUATION]
    picture = evaluation / SEGMENTATIONS
    with transfer():
        for file in (evaluation / PROVENANCE, evaluation / METRICS, *([picture] if picture.is_file() else [])):
            client.log_artifact(version.run_id, str(file), folder)
    for key, value in lineage_tags(evaluated).items():
        client.set_model_version_tag(name, number, key, value)
    write_metrics(client, name, number, tags)
    shown = f"{folder}/{SEGMENTATIONS}" if picture.is_file() else ""
    model_version.write_card(client, version, model, evaluation, config, shown)
    decision = pass_gate(client, name, number, challenge=True)
    return (CHAMPION if decision.champion else CHALLENGER), decision.reason


def _unmeasured(
    client: MlflowClient, version: ModelVersion, model: Path, config: RegisterConfig, provenance: Mapping[str, Any]
) -> tuple[str, str]:
    """Mark a version as unmeasured, unless an earlier registration has measured it; return role and reason."""
    name, number = version.name, str(version.version)
    if version.tags.get("measured_on"):
        raise ValueError(f"{name} version {number} of these weights has been evaluated; register it with its evaluation")
    for key, value in lineage_tags(provenance).items():
        client.set_model_version_tag(name, number, key, value)
    reason = "it was registered without an evaluation, so the gate cannot compare it; evaluate it and register it again"
    client.set_model_version_tag(name, number, GATE, f"{UNMEASURED}: {reason}")
    model_version.write_card(client, version, model, None, config)
    return UNMEASURED, reason


def _metrics(model: Path, evaluation: Path, evaluated: Mapping[str, Any]) -> tuple[GateMetrics, str]:
    metrics = read_metrics(evaluation)
    names = [key.removeprefix("gain/") for key in metrics if key.startswith("gain/") and not key.endswith(BEST)]
    if len(names) != 1 or f"miou/{names[0]}" not in metrics:
        raise ValueError(f"{evaluation / METRICS}: needs exactly one gain/NAME with its miou/NAME, found {sorted(metrics)}")
    miou, gain = (float(metrics[f"{key}/{names[0]}"]) for key in ("miou", "gain"))
    return GateMetrics(miou, gain, _measured_on(model, evaluation, evaluated)), names[0]


def _measured_on(model: Path, evaluation: Path, evaluated: Mapping[str, Any]) -> str:
    """Hash the conditions under which the metrics of two models are comparable: labelled set, given masks, protocol.

    The name of the set is ignored, and so is the side if it is the model's own: models are compared at the sides they were
    trained with.
    """
    conditions = conditions_of(read_protocol(evaluation), evaluated["inputs"])
    del conditions["name"]
    if conditions["side"] == read_config(model)["side"]:
        conditions["side"] = "the model's"
    return hashlib.md5(json.dumps(conditions, sort_keys=True).encode(), usedforsecurity=False).hexdigest()
