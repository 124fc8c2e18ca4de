"""Lineage of a registered model: run, settings, data, code and image, as a table or JSON.

It is read from the version's tags and from the provenance of its evaluation, an artifact of the run that nests the provenance
of all earlier stages.
"""

import json
import re
from typing import Any, NamedTuple

from mlflow.artifacts import load_dict
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from pixelclip.registry.model_version import EVALUATION
from pixelclip.registry.promotion import registry
from pixelclip.tracking.server import connect, public_uri, reason_of, run_url, transfer
from pixelclip.workflow.provenance import WEIGHTS, chain, changed_settings, origins, source
from pixelclip.workflow.stage import METRICS, PROVENANCE


class Registered(NamedTuple):
    """A registered version with its aliases and the metrics and provenance of its evaluation."""

    version: ModelVersion
    aliases: list[str]
    metrics: dict[str, float]
    provenance: dict[str, Any]


def run(uri: str, as_json: bool = False) -> dict[str, Any]:
    """Print the lineage of a registered model.

    Args:
        uri: `models:/NAME@ALIAS` or `models:/NAME/VERSION`.
        as_json: print JSON instead of the table.

    Returns:
        The lineage: `model`, `run`, `stages`, `data`.

    Raises:
        ValueError: the model is unknown or not registered by `pixelclip register`, or MLflow is unreachable.
    """
    origin = trace(recorded(uri))
    print(json.dumps(origin, indent=2) if as_json else table(origin))
    return origin


def recorded(uri: str) -> Registered:
    """Read a registered version and its evaluation; `uri` and errors as in `run`."""
    match = re.fullmatch(r"models:/([^/@]+)(?:@([^/@]+)|/(\d+))", uri)
    if match is None:
        raise ValueError(f"{uri}: expected models:/NAME@ALIAS or models:/NAME/VERSION")
    name, alias, number = match.groups()
    with registry(name) as client:
        aliases = {key: str(value) for key, value in client.get_registered_model(name).aliases.items()}
        if alias and alias not in aliases:
            raise ValueError(f"{uri}: {name} has no alias {alias!r}; its aliases: {', '.join(sorted(aliases)) or 'none'}")
        version = client.get_model_version(name, number or aliases[alias])
        artifact_path = version.tags.get(EVALUATION)
        if not artifact_path:
            raise ValueError(f"{uri}: has no tag {EVALUATION!r}; `pixelclip register` with its evaluation writes it")
        metrics, provenance = (_artifact(f"runs:/{version.run_id}/{artifact_path}/{file}") for file in (METRICS, PROVENANCE))
    own = sorted(key for key, value in aliases.items() if value == str(version.version))
    return Registered(version, own, metrics, provenance)


def _artifact(uri: str) -> dict[str, Any]:
    try:
        with transfer():
            return load_dict(uri)
    except MlflowException as error:
        raise ValueError(f"{uri}: cannot be read: {reason_of(error)}") from None


def trace(registered: Registered) -> dict[str, Any]:
    """Collect the lineage of a registered version as JSON values."""
    version, uri = registered.version, public_uri().rstrip("/")
    stages = {}
    for stage in reversed(list(chain(registered.provenance))):  # a stage that two inputs share is listed once
        entry = {key: stage.get(key, "") for key in ("stage", "finished", "version", "revision", "image")}
        entry |= {"md5": stage.get("output", {}).get("md5", ""), "settings": stage["settings"]}
        stages[stage["stage"], stage.get("fingerprint", "")] = entry
    data = {}
    for name, described, reader in origins(registered.provenance):
        entry = {"name": name, "of": reader, "md5": described["md5"], "path": described["path"], "source": source(described)}
        data[name, described["md5"]] = entry
    return {
        "model": {
            "name": version.name,
            "version": int(version.version),
            "aliases": registered.aliases,
            "md5": version.tags.get("model.md5", ""),
            "measured": version.tags.get("labelled.name", ""),
            "gate": version.tags.get("gate", ""),
            "metrics": registered.metrics,
        },
        "run": {
            "id": version.run_id,
            "tracking_uri": uri,
            "url": run_url(connect(), version.run_id),
            "kfp": version.tags.get("kfp.run_id", ""),
        },
        "stages": list(stages.values()),
        "data": list(data.values()),
    }


def table(origin: dict[str, Any]) -> str:
    """Format a lineage as text, the model first; settings that equal this version's defaults are omitted."""
    model, mlflow_run = origin["model"], origin["run"]
    aliases = f" ({', '.join(model['aliases'])})" if model["aliases"] else ""
    shown = {key: value for key, value in sorted(model["metrics"].items()) if key.startswith(("gain", "miou"))}
    rows = [
        ("model", f"models:/{model['name']}/{model['version']}{aliases}"),
        ("", f"md5 {model['md5']}"),
        ("measured", ", ".join(f"{key} {value:.2f}" for key, value in shown.items())),
        ("gate", model["gate"]),
        ("run", mlflow_run["url"]),
        *([("kfp run", mlflow_run["kfp"])] if mlflow_run["kfp"] else []),
    ]
    for entry in origin["data"]:
        label = "weights" if entry["name"] in WEIGHTS else "data"
        rows.append((f"{label} {entry['name']}", f"md5 {entry['md5']}  {entry['path']}"))
        if entry["source"]:
            rows.append(("", "fetched: " + "  ".join(f"{key} {value}" for key, value in entry["source"].items())))
    for stage in origin["stages"]:
        image = f"  image {stage['image']}" if stage["image"] else ""
        rows.append((f"stage {stage['stage']}", f"code {stage['revision']}  version {stage['version']}{image}"))
        changed = [f"{key}={value}" for key, value in changed_settings(stage).items()]
        rows.append(("", "  ".join(changed) or "default settings"))
    width = max(len(label) for label, _ in rows)
    return "\n".join(f"{label:<{width}}  {text}" for label, text in rows)
