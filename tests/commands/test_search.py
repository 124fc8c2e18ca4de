"""Search over ranges: choice of settings, interruptions, table, plot, best settings, invalid files."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from itertools import islice
from math import log10
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import yaml
from matplotlib.figure import Figure

from helpers import tiny
from helpers.sweeps import sweep_data, write_sweep
from pixelclip import evaluate, train
from pixelclip.commands import search, sweep, sweep_file, sweep_results
from pixelclip.settings import load

RATE, CONCEPTS, KIND = "train.learning_rate_decoder", "train.concepts", "train.concept_kind"
RANGES = {RATE: {"log": ["1e-4", "1e-1"]}, CONCEPTS: {"linear": [2, 8]}}


def planned(folder: Path, trials: int = 12, **content) -> sweep_file.Search:
    file = write_sweep(folder / "search.yaml", **{"ranges": RANGES, "trials": trials, **content})
    return sweep_file.read(file)[1]


def gain_of(settings: dict) -> float:
    """A smooth objective with its maximum at a rate of 0.001 and 6 concepts."""
    return -((log10(settings[RATE]) + 3) ** 2) - ((settings[CONCEPTS] - 6) / 6) ** 2


def run(plan: sweep_file.Search, out: Path, stop: int | None = None) -> list[dict]:
    """Run a search with `gain_of` instead of a training, and stop it during the trial `stop`; return the settings."""
    results: list[dict] = []
    settings = []
    for each in islice(search.trials(plan, out, results), None if stop is None else stop + 1):
        settings.append(each.settings)
        if len(settings) - 1 != stop:
            metrics = {"gain/toy": gain_of(each.settings), "gain/toy.best": 99.0}
            results.append({"row": each.row, "seed": each.seed, "settings": each.settings, "metrics": metrics, "error": ""})
    return settings


def test_settings_are_within_their_ranges_and_approach_the_best(tmp_path):
    settings = run(planned(tmp_path, trials=40), tmp_path)
    assert len({str(each) for each in settings}) > 35
    for each in settings:
        assert 1e-4 <= each[RATE] <= 1e-1 and each[RATE] == float(f"{each[RATE]:.4g}")
        assert each[CONCEPTS] in range(2, 9) and isinstance(each[CONCEPTS], int)
    gains = [gain_of(each) for each in settings]
    assert np.mean(gains[-10:]) > np.mean(gains[:10]), "later trials learn from earlier ones"


@pytest.mark.parametrize("stop", [0, 3, 7])
def test_interrupted_search_ends_like_an_undisturbed_one(tmp_path, stop):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    plan = planned(tmp_path)
    undisturbed = run(plan, tmp_path / "a")
    interrupted = run(plan, tmp_path / "b", stop)
    assert json.loads((tmp_path / "b" / "search.json").read_text())["trials"] == interrupted == undisturbed[: stop + 1]
    assert run(plan, tmp_path / "b") == undisturbed
    assert (tmp_path / "a" / "search.json").read_bytes() == (tmp_path / "b" / "search.json").read_bytes()


def test_more_trials_continue_a_search_and_the_first_seed_changes_it(tmp_path):
    few, many = run(planned(tmp_path, trials=4), tmp_path), run(planned(tmp_path, trials=8), tmp_path)
    assert many[:4] == few and len(many) == 8
    (tmp_path / "other").mkdir()
    assert run(planned(tmp_path, seeds=[1]), tmp_path / "other")[:4] != few


def test_choices_keep_their_types_and_lists_are_allowed(tmp_path):
    scales = "evaluate.scales"
    ranges = {KIND: {"choice": ["prompts", "vectors"]}, "train.clustering": {"choice": [True, False]}}
    plan = planned(tmp_path, ranges={**ranges, scales: {"choice": [[], [1.25, 1.5]]}}, trials=8)
    results: list[dict] = []
    for each in search.trials(plan, tmp_path, results):
        assert each.train.concept_kind == each.settings[KIND] and each.train.clustering is each.settings["train.clustering"]
        assert each.evaluate.scales == each.settings[scales]
        results.append({"row": each.row, "seed": 0, "settings": each.settings, "metrics": {"gain/x": 1.0}, "error": ""})
    assert len({str(run["settings"]) for run in results}) > 2
    assert search.plot("choices", plan, sweep_results.summarise(results))[:8] == b"\x89PNG\r\n\x1a\n"


def test_failed_trials_teach_nothing_and_three_in_a_row_end_the_search(tmp_path, capsys):
    plan = planned(tmp_path)
    results: list[dict] = []
    for each in search.trials(plan, tmp_path, results):
        number = len(results)
        failed = {"metrics": {}, "error": "disk full"} if number in (1, 3, 4, 5) else {"metrics": {"gain/x": 1.0}, "error": ""}
        results.append({"row": each.row, "seed": each.seed, "settings": each.settings, **failed})
    assert [run["row"] for run in results] == [f"trial {number}" for number in range(6)]
    assert "3 trials in a row failed; the same command repeats them and continues" in capsys.readouterr().out
    assert run(plan, tmp_path)[:6] == [each["settings"] for each in results], "they are repeated with the same settings"
    assert sweep_results.best(sweep_results.summarise(results))["row"] == "trial 0"
    assert search.plot("none", plan, sweep_results.summarise(results[3:6]))[:4] == b"\x89PNG"


def test_plot_marks_the_trial_that_the_table_names(tmp_path, monkeypatch):
    """The trial with the largest gain has a failed seed, so it is not the best."""
    plan = planned(tmp_path, trials=3, seeds=[0, 1])
    results: list[dict] = []
    for each in search.trials(plan, tmp_path, results):
        number = len(results) // 2
        failed = {"metrics": {}, "error": "disk full"} if (number, each.seed) == (1, 1) else {"error": ""}
        run = {"row": each.row, "seed": each.seed, "settings": each.settings, "metrics": {"gain/x": [1.0, 5.0, 0.5][number]}}
        results.append(run | failed)
    rows = sweep_results.summarise(results)
    assert "Best: trial 0, gain 1.00" in sweep_results.table("failed seed", rows)
    save = Mock()
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: save(figure))
    search.plot("failed seed", plan, rows)
    (figure,) = save.call_args.args
    for axes in figure.axes[:3]:
        lines = {line.get_label(): [*line.get_ydata()] for line in axes.lines}
        assert lines.pop("best: trial 0") == [1.0] and len(axes.collections[0].get_offsets()) == 3
        assert lines in ({}, {"best so far": [1.0, 1.0, 1.0]})


def test_settings_that_do_not_fit_together_are_a_failed_trial(tmp_path):
    plan = planned(tmp_path, ranges={"train.cutout_min": {"linear": [0.0, 0.6]}, "train.cutout_max": {"choice": [0.9, 0.2]}})
    results: list[dict] = []
    for each in search.trials(plan, tmp_path, results):
        assert each.train.cutout_min <= each.train.cutout_max
        results.append({"row": each.row, "seed": 0, "settings": each.settings, "metrics": {"gain/x": 1.0}, "error": ""})
    failed = [each for each in results if each["error"]]
    assert failed and all(each["settings"]["train.cutout_min"] > each["settings"]["train.cutout_max"] for each in failed)
    assert re.search(r"search.yaml: trial \d+: train: cutout_min [\d.]+ is larger than cutout_max", failed[0]["error"])


def test_record_of_another_search_or_a_damaged_one_is_rejected(tmp_path):
    plan = planned(tmp_path)
    run(plan, tmp_path, 2)
    other = planned(tmp_path, ranges={**RANGES, CONCEPTS: {"linear": [2, 9]}})
    with pytest.raises(ValueError, match=r"search.json: belongs to a search over other ranges"):
        run(other, tmp_path)
    record = json.loads((tmp_path / "search.json").read_text())
    record["trials"][0].pop(RATE)
    (tmp_path / "search.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=f"every trial must have the settings {RATE}, {CONCEPTS}"):
        run(plan, tmp_path)
    (tmp_path / "search.json").write_text('{"ranges": ')
    with pytest.raises(ValueError, match=r"search.json"):
        run(plan, tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ranges: {train.conceptz: {linear: [2, 8]}}\ntrials: 2", "ranges: unknown setting 'train.conceptz', did you mean"),
        ("ranges: {train.seed: {linear: [0, 8]}}\ntrials: 2", "train.seed is set by `seeds`"),
        ("ranges: {train.concepts: {linear: [8, 8]}}\ntrials: 2", "the first bound must be less than the second"),
        ("ranges: {train.concepts: {linear: [2, 8, 9]}}\ntrials: 2", "train.concepts.linear: List should have at most 2 items"),
        (
            "ranges: {train.concepts: {linear: [1, 8]}}\ntrials: 2",
            "train: concepts: Input should be greater than or equal to 2",
        ),
        ("ranges: {train.concepts: {linear: [2.5, 8]}}\ntrials: 2", "train: concepts: Input should be a valid integer"),
        ("ranges: {train.learning_rate_decoder: {log: [0, 1]}}\ntrials: 2", "bounds must be positive"),
        ("ranges: {train.learning_rate_decoder: {log: [x, 1]}}\ntrials: 2", "log.0: Input should be a valid number"),
        ("ranges: {train.clip: {log: [1, 2]}}\ntrials: 2", "train.clip: is not a number, so it needs choice"),
        ("ranges: {train.clip: {choice: [toy]}}\ntrials: 2", "choice: List should have at least 2 items"),
        ("ranges: {train.clip: {choice: [toy, toy]}}\ntrials: 2", "a choice occurs twice"),
        ("ranges: {train.clip: {choice: [toy, 'a:https://x.y/z?key=1']}}\ntrials: 2", "contains credentials or a query"),
        ("ranges: {train.residual: {choice: [cls, klass]}}\ntrials: 2", "train: residual: Input should be 'cls' or 'patch'"),
        ("ranges: {train.concepts: {}}\ntrials: 2", "must have one of linear, log and choice (found none)"),
        ("ranges: {train.concepts: {log: [2, 8], linear: [2, 8]}}\ntrials: 2", "(found linear, log)"),
        ("ranges: {train.concepts: {lin: [2, 8]}}\ntrials: 2", "train.concepts.lin"),
        ("ranges: {train.concepts: {linear: [2, 8]}}", "ranges and trials, the number of settings to try, need each other"),
        ("ranges: {train.concepts: {linear: [2, 8]}}\ntrials: 0", "trials: Input should be greater than or equal to 1"),
        ("ranges: {train.concepts: {linear: [2, 8]}}\ntrials: 2\nrows: {a: }", "must have rows or ranges (found both)"),
        ("rows: {a: }\ntrials: 2", "ranges and trials"),
        ("settings: {train.concepts: 8}\nranges: {train.concepts: {linear: [2, 8]}}\ntrials: 2", "in settings and in ranges"),
    ],
)
def test_invalid_ranges_are_rejected(tmp_path, text, message):
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        sweep_file.read(file)
    assert str(error.value).startswith(str(file))


def test_missing_optuna_is_one_error(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ValueError, match=r"needs the extra `search` \(pip install 'pixelclip\[search\]'\)"):
        search.suggest(planned(tmp_path), 0, [])


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A finished search of three trials on tiny data; one MLflow store for the whole module."""
    base = tmp_path_factory.mktemp("search")
    masks, labelled, params = sweep_data(base)
    file = write_sweep(base / "rates.yaml", settings={"train.steps": 2}, ranges=RANGES, trials=3)
    with pytest.MonkeyPatch.context() as patch:
        client = tiny.mlflow_at(patch, base / "mlflow")
        rows = sweep.run(file, masks, labelled, base / "out", params)
        yield SimpleNamespace(base=base, client=client, file=file, data=(masks, labelled), params=params, rows=rows)


