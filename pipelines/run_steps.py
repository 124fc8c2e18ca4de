"""The steps of a KFP run, read from the API's answer.

KFP's API lists the nodes of Argo's workflow, up to six per step, without their IDs. The ID of a node is the workflow's name
and the FNV-1a hash of the node's full name, and every node lists the IDs of its children: so the full names can be found again.
A name is `PARENT.TASK` below a DAG, `NODE(NUMBER)` for an attempt, and `NODE(INDEX:INDEX)` for an iteration of a loop.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

from pixelclip_pipelines.cluster_config import STEPS

FINAL = ("SUCCEEDED", "FAILED", "SKIPPED", "CANCELED", "CACHED")
_NEVER = datetime(1971, 1, 1, tzinfo=UTC)  # KFP's empty times are before it
_MAX_ATTEMPTS = 100
_MAX_ITERATIONS = 10_000


@dataclass(frozen=True)
class Attempt:
    """One pod of a step: the hash in its name, its state, whether KFP saw its container run, and its seconds."""

    hash: int
    state: str
    started: bool
    seconds: int | None = None


@dataclass(frozen=True)
class Step:
    """One step of a run; every iteration of a loop is a step of its own.

    `state` is KFP's, or CACHED (taken from KFP's cache) or SKIPPED (never ran, because an earlier step failed).
    """

    task: str
    iteration: int | None
    state: str
    start: datetime | None = None
    end: datetime | None = None
    attempts: list[Attempt] = field(default_factory=list)
    waits_for: list[str] = field(default_factory=list)
    timeout: int | None = None
    failed_driver: bool = False

    @property
    def name(self) -> str:
        """Name of the step as in cluster.yaml, with the number of a second task and of an iteration, from 1: `masks/3`."""
        number = "" if self.iteration is None else f"/{self.iteration + 1}"
        return f"{self.task.replace('-', '_')}{number}"


def steps_of(run: Mapping[str, Any], spec: Mapping[str, Any] | None = None) -> list[Step]:
    """Return the steps of a run in the order of the pipeline.

    Args:
        run: KFP's answer about the run.
        spec: compiled pipeline as `{"pipeline_spec": ..., "platform_spec": ...}`; if given, also steps that the run has not
            reached, what they wait for, and the timeouts.
    """
    planned = dict(_planned(spec or {}))
    tasks = [task for task in (run.get("run_details") or {}).get("task_details") or [] if task.get("display_name")]
    found = _Nodes(tasks).steps(planned)
    reached = {step.task for step in found}
    found += [
        Step(task, None, "PENDING", waits_for=plan.after, timeout=plan.timeout)
        for task, plan in planned.items()
        if task not in reached
    ]
    if run.get("state") in FINAL:
        found = [replace(step, state="SKIPPED") if step.state == "PENDING" else step for step in found]
    return sorted(found, key=lambda step: (_position(step.task), step.task, step.iteration or 0))


def workflow_of(run: Mapping[str, Any]) -> str:
    """Return the name of the run's workflow, with which the names of its pods begin, or an empty string."""
    tasks = (run.get("run_details") or {}).get("task_details") or []
    return next((child["pod_name"].rpartition("-")[0] for task in tasks for child in task.get("child_tasks") or []), "")


def time_of(value: str | None) -> datetime | None:
    """Parse one of KFP's times; return None for an empty one."""
    time = datetime.fromisoformat(value) if value else _NEVER
    return time if time > _NEVER else None


@dataclass
class _Plan:
    after: list[str]
    timeout: int | None


