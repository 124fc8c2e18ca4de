"""MLflow's runs, their logged models, and the files of both."""

import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import LoggedModel, LoggedModelStatus, Run
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.artifact_repo import ArtifactRepository
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

from pixelclip.cleanup.named import KFP_RUN, Named, is_running
from pixelclip.cleanup.policy import Item
from pixelclip.tracking.run import KILLED
from pixelclip.tracking.server import is_missing, reason_of, transfer

DATABASE = "MLFLOW_BACKEND_STORE_URI"
"""Environment variable of MLflow's server with its database. Without it a client cannot remove records, only files."""
_ACTIVE = "active"


@dataclass(frozen=True)
class Store:
    """A client, and the store behind it if records can be removed for good: as in `mlflow gc`, only in a database."""

    client: MlflowClient
    database: Any | None

    @classmethod
    def of(cls, client: MlflowClient) -> "Store":
        """Return the store of a client: its own database, or that of `DATABASE`."""
        own = client._tracking_client.store
        if hasattr(own, "_hard_delete_run"):
            return cls(client, own)
        uri = os.environ.get(DATABASE)
        return cls(client, MlflowClient(uri)._tracking_client.store if uri else None)


def items(store: Store, experiment: str, runs: Sequence[Run], named: Named) -> list[Item]:
    """Return the runs of an experiment, each with its logged models, and the logged models whose run is gone.

    Raises:
        MlflowException: MLflow rejects a request.
    """
    of_run = defaultdict(list)
    for model in _models(store, experiment):
        of_run[model.source_run_id or ""].append(model)
    found = [item for run in runs if (item := _run_item(store, run, of_run.pop(run.info.run_id, []), named))]
    return found + [_model_item(store, model, named) for models in of_run.values() for model in models]


def _models(store: Store, experiment: str) -> list[LoggedModel]:
    """Return all logged models; those in MLflow's trash only from a database."""
    found: list[LoggedModel] = []
    token = None
    while True:
        page = store.client.search_logged_models([experiment], page_token=token)
        found += page
        if not (token := page.token):
            break
    if store.database:
        deleted = (
            store.database.get_logged_model(each, allow_deleted=True) for each in store.database._get_deleted_logged_models()
        )
        found += [model for model in deleted if model.experiment_id == experiment]
    return found


def _run_item(store: Store, run: Run, models: list[LoggedModel], named: Named) -> Item | None:
    """Return the item of a run; None for a run of which only a record is left that cannot be removed."""
    info = run.info
    size, problem = _measured(info.artifact_uri, *(model.artifact_location for model in models))
    deleted = info.lifecycle_stage != _ACTIVE
    if deleted and not (size or problem or models or store.database):
        return None
    reasons = [named.runs.get(info.run_id), *(named.models.get(model.model_id) for model in models)]
    reasons += [f"running: its status is {info.status}" if is_running(run) else None]
    reasons += [named.active_kfp.get(run.data.tags.get(KFP_RUN, ""))]
    return Item(
        name=f"{info.run_id[:8]}  {info.run_name}",
        size=size,
        changed=(info.end_time or info.start_time) / 1000,
        delete=partial(_delete_run, store, info.run_id, models, problem),
        kept=next(filter(None, reasons), ""),
        resumable=info.status == KILLED and not deleted,
    )


def _model_item(store: Store, model: LoggedModel, named: Named) -> Item:
    size, problem = _measured(model.artifact_location)
    return Item(
        name=f"{model.model_id[:10]}  {model.name}, without a run",
        size=size,
        changed=model.last_updated_timestamp / 1000,
        delete=partial(_delete_model, store, model, problem),
        kept=named.models.get(model.model_id, ""),
    )


def _delete_run(store: Store, run_id: str, models: Sequence[LoggedModel], problem: str) -> None:
    """Delete a run: its place in MLflow first, so that nobody uses it; then models and files; its record last.

    Raises:
        ValueError: there is a `problem`, or the run has been continued or registered since it was listed.
        MlflowException: MLflow rejects a request, or a file cannot be deleted.
    """
    run = store.client.get_run(run_id)
    _check(problem, run.info.artifact_uri, run_id)
    for model in models:
        _check(problem, model.artifact_location, model.model_id)
    if is_running(run) or store.client.search_model_versions(f"run_id = '{run_id}'", max_results=1):
        raise ValueError("has been continued or registered since it was listed")
    if run.info.lifecycle_stage == _ACTIVE:
        store.client.delete_run(run_id)
    for model in models:
        _delete_model(store, model)
    _delete_files(run.info.artifact_uri)
    if store.database:
        store.database._hard_delete_run(run_id)


def _delete_model(store: Store, model: LoggedModel, problem: str = "") -> None:
    """Delete a logged model: it fails first, so that nobody uses it, then its files go, then its record."""
    _check(problem, model.artifact_location, model.model_id)
    active = True
    try:
        store.client.finalize_logged_model(model.model_id, LoggedModelStatus.FAILED)
    except MlflowException as error:
        if not is_missing(error):
            raise
        active = False  # in MLflow's trash
    _delete_files(model.artifact_location)
    if active:
        store.client.delete_logged_model(model.model_id)
    if store.database:
        store.database._hard_delete_logged_model(model.model_id)


def _check(problem: str, uri: str, owner: str) -> None:
    """Raise ValueError if files could not be listed, or if their place may also hold files of others."""
    if problem:
        raise ValueError(problem)
    if owner not in uri.split("/"):
        raise ValueError(f"its files are in {uri}, which may hold files of others; delete it in MLflow")


def _delete_files(uri: str) -> None:
    with transfer():
        get_artifact_repository(uri).delete_artifacts()


def _measured(*uris: str) -> tuple[int, str]:
    """Return the bytes of all files below artifact locations, and why they cannot be listed."""
    try:
        with transfer():
            return sum(_size(get_artifact_repository(uri), None) for uri in uris), ""
    except Exception as error:  # of any store; the other items go on
        return 0, f"its files cannot be listed: {reason_of(error)}"


def _size(repository: ArtifactRepository, path: str | None) -> int:
    files = repository.list_artifacts(path)
    return sum(_size(repository, file.path) if file.is_dir else int(file.file_size or 0) for file in files)
