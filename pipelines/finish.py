"""The end of a pipeline run, whatever happened: its TrainJob is deleted and its MLflow run is closed."""

import json
import os
import time
import urllib.request
from pathlib import Path

from pixelclip.tracking.run import KILLED, PIPELINE_RUN
from pixelclip.tracking.server import connect, experiment_id

_STATUS = {"COMPLETE": "FINISHED", "SUCCEEDED": "FINISHED", "FAILED": "FAILED"}  # SUCCEEDED: of KFP's local runners
_TERMINATED = ("CANCELING", "CANCELED")
_KFP = "http://ml-pipeline.kubeflow:8888"
_KFP_TOKEN = "/var/run/secrets/kubeflow/pipelines/token"  # of KFP's SDK; mounted in multi-user installations
_ATTEMPTS, _TIMEOUT = 3, 5.0


def finish(state: str, nodes: int) -> None:
    """Delete the TrainJob of this pipeline run unless it is complete, and close its MLflow run.

    Args:
        state: how the steps ended, as KFP's exit handler names it: COMPLETE, FAILED, or RUNNING if nobody recorded the end
            (a terminated run, the deadline of a pod, a driver of KFP that failed).
        nodes: number of training nodes.

    Raises:
        ValueError: the ID of the pipeline run is not set, or MLflow is unreachable.
        RuntimeError: the TrainJob cannot be deleted. The MLflow run is closed nevertheless.
    """
    try:
        if nodes > 1:
            from pixelclip_pipelines.launcher import delete_unfinished

            delete_unfinished()
    finally:
        close_run(state)


def close_run(state: str) -> None:
    """End the MLflow run of this pipeline run: FINISHED, FAILED, or KILLED if the run was terminated.

    Raises the errors of `finish`.
    """
    if run_id := os.environ.get("MLFLOW_RUN_ID"):
        print(f"finish: MLflow run {run_id} will be closed by the plugin that started it", flush=True)
        return
    pipeline_run = os.environ.get(PIPELINE_RUN)
    if not pipeline_run:
        raise ValueError(f"{PIPELINE_RUN} is not set; it must be the ID of the pipeline run")
    client = connect()
    found = client.search_runs([experiment_id(client)], f"tags.`kfp.run_id` = '{pipeline_run}'")
    runs = [run for run in found if "mlflow.parentRunId" not in run.data.tags]  # whoever created the parent closes its children
    if not runs:
        print(f"finish: pipeline run {pipeline_run} ({state}) has no MLflow run of its own to close", flush=True)
        return
    status = _STATUS.get(state)
    terminated = None if status else is_terminated(pipeline_run)
    for run in runs:
        # With a loop, KFP before 2.17 reports RUNNING (kubeflow/pipelines#13321). Then the run is finished if its last step
        # registered a model.
        registered = client.search_model_versions(f"run_id = '{run.info.run_id}'")
        # A step that got SIGTERM has marked the run. Its reason may also be a timeout, so KFP's word counts first.
        killed = terminated or (terminated is None and run.info.status == KILLED)
        ended = status or (KILLED if killed else "FINISHED" if registered else "FAILED")
        client.set_terminated(run.info.run_id, ended)
        print(f"finish: MLflow run {run.info.run_id} is {ended} (the pipeline's steps: {state})", flush=True)


def is_terminated(pipeline_run: str) -> bool | None:
    """Return whether a user terminated the run, according to KFP's API: the run is CANCELING until this step has ended.

    The address is KF_PIPELINES_ENDPOINT, or the service of KFP in this namespace or in `kubeflow`. If the API does not answer,
    print why and return None.
    """
    host, port = os.environ.get("ML_PIPELINE_SERVICE_HOST"), os.environ.get("ML_PIPELINE_SERVICE_PORT", "8888")
    api = (os.environ.get("KF_PIPELINES_ENDPOINT") or (f"http://{host}:{port}" if host else _KFP)).rstrip("/")
    token = Path(os.environ.get("KF_PIPELINES_SA_TOKEN_PATH", _KFP_TOKEN))
    headers = {"Authorization": f"Bearer {token.read_text().strip()}"} if token.is_file() else {}
    request = urllib.request.Request(f"{api}/apis/v2beta1/runs/{pipeline_run}", headers=headers)
    problem = ""
    for attempt in range(_ATTEMPTS):
        time.sleep(attempt)
        try:
            with urllib.request.urlopen(request, timeout=_TIMEOUT) as answer:
                return json.load(answer).get("state") in _TERMINATED
        except (OSError, ValueError) as error:
            problem = str(error)
    print(f"finish: KFP at {api} does not say whether the run was terminated ({problem})", flush=True)
    return None