def _planned(spec: Mapping[str, Any]) -> Iterator[tuple[str, _Plan]]:
    """Yield the tasks of a compiled pipeline: steps after which each starts, and time limit."""
    pipeline = spec.get("pipeline_spec") or {}
    kubernetes = ((spec.get("platform_spec") or {}).get("platforms") or {}).get("kubernetes") or {}
    executors = (kubernetes.get("deploymentSpec") or {}).get("executors") or {}
    components = pipeline.get("components") or {}

    def walk(dag: Mapping[str, Any]) -> Iterator[tuple[str, _Plan]]:
        tasks = dag.get("tasks") or {}
        for name, task in tasks.items():
            component = components.get(task["componentRef"]["name"], {})
            if "dag" in component:
                yield from walk(component["dag"])
                continue
            exit_task = task.get("triggerPolicy", {}).get("strategy") == "ALL_UPSTREAM_TASKS_COMPLETED"  # after all others
            after = [] if exit_task else [step for other in task.get("dependentTasks") or [] for step in names(other, tasks)]
            limit = executors.get(component.get("executorLabel"), {}).get("activeDeadlineSeconds")
            yield name, _Plan(after, int(limit) if limit else None)

    def names(task: str, tasks: Mapping[str, Any]) -> list[str]:
        component = components.get(tasks[task]["componentRef"]["name"], {})
        return [name for name, _ in walk(component["dag"])] if "dag" in component else [task]

    yield from walk((pipeline.get("root") or {}).get("dag") or {})


