"""A run on Kubeflow Pipelines: its status, the logs of its steps, and its end."""

import json
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import kfp
import kfp_server_api

from pixelclip.tracking.pages import for_training
from pixelclip_pipelines.pods import waiting_reason
from pixelclip_pipelines.run_steps import FINAL, Attempt, Step, steps_of, time_of, workflow_of
from pixelclip_pipelines.submit import Target, connected, one_line
from pixelclip_pipelines.trainjob_progress import MARK

EXIT_CODES = {"SUCCEEDED": 0, "SKIPPED": 0, "FAILED": 1, "CANCELED": 1, "CANCELLED": 1}
"""Exit code of `status` by KFP's state of the run; `RUNNING` for every other state."""
RUNNING = 3
_POLL = 10.0  # seconds between two requests of --watch
_HEAD = 1 << 16  # bytes of the log of `train` in which the MLflow run is searched
_OUT_OF_MEMORY = 137
_WAITED = 60  # seconds after which a pod that was never seen running did not run; KFP looks every 10 s
_TEMPLATES = ("retry-system-container-impl", "system-container-impl")  # of Argo, in the names of pods
_EXIT = re.compile(r"failed to execute component: exit status (\d+)")
_MLFLOW = re.compile(r"^MLflow run: (http\S+)", re.MULTILINE)
_PROGRESS = re.compile(rf"^TrainJob \S+: {MARK}(.*)$", re.MULTILINE)
_FOREIGN = re.compile(  # lines that are not the step's: of KFP's launcher and executor, of Argo, of tracebacks
    r"[IWEF]\d{4} \d\d:|\[KFP Executor|time=\"|\s|Traceback |Looking for component|[{}]|.*failed to execute component"
)


@dataclass(frozen=True)
class Status:
    """State of a run: one line per step, then lines for the run and its MLflow run."""

    lines: list[str]
    exit_code: int


def status(target: Target, run_id: str, now: datetime | None = None) -> Status:
    """Return the state of every step and of the run.

    Args:
        target: KFP.
        run_id: ID of the run.
        now: time up to which the durations of unfinished steps count; by default the current time.

    Raises:
        ValueError: no such run; KFP is unreachable or rejects the request.
    """
    with connected(target) as (client, cluster, page):
        run = KfpRun(client, run_id)
        now = now or datetime.now(UTC)
        namespace = cluster.namespace or "kubeflow"
        lines = [_line(step, run, now, lambda pod: waiting_reason(namespace, pod)) for step in run.steps]
        state = run.answer.get("state") or "PENDING"
        start = time_of(run.answer.get("created_at"))
        end = time_of(run.answer.get("finished_at")) or (None if state in EXIT_CODES else now)
        title = f"run {run_id}{' (terminated)' if run.terminated and state in FINAL else ''}"
        reason = one_line((run.answer.get("error") or {}).get("message"))
        lines.append(f"{_columns(state, start, end)}{title}{f': {reason}' if reason else ''}")
        lines.append(f"KFP: {page}/#/runs/details/{run_id}")
        if url := run.mlflow_url(cluster.mlflow_ui):
            lines.append(f"MLflow: {url}")
        return Status(lines, EXIT_CODES.get(state, RUNNING))


def watch(target: Target, run_id: str, show: Callable[[str], None] = print, poll: float = _POLL) -> int:
    """Print the state of a run, then every line that changes, until the run ends; return its exit code.

    Raises:
        ValueError: see `status`.
    """
    shown: set[str] = set()
    while True:
        current = status(target, run_id)
        for line in current.lines:
            key = re.sub(r"^(RUNNING +)[\d:]+", r"\1", line)  # a running step is not printed again for its duration
            if key not in shown:
                shown.add(key)
                show(line)
        if current.exit_code != RUNNING:
            return current.exit_code
        time.sleep(poll)


