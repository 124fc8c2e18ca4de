"""Everything that `pixelclip gc` looks at: workspaces, an MLflow database, KFP's runs with artifacts in S3, a cache."""

import contextlib
import hashlib
import os
import sqlite3
import time
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.entities import LoggedModelStatus

from helpers import registrations, tiny
from helpers.kfp_server import FakeKfp
from pixelclip.config import RegisterConfig
from pixelclip.register import run as register
from pixelclip.storage import cache
from pixelclip.storage.files import digest, read_json, write_json
from pixelclip.tracking.server import experiment_id
from pixelclip.workflow.provenance import UNFINISHED

NAME = "demo"
DAY = 86400
OLD, OLDER, YOUNG = 40, 50, 5
"""Ages in days."""


def output(
    folder: Path, stage: str = "shards", inputs: Mapping[str, Any] | None = None, content: str = "", **settings: Any
) -> Path:
    """Write the finished output of a stage, whose content is by default its path."""
    folder.mkdir(parents=True)
    (folder / "000000.tar").write_text(content or str(folder))
    write_json(folder / "metrics.json", {})
    write_json(folder / "provenance.json", provenance(stage, inputs, **settings) | {"output": digest(folder)})
    return folder


def provenance(stage: str, inputs: Mapping[str, Any] | None = None, **settings: Any) -> dict[str, Any]:
    return {"stage": stage, "settings": settings, "inputs": dict(inputs or {}), "version": "0.2.0", "revision": "abc"}


def unfinished(out: Path, stage: str = "train", inputs: Mapping[str, Any] | None = None) -> Path:
    """Write the hidden folder of an unfinished stage."""
    folder = out.with_name(f".{out.name}.{hashlib.md5(str(out).encode()).hexdigest()[:12]}.partial")
    folder.mkdir(parents=True)
    (folder / "state.safetensors").write_bytes(b"state")
    write_json(folder / UNFINISHED, provenance(stage, inputs))
    return folder


def age(path: Path, days: float) -> Path:
    """Set the time of the last change of a folder and of everything below it."""
    when = time.time() - days * DAY
    for each in [*path.rglob("*"), path]:
        os.utime(each, (when, when), follow_symlinks=False)
    return path


def tree(folder: Path) -> dict[str, str]:
    """Return the content of all files below a folder, hidden ones too."""
    return {
        str(path.relative_to(folder)): hashlib.md5(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def ago(days: float) -> int:
    return int((time.time() - days * DAY) * 1000)


def mlflow_run(
    client: MlflowClient, status: str, days: float, *, model: bool = False, deleted: bool = False, **tags: str
) -> str:
    """Create a run with a file and, if wanted, a logged model."""
    experiment = experiment_id(client)
    run_id = client.create_run(experiment, ago(days), tags, run_name=f"{status.lower()} {days:g} d").info.run_id
    client.log_text(run_id, f"{run_id} {days}", "notes/a.txt")
    if model:
        logged = client.create_logged_model(experiment, name="best", source_run_id=run_id)
        (folder := Path(client.get_logged_model(logged.model_id).artifact_location.removeprefix("file://"))).mkdir(parents=True)
        (folder / "weights").write_text(logged.model_id)
        client.finalize_logged_model(logged.model_id, LoggedModelStatus.READY)
    if status not in ("RUNNING", "SCHEDULED"):
        client.set_terminated(run_id, status, ago(days))
    else:
        client.update_run(run_id, status)
    if deleted:
        client.delete_run(run_id)
    return str(run_id)


def registered(folder: Path, clip: Path, number: int, inputs: Mapping[str, Any]) -> str:
    """Register a model of a workspace as in a pipeline run, and return the ID of its MLflow run.

    Args:
        folder: the workspace.
        clip: CLIP of the model.
        number: distinguishes models; greater is better.
        inputs: further inputs of its training.
    """
    model = tiny.model_folder(folder / "train", clip, change=0.1 * number, seed=number)
    document = read_json(model / "provenance.json")
    document["inputs"] |= inputs
    write_json(model / "provenance.json", document)
    evaluation = registrations.evaluation(folder / "evaluate", model, 40.0 + number, 10.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PIXELCLIP_PIPELINE_RUN", kfp_id(f"registered {number}"))
        register(model, evaluation, folder / "register", RegisterConfig(name=NAME, min_gain=1.0))
    return str(read_json(folder / "register" / "registration.json")["run_id"])


def end_earlier(database: Path, run_id: str, days: float) -> None:
    """Change when a run started and ended, which MLflow's API cannot."""
    with contextlib.closing(sqlite3.connect(database)) as opened, opened:
        opened.execute("UPDATE runs SET start_time = ?, end_time = ? WHERE run_uuid = ?", (ago(days), ago(days), run_id))


def kfp_id(name: str) -> str:
    """Return the UUID of a KFP run by its name."""
    digits = hashlib.md5(name.encode()).hexdigest()
    return "-".join([digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:]])


def kfp_run(kfp: FakeKfp, name: str, state: str, days: float, workspace: str = "") -> str:
    """Add a run to KFP, in the experiment `pixelclip`."""
    experiments = kfp.all("experiments") or [kfp.add("experiments", {"display_name": "pixelclip"})]
    when = f"{datetime.now(UTC) - timedelta(days=days):%Y-%m-%dT%H:%M:%SZ}"
    ended = when if state in ("SUCCEEDED", "FAILED", "CANCELED") else "1970-01-01T00:00:00Z"
    entry = {"run_id": kfp_id(name), "display_name": name, "state": state, "experiment_id": experiments[0]["experiment_id"]}
    parameters = {"workspace": workspace, "settings": "train.crop=80"}
    kfp.add("runs", {**entry, "finished_at": ended, "runtime_config": {"parameters": parameters}})
    kfp.kept["runs"][kfp_id(name)]["created_at"] = when
    return kfp_id(name)


def copy_in_cache(uri: str, days: float, name: str = "weights.pt") -> Path:
    """Write a copy of a URI to the cache."""
    version = cache.folder_of(uri) / cache.short_hash("v1")
    version.mkdir(parents=True)
    (version / name).write_text(uri)
    (cache.folder_of(uri) / "uri").write_text(uri)
    return age(version, days)
