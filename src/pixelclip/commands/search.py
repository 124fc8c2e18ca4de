"""Search over ranges of settings: Optuna chooses the settings of each trial from the gains of the trials before.

OUT/search.json lists the settings of every trial that was started, so an interrupted search continues with the same settings.
What a trial's settings are depends only on the first seed, its number and the earlier gains: an interrupted search ends like
an undisturbed one.
"""

import io
from collections.abc import Iterator, Mapping, Sequence
from math import ceil
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict

from pixelclip.commands.sweep_file import OBJECTIVE, TRIAL, Range, Search, SweepRun
from pixelclip.commands.sweep_results import best, values_of
from pixelclip.storage.files import read_json, write_json

RECORD = "search.json"
_FAILURES = 3  # failed trials in a row that end a search: without results it would choose at random
_RANDOM_TRIALS = 5  # random ones, before the first that Optuna's sampler models
_DIGITS = 4  # of a number in settings, so that tables stay readable


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid")
    ranges: dict[str, Range]
    trials: list[dict[str, Any]]


def trials(search: Search, out: Path, results: list[dict[str, Any]]) -> Iterator[SweepRun]:
    """Yield the runs of every trial; end after `_FAILURES` failed trials in a row.

    Args:
        search: ranges, seeds and number of trials.
        out: folder of the sweep, with or for `search.json`.
        results: results of the runs yielded so far, to which the caller adds; see `summarise`. A trial whose settings do not
            fit together is added here as failed.

    Raises:
        ValueError: `search.json` is damaged, or of other ranges.
    """
    started = recorded(search, out)
    history: list[tuple[dict[str, Any], float]] = []
    failures = 0
    for number in range(search.trials):
        if number == len(started):
            started.append(suggest(search, number, history))
            write_json(out / RECORD, _Record(ranges=search.ranges, trials=started).model_dump(mode="json", exclude_none=True))
        values, start = started[number], len(results)
        try:
            runs = search.runs(number, values)
        except ValueError as error:
            row = {"row": f"{TRIAL}{number}", "settings": values, "metrics": {}, "error": str(error)}
            results += [{**row, "seed": seed} for seed in search.seeds]
        else:
            yield from runs
        ended = results[start:]
        failures = failures + 1 if any(run["error"] for run in ended) else 0
        if not failures:
            history.append((values, fmean(values_of(ended, OBJECTIVE))))
        elif failures == _FAILURES and number + 1 < search.trials:
            print(f"sweep: {failures} trials in a row failed; the same command repeats them and continues", flush=True)
            return


def recorded(search: Search, out: Path) -> list[dict[str, Any]]:
    """Return the settings of the trials in `search.json`; an empty list if there is no such file.

    Raises:
        ValueError: the file is damaged, or belongs to a search over other ranges.
    """
    file = out / RECORD
    if not file.is_file():
        return []
    record = _Record.model_validate(read_json(file, _Record))
    if record.ranges != search.ranges:
        raise ValueError(f"{file}: belongs to a search over other ranges than {search.source}; choose another folder")
    if any(values.keys() != search.ranges.keys() for values in record.trials):
        raise ValueError(f"{file}: every trial must have the settings {', '.join(search.ranges)}")
    return record.trials


def suggest(search: Search, number: int, history: Sequence[tuple[Mapping[str, Any], float]]) -> dict[str, Any]:
    """Return the settings of a trial.

    Args:
        search: the ranges, and the seeds, of which the first seeds the sampler.
        number: number of the trial from 0.
        history: settings and gain of the earlier trials that succeeded.
    """
    optuna = import_optuna()
    spaces = {name: _distribution(optuna, found) for name, found in search.ranges.items()}
    seed = int(np.random.SeedSequence([search.seeds[0], number]).generate_state(1)[0])
    sampler = optuna.samplers.TPESampler(n_startup_trials=_RANDOM_TRIALS, seed=seed)
    study = optuna.create_study(direction="maximize", sampler=sampler)
    for values, gain in history:
        params = {name: _encoded(search.ranges[name], value) for name, value in values.items()}
        study.add_trial(optuna.trial.create_trial(params=params, distributions=spaces, value=gain))
    params = study.ask(spaces).params
    return {name: _decoded(found, params[name]) for name, found in search.ranges.items()}


