"""What must stay: the runs, models and data that registered versions and running trainings name."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.artifacts import load_text
from mlflow.entities import Run, RunStatus, ViewType
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.utils.file_utils import local_file_uri_to_path
from mlflow.utils.uri import is_local_uri

from pixelclip.registry.model_version import EVALUATION
from pixelclip.storage import cache
from pixelclip.storage.files import parse_json
from pixelclip.tracking.run import LINEAGE
from pixelclip.tracking.server import is_missing, public_uri, reason_of, transfer
from pixelclip.workflow.provenance import chain
from pixelclip.workflow.stage import PROVENANCE

KFP_RUN = "kfp.run_id"
"""Tag of an MLflow run: the ID of its KFP run."""
_PARENT, _SWEEP, _SWEEP_OUT = "mlflow.parentRunId", "sweep.row", "sweep.out"
_UUID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_PAGE = 1000
_OPEN = ("RUNNING", "SCHEDULED")


def recipe(stage: Mapping[str, Any]) -> str:
    """Identify what a stage computes, the same for all its parts.

    A lineage has one MD5 for all parts together, so single parts are found by their recipe.
    """
    settings = {name: value for name, value in stage["settings"].items() if name != "part"}
    md5s = {name: described["md5"] for name, described in stage["inputs"].items()}
    return json.dumps([stage["stage"], settings, md5s], sort_keys=True)


class Named:
    """What must stay, each with the reason: MLflow runs, logged models and KFP runs by ID, data by MD5, and places.

    A place is a local path or an `s3://` URI.
    """

    def __init__(self) -> None:
        self.runs: dict[str, str] = {}
        self.models: dict[str, str] = {}
        self.kfp_runs: dict[str, str] = {}
        self.active_kfp: dict[str, str] = {}  # those that have not ended, whose MLflow runs stay, too
        self.md5s: dict[str, str] = {}
        self.places: dict[str, str] = {}

    def add_place(self, place: str, reason: str) -> None:
        """Add a path or URI; a path in KFP's artifact store also names the run that wrote it."""
        self.places.setdefault(place if "://" in place else str(Path(place).absolute()), reason)
        for run_id in _UUID.findall(place):
            self.kfp_runs.setdefault(run_id, reason)

    def add_lineage(self, provenance: Mapping[str, Any] | None, reason: str) -> None:
        """Add the inputs and outputs of all stages of a provenance, if there is one."""
        for stage in chain(provenance) if provenance else ():
            self.md5s.setdefault(recipe(stage), reason)
            for described in [*stage["inputs"].values(), stage.get("output", {})]:
                if md5 := described.get("md5"):
                    self.md5s.setdefault(md5, reason)
                if path := described.get("path"):
                    self.add_place(path, reason)

    def add_tags(self, tags: Mapping[str, str], reason: str) -> None:
        """Add what the lineage tags of a run or a version name."""
        for key, value in tags.items():
            if key == KFP_RUN:
                self.kfp_runs.setdefault(value, reason)
            elif key == "model.md5" or re.fullmatch(r"data\..+\.md5", key):
                self.md5s.setdefault(value, reason)
            elif re.fullmatch(r"data\..+\.path", key):
                self.add_place(value, reason)

    def of_path(self, path: Path) -> str:
        """Return why a local path must stay, because it is, contains or is inside a place; empty if it need not."""
        path = path.absolute()
        for place, reason in self.places.items():
            if "://" not in place and (path.is_relative_to(place) or Path(place).is_relative_to(path)):
                return reason
        return ""


def all_runs(client: MlflowClient, experiments: Sequence[str], query: str = "") -> list[Run]:
    """Return all runs of some experiments that a query finds, also those in MLflow's trash."""
    found: list[Run] = []
    token = None
    while True:
        page = client.search_runs(experiments, query, ViewType.ALL, _PAGE, page_token=token)
        found += page
        if not (token := page.token):
            return found


def is_running(run: Run) -> bool:
    """Return whether a run has not ended."""
    return run.info.lifecycle_stage == "active" and not RunStatus.is_terminated(RunStatus.from_string(run.info.status))


def read(client: MlflowClient, runs: Sequence[Run]) -> Named:
    """Collect what the registered versions of all models and the running runs of all experiments name.

    Args:
        client: a connected client.
        runs: all runs that may be deleted; relatives of named runs are found among them.

    Raises:
        ValueError: MLflow does not return the versions, or the lineage of one.
    """
    named = Named()
    by_id = {run.info.run_id: run for run in runs}
    try:
        for version, reason in _versions(client):
            _add_version(named, client, by_id, version, reason)
        experiments = client.search_experiments(view_type=ViewType.ALL)
        ids = [each.experiment_id for each in experiments]
        running = [run for status in _OPEN for run in all_runs(client, ids, f"attributes.status = '{status}'")]
        for run in filter(is_running, running):
            _add_running(named, client, by_id, run)
        for experiment in experiments:
            if is_local_uri(experiment.artifact_location):
                named.add_place(local_file_uri_to_path(experiment.artifact_location), "contains MLflow's artifacts")
    except MlflowException as error:
        problem = "what registered versions and running runs need cannot be read"
        raise ValueError(f"MLflow at {public_uri()}: {problem}, so nothing is deleted: {reason_of(error)}") from None
    named.add_place(str(cache.root()), "contains the cache")
    return named


