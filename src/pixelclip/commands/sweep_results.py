"""Results of a sweep: table, CSV and plot, from the metrics of its runs alone, so that a pipeline writes the same."""

import base64
import csv
import html
import io
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

from pixelclip.config import BEST

# Metrics of the table: prefix in evaluate's metrics, before the slash, and heading.
COLUMNS = {"miou_clip": "mIoU of CLIP", "miou": "mIoU", "gain": "gain", "pixel_accuracy": "pixel accuracy"}


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
            values = values_of(row["runs"], key)
            row[key] = fmean(values) if values else None
            row[f"{key}_std"] = stdev(values) if len(values) > 1 else None
    return list(rows.values())


def values_of(runs: Iterable[Mapping[str, Any]], key: str) -> list[float]:
    """Return the values of a metric, whose name in a run ends with the labelled set; not those of quality=best."""
    return [
        value
        for run in runs
        for name, value in run["metrics"].items()
        if name.partition("/")[0] == key and not name.endswith(BEST)
    ]


def best(rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """Return the row with the largest mean gain among those without a failed run, or None; of equal rows the first."""
    complete = [row for row in rows if row["gain"] is not None and not any(run["error"] for run in row["runs"])]
    return max(complete, key=lambda row: row["gain"], default=None)


def _mean(row: Mapping[str, Any], key: str, sign: str = "") -> str:
    if row[key] is None:
        return "–"
    spread = row[f"{key}_std"]
    return f"{row[key]:{sign}.2f}" + ("" if spread is None else f" ± {spread:.2f}")


def table(name: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """Format the rows as a Markdown table; errors are in the last column. The best of several rows is named above it."""
    runs = [run for row in rows for run in row["runs"]]
    failed = any(run["error"] for run in runs)
    sets = sorted(
        {f"`{key[5:]}`" for run in runs for key in run["metrics"] if key.startswith("gain/") and not key.endswith(BEST)}
    )
    heads = ["row", "settings that differ", *COLUMNS.values(), "seeds", *(["error"] if failed else [])]
    lines = [f"# {name}", "", f"{', '.join(sets) or 'No result'}: points, mean ± sample standard deviation over seeds.", ""]
    if len(rows) > 1 and (found := best(rows)):
        lines += [f"Best: {' '.join(found['row'].split())}, gain {_mean(found, 'gain')}.", ""]
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
        gains = values_of(row["runs"], "gain")
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
