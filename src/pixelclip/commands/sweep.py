"""Sweep: train and evaluate rows of settings with several seeds; write one table and one plot (the paper's ablations).

The stages `train` and `evaluate` write each run to OUT/ROW/seed-N/{model,evaluation}. The same command resumes an interrupted
sweep; an added row costs only its own runs. Table and plot depend only on the metrics, so the pipeline for a cluster
(pipelines/sweep.py) writes the same.
"""

import base64
import csv
import html
import io
import os
import re
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Annotated, Any

from mlflow.entities import RunTag
from mlflow.exceptions import MlflowException
from pydantic import BaseModel, ConfigDict, Field, model_validator

from pixelclip import evaluate, train
from pixelclip.config import BEST, STAGES, EvaluateConfig, TrainConfig
from pixelclip.data.labelled_sets import open_labelled
from pixelclip.data.shard_sources import list_shards
from pixelclip.settings import build, load, nearest, read_yaml
from pixelclip.storage.download import local_path
from pixelclip.storage.files import write_atomically
from pixelclip.storage.urls import public
from pixelclip.tracking.journal import RUN, read_run
from pixelclip.tracking.run import KILLED, PARENT_RUN, PIPELINE_RUN, Run
from pixelclip.tracking.server import connect
from pixelclip.workflow.termination import Terminated, deferred, terminable

TABLE, RUNS, PLOT = "table.md", "runs.csv", "sweep.png"
# Metrics of the table: prefix in evaluate's metrics, before the slash, and heading.
COLUMNS = {"miou_clip": "mIoU of CLIP", "miou": "mIoU", "gain": "gain", "pixel_accuracy": "pixel accuracy"}
_SEED = "train.seed"
_STAGES = ("train", "evaluate")
_ALLOWED = [f"{stage}.{name}" for stage in _STAGES for name in STAGES[stage].model_fields if f"{stage}.{name}" != _SEED]


def slug(row: str) -> str:
    """Return the folder name of a row: its words, joined by hyphens."""
    return re.sub(r"[\W_]+", "-", row.casefold()).strip("-")


