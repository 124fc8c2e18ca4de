"""Sweep: rows of settings, each trained and evaluated at several seeds -> one table, one plot (the paper's ablations).

Every run stands in OUT/ROW/seed-N/{model,evaluation} and is made by the stages themselves: the same command continues a
killed sweep, and a row that is added costs only itself. The table and the plot hang on the runs' metrics alone, so the
pipeline on a cluster (pipelines/sweep.py) makes the same ones.
"""

import base64
import csv
import hashlib
import html
import io
import os
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Annotated, Any

from mlflow.entities import RunTag
from mlflow.exceptions import MlflowException
from pydantic import BaseModel, ConfigDict, Field, model_validator

from pixelclip import evaluate, train
from pixelclip.benchmarks import open_labelled
from pixelclip.config import EvaluateConfig, TrainConfig, build, load, nearest, read_yaml
from pixelclip.download import here
from pixelclip.journal import RUN
from pixelclip.server import connect, experiment_id
from pixelclip.sources import list_shards
from pixelclip.storage import read_json, write_atomically
from pixelclip.tracking import PARENT_RUN, PIPELINE_RUN, Run, lineage

TABLE, RUNS, PLOT = "table.md", "runs.csv", "sweep.png"
FIGURES = {"miou_clip": "mIoU of CLIP", "miou": "mIoU", "gain": "gain", "pixel_accuracy": "pixel accuracy"}
"""What the table shows of a row: key of evaluate's metrics (before the slash), heading."""
_SEED = "train.seed"
_ALLOWED = [
    f"{stage}.{name}"
    for stage, kind in (("train", TrainConfig), ("evaluate", EvaluateConfig))
    for name in kind.model_fields
    if f"{stage}.{name}" != _SEED
]


def slug(row: str) -> str:
    """The folder of a row: its letters and digits, joined by hyphens."""
    return re.sub(r"[\W_]+", "-", row.casefold()).strip("-")


class SweepFile(BaseModel):
    """What the file of a sweep may say."""

    model_config = ConfigDict(extra="forbid", frozen=True, coerce_numbers_to_str=True)
    name: str = Field(min_length=1)
    seeds: list[Annotated[int, Field(strict=True, ge=0)]] = Field(default=[0], min_length=1)
    settings: dict[str, Any] | None = None
    rows: dict[str, dict[str, Any] | None] = Field(default={}, min_length=1, validate_default=True)

    @model_validator(mode="after")
    def _distinct(self) -> "SweepFile":
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds {self.seeds}: one stands there twice")
        folders: dict[str, str] = {}
        for row in self.rows:
            folder = slug(row)
            if not folder:
                raise ValueError(f"row {row!r}: its name needs a letter or a digit")
            if folder in folders:
                raise ValueError(f"rows {folders[folder]!r} and {row!r} would share the folder {folder!r}")
            folders[folder] = row
        return self


@dataclass(frozen=True)
class Planned:
    """One run of a sweep; `settings` are those that its row names itself."""

    row: str
    seed: int
    settings: dict[str, Any]
    train: TrainConfig
    evaluate: EvaluateConfig

    @property
    def place(self) -> str:
        """Its folder below OUT."""
        return f"{slug(self.row)}/seed-{self.seed}"


def read(file: Path, params: Path | None = None) -> tuple[str, list[Planned]]:
    """The name of a sweep and all its runs, row by row.

    Args:
        file: YAML with `rows` and, if wanted, `name`, `seeds`, `settings` (see `SweepFile`).
        params: YAML with one section a stage, below the file's own settings.

    Raises:
        ValueError: an unknown key or setting or a value that is not allowed, in any row.
    """
    said = build(SweepFile, {"name": file.stem, **_read_rows(file)}, str(file))
    base = {stage: load(stage, params).model_dump() for stage in ("train", "evaluate")}
    shared = said.settings or {}
    _check_names(shared, f"{file}: settings")
    planned = []
    for row, own in said.rows.items():
        where = f"{file}: row {row!r}"
        _check_names(own or {}, where)
        for seed in said.seeds:
            chosen = {**shared, **(own or {}), _SEED: seed}
            values = {stage: dict(section) for stage, section in base.items()}
            for name, value in chosen.items():
                stage, _, field = name.partition(".")
                values[stage][field] = value
            planned.append(
                Planned(
                    row,
                    seed,
                    own or {},
                    build(TrainConfig, values["train"], f"{where}: train"),
                    build(EvaluateConfig, values["evaluate"], f"{where}: evaluate"),
                )
            )
    return said.name, planned


