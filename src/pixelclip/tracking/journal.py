"""Journal of a run: metrics on their way to MLflow, kept while the server is slow or unreachable.

Curve points are appended to `curves.jsonl` first and delivered from there; `run.json` records the run and how many points its
server has. There is no thread: a stage calls `deliver`, which limits its own time, while it works, and `flush` at the end.
"""

import contextlib
import csv
import io
import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

from mlflow import MlflowClient
from mlflow.entities import Metric
from pydantic import BaseModel, Field, FiniteFloat, NonNegativeInt

from pixelclip.storage.files import parse_json, read_json, write_atomically, write_json
from pixelclip.storage.urls import public_url
from pixelclip.tracking.server import public_uri, reason_of, request_limits

CURVES, RUN = "curves.jsonl", "run.json"
CURVES_TABLE = "curves.csv"
_BATCH = 500  # metrics per request; MLflow accepts 1000
_SECONDS = 10  # time limit of one request; `deliver` starts no further request after it
_TIMES_LONGER = 20  # pause after a delivery, relative to its duration: a slow server takes at most 5 % of the training time
_LONGEST_PAUSE = 300.0


class _Point(BaseModel):
    step: Annotated[int, Field(ge=1, lt=2**63)]  # as in MLflow's database
    time: Annotated[int, Field(ge=0, lt=2**63)]
    metrics: dict[str, FiniteFloat]


class _Run(BaseModel):
    run_id: str
    tracking_uri: str
    delivered: NonNegativeInt
    owned: bool = False


def read_points(path: Path) -> list[dict[str, Any]]:
    """Read `curves.jsonl`; an empty list if there is no such file. Raise ValueError with the number of a damaged line."""
    lines = path.read_bytes().splitlines() if path.is_file() else []
    return [parse_json(line, f"{path}: line {number}", _Point) for number, line in enumerate(lines, 1)]


def write_table(folder: Path) -> None:
    """Write the curves as `curves.csv`, for DVC and spreadsheets: `step`, then one column per metric without its group."""
    points = read_points(folder / CURVES)
    names = list(dict.fromkeys(name for point in points for name in point["metrics"]))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["step", *(name.rpartition("/")[2] for name in names)])
    writer.writerows([point["step"], *(point["metrics"].get(name, "") for name in names)] for point in points)
    write_atomically(folder / CURVES_TABLE, text.getvalue())


def read_run(folder: Path) -> dict[str, Any]:
    """Read `run.json`: `run_id`, `tracking_uri` and `delivered`; raise ValueError if it is missing or damaged."""
    return dict(read_json(folder / RUN, _Run))


class Journal:
    """Curve points and other requests of one run, delivered in order and each point once.

    Args:
        client: a connected client.
        folder: folder of `curves.jsonl` and `run.json`.
        run_id: ID of an existing run.
        owned: whether the process that created the run also ends it; kept in `run.json`.
    """

    def __init__(self, client: MlflowClient, folder: Path, run_id: str, owned: bool = False) -> None:
        self._client, self._folder, self._run_id = client, folder, run_id
        _remove_incomplete_line(folder / CURVES)
        points = read_points(folder / CURVES)
        state = read_run(folder) if (folder / RUN).is_file() else {}
        same_run = state.get("run_id") == run_id and public_url(state["tracking_uri"]) == public_uri()
        self._owned = bool(state.get("owned")) if same_run else owned
        self._num_delivered = min(state["delivered"], len(points)) if same_run else 0
        self._last_step = points[-1]["step"] if points else -1
        self.curves: set[str] = set(points[-1]["metrics"]) if points else set()
        """Names of the metrics of the last point."""
        self._server_steps: dict[str, int] = {}  # last step of each curve on the server
        self._pause, self._next_attempt = 0.0, 0.0
        self.points = points[self._num_delivered :]
        """Undelivered points, each with `step`, `time` in milliseconds and `metrics`."""
        self.requests: list[Callable[[], None]] = []
        """Other undelivered requests. They are lost when the process ends."""
        self.error = ""
        """First line of the error that stopped the last delivery; empty after a success."""
        self._save()

    @property
    def pending(self) -> bool:
        """Whether anything is undelivered."""
        return bool(self.points or self.requests)

    def append(self, metrics: Mapping[str, float], step: int) -> None:
        """Append one point to every curve, unless the journal already has this step (after a resume)."""
        if step <= self._last_step:
            return
        point = {"step": step, "time": int(time.time() * 1000), "metrics": dict(metrics)}
        with (self._folder / CURVES).open("a") as file:
            file.write(json.dumps(point) + "\n")
        self.points.append(point)
        self._last_step, self.curves = step, set(metrics)

    def deliver(self) -> None:
        """Deliver pending points and requests unless in a pause; never raises for a failing server."""
        start = time.monotonic()
        if start < self._next_attempt:
            return
        with request_limits(timeout=_SECONDS, retries=0):
            self._attempt(start + _SECONDS)
        end = time.monotonic()
        self._pause = min(max(1.0, 2 * self._pause), _LONGEST_PAUSE) if self.error else 0.0
        self._next_attempt = end + max(self._pause, _TIMES_LONGER * (end - start))

    def flush(self, seconds: float) -> bool:
        """Try for about `seconds` to deliver everything; return whether it succeeded."""
        deadline = time.monotonic() + seconds
        self._attempt()
        while self.pending and time.monotonic() < deadline:
            time.sleep(min(1.0, seconds))
            self._attempt()
        return not self.pending

    def _attempt(self, deadline: float = math.inf) -> None:
        try:
            while self.pending and time.monotonic() < deadline:
                if self.points:
                    self._send_points()
                else:
                    self.requests[0]()
                    self.requests.pop(0)
        except Exception as error:  # whatever fails in MLflow or the network, the stage continues
            if not self.error:
                print(f"cannot reach MLflow at {public_uri()} ({reason_of(error)}); will retry", flush=True)
            self.error = reason_of(error)
            return
        if self.error and not self.pending:
            print(f"reached MLflow at {public_uri()} again; everything is delivered", flush=True)
            self.error = ""

    def _send_points(self) -> None:
        metrics: list[Metric] = []
        count = 0
        for point in self.points:
            if metrics and len(metrics) + len(point["metrics"]) > _BATCH:
                break
            metrics += [Metric(name, value, point["time"], point["step"]) for name, value in point["metrics"].items()]
            count += 1
        if new := [metric for metric in metrics if metric.step > self._last_step_of(metric.key)]:
            self._client.log_batch(self._run_id, metrics=new)
            self._server_steps |= {metric.key: metric.step for metric in new}
        del self.points[:count]
        self._num_delivered += count
        self._save()

    def _last_step_of(self, curve: str) -> int:
        """Return the last step on the server; a retried pod joins its run with an empty journal and trains from the start."""
        if curve not in self._server_steps:
            history = self._client.get_metric_history(self._run_id, curve)
            self._server_steps[curve] = max((metric.step for metric in history), default=-1)
        return self._server_steps[curve]

    def _save(self) -> None:
        state = {"run_id": self._run_id, "tracking_uri": public_uri(), "delivered": self._num_delivered, "owned": self._owned}
        with contextlib.suppress(PermissionError):  # read-only model folder; points are then compared with the server's
            write_json(self._folder / RUN, state)


def _remove_incomplete_line(path: Path) -> None:
    """Remove an incomplete last line of a journal, left by a killed process."""
    content = path.read_bytes() if path.is_file() else b""
    complete = content[: content.rfind(b"\n") + 1]
    if complete != content:
        path.write_bytes(complete)
