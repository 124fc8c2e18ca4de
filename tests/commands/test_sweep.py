"""Sweep on tiny data: table, reuse, resuming, failures, MLflow, invalid files, and the pipeline for a cluster."""

import csv
import json
import os
import re
import signal
import sys
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from kfp import components, local
from kfp.components import load_component_from_file

from helpers import sweeps, tiny
from helpers.sweeps import sweep_data
from pixelclip import evaluate, train
from pixelclip.cli.app import main
from pixelclip.commands import sweep, sweep_file, sweep_results
from pixelclip.settings import load
from pixelclip.tracking.run import PARENT_RUN, PIPELINE_RUN
from pixelclip.workflow.termination import Terminated
from pixelclip_components.sweep_table.component import sweep_table
from pixelclip_pipelines import sweep as pipeline

ROWS = {"full": None, "own | targets": {"train.clustering": False, "evaluate.templates": "single"}}
SEEDS = (0, 3)


def write_sweep(file: Path, **changed) -> Path:
    document = {"name": "tiny ablations", "seeds": list(SEEDS), "settings": {"train.steps": 3}, "rows": ROWS, **changed}
    return sweeps.write_sweep(file, **document)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Shards, labelled set, settings and a finished sweep; one MLflow store for the whole module."""
    base = tmp_path_factory.mktemp("sweep")
    masks, labelled, params = sweep_data(base)
    with pytest.MonkeyPatch.context() as patch:
        client = tiny.mlflow_at(patch, base / "mlflow")
        file = write_sweep(base / "ablations.yaml")
        inputs = (masks, labelled, base / "out", params)
        rows = sweep.run(file, *inputs)
        yield SimpleNamespace(base=base, client=client, file=file, inputs=inputs, out=base / "out", rows=rows)


def metrics_of(out: Path, row: str, stage: str) -> list[dict[str, float]]:
    return [json.loads((out / row / f"seed-{seed}" / stage / "metrics.json").read_text()) for seed in SEEDS]


def cells(text: str) -> list[list[str]]:
    """Rows of a Markdown table, split at unescaped bars."""
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in text.splitlines() if line[:2] == "| "]


def written(out: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in out.glob("*/*/*/metrics.json")}


def all_runs(client):
    return client.search_runs([client.get_experiment_by_name("pixelclip").experiment_id])


def test_table_has_mean_and_sample_deviation_of_the_metrics_files(made):
    head, _, *lines = cells((made.out / "table.md").read_text().replace("|---", "| ---"))
    assert head == ["row", "settings that differ", "mIoU of CLIP", "mIoU", "gain", "pixel accuracy", "seeds"]
    assert [line[0] for line in lines] == ["full", r"own \| targets"]
    assert [line[1] for line in lines] == ["–", "`evaluate.templates=single`, `train.clustering=false`"]
    for line, row, result in zip(lines, ("full", "own-targets"), made.rows, strict=True):
        found = metrics_of(made.out, row, "evaluation")
        for cell, key in zip(line[2:6], ("miou_clip", "miou", "gain", "pixel_accuracy"), strict=True):
            values = np.array([metrics[f"{key}/labelled"] for metrics in found])
            spread = np.sqrt(((values - values.mean()) ** 2).sum() / (len(values) - 1))
            assert cell == f"{values.mean():.2f} ± {spread:.2f}"
            assert (result[key], result[f"{key}_std"]) == pytest.approx((values.mean(), spread))
        assert line[6] == "2" and result["seeds"] == 2
    gains = {run["metrics"]["gain/labelled"] for row in made.rows for run in row["runs"]}
    assert len(gains) == 4, "seeds and settings reach the training"


def test_best_row_is_written_as_settings_that_reproduce_it(made, tmp_path):
    gains = {row["row"]: row["gain"] for row in made.rows}
    best = max(gains, key=gains.get)
    text = (made.out / "best.yaml").read_text()
    assert text.startswith(f"# tiny ablations: {best}, seed 0\n")
    assert f"Best: {best}, gain {gains[best]:.2f} ± " in (made.out / "table.md").read_text()
    config = {stage: load(stage, made.out / "best.yaml") for stage in ("train", "evaluate")}
    train.run(made.inputs[0], tmp_path / "model", config["train"])
    metrics = evaluate.run(tmp_path / "model", made.inputs[1], tmp_path / "evaluation", config["evaluate"])
    assert metrics == metrics_of(made.out, sweep_file.slug(best), "evaluation")[0]


def test_csv_has_every_run_with_all_metrics(made):
    listed = list(csv.DictReader((made.out / "runs.csv").read_text().splitlines()))
    runs = [(line["row"], line["seed"], line["error"]) for line in listed]
    assert runs == [(row, str(seed), "") for row in ROWS for seed in SEEDS]
    for position, line in enumerate(listed):
        row = "full" if position < 2 else "own-targets"
        expected = metrics_of(made.out, row, "model")[position % 2] | metrics_of(made.out, row, "evaluation")[position % 2]
        assert {name: float(line[name]) for name in expected} == expected


def test_run_equals_the_two_stages_run_separately(made, tmp_path):
    params, folder = made.base / "params.yaml", made.out / "own-targets" / "seed-3"
    config = load("train", params, {"train.steps": 3, "train.clustering": False, "train.seed": 3})
    train.run(made.base / "masks", tmp_path / "model", config)
    single = load("evaluate", params, {"templates": "single"})
    alone = evaluate.run(tmp_path / "model", made.base / "labelled", tmp_path / "evaluation", single)
    assert json.loads((folder / "evaluation" / "metrics.json").read_text()) == alone


def test_runs_are_children_of_one_mlflow_run_with_table_and_plot(made):
    runs = all_runs(made.client)
    parents = [run for run in runs if run.info.run_name == "tiny ablations"]
    assert len(parents) == 1 and parents[0].info.status == "FINISHED"
    assert "mlflow.parentRunId" not in parents[0].data.tags
    files = {file.path for file in made.client.list_artifacts(parents[0].info.run_id)}
    assert files == {"table.md", "runs.csv", "sweep.png", "best.yaml", "lineage.json"}
    children = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == parents[0].info.run_id]
    tags = {(run.info.run_name, run.data.tags["sweep.row"], run.data.tags["sweep.seed"]) for run in children}
    assert tags == {(f"{row}, seed {seed}", row, str(seed)) for row in ROWS for seed in SEEDS} and len(children) == 4
    for run in children:
        assert run.info.status == "FINISHED"
        assert run.data.params["train.seed"] == run.data.tags["sweep.seed"]
        assert {"eval/labelled/gain", "train/loss"} <= set(run.data.metrics)


def test_same_command_again_reuses_all_runs_and_the_parent(made, monkeypatch):
    before, runs = written(made.out), {run.info.run_id for run in all_runs(made.client)}
    monkeypatch.setenv(PIPELINE_RUN, "kept")
    assert sweep.run(made.file, *made.inputs) == made.rows
    assert written(made.out) == before and len(before) == 8
    assert {run.info.run_id for run in all_runs(made.client)} == runs
    assert PARENT_RUN not in os.environ and os.environ[PIPELINE_RUN] == "kept"


def test_terminated_sweep_resumes_below_the_same_parent(made, tmp_path, monkeypatch, capsys):
    file = write_sweep(tmp_path / "killed.yaml", name="killed", rows={"one": None})
    inputs = (*made.inputs[:2], tmp_path / "out", made.inputs[3])
    original, calls = evaluate.run, []

    def evaluate_or_interrupt(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGTERM)
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "run", evaluate_or_interrupt)
        with pytest.raises(Terminated):
            sweep.run(file, *inputs)
    assert "sweep: stopped by SIGTERM; the same command continues with run 2 of 2" in capsys.readouterr().out
    before = written(tmp_path / "out")
    assert len(before) == 3
    assert [line[6] for line in cells((tmp_path / "out" / "table.md").read_text())] == ["seeds", "1"]

    def parents():
        return [run for run in all_runs(made.client) if run.info.run_name == "killed"]

    assert [run.info.status for run in parents()] == ["KILLED"]
    assert sweep.run(file, *inputs)[0]["seeds"] == 2
    assert before.items() <= written(tmp_path / "out").items()
    assert [run.info.status for run in parents()] == ["FINISHED"]


def test_failing_added_row_is_named_and_leaves_the_others(made, monkeypatch, capsys):
    rows = {"broken": {"train.learning_rate_decoder": 1e30}, **ROWS}
    file, before = write_sweep(made.base / "more.yaml", rows=rows), written(made.out)
    words = zip(("--masks", "--labelled", "--out", "--params"), map(str, made.inputs), strict=True)
    monkeypatch.setattr(sys, "argv", ["pixelclip", "sweep", str(file), *chain(*words)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith("pixelclip: 2 of 6 runs failed") and "row 'broken', seed 3: step 2: loss" in message
    head, broken, *others = cells((made.out / "table.md").read_text())
    assert broken[0] == "broken" and broken[2:7] == ["–", "–", "–", "–", "0 of 2"]
    assert head[7] == "error" and broken[7].startswith("seed 0: step 2: loss")
    assert [line[0] for line in others] == ["full", r"own \| targets"] and [line[7] for line in others] == ["", ""]
    assert written(made.out) == before
    runs = all_runs(made.client)
    assert [run.info.status for run in runs if run.info.run_name == "tiny ablations"] == ["FAILED"]
    assert {run.info.status for run in runs if run.data.tags.get("sweep.row") == "broken"} == {"FAILED"}


def test_any_error_of_a_row_does_not_stop_the_others(made, tmp_path, monkeypatch):
    def out_of_memory(*_: object) -> None:
        raise RuntimeError("CUDA out of memory.\nTried to allocate 2 GiB")

    monkeypatch.setattr(train, "run", out_of_memory)
    file = write_sweep(tmp_path / "memory.yaml", rows={"a": None, "b": None}, seeds=[0])
    with pytest.raises(ValueError, match=r"(?s)^2 of 2 runs failed.*row 'b', seed 0: RuntimeError: CUDA out of memory\.$"):
        sweep.run(file, *made.inputs[:2], tmp_path / "out")


def test_run_id_from_the_environment_is_the_parent(made, tmp_path, monkeypatch):
    given = made.client.create_run(made.client.get_experiment_by_name("pixelclip").experiment_id).info.run_id
    monkeypatch.setenv("MLFLOW_RUN_ID", given)
    monkeypatch.setenv(PARENT_RUN, "above")
    file = write_sweep(tmp_path / "one.yaml", rows={"one": None}, seeds=[0])
    sweep.run(file, *made.inputs[:2], tmp_path / "out", made.inputs[3])
    children = [run for run in all_runs(made.client) if run.data.tags.get("mlflow.parentRunId") == given]
    assert [run.info.run_name for run in children] == ["one, seed 0"]
    assert made.client.get_run(given).info.status == "RUNNING", "its creator ends it"
    with sweep._children_of(given):
        assert "MLFLOW_RUN_ID" not in os.environ and os.environ[PARENT_RUN] == given
    assert (os.environ["MLFLOW_RUN_ID"], os.environ[PARENT_RUN]) == (given, "above")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rows: {K 8: {train.conceptz: 8}}", "row 'K 8': unknown setting 'train.conceptz', did you mean 'train.concepts'?"),
        ("rows: {a: {}, K 8: {train.concepts: 1}}", "row 'K 8': train: concepts: Input should be greater than"),
        ("rows: {a: {evaluate.stride: 999}}", "row 'a': evaluate: stride 999 is larger than crop"),
        ("rows: {a: {concepts: 8}}", "row 'a': unknown setting 'concepts', did you mean 'train.concepts'?"),
        ("rows: {a: {train.seed: 8}}", "row 'a': train.seed is set by `seeds`"),
        ("rows: {a: {register.name: x}}", "row 'a': unknown setting 'register.name'"),
        ("rows: {a: }\nsettings: {train.stepz: 3}", "settings: unknown setting 'train.stepz', did you mean 'train.steps'?"),
        ("rows: {a: }\nseed: [1]", "unknown setting 'seed', did you mean 'seeds'?"),
        ("rows: {a: }\nseeds: [1, 1]", "seeds [1, 1]: a seed occurs twice"),
        ("rows: {a: }\nseeds: [-1]", "seeds.0: Input should be greater than or equal to 0"),
        ("rows: {a: }\nseeds: [1.5]", "seeds.0: Input should be a valid integer"),
        ("rows: {a: }\nseeds: []", "seeds: List should have at least 1 item"),
        ("seeds: [1]", "must have rows or ranges (found neither)"),
        ("rows: {K 8: , k-8: }", "rows 'K 8' and 'k-8' would share the folder 'k-8'"),
        ("rows: {a: , a: {train.steps: 2}}", "duplicate key 'a'"),
        ("rows: {'*': }", "row '*': its name must contain a letter or a digit"),
        ("rows: {1.10: }", "rows.1.1.[key]: must be text; quote it: '...' (found 1.1)"),
        ("name: 1.10\nrows: {a: }", "name: must be text; quote it: '...' (found 1.1)"),
        ("rows: {a: {train.clip: 1.10}}", "train: clip: must be text; quote it: '...' (found 1.1)"),
        ("rows: {a: [1]}", "rows.a: Input should be a valid dictionary"),
        ("- rows", "must contain rows of settings, found list"),
        ("rows: {", "cannot be read as YAML"),
    ],
)
def test_invalid_file_is_rejected_before_the_first_run(made, tmp_path, text, message):
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    for start in (
        lambda: sweep.run(file, *made.inputs[:2], tmp_path / "out"),
        lambda: pipeline.compile_to(file, tmp_path / "compiled.yaml"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)) as error:
            start()
        assert str(error.value).startswith(str(file))
    assert list(tmp_path.iterdir()) == [file]


def test_unusable_inputs_are_rejected_before_the_first_run(made, tmp_path, monkeypatch):
    masks, labelled, _, params = made.inputs
    with pytest.raises(ValueError, match="no such folder or manifest"):
        sweep.run(made.file, tmp_path / "nothing", labelled, tmp_path / "out", params)
    with pytest.raises(ValueError, match="no such folder"):
        sweep.run(made.file, masks, tmp_path / "nothing", tmp_path / "out", params)
    with pytest.raises(ValueError, match="found a file"):
        sweep.run(made.file, masks, labelled, made.file, params)
    with pytest.raises(ValueError, match="cannot be read as YAML"):
        sweep.run(made.file, masks, labelled, tmp_path / "out", tmp_path / "no.yaml")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    with pytest.raises(ValueError, match="cannot be reached"):
        sweep.run(made.file, masks, labelled, tmp_path / "out", params)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="in one process"):
        sweep.run(made.file, masks, labelled, tmp_path / "out", params)
    assert list(tmp_path.iterdir()) == []


def test_name_and_seeds_have_defaults(tmp_path):
    (tmp_path / "mine.yaml").write_text("rows: {'8': {train.concepts: 8}}")
    name, planned = sweep.read(tmp_path / "mine.yaml")
    assert (name, [(each.row, each.seed, each.train.concepts) for each in planned]) == ("mine", [("8", 0, 8)])


def test_second_sweep_in_the_same_folder_is_rejected(made, tmp_path):
    (tmp_path / "out").mkdir()
    with sweep._locked(tmp_path / "out"), pytest.raises(ValueError, match="another sweep is writing this folder"):
        sweep.run(made.file, *made.inputs[:2], tmp_path / "out", made.inputs[3])
    assert list((tmp_path / "out").iterdir()) == []


def planned_runs(*gains: float | None) -> list[dict]:
    return [
        {
            "row": f"costs $5_{number}$ | " + "long " * 9,
            "seed": 0,
            "settings": {"train.concepts": 8.0},
            "metrics": {} if gain is None else {"gain/x": gain},
            "error": "" if gain is not None else "no\nluck | at all",
        }
        for number, gain in enumerate(gains)
    ]


def test_table_and_plot_with_one_seed_special_characters_and_failures():
    rows = sweep_results.summarise(planned_runs(1.25, -3.0, None))
    head, one, _, failed = cells(sweep_results.table("a", rows))
    assert one[1] == "`train.concepts=8`" and one[4] == "1.25" and one[2] == "–"
    assert failed[6] == "0 of 1" and failed[7] == r"seed 0: no luck \| at all" and len(head) == len(failed) == 8
    small, large = (sweep_results.plot("$a_$", rows[:count]) for count in (1, 3))
    assert small[:8] == large[:8] == b"\x89PNG\r\n\x1a\n"
    assert int.from_bytes(large[20:24]) > int.from_bytes(small[20:24]), "the plot grows with its rows"
    assert 'src="data:image/png;base64,' in sweep_results.page("<b>", rows) and "<b>" not in sweep_results.page("<b>", rows)


@pytest.fixture(scope="module")
def compiled(made) -> Path:
    path = made.base / "compiled.yaml"
    pipeline.compile_to(made.file, path, made.inputs[3])
    return path


def test_compiled_sweep_is_valid_and_describes_every_parameter(compiled):
    loaded = load_component_from_file(str(compiled))
    assert isinstance(loaded, components.YamlComponent) and loaded.component_spec.name == "pixelclip-sweep"
    spec = next(yaml.safe_load_all(compiled.read_text()))
    parameters = spec["root"]["inputDefinitions"]["parameters"]
    assert set(parameters) == {"masks", "labelled", "name", "runs"}
    assert all(len(entry.get("description", "")) > 10 for entry in parameters.values())
    assert parameters["name"]["defaultValue"] == "tiny ablations"
    tasks = spec["components"]["comp-for-loop-1"]["dag"]["tasks"]
    assert {name: task["componentRef"]["name"] for name, task in tasks.items()} == {
        "train": "comp-train",
        "evaluate": "comp-evaluate",
    }


def test_cluster_settings_apply_to_the_sweep(made, tmp_path):
    (tmp_path / "cluster.yaml").write_text("steps: {train: {gpus: 4, shared_memory: 9Gi}}\nsecrets: [{name: s3, env: {K: k}}]")
    pipeline.compile_to(made.file, tmp_path / "s.yaml", made.inputs[3], "", tmp_path / "cluster.yaml", "r/p:1")
    spec, platform = yaml.safe_load_all((tmp_path / "s.yaml").read_text())
    containers = {name: each["container"] for name, each in spec["deploymentSpec"]["executors"].items() if "container" in each}
    assert {each["image"] for each in containers.values()} == {"r/p:1"}
    assert containers["exec-train"]["resources"]["accelerator"]["resourceCount"] == "4"
    pods = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    assert set(pods) == set(containers) and pods["exec-train"]["emptyDirMounts"][0]["sizeLimit"] == "9Gi"
    assert all(pod["secretAsEnv"][0]["secretName"] == "s3" for pod in pods.values())
    assert not any("fieldPathAsEnv" in pod for pod in pods.values()), "every row and seed has its own MLflow run"


def test_masks_and_labelled_set_may_be_on_a_mounted_volume(compiled):
    """KFP's importer rejects a path without a scheme; `fetch_data` accepts it."""
    spec = next(yaml.safe_load_all(compiled.read_text()))
    assert not any("importer" in executor for executor in spec["deploymentSpec"]["executors"].values())
    tasks = spec["root"]["dag"]["tasks"]
    paths = [tasks[name]["inputs"]["parameters"]["path"] for name in ("fetch-data", "fetch-labelled")]
    assert paths == [{"componentInputParameter": name} for name in ("masks", "labelled")]
    dags = [each["dag"]["tasks"] for each in spec["components"].values() if "dag" in each]
    assert [set(dag["train"]["inputs"]["artifacts"]) for dag in dags] == [{"masks"}]