def _read_rows(file: Path) -> dict[str, Any]:
    document = read_yaml(file)
    if not isinstance(document, dict):
        raise ValueError(f"{file}: must hold rows of settings, found {type(document).__name__}")
    return {str(key): value for key, value in document.items()}


def _check_names(settings: Mapping[str, Any], where: str) -> None:
    for name in settings:
        if name == _SEED:
            raise ValueError(f"{where}: {_SEED} is not set here, seeds stand in `seeds`")
        if name not in _ALLOWED:
            hint = nearest(name, _ALLOWED) or "; a sweep varies train.SETTING and evaluate.SETTING"
            raise ValueError(f"{where}: unknown setting {name!r}{hint}")


def run(file: Path, masks: Path | str, labelled: Path | str, out: Path, params: Path | None = None) -> list[dict[str, Any]]:
    """Trains and evaluates every row at every seed, one after the other, and writes the table and the plot.

    Every run is an MLflow run below one of the sweep. What is finished is reused, what was interrupted continues.

    Args:
        file: the sweep, see `read`.
        masks: Shards with masks, here or on `s3://`.
        labelled: labelled set, here or on `s3://`.
        out: folder of all runs; after every run `table.md` and `runs.csv` are written anew, at the end `sweep.png`.
        params: see `read`.

    Returns:
        One dictionary a row, see `summarise`.

    Raises:
        ValueError: an unusable file, input or MLflow, before anything runs; or runs that failed, when all others are done.
    """
    name, planned = read(file, params)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("sweep: runs in one process; with several GPUs compile it for a cluster (pipeline compile-sweep)")
    list_shards(masks)
    labelled = here(labelled)
    for kind in sorted({each.evaluate.kind for each in planned}):
        open_labelled(labelled, kind)
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out}: must be a folder, found a file")
    parent, status = _parent(name, out), "FAILED"
    runs: list[dict[str, Any]] = []
    try:
        with _children_of(parent.run_id):
            for number, each in enumerate(planned, 1):
                print(f"sweep: run {number} of {len(planned)}: {each.row}, seed {each.seed}", flush=True)
                runs.append(_one(each, masks, labelled, out / each.place, parent))
                write_atomically(out / TABLE, table(name, summarise(runs)))
                write_atomically(out / RUNS, listing(runs))
        rows = summarise(runs)
        write_atomically(out / PLOT, plot(name, rows))
        for made in (TABLE, RUNS, PLOT):
            parent.artifact(out / made)
        failed = [f"row {run['row']!r}, seed {run['seed']}: {run['error']}" for run in runs if run["error"]]
        status = "FAILED" if failed else "FINISHED"
    finally:
        parent.finish(status)
    print((out / TABLE).read_text(), flush=True)
    if failed:
        raise ValueError("\n".join([f"{len(failed)} of {len(runs)} runs failed, see {out / TABLE}", *failed]))
    return rows


def _one(each: Planned, masks: Path | str, labelled: Path, folder: Path, parent: Run) -> dict[str, Any]:
    metrics: dict[str, float] = {}
    failure = ""
    try:
        metrics |= train.run(masks, folder / "model", each.train)
        metrics |= evaluate.run(folder / "model", labelled, folder / "evaluation", each.evaluate)
    except Exception as error:  # of any kind, as CUDA out of memory: the other rows may well succeed
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        failure = str(error) if not kind else kind + (str(error).splitlines() or [""])[0]
        print(f"sweep: {each.row}, seed {each.seed} failed: {failure}", flush=True)
    finally:
        _name_children(each, folder, parent)
    return {"row": each.row, "seed": each.seed, "settings": each.settings, "metrics": metrics, "error": failure}


