"""The pipeline on a real Kubeflow Pipelines: submit a run, see how it goes, run it on a schedule."""

import contextlib
import hashlib
import io
import json
import os
import re
import tempfile
import urllib.error
import urllib.request
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import kfp
import kfp_server_api
import yaml
from kfp import compiler
from urllib3.exceptions import HTTPError

from pixelclip_pipelines.cluster import Cluster, check_workspace, image_of, read, seconds
from pixelclip_pipelines.pixelclip import build

ENDPOINTS = ("KFP_ENDPOINT", "KF_PIPELINES_ENDPOINT")
TOKEN = "KFP_TOKEN"
_GOOD, _BAD = ("SUCCEEDED", "SKIPPED"), ("FAILED", "CANCELED", "CANCELLED")
_PAGE = 100


@dataclass(frozen=True)
class Target:
    """Where the pipeline goes: KFP's URL (empty: by environment or file), settings of the cluster, nodes, image."""

    endpoint: str = ""
    cluster: Path | None = None
    nodes: int = 1
    image: str = ""


def submit(given: Mapping[str, Any], target: Target, name: str = "") -> str:
    """Starts a run; the pipeline is uploaded first if it is new, or as a new version if it changed.

    Args:
        given: the pipeline's arguments, see `run.arguments`.
        target: where.
        name: of the run; empty: the pipeline's with the time.

    Returns:
        The run's id; its URL is printed.

    Raises:
        ValueError: a wrong parameter or setting, KFP not reached or refusing.
    """
    with _prepared(given, target) as ready:
        name = name or f"{ready.pipeline} {datetime.now(UTC):%Y-%m-%d %H:%M:%S}"
        run = ready.client.run_pipeline(
            experiment_id=ready.experiment,
            job_name=name,
            params=dict(given),
            pipeline_id=ready.pipeline_id,
            version_id=ready.version_id,
            service_account=ready.cluster.service_account or None,
        )
        ready.said.append(f"run {run.run_id}: {ready.page}/#/runs/details/{run.run_id}")
        return str(run.run_id)


def schedule(given: Mapping[str, Any], target: Target, name: str, cron: str = "", every: str = "") -> str:
    """Runs the pipeline again and again.

    Args:
        given: as `submit`.
        target: where.
        name: of the schedule; there must be none of that name in the experiment.
        cron: `MINUTE HOUR DAY MONTH WEEKDAY` in the time zone of KFP's server, or KFP's six fields with seconds in front.
        every: 30m, 6h, 1d; one of `cron` and `every`.

    Returns:
        The schedule's id.

    Raises:
        ValueError: as `submit`; no schedule, two, or one that KFP would not take.
    """
    if bool(cron) == bool(every):
        raise ValueError("a schedule is either --cron or --every")
    when = {"cron_expression": _six_fields(cron)} if cron else {"interval_second": _interval(every)}
    with _prepared(given, target) as ready:
        if taken := [each for each in _schedules(ready.client, ready.experiment) if each.display_name == name]:
            raise ValueError(
                f"there is a schedule {name!r} already ({taken[0].recurring_run_id}); delete it or take another name"
            )
        made = ready.client.create_recurring_run(
            experiment_id=ready.experiment,
            job_name=name,
            params=dict(given),
            pipeline_id=ready.pipeline_id,
            version_id=ready.version_id,
            max_concurrency=1,
            no_catchup=True,
            service_account=ready.cluster.service_account or None,
            **when,
        )
        ready.said.append(f"schedule {made.recurring_run_id}: {ready.page}/#/recurringrun/details/{made.recurring_run_id}")
        return str(made.recurring_run_id)


def schedules(target: Target) -> list[str]:
    """The schedules of the experiment, one line each.

    Raises:
        ValueError: KFP not reached or refusing.
    """
    with _connected(target) as (client, cluster, _):
        try:
            experiment = client.get_experiment(experiment_name=cluster.experiment, namespace=cluster.namespace or None)
        except ValueError as error:
            if not str(error).startswith("No experiment is found"):
                raise
            return []
        return [_line(each) for each in _schedules(client, experiment.experiment_id)]


def unschedule(target: Target, schedule_id: str) -> None:
    """Deletes a schedule; runs that it has started go on.

    Raises:
        ValueError: there is none of that id, KFP not reached or refusing.
    """
    with _connected(target) as (client, _, _):
        client.delete_recurring_run(schedule_id)


