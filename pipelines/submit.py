"""Client of Kubeflow Pipelines: submit a run, manage schedules."""

import contextlib
import hashlib
import json
import os
import re
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import kfp
import kfp_server_api
import requests
from kfp import compiler
from kfp.dsl.base_component import BaseComponent
from urllib3.exceptions import HTTPError

from pixelclip.storage.urls import public_url, scrubbed
from pixelclip_pipelines import predict
from pixelclip_pipelines.cluster_config import Cluster, default_workspace, image_of, read, shared_folder
from pixelclip_pipelines.cluster_sections import seconds
from pixelclip_pipelines.form import described
from pixelclip_pipelines.parameters import check_batch, check_place, check_prediction, check_scheduled, check_settings, of_form
from pixelclip_pipelines.pixelclip import build

ENDPOINTS = ("KFP_ENDPOINT", "KF_PIPELINES_ENDPOINT")
TOKEN = "KFP_TOKEN"


@dataclass(frozen=True)
class Target:
    """KFP's URL (by default from environment or file), the cluster's settings, number of training nodes, container image."""

    endpoint: str = ""
    cluster: Path | None = None
    nodes: int = 1
    image: str = ""


def submit(arguments: Mapping[str, Any], target: Target, name: str = "") -> str:
    """Start a run, after uploading the pipeline if it is new or changed.

    Args:
        arguments: arguments of the pipeline, see `run.arguments`.
        target: KFP and how to compile for it.
        name: name of the run; by default the pipeline's name and the time.

    Returns:
        ID of the run, whose URL is printed.

    Raises:
        ValueError: an invalid parameter or setting; KFP is unreachable or rejects a request.
    """
    cluster = read(target.cluster)
    arguments = _placed(arguments, cluster)
    return _start(_checked(arguments, cluster, target), cluster, arguments, target, name)


def submit_prediction(arguments: Mapping[str, Any], target: Target, name: str = "", cron: str = "", every: str = "") -> str:
    """Start a run of `pixelclip-predict`, or with `cron` or `every` run it on a schedule; see `submit` and `schedule`.

    Args:
        arguments: see `predict.arguments`.
        target: KFP and how to compile for it; `nodes` is not used.
        name: see `submit`; a schedule needs one.
        cron, every: see `schedule`.
    """
    when = _when(cron, every) if cron or every else {}
    if when and not name:
        raise ValueError("--name: a schedule needs a name")
    cluster = read(target.cluster)
    arguments = _placed(arguments, cluster)
    pipeline = predict.build(cluster, image_of(cluster, target.image))
    check_prediction(arguments["classes"], arguments["workspace"], arguments["out"], shared_folder(cluster))
    if not when:
        return _start(pipeline, cluster, arguments, target, name)
    check_scheduled(arguments["workspace"], arguments["out"])
    return _schedule(pipeline, cluster, arguments, target, name, when)


def _start(pipeline: BaseComponent, cluster: Cluster, arguments: Mapping[str, Any], target: Target, name: str) -> str:
    with uploaded(pipeline, cluster, arguments, target) as (client, _, options):
        title = name or f"{pipeline.name} {datetime.now(UTC):%Y-%m-%d %H:%M:%S}"
        return str(client.run_pipeline(job_name=title, **options).run_id)


def schedule(arguments: Mapping[str, Any], target: Target, name: str, cron: str = "", every: str = "") -> str:
    """Run the pipeline on a schedule.

    Args:
        arguments, target: see `submit`.
        name: name of the schedule, unique within the experiment.
        cron: `MINUTE HOUR DAY MONTH WEEKDAY` in the time zone of KFP's server, or KFP's six fields that begin with seconds.
        every: interval such as 30m, 6h or 1d, instead of `cron`.

    Returns:
        ID of the schedule.

    Raises:
        ValueError: see `submit`; not exactly one of `cron` and `every`, or an invalid one.
    """
    when = _when(cron, every)
    cluster = read(target.cluster)
    arguments = _placed(arguments, cluster)
    return _schedule(_checked(arguments, cluster, target), cluster, arguments, target, name, when)


def _when(cron: str, every: str) -> dict[str, Any]:
    if bool(cron) == bool(every):
        raise ValueError("give exactly one of --cron and --every")
    return {"cron_expression": _six_fields(cron)} if cron else {"interval_second": _interval(every)}


def _schedule(
    pipeline: BaseComponent,
    cluster: Cluster,
    arguments: Mapping[str, Any],
    target: Target,
    name: str,
    when: Mapping[str, Any],
) -> str:
    with uploaded(pipeline, cluster, arguments, target) as (client, page, options):
        for existing in all_schedules(client, options["experiment_id"]):
            if existing.display_name == name:
                raise ValueError(
                    f"a schedule named {name!r} already exists ({existing.recurring_run_id}); delete it or choose another name"
                )
        created = client.create_recurring_run(job_name=name, max_concurrency=1, no_catchup=True, **when, **options)
        print(f"schedule {created.recurring_run_id}: {page}/#/recurringrun/details/{created.recurring_run_id}", flush=True)
        return str(created.recurring_run_id)