def logs(target: Target, run_id: str, step: str) -> Iterator[str]:
    """Yield the logs of a step, of all its attempts, with a title line before each if there are several.

    Args:
        target: KFP.
        run_id: ID of the run.
        step: name as in the lines of `status`, for example `train` or `masks/2`; without a number all parts.

    Raises:
        ValueError: no such run or step, or no log; KFP is unreachable or rejects the request.
    """
    wanted = step.replace("-", "_")
    with connected(target) as (client, _, _):
        run = KfpRun(client, run_id)
        chosen = [each for each in run.steps if wanted in (each.name, each.name.partition("/")[0])]
        if not chosen:
            known = ", ".join(each.name for each in run.steps) or "none yet"
            raise ValueError(f"{step}: run {run_id} has no such step; its steps are {known}")
        pods = [(each, number, attempt) for each in chosen for number, attempt in enumerate(each.attempts, 1)]
        found = False
        for each, number, attempt in pods:
            if text := run.log(attempt):
                if len(pods) > 1:
                    yield f"--- {each.name}, attempt {number} of {len(each.attempts)}"
                yield text.rstrip("\n")
                found = True
        if not found:
            states = ", ".join(f"{each.name} is {each.state}" for each in chosen)
            raise ValueError(f"{step}: no log in run {run_id}: {states}")


def cancel(target: Target, run_id: str) -> None:
    """Terminate a run. Its step `finish` still runs.

    Raises:
        ValueError: no such run, or it has ended; KFP is unreachable or rejects the request.
    """
    with connected(target) as (client, _, _):
        state = KfpRun(client, run_id).answer.get("state")
        if state in EXIT_CODES:
            raise ValueError(f"run {run_id} has already ended: {state}")
        client.terminate_run(run_id)


class KfpRun:
    """KFP's answer about a run, its steps, and their logs."""

    def __init__(self, client: kfp.Client, run_id: str) -> None:
        self._client, self._id = client, run_id
        self.answer: dict[str, Any] = json.loads(self._get(f"/apis/v2beta1/runs/{run_id}"))
        self.steps = steps_of(self.answer, self._spec())
        self.terminated = any(each.get("state") == "CANCELING" for each in self.answer.get("state_history") or [])
        self._logs: dict[int, str] = {}

    def log(self, attempt: Attempt, size: int | None = None) -> str:
        """Return the log of a pod, or its first `size` bytes; an empty string if there is none."""
        if attempt.hash not in self._logs or size:
            workflow = workflow_of(self.answer)
            names = [*(f"{workflow}-{template}-{attempt.hash}" for template in _TEMPLATES), f"{workflow}-{attempt.hash}"]
            text = ""
            for name in names:
                try:
                    text = self._get(f"/apis/v1alpha1/runs/{self._id}/nodes/{name}/log", size)
                except kfp_server_api.ApiException as error:
                    if error.status in (401, 403):
                        raise
                if text:
                    break
            if size:
                return text
            self._logs[attempt.hash] = text
        return self._logs[attempt.hash]

    def pod(self, attempt: Attempt) -> str:
        """Return the name of a pod."""
        return f"{workflow_of(self.answer)}-{_TEMPLATES[0]}-{attempt.hash}"

    def mlflow_url(self, mlflow_ui: str) -> str:
        """Return the URL of the MLflow run: that of KFP's plugin, else the one in the log of the training."""
        output = ((self.answer.get("plugins_output") or {}).get("mlflow") or {}).get("entries") or {}
        if url := (output.get("run_url") or {}).get("value"):
            return for_training(f"{mlflow_ui.rstrip('/')}/{url[url.index('#') :]}" if mlflow_ui and "#" in url else str(url))
        for step in self.steps:
            if step.task in ("train", "train-job") and step.iteration is None and step.attempts:
                found = _MLFLOW.search(self.log(step.attempts[-1], _HEAD))
                return for_training(found[1]) if found else ""
        return ""

    def _spec(self) -> Mapping[str, Any] | None:
        """Return the compiled pipeline of the run, if KFP has it."""
        if spec := self.answer.get("pipeline_spec"):
            return _both(spec)
        version = self.answer.get("pipeline_version_reference") or {}
        if not version.get("pipeline_version_id"):
            return None
        path = f"/apis/v2beta1/pipelines/{version['pipeline_id']}/versions/{version['pipeline_version_id']}"
        try:
            return _both(json.loads(self._get(path)).get("pipeline_spec") or {})
        except kfp_server_api.ApiException:  # a deleted version; the steps of the run are known without it
            return None

    def _get(self, path: str, size: int | None = None) -> str:
        api: kfp_server_api.ApiClient = self._client.runs.api_client
        response = api.call_api(path, "GET", auth_settings=["Bearer"], _preload_content=False, _return_http_data_only=True)
        try:
            return str(response.read(size).decode(errors="replace"))
        finally:
            response.release_conn()