def _versions(client: MlflowClient) -> Iterator[tuple[ModelVersion, str]]:
    """Yield all registered versions, and how they are called: `models:/NAME/3 (champion)`."""
    aliases: dict[str, dict[str, str]] = {}
    token = None
    while True:
        page = client.search_model_versions(max_results=_PAGE, page_token=token)
        for version in page:
            name, number = version.name, str(version.version)
            if name not in aliases:
                aliases[name] = client.get_registered_model(name).aliases
            own = sorted(alias for alias, value in aliases[name].items() if str(value) == number)
            yield version, f"models:/{name}/{number}" + (f" ({', '.join(own)})" if own else "")
        if not (token := page.token):
            return


def _add_version(named: Named, client: MlflowClient, runs: dict[str, Run], version: ModelVersion, name: str) -> None:
    """Add a version's logged model, run and relatives of the run, and everything its lineage names."""
    named.add_tags(version.tags, f"named by {name}")
    source = str(version.source or "")
    if source and "models:/" not in source:  # a version that MLflow's clients before 3.0 or other tools made of files
        named.add_place(local_file_uri_to_path(source) if is_local_uri(source) else source, f"named by {name}")
    run_ids = {version.run_id or "", *re.findall(r"\b[0-9a-f]{32}\b", source)}
    for model_id in {version.model_id or "", *re.findall(r"\bm-[0-9a-f]{32}\b", source)} - {""}:
        named.models.setdefault(model_id, f"named by {name}")
        try:
            run_ids.add(client.get_logged_model(model_id).source_run_id or "")
        except MlflowException as error:
            if not is_missing(error):
                raise
    for run_id in run_ids - {""}:
        named.runs.setdefault(run_id, f"named by {name}")
        try:
            run = runs.get(run_id) or client.get_run(run_id)
        except MlflowException as error:
            if is_missing(error):  # deleted for good; its version names the data by tags
                continue
            raise
        folder = version.tags.get(EVALUATION)
        for path in (LINEAGE, *([f"{folder}/{PROVENANCE}"] if folder else [])):
            named.add_lineage(_document(client, run_id, path), f"data of {name}")
        named.add_tags(run.data.tags, f"named by {name}")
        _add_parents(named, runs, run, f"belongs to {name}")
        _add_siblings(named, runs, run, f"belongs to {name}")


def _add_running(named: Named, client: MlflowClient, runs: dict[str, Run], run: Run) -> None:
    """Add what a running run reads and writes, its parents, and its children."""
    shown = f"the running MLflow run {run.info.run_id[:8]}"
    named.add_tags(run.data.tags, f"read by {shown}")
    named.add_lineage(_document(client, run.info.run_id, LINEAGE), f"read by {shown}")
    if out := run.data.tags.get(_SWEEP_OUT):
        named.add_place(out, f"written by {shown}")
    _add_parents(named, runs, run, f"parent of {shown}")
    _add_children(named, runs, run, f"child of {shown}")


def _add_children(named: Named, runs: dict[str, Run], run: Run, reason: str) -> None:
    """Add the runs below a run: a running sweep reads finished rows again for its table."""
    found = [run.info.run_id]
    for above in found:
        below = [run_id for run_id, other in runs.items() if other.data.tags.get(_PARENT) == above and run_id not in found]
        found += below
        for run_id in below:
            named.runs.setdefault(run_id, reason)


def _add_parents(named: Named, runs: dict[str, Run], run: Run, reason: str) -> None:
    seen = {""}
    above = run.data.tags.get(_PARENT, "")
    while above not in seen:
        seen.add(above)
        named.runs.setdefault(above, reason)
        above = runs[above].data.tags.get(_PARENT, "") if above in runs else ""


def _add_siblings(named: Named, runs: dict[str, Run], run: Run, reason: str) -> None:
    """Add the other runs of the same pipeline run, such as that of CLIP's evaluation; rows of a sweep are independent."""
    for other in runs.values():
        keys = [KFP_RUN] if _SWEEP in run.data.tags else [KFP_RUN, _PARENT]
        if any(run.data.tags.get(key) and run.data.tags[key] == other.data.tags.get(key) for key in keys):
            named.runs.setdefault(other.info.run_id, reason)


def _document(client: MlflowClient, run_id: str, path: str) -> dict[str, Any] | None:
    """Return a provenance among the artifacts of a run; None if the run has none that pixelclip wrote."""
    with transfer():
        if path not in [file.path for file in client.list_artifacts(run_id, path.rpartition("/")[0] or None)]:
            return None
        document = parse_json(load_text(f"runs:/{run_id}/{path}"), f"runs:/{run_id}/{path}")
    return document if isinstance(document, dict) and {"stage", "settings", "inputs"} <= document.keys() else None