class _Nodes:
    """The nodes of a workflow by their full names."""

    def __init__(self, tasks: list[dict[str, Any]]) -> None:
        self._tasks = tasks
        self._children = {id(task): {child["pod_name"] for child in task.get("child_tasks") or []} for task in tasks}
        self._ids = set().union(*self._children.values()) if tasks else set()
        self._workflow = next(iter(self._ids)).rpartition("-")[0] if self._ids else ""
        self._taken: set[int] = set()
        titles = {task["display_name"] for task in tasks}
        self._titles = sorted(title for title in titles if not title.endswith(")"))
        self.names: list[str] = []
        if self._workflow:
            self._walk(self._workflow)

    def _id(self, name: str) -> str:
        return f"{self._workflow}-{_fnv1a(name)}"

    def _walk(self, name: str) -> None:
        """Collect the names of all nodes below a node."""
        self.names.append(name)
        below = [f"{name}.{title}" for title in self._titles if self._id(f"{name}.{title}") in self._ids]
        for child in [*self._numbered(name), *self._iterations(name), *below]:
            self._walk(child)

    def _numbered(self, name: str) -> list[str]:
        """Return the attempts of a node; numbers have no gaps."""
        found = []
        for number in range(_MAX_ATTEMPTS):
            if self._id(f"{name}({number})") not in self._ids:
                break
            found.append(f"{name}({number})")
        return found

    def _iterations(self, name: str) -> list[str]:
        if not name.endswith("iteration-iterations"):
            return []
        numbers = (f"{name}({number}:{number})" for number in range(_MAX_ITERATIONS))
        count = sum(bool(re.match(r"iteration-iterations\(\d+:\d+\)$", task["display_name"])) for task in self._tasks)
        found: list[str] = []
        for child in numbers:
            if len(found) == count:
                break
            if self._id(child) in self._ids:
                found.append(child)
        return found

    def steps(self, planned: Mapping[str, _Plan]) -> list[Step]:
        """Return one step for each task and iteration; a repeated part of the workflow adds attempts to it."""
        paths: dict[tuple[str, int | None], list[str]] = {}
        for name in self.names:
            title = name.rpartition(".")[2]
            task = title.removesuffix("-driver")
            if _position(task) < len(STEPS):
                loop = re.findall(r"iterations\((\d+):", name)
                path = paths.setdefault((task, int(loop[-1]) if loop else None), [])
                if (own := name.removesuffix("-driver")) not in path:
                    path.append(own)
        return [self._step(task, iteration, names, planned.get(task)) for (task, iteration), names in paths.items()]

    def _step(self, task: str, iteration: int | None, names: list[str], plan: _Plan | None) -> Step:
        own = [(name, self._find(name, task)) for name in names]
        # A repeated part of the workflow usually skips what failed before; the node that ran is the interesting one.
        ran = [(name, node) for name, node in own if node and node.get("state")] or [(n, node) for n, node in own if node]
        attempts = [attempt for name, node in ran for attempt in self._attempts(name, node)]
        after = plan.after if plan else []
        timeout = plan.timeout if plan else None
        if not ran:  # only its driver exists
            driver = self._find(f"{names[-1]}-driver", f"{task}-driver") or {}
            failed = driver.get("state") == "FAILED"
            return Step(task, iteration, "FAILED" if failed else "PENDING", timeout=timeout, failed_driver=failed)
        _, node = ran[-1]
        start, end, state = time_of(node.get("start_time")), time_of(node.get("end_time")), node.get("state") or "SKIPPED"
        driver = self._find(f"{ran[-1][0]}-driver", f"{task}-driver") or {}
        if state == "SKIPPED" and driver.get("state") == "FAILED":
            return Step(task, iteration, "FAILED", time_of(driver.get("start_time")), end, timeout=timeout, failed_driver=True)
        if state == "SUCCEEDED" and not attempts:
            state = "CACHED"
        if start is None and state == "RUNNING":
            state = "PENDING"
        return Step(task, iteration, state, start, end, attempts, after, timeout)

    def _find(self, name: str, title: str) -> dict[str, Any] | None:
        """Return the task of a node: that whose children are the node's, else the first unused one of this title."""
        children = {self._id(child) for child in self._numbered(name)}
        same = [task for task in self._tasks if task["display_name"] == title]
        if children or len(same) == 1:
            return next((task for task in same if children <= self._children[id(task)]), None)
        return next((task for task in same if task.get("state") in (None, "PENDING", "SKIPPED")), None)

    def _attempts(self, name: str, node: Mapping[str, Any]) -> list[Attempt]:
        found: list[Attempt] = []
        for outer in self._numbered(name):
            executor = f"{outer}.executor"
            parent = self._find(executor, "executor") if self._numbered(executor) else None
            for number, pod in enumerate(self._numbered(executor)):
                found.append(self._attempt(pod, number, parent or node))
        return found

    def _attempt(self, name: str, number: int, parent: Mapping[str, Any]) -> Attempt:
        """Return a pod's attempt; of several pods with one title, that whose times are nearest to those of its parent."""
        start, end = time_of(parent.get("start_time")), time_of(parent.get("end_time"))

        def distance(task: Mapping[str, Any]) -> float:
            own_start, own_end = time_of(task.get("start_time")), time_of(task.get("end_time"))
            if not (start and own_start) or own_start < start or (end and (own_end is None or own_end > end)):
                return float("inf")
            after = (own_start - start).total_seconds()
            return after + (1000 * bool(own_end) if not end else (end - own_end).total_seconds() if own_end else 0)

        same = [t for t in self._tasks if t["display_name"] == f"executor({number})" and id(t) not in self._taken]
        task = min(same, key=distance, default=None)
        if task is None:
            return Attempt(_fnv1a(name), "PENDING", False)
        self._taken.add(id(task))
        states = {entry.get("state"): time_of(entry["update_time"]) for entry in task.get("state_history") or []}
        own_start, own_end = time_of(task.get("start_time")), time_of(task.get("end_time"))
        seconds = int((own_end - own_start).total_seconds()) if own_start and own_end else None
        started = "RUNNING" in states or "SUCCEEDED" in states
        return Attempt(_fnv1a(name), str(task.get("state") or "PENDING"), started, seconds)


def _position(task: str) -> int:
    """Return the position of a task in the pipeline; behind all steps if it is none."""
    name = re.sub(r"-\d+$", "", task).replace("-", "_")
    return list(STEPS).index(name) if name in STEPS else len(STEPS)


def _fnv1a(text: str) -> int:
    """Return the 32-bit FNV-1a hash, by which Argo names nodes and pods."""
    value = 0x811C9DC5
    for byte in text.encode():
        value = (value ^ byte) * 0x01000193 & 0xFFFFFFFF
    return value
