"""The Run: one MLflow run per pipeline run, fed from a journal so that a lost server loses nothing.

Every point of a curve is first appended to `curves.jsonl` in the stage's folder, then delivered by a background thread.
What a lost server missed is delivered when it is back, or by the same command again.
"""

import contextlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Self

from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag
from mlflow.exceptions import MlflowException

from pixelclip.provenance import data, flatten, source
from pixelclip.provenance import tags as tags_of
from pixelclip.server import connect, experiment_id, first_line, is_missing, tracking_uri
from pixelclip.storage import read_json, write_json

CURVES, RUN = "curves.jsonl", "run.json"
PIPELINE_RUN = "PIXELCLIP_PIPELINE_RUN"
"""Environment variable with the id of the pipeline run that a stage is part of."""
PARENT_RUN = "PIXELCLIP_PARENT_RUN"
"""Environment variable with the id of the MLflow run below which new runs stand."""
_BATCH, _PARAMS_AT_ONCE = 500, 90
_CLOSE_SECONDS = 30.0


def lineage(provenance: Mapping[str, Any]) -> dict[str, str]:
    """Lineage tags: code and data of the whole chain, the pipeline run, the run above."""
    found = tags_of(provenance)
    if pipeline_run := os.environ.get(PIPELINE_RUN):
        found["kfp.run_id"] = pipeline_run
    if parent := os.environ.get(PARENT_RUN):
        found["mlflow.parentRunId"] = parent
    return found


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
        self._runs = [run_id]  # that take final figures and tags
        self._journal = folder / CURVES
        self._lines = _whole_lines(self._journal)
        self._last_step = json.loads(self._lines[-1])["step"] if self._lines else -1
        known = read_json(folder / RUN) if (folder / RUN).is_file() else {}
        same = known.get("run_id") == run_id and known.get("tracking_uri") == tracking_uri()
        self._delivered = min(int(known["delivered"]), len(self._lines)) if same else 0
        self._told: dict[str, int] = {}  # the last step that the server has of each curve
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

        The order of choice is: MLFLOW_RUN_ID (which is never ended here), the run of an interrupted start, a new run below
        PIXELCLIP_PARENT_RUN, the run tagged with this pipeline run's id, a new run. An interrupted training continues its run
        also while the server does not answer.

        Raises:
            ValueError: MLflow cannot be reached, or refuses.
        """
        given = os.environ.get("MLFLOW_RUN_ID")
        with _said(given):
            client, resumed = (connect(), None) if given else _resumed(folder)
            tags = lineage(provenance)
            if given:
                tags.pop("mlflow.parentRunId", None)  # it stands where its maker put it
            run_id = given or resumed or _of_pipeline(client, tags)
            if run_id is None:
                run_id = client.create_run(experiment_id(client), run_name=name, tags=tags).info.run_id
            run = cls(client, folder, run_id, owned=not given)
            introduce = partial(run._introduce, provenance, tags)
            if resumed:
                run._do(introduce)  # its server knows most of that already, and need not be there right now
            else:
                introduce()
        return run

    @classmethod
    def trained(cls, client: MlflowClient, model: Path, provenance: Mapping[str, Any]) -> str:
        """The id of the run that trained a model; what its server missed is delivered first.

        A server that does not know the run is told its whole history: in the run MLFLOW_RUN_ID, or in a new one.

        Args:
            client: a connected client.
            model: the model folder.
            provenance: the model's.

        Raises:
            ValueError: MLflow refuses.
        """
        given = os.environ.get("MLFLOW_RUN_ID")
        with _said(given):
            known = _existing(client, model)
            run_id = known or given
            if run_id is None:
                run_id = client.create_run(experiment_id(client), run_name=model.name, tags=lineage(provenance)).info.run_id
            retold = cls(client, model, run_id, owned=run_id != given)
            if known is None or retold._pending():
                retold.params(flatten(provenance))
                retold.datasets(provenance, "training")
                retold.finish()
        return run_id

    @classmethod
    def attach(cls, model: Path, folder: Path, provenance: Mapping[str, Any]) -> Self:
        """Attaches to the run MLFLOW_RUN_ID, or else to the run that trained a model.

        Where both are there and differ (Kubeflow's MLflow plugin gives every task a run of its own), final figures and tags
        go to the training's run, too: there all numbers of a model stand together.

        Args:
            model: the model folder.
            folder: the attaching stage's folder, for what could not be delivered.
            provenance: the model's.

        Raises:
            ValueError: MLflow cannot be reached, or refuses.
        """
        client = connect()
        run_id = cls.trained(client, model, provenance)
        given = os.environ.get("MLFLOW_RUN_ID")
        with _said(given):
            if given:
                client.get_run(given)
        run = cls(client, folder, given or run_id, owned=False)
        run._runs = list(dict.fromkeys([run.run_id, run_id]))
        return run

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
        for run_id in self._runs:
            self._do(partial(self.client.log_batch, run_id, metrics=points))

    def params(self, params: Mapping[str, Any]) -> None:
        """Records settings; MLflow keeps the first value of each."""
        there = self.client.get_run(self.run_id).data.params
        new = [Param(name, str(value)[:500]) for name, value in params.items() if name not in there]
        for start in range(0, len(new), _PARAMS_AT_ONCE):
            self.client.log_batch(self.run_id, params=new[start : start + _PARAMS_AT_ONCE])

    def tags(self, tags: Mapping[str, str]) -> None:
        """Sets tags."""
        for run_id in self._runs:
            self.client.log_batch(run_id, tags=[RunTag(name, str(value)[:5000]) for name, value in tags.items()])

    def datasets(self, provenance: Mapping[str, Any], context: str) -> None:
        """Names the data that a chain begins with as MLflow datasets, identified by md5."""
        named = []
        for name, described in data(provenance).items():
            fetched = source(described)
            digest = str(fetched.get("md5", described["md5"]))[:36]  # MLflow's limit, and the length of DVC's md5 of a folder
            place = json.dumps(fetched or {"uri": described["path"]})
            dataset = Dataset(name=name, digest=digest, source_type="dvc" if fetched else "local", source=place)
            named.append(DatasetInput(dataset, [InputTag("mlflow.data.context", context)]))
        if named:
            self.client.log_inputs(self.run_id, datasets=named)

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
                f"which stand in {CURVES} beside the result and are delivered by the next stage, and {others} figures, "
                "tags or files, which stand beside the result too but are not delivered again",
                flush=True,
            )
        elif self._owned:
            try:
                self.client.set_terminated(self.run_id, status)
            except Exception as error:  # as in connect
                print(f"MLflow at {tracking_uri()}: the run could not be closed: {first_line(error)}", flush=True)
        return not left

    def _introduce(self, provenance: Mapping[str, Any], tags: Mapping[str, str]) -> None:
        if self._owned:
            self.client.update_run(self.run_id, status="RUNNING")
        self.params(flatten(provenance))
        self.tags(tags)
        self.datasets(provenance, "training")

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
                    print(f"MLflow at {tracking_uri()} does not answer ({first_line(error)}); training goes on", flush=True)
                self._trouble = first_line(error)
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
        if count:
            if new := [point for point in points if point.step > self._last_step_of(point.key)]:
                self.client.log_batch(self.run_id, metrics=new)
                self._told |= {point.key: point.step for point in new}
            self._delivered += count
            self._save()
        if action is not None:
            action()
            with self._idle:
                self._actions.pop(0)

    def _last_step_of(self, curve: str) -> int:
        """The last step that the server has: a retried pod joins its run with an empty journal and trains from the start."""
        if curve not in self._told:
            points = self.client.get_metric_history(self.run_id, curve)
            self._told[curve] = max((point.step for point in points), default=-1)
        return self._told[curve]

    def _save(self) -> None:
        state = {"run_id": self.run_id, "tracking_uri": tracking_uri(), "delivered": self._delivered}
        with contextlib.suppress(PermissionError):  # the journal of a read-only model folder: told again next time
            write_json(self.folder / RUN, state)


@contextlib.contextmanager
def _said(given: str | None) -> Iterator[None]:
    """What MLflow refuses is one message."""
    try:
        yield
    except MlflowException as error:
        named = f" {given} (MLFLOW_RUN_ID)" if given else ""
        raise ValueError(f"MLflow at {tracking_uri()} refused the run{named}: {first_line(error)}") from None


def _existing(client: MlflowClient, folder: Path) -> str | None:
    """The run that a folder belongs to; None if there is none, or the server says that it has no such run."""
    if not (folder / RUN).is_file():
        return None
    try:
        info = client.get_run(read_json(folder / RUN)["run_id"]).info
    except MlflowException as error:
        if is_missing(error):
            return None
        raise
    return str(info.run_id) if info.lifecycle_stage == "active" else None  # a deleted run takes nothing any more


def _resumed(folder: Path) -> tuple[MlflowClient, str | None]:
    """A client, and the run that a folder belongs to: by the journal's word where the server that it names does not answer.

    Should that have lost the run meanwhile, nothing can be delivered, and the next stage tells it the whole history.
    """
    known = read_json(folder / RUN) if (folder / RUN).is_file() else {}
    client = None
    try:
        client = connect()
        return client, _existing(client, folder)
    except (ValueError, MlflowException) as error:
        uri = tracking_uri()
        if known.get("tracking_uri") != uri or not (client or uri.startswith("http")):  # a file does not come back by itself
            raise
        print(f"{first_line(error)}; training goes on in MLflow run {known['run_id']}", flush=True)
        return client or MlflowClient(uri), str(known["run_id"])


def _of_pipeline(client: MlflowClient, tags: Mapping[str, str]) -> str | None:
    pipeline_run = tags.get("kfp.run_id")
    if pipeline_run is None or "mlflow.parentRunId" in tags:
        return None
    which = f"tags.`kfp.run_id` = '{pipeline_run}'"
    found = client.search_runs([experiment_id(client)], which, order_by=["attributes.start_time ASC"])
    whole = [run for run in found if "mlflow.parentRunId" not in run.data.tags]
    return str(whole[0].info.run_id) if whole else None


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