def test_search_writes_table_plot_and_runs(made):
    out = made.base / "out"
    assert [row["row"] for row in made.rows] == ["trial 0", "trial 1", "trial 2"]
    table = (out / "table.md").read_text()
    started = json.loads((out / "search.json").read_text())["trials"]
    for number, values in enumerate(started):
        assert f"| trial {number} | `{CONCEPTS}={values[CONCEPTS]}`, `{RATE}={values[RATE]}` |" in table
        metrics = json.loads((out / f"trial-{number}" / "seed-0" / "evaluation" / "metrics.json").read_text())
        assert made.rows[number]["gain"] == metrics["gain/labelled"]
    assert (out / "sweep.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    runs = made.client.search_runs([made.client.get_experiment_by_name("pixelclip").experiment_id])
    assert {run.data.tags.get("sweep.row") for run in runs} == {None, "trial 0", "trial 1", "trial 2"}


def test_best_settings_reproduce_the_best_trial(made, tmp_path):
    best = max(made.rows, key=lambda row: row["gain"])
    file = made.base / "out" / "best.yaml"
    assert yaml.safe_load(file.read_text())["train"]["concepts"] == best["settings"][CONCEPTS]
    train.run(made.data[0], tmp_path / "model", load("train", file))
    metrics = evaluate.run(tmp_path / "model", made.data[1], tmp_path / "evaluation", load("evaluate", file))
    assert metrics.items() <= best["runs"][0]["metrics"].items() and metrics["gain/labelled"] == best["gain"]


def test_settings_file_is_read_once(tmp_path):
    """An edit of params.yaml during a search must not give its later trials other settings."""
    params = tmp_path / "params.yaml"
    params.write_text("train: {steps: 7}\nevaluate: {pictures: 3}")
    file = write_sweep(tmp_path / "search.yaml", settings={"train.batch_size": 5}, ranges=RANGES, trials=2)
    _, plan = sweep_file.read(file, params)
    params.write_text("train: {nonsense: 1}")
    (one,) = plan.runs(0, {RATE: 0.01, CONCEPTS: 4})
    assert one.train == load("train", overrides={"steps": 7, "batch_size": 5, RATE: 0.01, "concepts": 4})
    assert one.evaluate == load("evaluate", overrides={"pictures": 3})


@pytest.mark.slow
def test_killed_search_ends_like_an_undisturbed_one(made, tmp_path):
    command = [sys.executable, "-m", "pixelclip", "sweep", str(made.file), "--masks", str(made.data[0])]
    command += ["--labelled", str(made.data[1]), "--out", str(tmp_path / "out"), "--params", str(made.params)]
    record = tmp_path / "out" / "search.json"
    with subprocess.Popen(command, env=os.environ | {"MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db"}) as process:
        while not (record.is_file() and len(json.loads(record.read_text())["trials"]) == 2) and process.poll() is None:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL and not (tmp_path / "out" / "best.yaml").exists()
    assert sweep.run(made.file, *made.data, tmp_path / "out", made.params) == made.rows
    for name in ("table.md", "runs.csv", "search.json", "best.yaml"):
        assert (tmp_path / "out" / name).read_bytes() == (made.base / "out" / name).read_bytes()