def status(target: Target, run_id: str) -> tuple[list[str], int]:
    """How a run goes.

    Returns:
        One line a step with its state, then one of the run; and an exit code: 0 succeeded, 1 failed or cancelled, 3 not over.

    Raises:
        ValueError: there is no such run, KFP not reached or refusing.
    """
    with _connected(target) as (client, _, page):
        run = client.get_run(run_id)
    tasks = (run.run_details.task_details if run.run_details else None) or []
    # KFP's own helpers: a driver before every step, and the root around all of them.
    shown = [task for task in tasks if task.display_name and not re.search(r"(-driver|^root|^executor)$", task.display_name)]
    shown.sort(key=lambda task: (task.start_time or task.create_time or datetime.max.replace(tzinfo=UTC), task.display_name))
    lines = [f"{task.state or 'PENDING':<10} {_took(task):>9}  {task.display_name}{_why(task)}" for task in shown]
    lines.append(f"{run.state or 'PENDING':<10} {'':>9}  run {run_id}{_why(run)}: {page}/#/runs/details/{run_id}")
    code = 0 if run.state in _GOOD else 1 if run.state in _BAD else 3
    return lines, code


@dataclass(frozen=True)
class _Ready:
    client: kfp.Client
    cluster: Cluster
    page: str
    pipeline: str
    pipeline_id: str
    version_id: str
    experiment: str
    said: list[str]


@contextlib.contextmanager
def _prepared(given: Mapping[str, Any], target: Target) -> Iterator[_Ready]:
    """Checks everything, then uploads what is new. What was said is printed at the end, when all went well."""
    said: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "pipeline.yaml")
        cluster = read(target.cluster)
        compiler.Compiler().compile(build(cluster, target.nodes, image_of(cluster, target.image)), str(path))
        spec = next(yaml.safe_load_all(path.read_text()))
        _check(given, spec, target.nodes)
        check_workspace(cluster, given.get("workspace", ""))
        with _connected(target) as (client, _, page):
            name = spec["pipelineInfo"]["name"]
            pipeline_id, version_id = _upload(client, path, name, cluster.namespace, said)
            experiment = client.create_experiment(cluster.experiment, namespace=cluster.namespace or None)
            yield _Ready(client, cluster, page, name, pipeline_id, version_id, experiment.experiment_id, said)
    print("\n".join(said), flush=True)


def _check(given: Mapping[str, Any], spec: Mapping[str, Any], nodes: int) -> None:
    """Holds arguments against the compiled pipeline: KFP itself takes unknown ones without a word."""
    known = spec["root"]["inputDefinitions"]["parameters"]
    kinds = {"STRING": str, "NUMBER_INTEGER": int, "NUMBER_DOUBLE": (int, float), "STRUCT": dict, "BOOLEAN": bool, "LIST": list}
    for name, value in given.items():
        if name not in known:
            raise ValueError(f"the pipeline has no parameter {name!r}; it has {', '.join(known)}")
        kind = known[name]["parameterType"]
        if not isinstance(value, kinds[kind]) or (isinstance(value, bool) and kind != "BOOLEAN"):
            raise ValueError(f"pipeline parameter {name} must be of type {kind}, found {value!r}")
    if missing := [name for name, entry in known.items() if not entry.get("isOptional") and name not in given]:
        raise ValueError(f"the pipeline needs {', '.join(missing)}")
    if nodes > 1 and not given.get("workspace"):
        raise ValueError("a training on several nodes needs --workspace: a folder on the volume that they share")


@contextlib.contextmanager
def _connected(target: Target) -> Iterator[tuple[kfp.Client, Cluster, str]]:
    """A client of KFP that answers, the cluster's settings, and the URL of KFP's pages."""
    cluster = read(target.cluster)
    by_environment = next((os.environ[name] for name in ENDPOINTS if os.environ.get(name)), "")
    endpoint = (target.endpoint or by_environment or cluster.endpoint).rstrip("/")
    if not endpoint:
        raise ValueError(f"where is KFP? Give --endpoint, or {' or '.join(ENDPOINTS)}, or endpoint in cluster.yaml")
    if not endpoint.startswith(("http://", "https://")):
        raise ValueError(f"KFP's endpoint is a URL with http:// or https://, found {endpoint!r}")
    token = os.environ.get(TOKEN)
    _check_alive(endpoint, token)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):  # its links; ours are printed at the end
            warnings.simplefilter("ignore", FutureWarning)
            client = kfp.Client(host=endpoint, existing_token=token, namespace=cluster.namespace or "kubeflow")
            yield client, cluster, os.environ.get("KF_PIPELINES_UI_ENDPOINT", endpoint).rstrip("/")
    except kfp_server_api.ApiException as error:
        raise ValueError(f"KFP at {endpoint} refused ({error.status} {error.reason}): {_first_line(error.body)}") from None
    except HTTPError as error:
        raise ValueError(f"KFP at {endpoint} was lost: {error}") from None