def schedules(target: Target) -> list[str]:
    """Return the schedules of the experiment, one per line.

    Raises:
        ValueError: KFP is unreachable or rejects the request.
    """
    with connected(target) as (client, cluster, _):
        experiment = find_experiment(client, cluster)
        lines = []
        for each in all_schedules(client, experiment) if experiment else ():
            cron, periodic = each.trigger.cron_schedule, each.trigger.periodic_schedule
            when = f"cron {cron.cron}" if cron else f"every {periodic.interval_second} s"
            lines.append(f"{each.recurring_run_id}  {each.status or each.mode or '':<8} {when:<24} {each.display_name}")
        return lines


def unschedule(target: Target, schedule_id: str) -> None:
    """Delete a schedule. Its running runs continue.

    Raises:
        ValueError: no such schedule; KFP is unreachable or rejects the request.
    """
    with connected(target) as (client, _, _):
        client.delete_recurring_run(schedule_id)


def _placed(arguments: Mapping[str, Any], cluster: Cluster) -> dict[str, Any]:
    """Return the arguments with the volume of the run as workspace, if the cluster has one and they name none."""
    return {**arguments, "workspace": arguments.get("workspace") or default_workspace(cluster)}


def _checked(arguments: Mapping[str, Any], cluster: Cluster, target: Target) -> BaseComponent:
    """Return the pipeline for these arguments after checking them for a cluster."""
    pipeline = build(cluster, target.nodes, image_of(cluster, target.image), "data_labelled" in arguments)
    check_place(arguments.get("workspace", ""), shared_folder(cluster), target.nodes)
    if not arguments.get("settings_file"):  # which the first step reads
        check_batch(check_settings(None, of_form(arguments))["train"], target.nodes, cluster.steps["train"].gpus)
    return pipeline


@contextlib.contextmanager
def uploaded(
    pipeline: BaseComponent, cluster: Cluster, arguments: Mapping[str, Any], target: Target
) -> Iterator[tuple[kfp.Client, str, dict[str, Any]]]:
    """Upload the pipeline if it is new, and yield client, URL of KFP's pages and options of a run."""
    with tempfile.TemporaryDirectory() as folder, connected(target) as (client, _, page):
        file = Path(folder, "pipeline.yaml")
        compiler.Compiler().compile(pipeline, str(file))
        pipeline_id, version_id = _upload(client, file, pipeline.name, described(pipeline), cluster.namespace)
        experiment = client.create_experiment(cluster.experiment, namespace=cluster.namespace or None)
        options = {
            "experiment_id": experiment.experiment_id,
            "pipeline_id": pipeline_id,
            "version_id": version_id,
            "params": dict(arguments),
            "service_account": cluster.service_account or None,
        }
        yield client, page, options


def endpoint_of(target: Target, cluster: Cluster) -> str:
    """Return KFP's URL; empty if nothing sets it."""
    from_environment = next((os.environ[name] for name in ENDPOINTS if os.environ.get(name)), "")
    return (target.endpoint or from_environment or cluster.endpoint).rstrip("/")


@contextlib.contextmanager
def connected(target: Target) -> Iterator[tuple[kfp.Client, Cluster, str]]:
    """Yield a connected client, the cluster's settings and the URL of KFP's pages."""
    cluster = read(target.cluster)
    endpoint = endpoint_of(target, cluster)
    if not endpoint:
        raise ValueError(f"KFP's URL is missing: set --endpoint, {' or '.join(ENDPOINTS)}, or endpoint in cluster.yaml")
    if not endpoint.startswith(("http://", "https://")):
        raise ValueError(f"KFP's endpoint must be a URL with http:// or https://, found {public_url(endpoint)!r}")
    health(endpoint)
    shown = public_url(endpoint)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            client = kfp.Client(host=endpoint, existing_token=os.environ.get(TOKEN), namespace=cluster.namespace or "kubeflow")
            yield client, cluster, public_url(os.environ.get("KF_PIPELINES_UI_ENDPOINT", endpoint)).rstrip("/")
    except kfp_server_api.ApiException as error:
        raise ValueError(
            f"KFP at {shown} rejected the request ({error.status} {error.reason}): {one_line(error.body)}"
        ) from None
    except HTTPError as error:
        raise ValueError(f"the connection to KFP at {shown} failed: {scrubbed(str(error), endpoint)}") from None