def _both(spec: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return pipeline and platform; KFP answers with the pipeline alone if there is no platform."""
    return spec if "pipeline_spec" in spec else {"pipeline_spec": spec}


def _line(step: Step, run: KfpRun, now: datetime, pod_waits: Callable[[str], str]) -> str:
    state, note = step.state, ""
    last = step.attempts[-1] if step.attempts else None
    if state == "FAILED":
        note = f": {_why(step, run)}"
    elif state == "RUNNING" and last and last.state == "PENDING":
        state, note = "PENDING", f": {pod_waits(run.pod(last)) or 'its pod has not started; try pixelclip pipeline doctor'}"
    elif state == "RUNNING" and last and all(each.state == "FAILED" and each.seconds == 0 for each in step.attempts):
        state, note = "PENDING", ": its pod cannot be created; try pixelclip pipeline doctor"
    elif state == "RUNNING" and last and step.task == "train-job" and (lines := _PROGRESS.findall(run.log(last))):
        note = f": {lines[-1]}"
    elif state == "PENDING" and step.waits_for:
        done = {each.task for each in run.steps if each.state in ("SUCCEEDED", "CACHED")}
        if waits := [task.replace("-", "_") for task in step.waits_for if task not in done]:
            note = f": waits for {', '.join(waits)}"
    ended = state in FINAL
    ran = state in ("SUCCEEDED", "FAILED") or (state in ("RUNNING", "PENDING") and last is not None)
    attempts = f", {len(step.attempts)} attempts" if len(step.attempts) > 1 else ""
    return f"{_columns(state, step.start if ran else None, step.end if ended else now)}{step.name}{attempts}{note}"


def _why(step: Step, run: KfpRun) -> str:
    """Return why a step failed: KFP has no message, so the log of its last attempt must tell."""
    if step.failed_driver or not step.attempts:
        return "terminated" if run.terminated else "KFP could not start it (its driver failed)"
    last = step.attempts[-1]
    log = run.log(last)
    codes = _EXIT.findall(log)
    never_started = not log and any(not each.started and (each.seconds or 0) >= _WAITED for each in step.attempts)
    if not codes and run.terminated:
        return f"terminated{'; its pod never started' if never_started else ''}"
    if not codes and step.timeout and (last.seconds or 0) >= step.timeout:
        limit = f"{step.timeout} s" if step.timeout < 120 else str(timedelta(seconds=step.timeout))
        return f"timeout after {limit}"
    if never_started:
        return "its pod never started"
    if not codes:
        return "its pod was lost, or it ran into its timeout" if log or last.started else "KFP has no log of it"
    if int(codes[-1]) == _OUT_OF_MEMORY:
        return f"out of memory ({_OUT_OF_MEMORY})"
    return last_line(log) or f"exit code {codes[-1]}"


def last_line(log: str) -> str:
    """Return the last line of a log that the step itself wrote, without the type of an exception."""
    own = [line for line in log.splitlines() if line and not _FOREIGN.match(line)]
    return re.sub(r"^(pixelclip: |([a-z_]\w*\.)*[A-Z]\w*(Error|Exception): )+", "", own[-1])[:300] if own else ""


def _columns(state: str, start: datetime | None, end: datetime | None) -> str:
    duration = str(end - start).partition(".")[0] if start and end and end >= start else ""
    return f"{state:<10} {duration:>9}  "
