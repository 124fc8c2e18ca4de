"""Delete what nobody needs any more: workspaces, MLflow's runs and models, KFP's runs and artifacts, the cache.

Nothing is deleted that a registered version, a running run or a schedule names. An interrupted deletion is completed by the
next call.
"""

import os
import shutil
import textwrap
import time
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from pixelclip.cleanup import copies, mlflow_runs, workspaces
from pixelclip.cleanup.named import Named, all_runs, read
from pixelclip.cleanup.policy import Item, Policy, Verdict, decide
from pixelclip.tracking.server import connect, find_experiment, public_uri, reason_of, tracking_uri

STORES = ("workspaces", "mlflow", "kfp", "cache")
_DEFAULT_FOLDER = Path("runs")
_HOUR, _DAY = 3600, 86400
_KFP_SETTINGS = ("KFP_ENDPOINT", "KF_PIPELINES_ENDPOINT")
_FIXED = 30  # columns of the table besides name and reason


def run(
    policy: Policy,
    folders: Sequence[Path] = (),
    stores: Sequence[str] = (),
    pipeline_root: str = "",
    cluster: Path | None = None,
    endpoint: str = "",
    delete: bool = False,
) -> int:
    """Print what goes and what stays, and delete it if wanted.

    Args:
        policy: limits, which hold for every store on its own.
        folders: folders with workspaces; by default `runs`, if it exists.
        stores: some of `STORES`; all by default.
        pipeline_root: KFP's pipeline root in an object store; if empty, KFP's runs stay.
        cluster, endpoint: KFP, see `pixelclip_pipelines.submit.Target`. If it is configured, what its runs use stays.
        delete: delete, instead of only printing.

    Returns:
        Number of items that could not be deleted.

    Raises:
        ValueError: an unknown store; a store is unreachable, so that nothing is known about what must stay.
    """
    if unknown := [store for store in stores if store not in STORES]:
        raise ValueError(f"--only {unknown[0]}: must be one of {', '.join(STORES)}")
    now = time.time()
    chosen = stores or STORES
    found = _items(chosen, folders, pipeline_root, cluster, endpoint)
    verdicts = {store: decide(found[store], policy, now) for store in STORES if found.get(store)}
    for line in table(verdicts, policy, now):
        print(line, flush=True)
    gone = [verdict.item for listed in verdicts.values() for verdict in listed if verdict.goes]
    if not delete:
        print(f"Would delete {_count(gone)}. Nothing was deleted: add --delete to do it.")
        return 0
    results = [(item, _delete(item)) for item in gone]
    deleted, failed = ([item for item, done in results if done == wanted] for wanted in (True, False))
    print(f"Deleted {_count(deleted)}{f', failed to delete {_count(failed)}: run it again' if failed else ''}.")
    return len(failed)


def _items(
    stores: Sequence[str], folders: Sequence[Path], pipeline_root: str, cluster: Path | None, endpoint: str
) -> dict[str, list[Item]]:
    found = {"cache": copies.items()} if "cache" in stores else {}
    if not set(stores) - {"cache"}:
        return found  # copies are not needed by anything, so no other store is asked
    client = _mlflow()
    folders = folders or ([_DEFAULT_FOLDER] if _DEFAULT_FOLDER.is_dir() else [])
    try:
        experiment = find_experiment(client)
        runs = all_runs(client, [experiment.experiment_id]) if experiment else []
        named = read(client, runs)
        if kfp := _kfp(folders, pipeline_root if "kfp" in stores else "", cluster, endpoint, named):
            found["kfp"] = kfp
        if "workspaces" in stores:
            found["workspaces"] = workspaces.items(folders, named)
        if "mlflow" in stores and experiment:
            found["mlflow"] = mlflow_runs.items(mlflow_runs.Store.of(client), experiment.experiment_id, runs, named)
    except MlflowException as error:
        raise ValueError(f"MLflow at {public_uri()}: its runs cannot be listed: {reason_of(error)}") from None
    return found


def _mlflow() -> MlflowClient:
    """Return a client; a missing database is an error, since a new one would know no registered version."""
    file = tracking_uri().removeprefix("sqlite:///")
    if file != tracking_uri() and not Path(file).is_file():
        raise ValueError(f"{file}: no such MLflow database; gc must know the registered versions: set MLFLOW_TRACKING_URI")
    return connect()


def _kfp(folders: Sequence[Path], pipeline_root: str, cluster: Path | None, endpoint: str, named: Named) -> list[Item]:
    """Return KFP's runs and add to `named` what they use; nothing if KFP is not configured."""
    try:
        from pixelclip_pipelines import stored_runs
        from pixelclip_pipelines.cluster_config import read as read_cluster
        from pixelclip_pipelines.submit import Target, endpoint_of
    except ImportError:
        if endpoint or cluster or pipeline_root or any(map(os.environ.get, _KFP_SETTINGS)) or Path("cluster.yaml").is_file():
            raise ValueError("KFP is configured, and gc must know its runs: pip install 'pixelclip[pipeline]'") from None
        return []
    target = Target(endpoint, cluster)
    if not pipeline_root and not endpoint_of(target, read_cluster(cluster)):
        return []
    return stored_runs.items(target, pipeline_root, [folder.absolute() for folder in folders], named)


def _delete(item: Item) -> bool:
    """Delete an item and return whether that succeeded; print why not."""
    try:
        item.delete()
    except Exception as error:  # of any store; the others go on
        print(f"FAILED {item.name}: {reason_of(error)}", flush=True)
        return False
    return True


def table(verdicts: Mapping[str, Sequence[Verdict]], policy: Policy, now: float, width: int = 0) -> list[str]:
    """Format verdicts as lines: per store a summary, then what goes and what stays, with size, age and reason.

    Args:
        verdicts: those of each store.
        policy: the limits, to say where more stays than they allow.
        now: current time, in seconds since the epoch.
        width: columns; by default those of the terminal.
    """
    width = width or shutil.get_terminal_size().columns
    lines = []
    for store, listed in verdicts.items():
        gone = [each.item for each in listed if each.goes]
        stays = [each.item for each in listed if not each.goes]
        over = f", more than {policy.max_size}" if policy.size is not None and _total(stays) > policy.size else ""
        lines += [f"{store}: {_count(gone)} go, {_count(stays)} stay{over}"]
        name_width = min(max(len(each.item.name) for each in listed), (width - _FIXED) // 2)
        for each in sorted(listed, key=lambda each: not each.goes):
            age = _age(now - each.item.changed)
            start = f"  {'delete' if each.goes else 'keep':<6} {_bytes(each.item.size):>9} {age:>6}  "
            names = textwrap.wrap(each.item.name, name_width)
            reasons = textwrap.wrap(each.reason, width - _FIXED - name_width)
            for number, (name, reason) in enumerate(zip_longest(names, reasons, fillvalue="")):
                lines.append(f"{start if not number else '':<{_FIXED - 2}}{name:<{name_width}}  {reason}".rstrip())
    return lines


def _count(items: Sequence[Item]) -> str:
    return f"{len(items)} ({_bytes(_total(items))})"


def _total(items: Sequence[Item]) -> int:
    return sum(item.size for item in items)


def _bytes(size: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if size < 999.5:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:,.1f} TB"


def _age(seconds: float) -> str:
    return f"{seconds / _DAY:.0f} d" if seconds >= _DAY else f"{max(seconds, 0) / _HOUR:.0f} h"