def _parent(name: str, out: Path) -> Run:
    """The sweep's own MLflow run: MLFLOW_RUN_ID, or the one that this name and folder have had before, or a new one."""
    client = connect()
    identity = hashlib.sha256(f"{name}\n{out.resolve()}".encode()).hexdigest()[:16]
    tags = {"sweep.id": identity, "sweep.out": str(out.resolve()), **lineage({"inputs": {}})}
    given = os.environ.get("MLFLOW_RUN_ID")
    try:
        experiment = experiment_id(client)
        found = client.search_runs([experiment], f"tags.`sweep.id` = '{identity}'", max_results=1)
        run_id = given or (found[0].info.run_id if found else None)
        if run_id is None:
            run_id = client.create_run(experiment, run_name=name, tags=tags).info.run_id
        elif not given:
            client.update_run(run_id, status="RUNNING")
        out.mkdir(parents=True, exist_ok=True)
        parent = Run(client, out, run_id, owned=not given)
        parent.tags(tags)
    except MlflowException as error:
        raise ValueError(f"MLflow refused the run of the sweep: {error}") from None
    return parent


@contextmanager
def _children_of(run_id: str) -> Iterator[None]:
    """Trainings that start meanwhile are runs of their own below this one, not the run that the environment names."""
    before = {name: os.environ.pop(name, None) for name in (PARENT_RUN, PIPELINE_RUN, "MLFLOW_RUN_ID")}
    os.environ[PARENT_RUN] = run_id
    try:
        yield
    finally:
        del os.environ[PARENT_RUN]
        os.environ.update({name: value for name, value in before.items() if value is not None})


def _name_children(each: Planned, folder: Path, parent: Run) -> None:
    """Tells MLflow the row of a run, finished or not; also of a reused one, whose sweep may have been another."""
    tags = {"sweep.row": each.row, "sweep.seed": str(each.seed), "mlflow.parentRunId": parent.run_id}
    for journal in [*folder.glob(f"model/{RUN}"), *folder.glob(f".model.*.partial/{RUN}")]:
        run_id = read_json(journal)["run_id"]
        with suppress(MlflowException):  # a run of another server, or a deleted one: nothing to name
            parent.client.update_run(run_id, name=f"{each.row}, seed {each.seed}")
            parent.client.log_batch(run_id, tags=[RunTag(name, value) for name, value in tags.items()])


