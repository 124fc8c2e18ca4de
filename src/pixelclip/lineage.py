"""Where a registered model comes from: model, run, settings, data, code and image, as a table and as JSON.

All of it stands in the registry: in the version's tags, and in the provenance of its evaluation, which `register` put among
its run's artifacts and which nests those of all stages before.
"""

import json
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from pixelclip.config import SETTINGS
from pixelclip.promote import registry
from pixelclip.provenance import WEIGHTS, chain, inputs, source
from pixelclip.register import EVALUATION
from pixelclip.server import first_line, tracking_uri, transfer
from pixelclip.stage import METRICS, PROVENANCE
from pixelclip.storage import read_json


@dataclass(frozen=True)
class Registered:
    """A registered version with its aliases, and its evaluation as it was recorded: numbers and provenance."""

    version: ModelVersion
    aliases: list[str]
    metrics: dict[str, float]
    provenance: dict[str, Any]


def run(uri: str, as_json: bool = False) -> dict[str, Any]:
    """Prints where a registered model comes from.

    Args:
        uri: `models:/NAME@ALIAS` or `models:/NAME/VERSION`.
        as_json: print JSON in place of the table.

    Returns:
        What is printed: `model`, `run`, `stages`, `data`.

    Raises:
        ValueError: no such model, one that `pixelclip register` did not register, or MLflow is unreachable.
    """
    found = trace(recorded(uri))
    print(json.dumps(found, indent=2) if as_json else table(found))
    return found


def recorded(uri: str) -> Registered:
    """What the registry holds about a model; `uri` and errors as in `run`."""
    named = re.fullmatch(r"models:/([^/@]+)(?:@([^/@]+)|/(\d+))", uri)
    if named is None:
        raise ValueError(f"{uri}: models:/NAME@ALIAS or models:/NAME/VERSION is expected")
    name, alias, number = named.groups()
    with registry(name) as client:
        aliases = {key: str(value) for key, value in client.get_registered_model(name).aliases.items()}
        if alias and alias not in aliases:
            raise ValueError(f"{uri}: {name} has no alias {alias!r}; there are {', '.join(sorted(aliases)) or 'none'}")
        version = client.get_model_version(name, number or aliases[alias])
        place = version.tags.get(EVALUATION)
        if not place:
            raise ValueError(f"{uri}: has no tag {EVALUATION!r}: `pixelclip register` with its evaluation records it")
        metrics, provenance = (_artifact(client, version.run_id, f"{place}/{file}") for file in (METRICS, PROVENANCE))
    own = sorted(key for key, value in aliases.items() if value == str(version.version))
    return Registered(version, own, metrics, provenance)


def _artifact(client: MlflowClient, run_id: str, path: str) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        try:
            with transfer():
                return read_json(Path(client.download_artifacts(run_id, path, folder)))
        except MlflowException as error:
            raise ValueError(f"run {run_id}: its artifact {path} cannot be read: {first_line(error)}") from None


def trace(there: Registered) -> dict[str, Any]:
    """The way back from a registered model, in plain values."""
    version, uri = there.version, tracking_uri().rstrip("/")
    stages = {
        (stage["stage"], stage.get("fingerprint", "")): {
            "stage": stage["stage"],
            "finished": stage.get("finished", ""),
            "version": stage.get("version", ""),
            "revision": stage.get("revision", ""),
            "image": stage.get("image", ""),
            "md5": stage.get("output", {}).get("md5", ""),
            "settings": stage["settings"],
        }
        for stage in reversed(list(chain(there.provenance)))  # one that two inputs have in common stands once
    }
    data = {}
    for name, described, stage in inputs(there.provenance):
        if "provenance" in described and not source(described):
            continue  # a stage made it: it stands among the stages
        data[name, described["md5"]] = {
            "name": name,
            "of": stage,
            "md5": described["md5"],
            "path": described["path"],
            "source": source(described),
        }
    return {
        "model": {
            "name": version.name,
            "version": int(version.version),
            "aliases": there.aliases,
            "md5": version.tags.get("model.md5", ""),
            "measured": version.tags.get("labelled.name", ""),
            "gate": version.tags.get("gate", ""),
            "metrics": there.metrics,
        },
        "run": {
            "id": version.run_id,
            "tracking_uri": uri,
            "kfp": version.tags.get("kfp.run_id", ""),
        },
        "stages": list(stages.values()),
        "data": list(data.values()),
    }


def table(found: dict[str, Any]) -> str:
    """The way back as text, the model first; of the settings those that are not the defaults of this version."""
    model, made_by = found["model"], found["run"]
    own = f" ({', '.join(model['aliases'])})" if model["aliases"] else ""
    shown = {key: value for key, value in sorted(model["metrics"].items()) if key.startswith(("gain", "miou"))}
    rows = [
        ("model", f"models:/{model['name']}/{model['version']}{own}"),
        ("", f"md5 {model['md5']}"),
        ("measured", ", ".join(f"{key} {value:.2f}" for key, value in shown.items())),
        ("gate", model["gate"]),
        ("run", f"{made_by['id']} at {made_by['tracking_uri']}"),
        *([("kfp run", made_by["kfp"])] if made_by["kfp"] else []),
    ]
    for each in found["data"]:
        label = "weights" if each["name"] in WEIGHTS else "data"
        rows.append((f"{label} {each['name']}", f"md5 {each['md5']}  {each['path']}"))
        if each["source"]:
            rows.append(("", "fetched: " + "  ".join(f"{key} {value}" for key, value in each["source"].items())))
    for stage in found["stages"]:
        image = f"  image {stage['image']}" if stage["image"] else ""
        rows.append((f"stage {stage['stage']}", f"code {stage['revision']}  version {stage['version']}{image}"))
        kind = SETTINGS.get(stage["stage"])
        usual = kind().model_dump() if kind else {}
        own_settings = [f"{key}={value}" for key, value in stage["settings"].items() if usual.get(key, ...) != value]
        rows.append(("", "  ".join(own_settings) or "all settings as by default"))
    width = max(len(label) for label, _ in rows)
    return "\n".join(f"{label:<{width}}  {text}" for label, text in rows)
