"""Sweep: train and evaluate rows of settings with several seeds, or search ranges; write one table and one plot.

The stages `train` and `evaluate` write each run to OUT/ROW/seed-N/{model,evaluation}. The same command resumes an interrupted
sweep; an added row or trial costs only its own runs. Table and plot depend only on the metrics, so the pipeline for a cluster
(pipelines/sweep.py) writes the same.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml
from mlflow.entities import RunTag
from mlflow.exceptions import MlflowException

from pixelclip import evaluate, train
from pixelclip.commands import search
from pixelclip.commands.sweep_file import Search, SweepRun, read
from pixelclip.commands.sweep_results import as_csv, best, plot, summarise, table
from pixelclip.data.labelled_sets import open_labelled
from pixelclip.data.shard_sources import list_shards
from pixelclip.settings import read_yaml
from pixelclip.storage.download import local_path
from pixelclip.storage.files import lock_folder, write_atomically
from pixelclip.storage.urls import public
from pixelclip.tracking.journal import RUN, read_run
from pixelclip.tracking.run import KILLED, PARENT_RUN, PIPELINE_RUN, Run
from pixelclip.tracking.server import connect
from pixelclip.workflow.termination import Terminated, deferred, terminable

TABLE, RUNS, PLOT, BEST_ROW = "table.md", "runs.csv", "sweep.png", "best.yaml"


def run(file: Path, masks: Path | str, labelled: Path | str, out: Path, params: Path | None = None) -> list[dict[str, Any]]:
    """Train and evaluate every row or trial with every seed, one after another, and write the table and the plot.

    Each run has an MLflow run below the sweep's. Finished runs are reused, and interrupted runs resume.

    Args:
        file: the sweep, see `read`.
        masks: shards with masks, a folder or an `s3://` prefix.
        labelled: labelled set, a folder or an `s3://` prefix.
        out: folder of all runs; `table.md` and `runs.csv` are updated after every run, `sweep.png` and `best.yaml` (settings of
            the best row, as in `params`) are written last.
        params: see `read`.

    Returns:
        One dictionary per row, see `summarise`.

    Raises:
        ValueError: before the first run, if a file, an input or MLflow is unusable; after the last run, if runs failed.
    """
    name, plan = read(file, params)
    sections = read_yaml(params, "one section per stage") if params else {}
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("sweep: runs in one process; with several GPUs compile it for a cluster (pipeline compile-sweep)")
    list_shards(masks)
    labelled = local_path(labelled)
    for kind, names in sorted({(each.evaluate.kind, each.evaluate.names) for each in _known(plan)}):
        open_labelled(labelled, kind, names=names)
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out}: must be a folder, found a file")
    if isinstance(plan, Search):
        search.import_optuna()
        search.recorded(plan, out)
    connect()  # reports an unreachable server before anything is written
    out.mkdir(parents=True, exist_ok=True)
    with terminable(), _locked(out):
        return _run_all(name, plan, masks, labelled, out, sections)


def _known(plan: list[SweepRun] | Search) -> list[SweepRun]:
    """Return the runs that are known before the first one: all rows, or one trial."""
    return plan.runs(0, {name: found.values[0] for name, found in plan.ranges.items()}) if isinstance(plan, Search) else plan


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Lock the folder of a sweep, in which a second process would overwrite the results of the first."""
    handle = lock_folder(out, f"{out}: another sweep is writing this folder; wait for it or choose another folder")
    try:
        yield
    finally:
        os.close(handle)


