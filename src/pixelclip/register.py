"""STAGE register: register a model in MLflow and promote it to champion if it passes the gate.

Every model is registered. It becomes `champion` only if its gain over CLIP reaches `register.min_gain` and it beats the current
champion on the same labelled set and protocol; otherwise it becomes `challenger`. Tags on the version hold the metrics and the
reason; the full evaluation is stored as artifacts of the run.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pixelclip.config import RegisterConfig
from pixelclip.evaluation.protocol import conditions_of, read_protocol, resize_of
from pixelclip.models.checkpoint import read_config
from pixelclip.registry import model_version
from pixelclip.registry.gate import GateMetrics
from pixelclip.registry.model_version import EVALUATION, REGISTRATION
from pixelclip.registry.promotion import CHALLENGER, CHAMPION, pass_gate, registry, write_metrics
from pixelclip.storage.files import write_json
from pixelclip.tracking.run import lineage_tags
from pixelclip.tracking.server import public_uri, transfer
from pixelclip.workflow.provenance import read_provenance
from pixelclip.workflow.stage import METRICS, PROVENANCE, Metrics, Stage, describe, read_metrics


def run(model: Path, evaluation: Path, out: Path, config: RegisterConfig) -> Metrics:
    """Register a model and promote it if it passes the gate; the same weights are registered once per first resize.

    Args:
        model: model folder.
        evaluation: output of `evaluate` for this model.
        out: output folder, for `registration.json`.
        config: settings.

    Returns:
        `register/version` and `register/champion` (1 or 0).

    Raises:
        ValueError: the evaluation is of a different model, a metric is missing or not finite, or MLflow is unreachable.
    """
    provenance, evaluated = (read_provenance(folder / PROVENANCE) for folder in (model, evaluation))
    if evaluated["stage"] != "evaluate":
        raise ValueError(f"{evaluation}: expected the output of evaluate, found that of {evaluated['stage']!r}")
    md5 = provenance["output"]["md5"]
    if evaluated["inputs"].get("model", {}).get("md5") != md5:
        raise ValueError(f"{evaluation}: evaluates a different model than {model}")
    metrics, labelled_name = _metrics(model, evaluation, evaluated)
    resize = resize_of(evaluated["settings"])
    stage = Stage("register", out, {"model": describe(model), "evaluation": describe(evaluation)}, config)
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
            artifact_path = f"evaluations/{metrics.measured_on[:12]}-{md5[:12]}"
            with transfer():
                for file in (PROVENANCE, METRICS):
                    client.log_artifact(version.run_id, str(evaluation / file), artifact_path)
            for key, value in lineage_tags(evaluated).items():
                client.set_model_version_tag(config.name, number, key, value)
            tags = {
                "miou": repr(metrics.miou),
                "gain": repr(metrics.gain),
                "labelled.name": labelled_name,
                "measured_on": metrics.measured_on,
                "min_gain": repr(config.min_gain),
                EVALUATION: artifact_path,
            }
            write_metrics(client, config.name, number, tags)
            decision = pass_gate(client, config.name, number, challenge=True)
            role = CHAMPION if decision.champion else CHALLENGER
            print(f"register: {config.name} version {number} is {role}: {decision.reason}", flush=True)
            registration = {
                "name": config.name,
                "version": int(number),
                "role": role,
                "reason": decision.reason,
                "run_id": version.run_id,
                "model_uri": f"models:/{config.name}/{number}",
                "tracking_uri": public_uri(),
            }
            write_json(stage.folder / REGISTRATION, registration)
            values = {"register/version": float(number), "register/champion": float(decision.champion)}
            return stage.finish(values, files=[REGISTRATION])


def _metrics(model: Path, evaluation: Path, evaluated: Mapping[str, Any]) -> tuple[GateMetrics, str]:
    metrics = read_metrics(evaluation)
    names = [key.removeprefix("gain/") for key in metrics if key.startswith("gain/")]
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
