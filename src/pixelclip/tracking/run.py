"""The MLflow run of a pipeline run: `train` starts it, later stages join it.

Metrics pass through a journal (`journal.py`), so training continues without a server; the next `log`, the next stage or a
repeated command delivers the curves.
"""

import contextlib
import json
import os
import re
import time
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Self

from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, LoggedModelStatus, Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor
from mlflow.utils.mlflow_tags import MLFLOW_SOURCE_NAME, MLFLOW_SOURCE_TYPE, MLFLOW_USER
from mlflow.utils.validation import MAX_METRICS_PER_BATCH, MAX_PARAM_VAL_LENGTH, MAX_TAG_VAL_LENGTH
from PIL import Image

from pixelclip.storage.urls import public_url
from pixelclip.tracking.description import NOTE, run_name, run_note, run_tags
from pixelclip.tracking.journal import CURVES, RUN, Journal, read_run
from pixelclip.tracking.server import (
    connect,
    experiment_id,
    is_missing,
    public_uri,
    reason_of,
    request_limits,
    run_url,
    tracking_uri,
    transfer,
)
from pixelclip.tracking.system_metrics import start_monitor
from pixelclip.workflow.provenance import data, flatten, source
from pixelclip.workflow.provenance import tags as tags_of

KILLED = "KILLED"
"""Status of a run that a signal ended."""
PIPELINE_RUN = "PIXELCLIP_PIPELINE_RUN"
"""Environment variable with the ID of the pipeline run that a stage belongs to."""
PARENT_RUN = "PIXELCLIP_PARENT_RUN"
"""Environment variable with the ID of the parent of new MLflow runs."""
LINEAGE = "lineage.json"
"""Artifact of a run: the provenance of its training and of all earlier stages."""
_STEP = "step"  # tag of a model of `Run.model`
_PARAMS_PER_REQUEST = 90  # MLflow accepts 100
_CLOSE_SECONDS = 30.0
_KILL_SECONDS = 5


def lineage_tags(provenance: Mapping[str, Any]) -> dict[str, str]:
    """Return tags with the code and data of all stages, the pipeline run and the parent run."""
    runs = {"kfp.run_id": os.environ.get(PIPELINE_RUN), "mlflow.parentRunId": os.environ.get(PARENT_RUN)}
    return tags_of(provenance) | {tag: run_id for tag, run_id in runs.items() if run_id}