def _run_all(
    name: str, plan: list[SweepRun] | Search, masks: Path | str, labelled: Path, out: Path, sections: Mapping[str, Any]
) -> list[dict[str, Any]]:
    parent: Run | None = None
    status = "FAILED"
    runs: list[dict[str, Any]] = []
    configs: dict[str, SweepRun] = {}  # the first run of each row
    total = plan.trials * len(plan.seeds) if isinstance(plan, Search) else len(plan)
    try:
        with deferred():  # otherwise a run could stay open that nobody knows
            parent = Run.start(out, name, {"stage": "sweep", "settings": {}, "inputs": {}})
        parent.tags({"sweep.out": str(out.resolve())})
        parent.journal.deliver()  # a continued run is RUNNING again
        with _children_of(parent.run_id):
            for each in search.trials(plan, out, runs) if isinstance(plan, Search) else plan:
                print(f"sweep: run {len(runs) + 1} of {total}: {each.row}, seed {each.seed}", flush=True)
                configs.setdefault(each.row, each)
                runs.append(_run_one(each, masks, labelled, out / each.folder, parent))
                write_atomically(out / TABLE, table(name, summarise(runs)))
                write_atomically(out / RUNS, as_csv(runs))
        rows = summarise(runs)
        for file in _write_results(name, plan, runs, configs, out, sections):
            parent.artifact(file)
        failed = [f"row {run['row']!r}, seed {run['seed']}: {run['error']}" for run in runs if run["error"]]
        status = "FAILED" if failed else "FINISHED"
    except Terminated as stop:
        status = KILLED
        print(f"sweep: {stop.reason}; the same command continues with run {len(runs) + 1} of {total}", flush=True)
        raise
    finally:
        if parent:
            parent.finish(status)
    print((out / TABLE).read_text(), flush=True)
    if failed:
        raise ValueError("\n".join([f"{len(failed)} of {len(runs)} runs failed, see {out / TABLE}", *failed]))
    return rows


def _write_results(
    name: str,
    plan: list[SweepRun] | Search,
    runs: Sequence[Mapping[str, Any]],
    configs: Mapping[str, SweepRun],
    out: Path,
    sections: Mapping[str, Any],
) -> list[Path]:
    """Write table, CSV and plot of all runs, and the settings of the best row; return the files."""
    rows = summarise(runs)
    files: dict[str, str | bytes] = {TABLE: table(name, rows), RUNS: as_csv(runs)}
    files[PLOT] = search.plot(name, plan, rows) if isinstance(plan, Search) else plot(name, rows)
    if found := best(rows):
        chosen = configs[found["row"]]
        settings = {**sections, "train": chosen.train.model_dump(), "evaluate": chosen.evaluate.model_dump()}
        title = f"# {' '.join(f'{name}: {chosen.row}, seed {chosen.seed}'.split())}\n"
        files[BEST_ROW] = title + yaml.safe_dump(public(settings), sort_keys=False, allow_unicode=True)
    else:
        (out / BEST_ROW).unlink(missing_ok=True)
    for file, content in files.items():
        write_atomically(out / file, content)
    return [out / file for file in files]


def _run_one(each: SweepRun, masks: Path | str, labelled: Path, folder: Path, parent: Run) -> dict[str, Any]:
    metrics: dict[str, float] = {}
    failure = ""
    try:
        metrics |= train.run(masks, folder / "model", each.train)
        metrics |= evaluate.run(folder / "model", labelled, folder / "evaluation", each.evaluate)
    except Exception as error:  # of any type, such as CUDA out of memory: the other rows may succeed
        failure = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        print(f"sweep: {each.row}, seed {each.seed} failed: {failure}", flush=True)
    finally:
        _tag_children(each, folder, parent)
    return {"row": each.row, "seed": each.seed, "settings": each.settings, "metrics": metrics, "error": failure}


@contextmanager
def _children_of(run_id: str) -> Iterator[None]:
    """Let training runs create MLflow runs below `run_id` instead of using one from the environment."""
    before = {name: os.environ.pop(name, None) for name in (PARENT_RUN, PIPELINE_RUN, "MLFLOW_RUN_ID")}
    os.environ[PARENT_RUN] = run_id
    try:
        yield
    finally:
        del os.environ[PARENT_RUN]
        os.environ.update({name: value for name, value in before.items() if value is not None})


def _tag_children(each: SweepRun, folder: Path, parent: Run) -> None:
    """Set name, row and parent of a run in MLflow, even if it failed or was reused from another sweep."""
    tags = {"sweep.row": each.row, "sweep.seed": str(each.seed), "mlflow.parentRunId": parent.run_id}
    for journal in [*folder.glob(f"model/{RUN}"), *folder.glob(f".model.*.partial/{RUN}")]:
        run_id = read_run(journal.parent)["run_id"]
        with suppress(MlflowException):  # a run on another server, or a deleted one
            parent.client.update_run(run_id, name=f"{each.row}, seed {each.seed}")
            parent.client.log_batch(run_id, tags=[RunTag(name, value) for name, value in tags.items()])
