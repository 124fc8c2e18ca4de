"""The Run: one MLflow run per pipeline run, fed from a journal so that a lost server loses nothing.

Every point of a curve is first appended to `curves.jsonl` in the stage's folder, then delivered by a background thread.
What a lost server missed is delivered when it is back, or by the same command again. `MLFLOW_TRACKING_URI` and MLflow's
other variables are honoured; the default is `sqlite:///runs/mlflow.db` with artifacts beside it.
"""

import contextlib
import json
import os
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

import mlflow
from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException

from pixelclip import __version__
from pixelclip.stage import code_revision
from pixelclip.storage import read_json, write_json

CURVES, RUN = "curves.jsonl", "run.json"
PIPELINE_RUN = "PIXELCLIP_PIPELINE_RUN"
"""Environment variable with the id of the pipeline run that a stage is part of."""
PARENT_RUN = "PIXELCLIP_PARENT_RUN"
"""Environment variable with the id of the MLflow run below which new runs stand."""
_DEFAULT_URI = "sqlite:///runs/mlflow.db"
_BATCH, _PARAMS_AT_ONCE = 500, 90
_CLOSE_SECONDS = 30.0


def tracking_uri() -> str:
    """Where runs are stored."""
    return os.environ.get("MLFLOW_TRACKING_URI") or _DEFAULT_URI


def connect() -> MlflowClient:
    """A client of the tracking server or file.

    Raises:
        ValueError: it cannot be reached.
    """
    uri = tracking_uri()
    # A long outage is survived by the journal, so one delivery must not block for MLflow's own minutes of retries.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    if uri.startswith("sqlite:///"):
        Path(uri.removeprefix("sqlite:///")).absolute().parent.mkdir(parents=True, exist_ok=True)
    elif uri.startswith(("http://", "https://")):
        _check_alive(uri)
    mlflow.set_tracking_uri(uri)
    try:
        client = MlflowClient(uri)
        client.search_experiments(max_results=1)
    except Exception as error:  # MLflow raises many kinds here, from SQLAlchemy's to its own
        raise ValueError(f"MLflow at {uri} cannot be used (MLFLOW_TRACKING_URI): {_first_line(error)}") from None
    return client


def _check_alive(uri: str) -> None:
    try:
        with urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=10):
            return
    except urllib.error.HTTPError:
        return  # somebody answers; whether we may use it shows with the first real request
    except OSError as error:
        reason = getattr(error, "reason", error)
        raise ValueError(f"MLflow at {uri} cannot be reached (MLFLOW_TRACKING_URI): {reason}") from None


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def experiment_id(client: MlflowClient) -> str:
    """The experiment that runs go to: MLFLOW_EXPERIMENT_ID, or MLFLOW_EXPERIMENT_NAME, or `pixelclip`; made when new."""
    if given := os.environ.get("MLFLOW_EXPERIMENT_ID"):
        return given
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "pixelclip")
    found = client.get_experiment_by_name(name)
    if found is not None:
        return str(found.experiment_id)
    uri = tracking_uri()
    location = None
    if uri.startswith("sqlite:///"):
        location = (Path(uri.removeprefix("sqlite:///")).absolute().parent / "mlartifacts").as_uri()
    try:
        return str(client.create_experiment(name, artifact_location=location))
    except MlflowException:  # another process was faster
        found = client.get_experiment_by_name(name)
        if found is None:
            raise
        return str(found.experiment_id)