def import_optuna() -> Any:
    """Import Optuna, which then writes only warnings.

    Raises:
        ValueError: it is not installed.
    """
    try:
        import optuna
    except ImportError:
        raise ValueError("a sweep over ranges needs the extra `search` (pip install 'pixelclip[search]')") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def _distribution(optuna: Any, found: Range) -> Any:
    if found.choice:
        return optuna.distributions.CategoricalDistribution(range(len(found.choice)))  # Optuna has no lists as choices
    low, high = found.values
    kind = optuna.distributions.IntDistribution if isinstance(low, int) else optuna.distributions.FloatDistribution
    return kind(low, high, log=bool(found.log))


def _encoded(found: Range, value: Any) -> Any:
    return found.choice.index(value) if found.choice else value


def _decoded(found: Range, value: Any) -> Any:
    if found.choice:
        return found.choice[value]
    if isinstance(value, int):
        return value
    low, high = found.values
    return min(max(float(f"{value:.{_DIGITS}g}"), low), high)


def plot(name: str, search: Search, rows: Sequence[Mapping[str, Any]]) -> bytes:
    """Draw a search as a PNG: gain of the trials and the best so far, then gain over each setting; the best is marked.

    The best is the one of `sweep_results.best`: a trial with a failed seed has a dot, but no ring.
    """
    from matplotlib.figure import Figure

    ended = [row for row in rows if row[OBJECTIVE] is not None]
    gains = [row[OBJECTIVE] for row in ended]
    numbers = [int(row["row"].removeprefix(TRIAL)) for row in ended]
    tops = [best(ended[: end + 1]) for end in range(len(ended))]
    top = ended.index(tops[-1]) if tops and tops[-1] else None
    panels = 1 + len(search.ranges)
    columns = min(3, panels)
    lines = ceil(panels / columns)
    figure = Figure(figsize=(5 * columns, 4 * lines), dpi=120, layout="constrained")
    trial_axes, *setting_axes = figure.subplots(lines, columns, squeeze=False).flat
    trial_axes.set_xlabel("trial")
    trial_axes.xaxis.get_major_locator().set_params(integer=True)
    so_far = [found[OBJECTIVE] if found else np.nan for found in tops]
    trial_axes.step(numbers, so_far, where="post", color="#8fb8de", label="best so far")
    _mark(trial_axes, numbers, gains, numbers, top)
    trial_axes.legend()
    for axes, (setting, found) in zip(setting_axes, search.ranges.items(), strict=False):
        axes.set_xlabel(setting)
        if found.choice:
            axes.set_xticks(range(len(found.choice)), [str(each) for each in found.choice], parse_math=False)
        elif found.log:
            axes.set_xscale("log")
        _mark(axes, [_encoded(found, row["settings"][setting]) for row in ended], gains, numbers, top)
    for axes in setting_axes[len(search.ranges) :]:
        axes.set_axis_off()
    figure.suptitle(name, parse_math=False)
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


def _mark(axes: Any, places: Sequence[float], gains: Sequence[float], numbers: Sequence[int], top: int | None) -> None:
    """Draw a dot per trial, darker for earlier ones, and a ring around the one at index `top`."""
    axes.set_ylabel("gain over CLIP in points of mIoU")
    axes.grid(alpha=0.3)
    axes.scatter(places, gains, c=numbers, cmap="viridis", zorder=2)
    if top is not None:
        label = f"best: trial {numbers[top]}"
        axes.plot(places[top], gains[top], "o", markersize=12, fillstyle="none", color="#c0392b", label=label)