def _check_alive(endpoint: str, token: str | None) -> None:
    request = urllib.request.Request(
        f"{endpoint}/apis/v2beta1/healthz", headers={"Authorization": f"Bearer {token}"} if token else {}
    )
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            kind = answer.headers.get_content_type()
    except urllib.error.HTTPError as error:
        hint = f"; a token is given by {TOKEN}" if error.code in (401, 403) else ""
        raise ValueError(f"KFP at {endpoint} refused ({error.code} {error.reason}){hint}") from None
    except OSError as error:
        raise ValueError(f"KFP at {endpoint} cannot be reached: {getattr(error, 'reason', error)}") from None
    if kind != "application/json":  # a login page in front of it answers with 200, too
        raise ValueError(f"{endpoint}: this is not KFP's API, it answers with {kind}; a token is given by {TOKEN}")


def _upload(client: kfp.Client, path: Path, name: str, namespace: str, said: list[str]) -> tuple[str, str]:
    """The pipeline's id and that of the version with this very content, uploaded if there is none."""
    version = f"{name} {hashlib.sha256(path.read_bytes()).hexdigest()[:12]}"
    pipeline_id = _pipeline_id(client, name, namespace)
    if not pipeline_id:
        new = kfp_server_api.V2beta1Pipeline(display_name=name, namespace=namespace or None)
        pipeline_id = client.pipelines.pipeline_service_create_pipeline(pipeline=new).pipeline_id
        said.append(f"pipeline {name!r} is new: {pipeline_id}")
    for page in _pages(partial(client.list_pipeline_versions, pipeline_id)):
        for each in page.pipeline_versions or []:
            if each.display_name == version:
                said.append(f"pipeline version {version!r} is there already")
                return pipeline_id, each.pipeline_version_id
    made = client.upload_pipeline_version(str(path), version, pipeline_id=pipeline_id)
    said.append(f"pipeline version {version!r} uploaded")
    return pipeline_id, made.pipeline_version_id


def _pipeline_id(client: kfp.Client, name: str, namespace: str) -> str:
    """The id of the pipeline of that name, or nothing; `kfp.Client.get_pipeline_id` looks into no namespace."""
    named = json.dumps({"predicates": [{"operation": "EQUALS", "key": "display_name", "stringValue": name}]})
    page = client.list_pipelines(filter=named, namespace=namespace or None)
    return str(page.pipelines[0].pipeline_id) if page.pipelines else ""


def _schedules(client: kfp.Client, experiment: str) -> list[Any]:
    pages = _pages(partial(client.list_recurring_runs, experiment_id=experiment))
    return [each for page in pages for each in page.recurring_runs or []]


def _pages(ask: Callable[..., Any]) -> Iterator[Any]:
    """One of KFP's lists, a page at a time."""
    token = ""
    while True:
        page = ask(page_token=token, page_size=_PAGE)
        yield page
        if not (token := page.next_page_token or ""):
            return


def _line(made: Any) -> str:
    cron, periodic = made.trigger.cron_schedule, made.trigger.periodic_schedule
    when = f"cron {cron.cron}" if cron else f"every {periodic.interval_second} s"
    return f"{made.recurring_run_id}  {made.status or made.mode or '':<8} {when:<24} {made.display_name}"


def _six_fields(cron: str) -> str:
    """A schedule as KFP writes it, with seconds in front."""
    fields = cron.split()
    if len(fields) not in (5, 6) or not all(re.fullmatch(r"[\d*/,?A-Za-z#-]+", field) for field in fields):
        raise ValueError(f"--cron {cron!r}: MINUTE HOUR DAY MONTH WEEKDAY is expected, as '0 3 * * 1'")
    return " ".join(["0", *fields] if len(fields) == 5 else fields)


def _interval(every: str) -> int:
    if not re.fullmatch(r"[1-9]\d*[smhd]", every):
        raise ValueError(f"--every {every!r}: a number and s, m, h or d is expected, as 6h")
    return seconds(every)


def _took(task: Any) -> str:
    if not (task.start_time and task.end_time) or task.end_time < task.start_time:
        return ""
    return str(task.end_time - task.start_time).partition(".")[0]


def _why(thing: Any) -> str:
    message = thing.error.message if thing.error else ""
    return f": {_first_line(message)}" if message else ""


def _first_line(text: Any) -> str:
    return (str(text or "").strip().splitlines() or [""])[0][:300]