class SweepFile(BaseModel):
    """Schema of a sweep file."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str = Field(min_length=1)
    seeds: list[Annotated[int, Field(strict=True, ge=0)]] = Field(default=[0], min_length=1)
    settings: dict[str, Any] | None = None
    rows: dict[str, dict[str, Any] | None] = Field(default={}, min_length=1, validate_default=True)

    @model_validator(mode="after")
    def _distinct(self) -> "SweepFile":
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds {self.seeds}: a seed occurs twice")
        folders: dict[str, str] = {}
        for row in self.rows:
            if not slug(row):
                raise ValueError(f"row {row!r}: its name must contain a letter or a digit")
            if (other := folders.setdefault(slug(row), row)) != row:
                raise ValueError(f"rows {other!r} and {row!r} would share the folder {slug(row)!r}")
        return self


@dataclass(frozen=True)
class SweepRun:
    """One run of a sweep; `settings` are only the settings of its row."""

    row: str
    seed: int
    settings: dict[str, Any]
    train: TrainConfig
    evaluate: EvaluateConfig

    @property
    def folder(self) -> str:
        """Folder of the run below OUT."""
        return f"{slug(self.row)}/seed-{self.seed}"


def read(file: Path, params: Path | None = None) -> tuple[str, list[SweepRun]]:
    """Return the name of a sweep and all its runs, row by row.

    Args:
        file: YAML as in `SweepFile`.
        params: YAML with one section per stage; the sweep's settings override it.

    Raises:
        ValueError: a row has an unknown key or setting, or an invalid value.
    """
    document = read_yaml(file, "rows of settings")
    sweep = build(SweepFile, {"name": file.stem, **{str(key): value for key, value in document.items()}}, str(file))
    shared = _checked(sweep.settings, f"{file}: settings")
    runs = []
    for row, settings in sweep.rows.items():
        source = f"{file}: row {row!r}"
        values = shared | _checked(settings, source)
        for seed in sweep.seeds:
            configs = (load(stage, params, {**values, _SEED: seed}, source) for stage in _STAGES)
            runs.append(SweepRun(row, seed, public(settings or {}), *configs))
    return sweep.name, runs


def _checked(settings: Mapping[str, Any] | None, source: str) -> dict[str, Any]:
    for name in settings or {}:
        if name == _SEED:
            raise ValueError(f"{source}: {_SEED} is set by `seeds`")
        if name not in _ALLOWED:
            hint = nearest(name, _ALLOWED) or "; a sweep varies train.SETTING and evaluate.SETTING"
            raise ValueError(f"{source}: unknown setting {name!r}{hint}")
    return dict(settings or {})


def run(file: Path, masks: Path | str, labelled: Path | str, out: Path, params: Path | None = None) -> list[dict[str, Any]]:
    """Train and evaluate every row with every seed, one after another, and write the table and the plot.

    Each run has an MLflow run below the sweep's. Finished runs are reused, and interrupted runs resume.

    Args:
        file: the sweep, see `read`.
        masks: shards with masks, a folder or an `s3://` prefix.
        labelled: labelled set, a folder or an `s3://` prefix.
        out: folder of all runs; `table.md` and `runs.csv` are updated after every run, `sweep.png` is written last.
        params: see `read`.

    Returns:
        One dictionary per row, see `summarise`.

    Raises:
        ValueError: before the first run, if a file, an input or MLflow is unusable; after the last run, if runs failed.
    """
    name, planned = read(file, params)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("sweep: runs in one process; with several GPUs compile it for a cluster (pipeline compile-sweep)")
    list_shards(masks)
    labelled = local_path(labelled)
    for kind, names in sorted({(each.evaluate.kind, each.evaluate.names) for each in planned}):
        open_labelled(labelled, kind, names=names)
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out}: must be a folder, found a file")
    connect()  # reports an unreachable server before anything is written
    out.mkdir(parents=True, exist_ok=True)
    with terminable():
        return _run_all(name, planned, masks, labelled, out)


def _run_all(name: str, planned: list[SweepRun], masks: Path | str, labelled: Path, out: Path) -> list[dict[str, Any]]:
    parent: Run | None = None
    status = "FAILED"
    runs: list[dict[str, Any]] = []
    try:
        with deferred():  # otherwise a run could stay open that nobody knows
            parent = Run.start(out, name, {"stage": "sweep", "settings": {}, "inputs": {}})
        parent.tags({"sweep.out": str(out.resolve())})
        parent.journal.deliver()  # a continued run is RUNNING again
        with _children_of(parent.run_id):
            for number, each in enumerate(planned, 1):
                print(f"sweep: run {number} of {len(planned)}: {each.row}, seed {each.seed}", flush=True)
                runs.append(_run_one(each, masks, labelled, out / each.folder, parent))
                write_atomically(out / TABLE, table(name, summarise(runs)))
                write_atomically(out / RUNS, as_csv(runs))
        rows = summarise(runs)
        write_atomically(out / PLOT, plot(name, rows))
        for file_name in (TABLE, RUNS, PLOT):
            parent.artifact(out / file_name)
        failed = [f"row {run['row']!r}, seed {run['seed']}: {run['error']}" for run in runs if run["error"]]
        status = "FAILED" if failed else "FINISHED"
    except Terminated as stop:
        status = KILLED
        print(f"sweep: {stop.reason}; the same command continues with run {len(runs) + 1} of {len(planned)}", flush=True)
        raise
    finally:
        if parent:
            parent.finish(status)
    print((out / TABLE).read_text(), flush=True)
    if failed:
        raise ValueError("\n".join([f"{len(failed)} of {len(runs)} runs failed, see {out / TABLE}", *failed]))
    return rows


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


def gather(items: Sequence[Mapping[str, Any]], metrics: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Combine the items of a pipeline's loop (`row`, `seed`, `differs`) and their metrics, in the same order, to runs.

    Raises:
        ValueError: the numbers of items and metrics differ.
    """
    runs = []
    for item, values in zip(items, metrics, strict=True):
        numbers = {name: value for name, value in values.items() if isinstance(value, int | float)}
        run = {"row": item["row"], "seed": int(item["seed"]), "settings": dict(item["differs"])}
        runs.append(run | {"metrics": numbers, "error": ""})
    return runs