class Run:
    """An MLflow run with its journal.

    Args:
        client: a connected client.
        folder: folder of the journal (`curves.jsonl`, `run.json`).
        run_id: ID of an existing run.
        owned: whether this process ends the run.
    """

    def __init__(self, client: MlflowClient, folder: Path, run_id: str, owned: bool) -> None:
        self.client, self.run_id = client, run_id
        self.journal = Journal(client, folder, run_id, owned)
        self._owned = owned
        self._run_ids = [run_id]  # runs that receive final metrics and tags
        self._monitor: SystemMetricsMonitor | None = None

    @classmethod
    def start(cls, folder: Path, name: str, provenance: Mapping[str, Any], own_tags: str = "") -> Self:
        """Start the MLflow run of a training run, or continue the run of an interrupted one in `folder`.

        The first of these is used: MLFLOW_RUN_ID (which is never ended here), the interrupted run, a new child of
        PIXELCLIP_PARENT_RUN, the run tagged with the ID of this pipeline run, a new run. An interrupted run is continued even
        while the server does not respond. `own_tags` are more tags, as in the setting `train.run_tags`; they replace no other.

        Raises:
            ValueError: MLflow is unreachable or rejects a request.
        """
        env_run = os.environ.get("MLFLOW_RUN_ID")
        with _one_error(env_run):
            client, resumed = (connect(), None) if env_run else _resumed(folder)
            tags = json.loads(own_tags or "{}") | run_tags(provenance, lineage_tags(provenance))
            if env_run:
                for chosen_by_its_creator in ("mlflow.parentRunId", MLFLOW_SOURCE_NAME, MLFLOW_SOURCE_TYPE, MLFLOW_USER):
                    tags.pop(chosen_by_its_creator, None)
            run_id = env_run or resumed or _of_pipeline(client, tags)
            if run_id is None:
                run_id = client.create_run(experiment_id(client), run_name=name, tags=tags).info.run_id
            run = cls(client, folder, run_id, owned=not env_run)
            describe = partial(run._describe, provenance, tags)
            if resumed:
                run.journal.requests.append(describe)  # the server usually has this already; it may be unreachable now
            else:
                describe()
        print(f"MLflow run: {run_url(client, run_id)}", flush=True)
        return run

    @classmethod
    def trained(cls, client: MlflowClient, model: Path, provenance: Mapping[str, Any]) -> str:
        """Return the ID of the run that trained a model, after delivering the rest of its curves.

        If the server has no such run, all curves and settings are sent to the run MLFLOW_RUN_ID or to a new run.

        Raises:
            ValueError: MLflow rejects a request.
        """
        env_run = os.environ.get("MLFLOW_RUN_ID")
        with _one_error(env_run):
            existing = _existing(client, model)
            run_id = existing or env_run
            if run_id is None:
                tags = run_tags(provenance, lineage_tags(provenance))
                run_id = client.create_run(experiment_id(client), run_name=run_name(provenance), tags=tags).info.run_id
            # The training has ended: if its run is still open, the process was killed that should have closed it.
            left_open = existing and _owned(model) and client.get_run(existing).info.status == "RUNNING"
            run = cls(client, model, run_id, owned=run_id != env_run)
            if existing is None or run.journal.pending or left_open:
                run.params(flatten(provenance))
                run.datasets(provenance, "training")
                run._explain(provenance)
                run.finish()
                run._delete_unfinished_models()
        return run_id

    @classmethod
    def attach(cls, model: Path, folder: Path, provenance: Mapping[str, Any]) -> Self:
        """Attach to the run MLFLOW_RUN_ID, or else to the run that trained a model.

        If both exist and differ (Kubeflow's MLflow plugin creates a run per task), final metrics and tags go to both, so that
        the training run has all metrics of its model. The journal is in the folder of the attaching stage.

        Raises:
            ValueError: MLflow is unreachable or rejects a request.
        """
        client = connect()
        run_id = cls.trained(client, model, provenance)
        env_run = os.environ.get("MLFLOW_RUN_ID")
        with _one_error(env_run):
            if env_run:
                client.get_run(env_run)
        run = cls(client, folder, env_run or run_id, owned=False)
        run._run_ids = list(dict.fromkeys([run.run_id, run_id]))
        return run

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Add one point to every curve; skip steps that the journal already has (after a resume)."""
        self.journal.append(metrics, step)
        self.journal.deliver()

    def values(self, metrics: Mapping[str, float]) -> None:
        """Set final metrics at the next delivery, without those that have a curve, whose last point is the final value."""
        now = int(time.time() * 1000)
        points = [Metric(name, float(value), now, 0) for name, value in metrics.items() if name not in self.journal.curves]
        for run_id in self._run_ids:
            for start in range(0, len(points), MAX_METRICS_PER_BATCH):
                batch = points[start : start + MAX_METRICS_PER_BATCH]
                self.journal.requests.append(partial(self.client.log_batch, run_id, metrics=batch))

    def params(self, params: Mapping[str, Any]) -> None:
        """Log settings; a value that was logged before is kept. Texts longer than MLflow accepts are cut and end with `...`."""
        existing = self.client.get_run(self.run_id).data.params
        new = [Param(name, cut(value, MAX_PARAM_VAL_LENGTH)) for name, value in params.items() if name not in existing]
        for start in range(0, len(new), _PARAMS_PER_REQUEST):
            self.client.log_batch(self.run_id, params=new[start : start + _PARAMS_PER_REQUEST])

    def tags(self, tags: Mapping[str, str]) -> None:
        """Set tags, cut like the settings in `params`."""
        for run_id in self._run_ids:
            self.client.log_batch(run_id, tags=[RunTag(name, cut(value, MAX_TAG_VAL_LENGTH)) for name, value in tags.items()])

    def datasets(self, provenance: Mapping[str, Any], context: str) -> None:
        """Log the data that the first stages read as MLflow datasets, identified by MD5."""
        inputs = []
        for name, described in data(provenance).items():
            fetched = source(described)
            digest = str(fetched.get("md5", described["md5"]))[:36]  # MLflow's limit, and the length of DVC's MD5 of a folder
            origin = json.dumps(fetched or {"uri": described["path"]})
            dataset = Dataset(name=name, digest=digest, source_type="dvc" if fetched else "local", source=origin)
            inputs.append(DatasetInput(dataset, [InputTag("mlflow.data.context", context)]))
        if inputs:
            self.client.log_inputs(self.run_id, datasets=inputs)

    def artifact(self, path: Path, below: str | None = None) -> None:
        """Upload a file at the next delivery; the file must exist until `finish`."""
        self.journal.requests.append(partial(self.client.log_artifact, self.run_id, str(path), below))

    def image(self, image: Image.Image, key: str, step: int) -> None:
        """Log a picture of one step at the next delivery; MLflow shows the pictures of a key over the steps and runs."""
        key = re.sub(r"[^\w\-. ]", "_", key, flags=re.ASCII)
        self.journal.requests.append(partial(self.client.log_image, self.run_id, image, key=key, step=step))

    def model(self, folder: Path, metric: str, value: float, step: int) -> None:
        """Log a model folder as a model of the run, with one metric of it, at the next delivery."""
        self.journal.requests.append(partial(self._log_model, folder, metric, value, step))

    def _log_model(self, folder: Path, metric: str, value: float, step: int) -> None:
        experiment = self._delete_unfinished_models()
        tags = {_STEP: str(step)}
        model = self.client.create_logged_model(experiment, name=folder.name, source_run_id=self.run_id, tags=tags)
        with transfer():
            self.client.log_model_artifacts(model.model_id, str(folder))
        self.client.finalize_logged_model(model.model_id, LoggedModelStatus.READY)
        self.client.log_metric(self.run_id, metric, value, step=step, model_id=model.model_id)

    def _delete_unfinished_models(self) -> str:
        """Delete the models of `model` whose upload an outage or a kill has ended; return the ID of the experiment."""
        experiment = self.client.get_run(self.run_id).info.experiment_id
        for model in self.client.search_logged_models([experiment], f"source_run_id = '{self.run_id}'"):
            if _STEP in model.tags and model.status == LoggedModelStatus.PENDING:
                self.client.delete_logged_model(model.model_id)
        return str(experiment)

    def note(self, text: str) -> None:
        """Set the description of the runs, in Markdown, at the next delivery."""
        for run_id in self._run_ids:
            tag = RunTag(NOTE, cut(text, MAX_TAG_VAL_LENGTH))
            self.journal.requests.append(partial(self.client.log_batch, run_id, tags=[tag]))

    def monitor_system(self) -> None:
        """Log CPU, memory, disk, network and GPUs as `system/...` until `finish`, from MLflow's own thread."""
        self._monitor = start_monitor(self.run_id)

    def finish(self, status: str = "FINISHED") -> bool:
        """Deliver everything and end the run; print a message and return False if delivery fails."""
        if status == KILLED:  # little time is left; the monitor ends with the process
            with request_limits(timeout=_KILL_SECONDS, retries=0):
                return self._deliver_and_close(status, _KILL_SECONDS)
        if self._monitor:
            self._monitor.finish()
        return self._deliver_and_close(status, _CLOSE_SECONDS)

    def _deliver_and_close(self, status: str, seconds: float) -> bool:
        if not self.journal.flush(seconds):
            print(
                f"Lost connection to MLflow at {public_uri()} ({self.journal.error}), run {self.run_id}. "
                f"{len(self.journal.points)} curve points will be sent by the next stage from {CURVES}; "
                f"{len(self.journal.requests)} other requests (metrics, tags, files) were dropped; their data is in the "
                "output folder",
                flush=True,
            )
            return False
        self._close(status)
        return True

    def mark_killed(self) -> None:
        """Set the status KILLED before slower work, because a cluster may leave little time; `finish` delivers the rest."""
        with request_limits(timeout=_KILL_SECONDS, retries=0):
            self._close(KILLED)

    def _close(self, status: str) -> None:
        if self._owned:
            try:
                self.client.set_terminated(self.run_id, status)
            except Exception as error:  # MLflow raises many types, see `connect`
                print(f"MLflow at {public_uri()}: the run could not be closed: {reason_of(error)}", flush=True)

    def _describe(self, provenance: Mapping[str, Any], tags: Mapping[str, str]) -> None:
        if self._owned:
            self.client.update_run(self.run_id, status="RUNNING")
        self.params(flatten(provenance))
        self.tags(tags)
        self.datasets(provenance, "training")
        self._explain(provenance)

    def _explain(self, provenance: Mapping[str, Any]) -> None:
        self.journal.requests.append(partial(self.client.log_dict, self.run_id, dict(provenance), LINEAGE))
        self.note(run_note(provenance))


