"""KFP's runs and their artifacts in an object store, for `pixelclip gc`; what unfinished runs and schedules need."""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import kfp
import kfp_server_api

from pixelclip.cleanup.named import Named
from pixelclip.cleanup.policy import Item
from pixelclip.storage.s3 import Listed, delete_below, is_s3, list_below
from pixelclip_pipelines.cluster_config import Cluster
from pixelclip_pipelines.run_steps import FINAL
from pixelclip_pipelines.runs import KfpRun
from pixelclip_pipelines.submit import Target, all_runs, all_schedules, connected, find_experiment

_PIPELINES = ("pixelclip", "pixelclip-unlabelled", "pixelclip-predict", "pixelclip-sweep", "pixelclip-sweep-run")
_RUN = re.compile(r"([^/]+)/([0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})/")
_MISSING = 404


def items(target: Target, root: str, roots: Sequence[Path], named: Named) -> list[Item]:
    """Return the runs of the experiment with their artifacts, and artifacts whose run was deleted.

    Args:
        target: KFP.
        root: KFP's pipeline root, `s3://` or `minio://`; if empty, no item is returned.
        roots: local folders with workspaces, to which a claim's `mount` in KFP's parameters may correspond.
        named: what must stay; what unfinished runs and schedules of the namespace read is added, whatever their experiment.

    Raises:
        ValueError: KFP or the store is unreachable or rejects a request.
    """
    with connected(target) as (client, cluster, _):
        experiment = find_experiment(client, cluster)
        namespace = cluster.namespace or client.get_user_namespace()  # as KFP's client finds the experiment
        found = list(all_runs(client, None, namespace))
        # Only runs of the experiment may go, but those of others can use the same workspaces and artifacts.
        runs = {run.run_id: run for run in found if experiment and run.experiment_id == experiment}
        active = {run.run_id: run for run in found if run.state not in FINAL}
        for run_id, run in active.items():
            reason = f"used by the KFP run {run_id[:8]}, which is {run.state or 'PENDING'}"
            named.active_kfp[run_id] = reason
            _add_parameters(named, run, cluster, roots, reason)
        for each in all_schedules(client, None, namespace):
            _add_parameters(named, each, cluster, roots, f"used by the schedule {each.display_name}")
        if not root:
            return []
        # KFP does not tell from which run a cached result comes.
        cached = [run_id for run_id in active if any(step.state == "CACHED" for step in KfpRun(client, run_id).steps)]
        reader = f"may be read by the KFP run {cached[0][:8]}, which is {active[cached[0]].state}" if cached else ""
        place = re.sub("^minio://", "s3://", root).rstrip("/")
        if not is_s3(place):
            raise ValueError(f"--pipeline-root {root}: must be s3://bucket/folder or minio://bucket/folder")
        stored = _stored(place)
        orphans = {
            run_id for (name, run_id) in stored if name in _PIPELINES and run_id not in runs and _is_deleted(client, run_id)
        }
        prefixes = defaultdict(list)
        for (name, run_id), objects in stored.items():
            if run_id in runs or run_id in orphans:
                prefixes[run_id].append((f"{place}/{name}/{run_id}", objects))
        return [_item(target, run_id, runs.get(run_id), prefixes[run_id], named, reader) for run_id in {**runs, **prefixes}]


def _add_parameters(named: Named, run: Any, cluster: Cluster, roots: Sequence[Path], reason: str) -> None:
    """Add the places in the parameters of a run or a schedule."""
    parameters = run.runtime_config.parameters if run.runtime_config else {}
    for word in (word for text in _texts(parameters or {}) for word in re.split(r"[\s=]", text)):
        if is_s3(word) or word.startswith("/"):
            named.add_place(word, reason)
        if (path := Path(word)).is_relative_to(cluster.volume.mount):
            for root in roots:
                named.add_place(str(root / path.relative_to(cluster.volume.mount)), reason)


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _texts(each)


def _stored(root: str) -> dict[tuple[str, str], list[Listed]]:
    """Return the objects of each run below a pipeline root by pipeline and run ID."""
    found = defaultdict(list)
    for listed in list_below(root):
        if match := _RUN.match(listed.uri.removeprefix(f"{root}/")):
            found[match[1], match[2]].append(listed)
    return found


def _is_deleted(client: kfp.Client, run_id: str) -> bool:
    """Return whether KFP has no such run, in any experiment."""
    try:
        client.get_run(run_id)
    except kfp_server_api.ApiException as error:
        if error.status == _MISSING:
            return True
        raise
    return False


def _item(
    target: Target, run_id: str, run: Any, stored: Sequence[tuple[str, Iterable[Listed]]], named: Named, reader: str
) -> Item:
    objects = [each for _, listed in stored for each in listed]
    inside = (reason for place, reason in named.places.items() if any(f"{place}/".startswith(f"{uri}/") for uri, _ in stored))
    kept = named.active_kfp.get(run_id) and f"running: its state is {run.state or 'PENDING'}"
    ended = run and ((run.finished_at if run.finished_at and run.finished_at.year > 1970 else None) or run.created_at)
    return Item(
        name=f"{run_id[:8]}  {run.display_name if run else 'artifacts of a deleted run'}",
        size=sum(each.size for each in objects),
        changed=ended.timestamp() if ended else max(each.modified for each in objects),
        delete=partial(_delete, target, run_id, [uri for uri, _ in stored]),
        kept=kept or named.kfp_runs.get(run_id) or next(inside, "") or reader,
        resumable=bool(run) and run.state in ("FAILED", "CANCELED"),
    )


def _delete(target: Target, run_id: str, prefixes: Sequence[str]) -> None:
    """Delete a run: its record first, and with it KFP's cache of its steps; then its artifacts.

    Raises:
        ValueError: the run has been started again since it was listed; KFP or the store rejects a request.
    """
    with connected(target) as (client, _, _):
        if not _is_deleted(client, run_id):
            if (state := client.get_run(run_id).state) not in FINAL:
                raise ValueError(f"has been started again since it was listed: its state is {state}")
            client.delete_run(run_id)
    for prefix in prefixes:
        delete_below(prefix)