def summarise(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Average the metrics over seeds, one dictionary per row.

    Args:
        runs: `row`, `seed`, `settings`, `metrics` and `error` (empty if none) of every run.

    Returns:
        `row`, `settings`, `seeds` (number of runs without error), `runs`, and for every key of `COLUMNS` its mean and, as
        `KEY_std`, its sample standard deviation; None for too few runs.
    """
    rows: dict[str, dict[str, Any]] = {}
    for run in runs:
        rows.setdefault(run["row"], {"row": run["row"], "settings": run["settings"], "runs": []})["runs"].append(run)
    for row in rows.values():
        row["seeds"] = sum(not run["error"] for run in row["runs"])
        for key in COLUMNS:
            values = _values(row["runs"], key)
            row[key] = fmean(values) if values else None
            row[f"{key}_std"] = stdev(values) if len(values) > 1 else None
    return list(rows.values())


def _values(runs: Iterable[Mapping[str, Any]], key: str) -> list[float]:
    """Return the values of a metric, whose name in a run ends with the labelled set; not those of quality=best."""
    return [
        value
        for run in runs
        for name, value in run["metrics"].items()
        if name.partition("/")[0] == key and not name.endswith(BEST)
    ]


def _mean(row: Mapping[str, Any], key: str, sign: str = "") -> str:
    if row[key] is None:
        return "–"
    spread = row[f"{key}_std"]
    return f"{row[key]:{sign}.2f}" + ("" if spread is None else f" ± {spread:.2f}")


def table(name: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """Format the rows as a Markdown table; errors are in the last column."""
    runs = [run for row in rows for run in row["runs"]]
    failed = any(run["error"] for run in runs)
    sets = sorted(
        {f"`{key[5:]}`" for run in runs for key in run["metrics"] if key.startswith("gain/") and not key.endswith(BEST)}
    )
    heads = ["row", "settings that differ", *COLUMNS.values(), "seeds", *(["error"] if failed else [])]
    lines = [f"# {name}", "", f"{', '.join(sets) or 'No result'}: points, mean ± sample standard deviation over seeds.", ""]
    lines += [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    for row in rows:
        differs = ", ".join(f"`{key}={_plain(value)}`" for key, value in sorted(row["settings"].items())) or "–"
        count = str(row["seeds"]) + (f" of {len(row['runs'])}" if row["seeds"] < len(row["runs"]) else "")
        errors = "; ".join(f"seed {run['seed']}: {run['error']}" for run in row["runs"] if run["error"])
        cells = [row["row"], differs, *(_mean(row, key) for key in COLUMNS), count, *([errors] if failed else [])]
        lines.append(f"| {' | '.join(' '.join(cell.split()).replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(lines) + "\n"


def _plain(value: Any) -> Any:
    """Convert a value to YAML's notation; pipeline parameters turn whole numbers into floats such as 8.0."""
    if isinstance(value, bool):
        return str(value).lower()
    return int(value) if isinstance(value, float) and value.is_integer() else value


def as_csv(runs: Sequence[Mapping[str, Any]]) -> str:
    """Format every run with all its metrics as CSV."""
    names = sorted({name for run in runs for name in run["metrics"]})
    file = io.StringIO()
    writer = csv.DictWriter(file, ["row", "seed", "error", *names], extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows({**run, **run["metrics"]} for run in runs)
    return file.getvalue()


def plot(name: str, rows: Sequence[Mapping[str, Any]]) -> bytes:
    """Draw the gain of every row as a PNG: a bar for the mean, a dot for every seed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 1.4 + 0.45 * len(rows)), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    for position, row in enumerate(rows):
        gains = _values(row["runs"], "gain")
        axes.barh(position, row["gain"] or 0.0, height=0.6, color="#8fb8de")
        axes.plot(gains, [position] * len(gains), "o", color="#1f3b57", markersize=5, alpha=0.8)
        label = "failed" if row["gain"] is None else _mean(row, "gain", "+")
        axes.text(1.02, position, label, transform=axes.get_yaxis_transform(), va="center")
    labels = [textwrap.fill(row["row"], 30) for row in rows]
    axes.set_yticks(range(len(rows)), labels=labels, parse_math=False)  # a name may contain a dollar sign
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.grid(axis="x", alpha=0.3)
    axes.set_xlabel("gain over CLIP in points of mIoU: mean ± sample standard deviation; dots are seeds")
    axes.set_title(name, loc="left", parse_math=False)
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


def page(name: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the plot as a self-contained HTML page."""
    image = base64.b64encode(plot(name, rows)).decode()
    title = html.escape(name)
    return (
        f'<!doctype html><meta charset="utf-8"><title>{title}</title>'
        f'<img alt="{title}: gain of every row" style="max-width:100%" src="data:image/png;base64,{image}">\n'
    )