def test_loop_items_give_every_run_its_exact_settings(made, compiled):
    baked = next(yaml.safe_load_all(compiled.read_text()))["root"]["inputDefinitions"]["parameters"]["runs"]["defaultValue"]
    _, planned = sweep.read(made.file, made.inputs[3])
    assert [(item["row"], item["seed"]) for item in baked] == [(each.row, each.seed) for each in planned]
    for item, each in zip(baked, planned, strict=True):
        named = {f"train.{name}": item[name] for name in ("clip", "steps", "batch_size", "concepts", "seed")}
        found = load("train", overrides={**item["settings"], **named})  # as the components merge them
        assert found.model_copy(update={"run_name": "", "run_tags": ""}) == each.train
        tags = {"sweep.name": "tiny ablations", "sweep.row": each.row, "sweep.seed": str(each.seed)}
        assert (found.run_name, json.loads(found.run_tags)) == (f"{each.row}, seed {each.seed}", tags)
        assert load("evaluate", overrides=item["settings"]) == each.evaluate
        assert item["workspace"] == ""
    workspaces = [item["workspace"] for item in pipeline.items("s", planned, "/mnt/space")]
    assert workspaces[0] == "/mnt/space/full/seed-0" and len(set(workspaces)) == 4


def test_command_compiles(made, monkeypatch, capsys, tmp_path):
    (tmp_path / "cluster.yaml").write_text("volume: {claim: shared, mount: /mnt}")
    options = ["--out", str(tmp_path / "s.yaml"), "--workspace", "/mnt/space", "--cluster", str(tmp_path / "cluster.yaml")]
    monkeypatch.setattr(sys, "argv", ["pixelclip", "pipeline", "compile-sweep", str(made.file), *options])
    with pytest.raises(SystemExit, match="0"):
        main()
    assert capsys.readouterr().out.strip() == str(tmp_path / "s.yaml")
    assert "/mnt/space/own-targets/seed-3" in (tmp_path / "s.yaml").read_text()
    for path, message in ((tmp_path / "s.json", "must be a .yaml file"), (made.file, "would overwrite")):
        with pytest.raises(ValueError, match=message):
            pipeline.compile_to(made.file, path)
    with pytest.raises(ValueError, match="--workspace /mnt/space: must be a folder on the volume"):
        pipeline.compile_to(made.file, tmp_path / "t.yaml", workspace="/mnt/space")