def gather(items: Sequence[Mapping[str, Any]], metrics: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The runs of a pipeline, from its loop's items and the metrics of each.

    Args:
        items: `row`, `seed` and `differs` (the row's own settings) of every run.
        metrics: of every run, in the same order; what is no number is left out.

    Raises:
        ValueError: not as many metrics as items.
    """
    if len(items) != len(metrics):
        raise ValueError(f"sweep: {len(items)} runs, but metrics of {len(metrics)}")
    return [
        {
            "row": item["row"],
            "seed": int(item["seed"]),
            "settings": dict(item["differs"]),
            "metrics": {name: value for name, value in found.items() if isinstance(value, int | float)},
            "error": "",
        }
        for item, found in zip(items, metrics, strict=True)
    ]


def summarise(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Means over seeds, one dictionary a row.

    Args:
        runs: `row`, `seed`, `settings`, `metrics` and `error` (empty if none) of every run.

    Returns:
        `row`, `settings`, `seeds` (runs without error), `runs`, and for every key of `FIGURES` its mean and, as `KEY_std`,
        its sample standard deviation; None where there are too few runs.
    """
    rows: dict[str, dict[str, Any]] = {}
    for run in runs:
        rows.setdefault(run["row"], {"row": run["row"], "settings": run["settings"], "runs": []})["runs"].append(run)
    for row in rows.values():
        row["seeds"] = sum(not run["error"] for run in row["runs"])
        for key in FIGURES:
            values = [value for run in row["runs"] if (value := _figure(run["metrics"], key)) is not None]
            row[key] = fmean(values) if values else None
            row[f"{key}_std"] = stdev(values) if len(values) > 1 else None
    return list(rows.values())


def _figure(metrics: Mapping[str, float], key: str) -> float | None:
    return next((value for name, value in metrics.items() if name.partition("/")[0] == key), None)


def _mean(row: Mapping[str, Any], key: str, sign: str = "") -> str:
    if row[key] is None:
        return "–"
    spread = row[f"{key}_std"]
    return f"{row[key]:{sign}.2f}" + ("" if spread is None else f" ± {spread:.2f}")


def table(name: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as Markdown; a row that failed says why."""
    runs = [run for row in rows for run in row["runs"]]
    failed = any(run["error"] for run in runs)
    sets = sorted({f"`{key[5:]}`" for run in runs for key in run["metrics"] if key.startswith("gain/")})
    heads = ["row", "settings that differ", *FIGURES.values(), "seeds", *(["error"] if failed else [])]
    lines = [
        f"# {name}",
        "",
        f"{', '.join(sets) or 'No result'}: points, mean ± sample standard deviation over seeds.",
        "",
        f"| {' | '.join(heads)} |",
        f"|{'---|' * len(heads)}",
    ]
    for row in rows:
        differs = ", ".join(f"`{key}={_plain(value)}`" for key, value in sorted(row["settings"].items())) or "–"
        count = str(row["seeds"]) + (f" of {len(row['runs'])}" if row["seeds"] < len(row["runs"]) else "")
        errors = "; ".join(f"seed {run['seed']}: {run['error']}" for run in row["runs"] if run["error"])
        cells = [row["row"], differs, *(_mean(row, key) for key in FIGURES), count, *([errors] if failed else [])]
        lines.append(f"| {' | '.join(' '.join(cell.split()).replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(lines) + "\n"


def _plain(value: Any) -> Any:
    """A value as it is written in YAML; a pipeline's parameters have turned whole numbers into 8.0."""
    if isinstance(value, bool):
        return str(value).lower()
    return int(value) if isinstance(value, float) and value.is_integer() else value


def listing(runs: Sequence[Mapping[str, Any]]) -> str:
    """Every run with all its metrics, as CSV."""
    names = sorted({name for run in runs for name in run["metrics"]})
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["row", "seed", "error", *names])
    for run in runs:
        writer.writerow([run["row"], run["seed"], run["error"], *(run["metrics"].get(name, "") for name in names)])
    return file.getvalue()


def plot(name: str, rows: Sequence[Mapping[str, Any]]) -> bytes:
    """The gain of every row as a PNG: a bar for the mean, a dot for every seed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 1.4 + 0.45 * len(rows)), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for place, row in enumerate(rows):
        gains = [gain for run in row["runs"] if (gain := _figure(run["metrics"], "gain")) is not None]
        axes.barh(place, row["gain"] or 0.0, height=0.6, color="#8fb8de")
        axes.plot(gains, [place] * len(gains), "o", color="#1f3b57", markersize=5, alpha=0.8)
        said = "failed" if row["gain"] is None else _mean(row, "gain", "+")
        axes.text(1.02, place, said, transform=axes.get_yaxis_transform(), va="center")
    labels = [textwrap.fill(row["row"], 30) for row in rows]
    axes.set_yticks(range(len(rows)), labels=labels, parse_math=False)  # a name may hold a dollar sign
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("gain over CLIP in points of mIoU: mean ± sample standard deviation; dots are seeds")
    axes.set_title(name, loc="left", parse_math=False)
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


def page(name: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """The plot as an HTML page of its own."""
    image = base64.b64encode(plot(name, rows)).decode()
    title = html.escape(name)
    return (
        f'<!doctype html><meta charset="utf-8"><title>{title}</title>'
        f'<img alt="{title}: gain of every row" style="max-width:100%" src="data:image/png;base64,{image}">\n'
    )