def cut(value: object, limit: int) -> str:
    """Return a value as text of at most `limit` characters; a longer one ends with `...`."""
    text = str(value)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


@contextlib.contextmanager
def _one_error(env_run: str | None) -> Iterator[None]:
    """Turn MLflow's exceptions into one-line ValueErrors."""
    try:
        yield
    except MlflowException as error:
        which = f" {env_run} (MLFLOW_RUN_ID)" if env_run else ""
        raise ValueError(f"MLflow at {public_uri()} rejected the run{which}: {reason_of(error)}") from None


def _existing(client: MlflowClient, folder: Path) -> str | None:
    """Return the run ID from `run.json`, or None if the file or the run does not exist."""
    if not (folder / RUN).is_file():
        return None
    try:
        info = client.get_run(read_run(folder)["run_id"]).info
    except MlflowException as error:
        if is_missing(error):
            return None
        raise
    return str(info.run_id) if info.lifecycle_stage == "active" else None  # MLflow rejects changes to a deleted run


def _owned(folder: Path) -> bool:
    return bool(read_run(folder).get("owned"))


def _resumed(folder: Path) -> tuple[MlflowClient, str | None]:
    """Return a client and the run of an interrupted training run; if the server does not respond, trust `run.json`.

    If the server later has no such run, the next stage delivers all curves to a new one.
    """
    state = read_run(folder) if (folder / RUN).is_file() else {}
    client = None
    try:
        client = connect()
        return client, _existing(client, folder)
    except (ValueError, MlflowException) as error:
        uri = tracking_uri()
        same_server = public_url(state.get("tracking_uri", "")) == public_uri()
        if not same_server or not (client or uri.startswith("http")):  # a local file does not recover
            raise
        print(f"{reason_of(error)}; training continues in MLflow run {state['run_id']}", flush=True)
        return client or MlflowClient(uri), str(state["run_id"])


def _of_pipeline(client: MlflowClient, tags: Mapping[str, str]) -> str | None:
    pipeline_run = tags.get("kfp.run_id")
    if pipeline_run is None or "mlflow.parentRunId" in tags:
        return None
    query = f"tags.`kfp.run_id` = '{pipeline_run}'"
    runs = client.search_runs([experiment_id(client)], query, order_by=["attributes.start_time ASC"])
    top_level = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    return str(top_level[0].info.run_id) if top_level else None