def test_component_writes_the_same_table(made, tmp_path):
    _, planned = sweep.read(made.file, made.inputs[3])
    runs = [run for row in made.rows for run in row["runs"]]
    found = [SimpleNamespace(metadata={**run["metrics"], "store_session_info": "{}"}) for run in runs]
    table, plot = (SimpleNamespace(path=str(tmp_path / name)) for name in ("table", "plot"))
    sweep_table.python_func("tiny ablations", pipeline.items("s", planned), found, table, plot)
    assert (tmp_path / "table").read_text() == sweep_results.table("tiny ablations", made.rows)
    assert (tmp_path / "plot").read_text() == sweep_results.page("tiny ablations", made.rows)
    with pytest.raises(ValueError, match="shorter"):
        sweep_results.gather(pipeline.items("s", planned), [each.metadata for each in found[:3]])
    readme = (Path(__file__).parents[2] / "components" / "sweep_table" / "README.md").read_text()
    assert all(f"`{name}`" in readme for name in (*sweep_table.component_spec.inputs, *sweep_table.component_spec.outputs))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*custom or non-Python base image:RuntimeWarning")
def test_local_pipeline_writes_the_same_table(made, tmp_path):
    name, planned = sweep.read(write_sweep(tmp_path / "one.yaml", seeds=[SEEDS[0]]), made.inputs[3])
    runs = [run for row in made.rows for run in row["runs"] if run["seed"] == SEEDS[0]]
    local.init(local.SubprocessRunner(use_venv=False), pipeline_root=str(tmp_path / "kfp"), raise_on_error=True)
    pipeline.sweep(masks=str(made.inputs[0]), labelled=str(made.inputs[1]), name=name, runs=pipeline.items("s", planned))
    assert next(tmp_path.rglob("sweep-table/table")).read_text() == sweep_results.table(name, sweep_results.summarise(runs))
    assert next(tmp_path.rglob("sweep-table/plot")).read_text().startswith("<!doctype html>")