def flatten(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a stage and of all stages before it, as `stage.setting`."""
    params = {f"{provenance['stage']}.{name}": value for name, value in provenance["settings"].items()}
    for described in provenance["inputs"].values():
        if "provenance" in described:
            params |= flatten(described["provenance"])
    return params


def lineage(provenance: Mapping[str, Any]) -> dict[str, str]:
    """Lineage tags: code revision and version, md5 and path of every input of the whole chain, the run above."""
    tags = {"code.revision": str(provenance.get("revision") or code_revision()), "code.version": __version__}

    def walk(inputs: Mapping[str, Any]) -> None:
        for name, described in inputs.items():
            tags[f"data.{name}.md5"] = described["md5"]
            tags[f"data.{name}.path"] = described["path"]
            if "provenance" in described:
                walk(described["provenance"]["inputs"])

    walk(provenance["inputs"])
    if pipeline_run := os.environ.get(PIPELINE_RUN):
        tags["kfp.run_id"] = pipeline_run
    if parent := os.environ.get(PARENT_RUN):
        tags["mlflow.parentRunId"] = parent
    return tags


class Run:
    """An MLflow run with its journal.

    Args:
        client: a connected client.
        folder: where the journal (`curves.jsonl`, `run.json`) stands.
        run_id: of a run that exists on the client's server.
        owned: whether this process decides how the run ends.
    """

    def __init__(self, client: MlflowClient, folder: Path, run_id: str, owned: bool) -> None:
        self.client, self.folder, self.run_id = client, folder, run_id
        self._owned = owned
        self._journal = folder / CURVES
        self._lines = _whole_lines(self._journal)
        self._last_step = json.loads(self._lines[-1])["step"] if self._lines else -1
        known = read_json(folder / RUN) if (folder / RUN).is_file() else {}
        same = known.get("run_id") == run_id and known.get("tracking_uri") == tracking_uri()
        self._delivered = min(int(known["delivered"]), len(self._lines)) if same else 0
        self._actions: list[Callable[[], None]] = []
        self._wake, self._closing, self._stop = threading.Event(), threading.Event(), threading.Event()
        self._idle = threading.Condition()
        self._trouble = ""
        self._save()
        self._thread = threading.Thread(target=self._deliver_forever, name="mlflow", daemon=True)
        self._thread.start()

    @classmethod
    def start(cls, folder: Path, name: str, provenance: Mapping[str, Any]) -> Self:
        """Starts the run of a training, or continues the one that `folder` belongs to.

        The order of choice is: the run of an interrupted start, MLFLOW_RUN_ID, the run tagged with this pipeline run's id,
        a new run.

        Raises:
            ValueError: MLflow cannot be reached.
        """
        client = connect()
        known = read_json(folder / RUN) if (folder / RUN).is_file() else {}
        given = os.environ.get("MLFLOW_RUN_ID")
        try:
            experiment = experiment_id(client)
            tags = lineage(provenance)
            run_id = _existing(client, known.get("run_id")) or given or _of_pipeline(client, experiment, tags)
            if run_id is None:
                run_id = client.create_run(experiment, run_name=name, tags=tags).info.run_id
            elif not given:
                client.update_run(run_id, status="RUNNING")
            run = cls(client, folder, run_id, owned=not given)
            run.params(flatten(provenance))
            run.tags(tags)
        except MlflowException as error:
            raise ValueError(f"MLflow at {tracking_uri()} refused the run: {_first_line(error)}") from None
        return run

    @classmethod
    def attach(cls, model: Path, folder: Path, provenance: Mapping[str, Any]) -> Self:
        """Attaches to the run of a trained model; what its server missed is delivered first.

        A server that does not know the run is told its whole history.

        Args:
            model: the model folder.
            folder: the attaching stage's folder, for what could not be delivered.
            provenance: the model's.

        Raises:
            ValueError: MLflow cannot be reached.
        """
        client = connect()
        known = read_json(model / RUN) if (model / RUN).is_file() else {}
        run_id = _existing(client, known.get("run_id"))
        unknown = run_id is None
        try:
            if run_id is None:
                run_id = client.create_run(experiment_id(client), run_name=model.name, tags=lineage(provenance)).info.run_id
            retold = cls(client, model, run_id, owned=run_id != os.environ.get("MLFLOW_RUN_ID"))
            if unknown or retold._pending():
                retold.params(flatten(provenance))
                retold.finish()
        except MlflowException as error:
            raise ValueError(f"MLflow at {tracking_uri()} refused the run: {_first_line(error)}") from None
        return cls(client, folder, run_id, owned=False)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Adds one point to every curve; a step that the journal holds already (a resumed run) is not added twice."""
        if step <= self._last_step:
            return
        line = json.dumps({"step": step, "time": int(time.time() * 1000), "metrics": dict(metrics)})
        with self._journal.open("a") as file:
            file.write(line + "\n")
        with self._idle:
            self._lines.append(line)
        self._last_step = step
        self._wake.set()

    def values(self, metrics: Mapping[str, float]) -> None:
        """Sets final metrics, without a curve."""
        now = int(time.time() * 1000)
        points = [Metric(name, float(value), now, 0) for name, value in metrics.items()]
        self._do(lambda: self.client.log_batch(self.run_id, metrics=points))

    def params(self, params: Mapping[str, Any]) -> None:
        """Records settings; MLflow keeps the first value of each."""
        there = self.client.get_run(self.run_id).data.params
        new = [Param(name, str(value)[:500]) for name, value in params.items() if name not in there]
        for start in range(0, len(new), _PARAMS_AT_ONCE):
            self.client.log_batch(self.run_id, params=new[start : start + _PARAMS_AT_ONCE])

    def tags(self, tags: Mapping[str, str]) -> None:
        """Sets tags."""
        self.client.log_batch(self.run_id, tags=[RunTag(name, str(value)[:5000]) for name, value in tags.items()])

    def artifact(self, path: Path, below: str | None = None) -> None:
        """Uploads a file; it must stay where it is until `finish`."""
        self._do(lambda: self.client.log_artifact(self.run_id, str(path), below))

    def finish(self, status: str = "FINISHED") -> bool:
        """Delivers what is left, for a while, and ends the run; says so if something could not be delivered."""
        deadline = time.monotonic() + _CLOSE_SECONDS
        self._closing.set()
        with self._idle:
            while self._pending() and time.monotonic() < deadline:
                self._wake.set()
                self._idle.wait(0.2)
        self._stop.set()
        self._wake.set()
        self._thread.join(_CLOSE_SECONDS)
        left = self._pending()
        if left:
            points, others = len(self._lines) - self._delivered, len(self._actions)
            print(
                f"MLflow at {tracking_uri()} is lost ({self._trouble}): run {self.run_id} misses {points} points of curves, "
                f"which stand in {CURVES} beside the result and are delivered by the next stage, and {others} final figures "
                "or files, which stand beside the result too but are not delivered again",
                flush=True,
            )
        elif self._owned:
            try:
                self.client.set_terminated(self.run_id, status)
            except Exception as error:  # as in connect
                print(f"MLflow at {tracking_uri()}: the run could not be closed: {_first_line(error)}", flush=True)
        return not left

    def _pending(self) -> int:
        return len(self._lines) - self._delivered + len(self._actions)

    def _do(self, action: Callable[[], None]) -> None:
        with self._idle:
            self._actions.append(action)
        self._wake.set()

    def _deliver_forever(self) -> None:
        pause = 1.0
        while not (self._stop.is_set() and not self._pending()):
            self._wake.wait()
            self._wake.clear()
            try:
                while self._pending():
                    self._deliver()
                if self._trouble:
                    print(f"MLflow at {tracking_uri()} is back; everything is delivered", flush=True)
                self._trouble, pause = "", 1.0
            except Exception as error:  # whatever the server or the network does, training goes on
                if not self._trouble:
                    print(f"MLflow at {tracking_uri()} does not answer ({_first_line(error)}); training goes on", flush=True)
                self._trouble = _first_line(error)
                if not self._closing.wait(pause):  # finish cuts a long pause short, and then tries every second
                    pause = min(2 * pause, 30.0)
                elif self._stop.wait(1.0):
                    return
                self._wake.set()
            with self._idle:
                self._idle.notify_all()

    def _deliver(self) -> None:
        with self._idle:
            points: list[Metric] = []
            count = 0
            for line in self._lines[self._delivered :]:
                point = json.loads(line)
                if points and len(points) + len(point["metrics"]) > _BATCH:
                    break
                points += [Metric(name, value, point["time"], point["step"]) for name, value in point["metrics"].items()]
                count += 1
            action = self._actions[0] if self._actions else None
        if points:
            self.client.log_batch(self.run_id, metrics=points)
            self._delivered += count
            self._save()
        if action is not None:
            action()
            with self._idle:
                self._actions.pop(0)

    def _save(self) -> None:
        state = {"run_id": self.run_id, "tracking_uri": tracking_uri(), "delivered": self._delivered}
        with contextlib.suppress(PermissionError):  # the journal of a read-only model folder: told again next time
            write_json(self.folder / RUN, state)


def _existing(client: MlflowClient, run_id: str | None) -> str | None:
    if run_id is None:
        return None
    try:
        info = client.get_run(run_id).info
    except MlflowException:
        return None
    return str(info.run_id) if info.lifecycle_stage == "active" else None  # a deleted run takes nothing any more


def _of_pipeline(client: MlflowClient, experiment: str, tags: Mapping[str, str]) -> str | None:
    pipeline_run = tags.get("kfp.run_id")
    if pipeline_run is None:
        return None
    found = client.search_runs([experiment], f"tags.`kfp.run_id` = '{pipeline_run}'", max_results=1)
    return str(found[0].info.run_id) if found else None


def _whole_lines(path: Path) -> list[str]:
    """The complete lines of a journal; one that a kill cut short is removed from the file."""
    if not path.is_file():
        return []
    content = path.read_text()
    lines = content.splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        lines.pop()
        path.write_text("".join(lines))
    return [line.rstrip("\n") for line in lines]
