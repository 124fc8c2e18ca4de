"""Progress of a TrainJob as text: step, loss, time left, nodes that are up, and why one is not."""

import json
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from kubernetes.client import V1Pod

from pixelclip.storage.progress import clock
from pixelclip.tracking.journal import CURVES
from pixelclip.tracking.trainjob import STEP, STEPS
from pixelclip_pipelines.pods import reason_of

MARK = "progress: "
"""Text before the progress in a line of the launcher's log."""
_INDEX = "batch.kubernetes.io/job-completion-index"
_OLD = 300.0  # seconds after which a report is called old
_TAIL = 1 << 16  # bytes at the end of the curves that are read
_MOST_NODES = 3  # whose trouble is shown


class _Report(NamedTuple):
    step: int
    steps: int
    loss: str
    seconds_left: float | None
    time: float


def training(job: dict[str, Any], out: Path, steps: int, now: float | None = None) -> tuple[int, str]:
    """Return the progress of the training in percent, and as text; -1 and an empty text before its first report.

    Args:
        job: the TrainJob; with Kubeflow Trainer's feature gate TrainJobStatus its status has the progress.
        out: model folder of the training on the shared volume; without the gate the curves of the unfinished stage are read.
        steps: all steps.
        now: seconds since the epoch; by default the current time.
    """
    status = job.get("status", {}).get("trainerStatus")
    report = _of_status(status, steps) if status else None
    report = report or _of_curves(out, steps, _time(job.get("metadata", {}).get("creationTimestamp")))
    if report is None:
        return -1, ""
    percent = 100 * report.step // report.steps
    parts = [f"step {report.step} of {report.steps} ({percent} %)"]
    parts += [f"loss {report.loss}"] if report.loss else []
    parts += [f"{clock(report.seconds_left)} left"] if report.seconds_left is not None else []
    age = (time.time() if now is None else now) - report.time
    parts += [f"reported {clock(age)} ago"] if age >= _OLD else []
    return percent, ", ".join(parts)


def _of_status(status: dict[str, Any], steps: int) -> _Report | None:
    """Read `trainerStatus`; None unless our training has written it."""
    metrics = {metric["name"]: metric["value"] for metric in status.get("metrics", [])}
    if not metrics.get(STEP, "").isdecimal():
        return None
    steps = int(metrics[STEPS]) if metrics.get(STEPS, "").isdecimal() else steps
    left = status.get("estimatedRemainingSeconds")
    return _Report(int(metrics[STEP]), max(steps, 1), metrics.get("loss", ""), left, _time(status.get("lastUpdatedTime")))


def _of_curves(out: Path, steps: int, since: float) -> _Report | None:
    """Read the last points of the newest curves of an unfinished training, if they were written after `since`."""
    files = [(file.stat().st_mtime, file) for file in out.parent.glob(f".{out.name}.*.partial/{CURVES}")]
    if not files:
        return None
    with max(files)[1].open("rb") as file:
        file.seek(max(0, file.seek(0, 2) - _TAIL))
        lines = file.read().split(b"\n")[:-1]  # the last one may be incomplete
    points = []
    for line in lines:
        try:
            point = json.loads(line)
            points.append((int(point["step"]), point["time"] / 1000, point["metrics"].get("train/loss")))
        except (ValueError, KeyError, TypeError, AttributeError):  # the first line may be incomplete, too
            continue
    points = [point for point in points if point[1] >= since]
    if not points:
        return None
    (first, began, _), (step, now, loss) = points[0], points[-1]
    left = (now - began) / (step - first) * (steps - step) if step > first else None
    return _Report(step, steps, "" if loss is None else f"{loss:.4f}", left, now)


def nodes(job: dict[str, Any], pods: Sequence[V1Pod]) -> str:
    """Return how many nodes are up, and what is wrong with the others.

    Args:
        job: the TrainJob.
        pods: its pods, also former ones.
    """
    for condition in job.get("status", {}).get("conditions", []):
        if condition["type"] == "Suspended" and condition["status"] == "True":
            return f"suspended: {condition.get('message') or condition.get('reason', '')}"
    count = int(job["spec"]["trainer"]["numNodes"])
    latest: dict[int, V1Pod] = {}
    for pod in sorted(pods, key=lambda pod: pod.metadata.creation_timestamp):
        if pod.metadata.deletion_timestamp is None:
            latest[int((pod.metadata.labels or {}).get(_INDEX, 0))] = pod
    down = {number: trouble for number in range(count) if (trouble := _trouble(latest.get(number)))}
    shown = [f"node {number}: {trouble}" for number, trouble in list(down.items())[:_MOST_NODES]]
    shown += [f"{len(down) - _MOST_NODES} more"] if len(down) > _MOST_NODES else []
    return f"{count - len(down)} of {count} nodes up" + (f" ({'; '.join(shown)})" if shown else "")


def _trouble(pod: V1Pod | None) -> str:
    """Return why a node is not up; an empty string if it runs or is done."""
    if pod is None:
        return "has no pod yet"
    status = pod.status
    if status.phase == "Succeeded":
        return ""
    for container in status.container_statuses or []:
        if container.state and (ended := container.state.terminated) and ended.exit_code:
            return f"{ended.reason or 'Error'} (exit code {ended.exit_code})"
    if status.phase == "Running":
        return ""
    if status.phase == "Failed":
        return " ".join(f"{status.reason or 'failed'} {status.message or ''}".split())
    return reason_of(status) or "is starting"


def _time(text: str | None) -> float:
    return datetime.fromisoformat(text).timestamp() if text else 0.0