def health(endpoint: str, timeout: float = 10.0) -> dict[str, Any]:
    """Return the response of KFP's health check, which may contain its version as `tag_name`.

    Raises:
        ValueError: KFP is unreachable or rejects the request, or the URL is not KFP's API.
    """
    shown = public_url(endpoint)
    headers = {"Authorization": f"Bearer {os.environ[TOKEN]}"} if os.environ.get(TOKEN) else {}
    try:
        response = requests.get(f"{endpoint.rstrip('/')}/apis/v2beta1/healthz", headers=headers, timeout=timeout)
    except requests.RequestException as error:
        raise ValueError(f"KFP at {shown} cannot be reached: {scrubbed(one_line(error), endpoint)}") from None
    if not response.ok:
        hint = f"; set a token in {TOKEN}" if response.status_code in (401, 403) else ""
        raise ValueError(f"KFP at {shown} rejected the request ({response.status_code} {response.reason}){hint}")
    try:
        return dict(response.json())
    except ValueError:  # a login page also has status 200
        kind = response.headers.get("Content-Type", "an unknown content type")
        raise ValueError(f"{shown}: expected KFP's API, got {kind}; set a token in {TOKEN}") from None


def _upload(client: kfp.Client, file: Path, name: str, description: str, namespace: str) -> tuple[str, str]:
    """Return the IDs of the pipeline and of its version with this content, uploading what is missing."""
    # kfp.Client.get_pipeline_id does not search a namespace.
    existing = client.list_pipelines(filter=_named(name), namespace=namespace or None).pipelines
    if existing:
        pipeline_id = str(existing[0].pipeline_id)
    else:
        new = kfp_server_api.V2beta1Pipeline(display_name=name, description=description, namespace=namespace or None)
        pipeline_id = client.pipelines.pipeline_service_create_pipeline(pipeline=new).pipeline_id
        print(f"pipeline {name!r} created: {pipeline_id}", flush=True)
    version = f"{name} {hashlib.sha256(file.read_bytes()).hexdigest()[:12]}"
    if versions := client.list_pipeline_versions(pipeline_id, filter=_named(version)).pipeline_versions:
        print(f"pipeline version {version!r} already exists", flush=True)
        return pipeline_id, versions[0].pipeline_version_id
    created = client.upload_pipeline_version(str(file), version, pipeline_id=pipeline_id, description=description)
    return pipeline_id, created.pipeline_version_id


def _named(name: str) -> str:
    return json.dumps({"predicates": [{"operation": "EQUALS", "key": "display_name", "stringValue": name}]})


def find_experiment(client: kfp.Client, cluster: Cluster) -> str:
    """Return the ID of the cluster's experiment; empty if there is none yet."""
    try:
        return str(client.get_experiment(experiment_name=cluster.experiment, namespace=cluster.namespace or None).experiment_id)
    except ValueError as error:
        if not str(error).startswith("No experiment is found"):
            raise
        return ""


def all_schedules(client: kfp.Client, experiment: str | None, namespace: str = "") -> list[Any]:
    """Return the schedules of an experiment; if it is None, of a namespace, or of all in a KFP without namespaces."""
    found: list[Any] = []
    token = ""
    while True:
        page = client.list_recurring_runs(token, 100, experiment_id=experiment, namespace=namespace or None)
        found += page.recurring_runs or []
        if not (token := page.next_page_token or ""):
            return found


def all_runs(client: kfp.Client, experiment: str | None, namespace: str = "") -> Iterator[Any]:
    """Yield the runs of an experiment; if it is None, of a namespace, or of all in a KFP without namespaces."""
    token = ""
    while True:
        page = client.list_runs(token, 100, experiment_id=experiment, namespace=namespace or None)
        yield from page.runs or []
        if not (token := page.next_page_token or ""):
            return


def _six_fields(cron: str) -> str:
    """Return a cron expression with six fields, of which KFP's first is seconds."""
    fields = cron.split()
    if len(fields) not in (5, 6) or not all(re.fullmatch(r"[\d*/,?A-Za-z#-]+", field) for field in fields):
        raise ValueError(f"--cron {cron!r}: must be MINUTE HOUR DAY MONTH WEEKDAY, for example '0 3 * * 1'")
    return " ".join(["0", *fields] if len(fields) == 5 else fields)


def _interval(every: str) -> int:
    if not re.fullmatch(r"[1-9]\d*[smhd]", every):
        raise ValueError(f"--every {every!r}: must be a number and s, m, h or d, for example 6h")
    return seconds(every)


def one_line(text: Any) -> str:
    """Return the first line of an answer's text or an error, at most 300 characters; empty for None."""
    text = text.decode(errors="replace") if isinstance(text, bytes) else text
    return (str(text or "").strip().splitlines() or [""])[0][:300]
