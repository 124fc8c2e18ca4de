"""submit-sweep: every row and seed as a run of KFP, against a small server of its API."""

import json
from pathlib import Path

import pytest

from helpers import kfp_server
from helpers.command_line import pixelclip  # noqa: F401
from helpers.sweeps import write_sweep
from pixelclip.commands import sweep_file
from pixelclip.settings import load

kfp, run = kfp_server.kfp, kfp_server.run
DATA = ("--masks", "s3://bucket/masks", "--labelled", "/workspace/labelled")
ROWS = {"full": None, "K 8": {"train.concepts": 8, "evaluate.templates": "single"}}
NAMED = ("clip", "steps", "batch_size", "concepts", "seed")


@pytest.fixture
def file(kfp):
    """A sweep of two rows with two seeds, in the current folder."""
    return write_sweep(Path("ablations.yaml"), rows=ROWS, seeds=[0, 3], settings={"train.steps": 7, "train.crop": 96})


def rows_of(kfp) -> list[tuple[str, int]]:
    parameters = [created["runtime_config"]["parameters"] for created in kfp.all("runs")]
    return [(each["row"], each["seed"]) for each in parameters]


def test_every_row_and_seed_is_a_run_with_its_exact_settings(kfp, run, file):
    code, out, err = run("submit-sweep", str(file), *DATA)
    assert (code, err) == (0, "") and out.endswith("4 of 4 runs submitted\n")
    assert rows_of(kfp) == [("full", 0), ("full", 3), ("K 8", 0), ("K 8", 3)]
    assert [len(kfp.all(kind)) for kind in ("pipelines", "versions", "experiments")] == [1, 1, 1]
    spec, platform = kfp.all("versions")[0]["pipeline_spec"]["documents"]
    _, planned = sweep_file.read(file)
    for created, each in zip(kfp.all("runs"), planned, strict=True):
        assert created["display_name"].startswith(f"ablations: {each.row}, seed {each.seed} (")
        assert f"{kfp.url}/#/runs/details/{created['run_id']}" in out
        found = created["runtime_config"]["parameters"]
        assert set(found) == set(spec["root"]["inputDefinitions"]["parameters"])
        config = load("train", overrides={**found["settings"], **{f"train.{name}": found[name] for name in NAMED}})
        assert config.model_copy(update={"run_name": "", "run_tags": ""}) == each.train
        assert load("evaluate", overrides=found["settings"]) == each.evaluate
        assert config.run_name == f"{each.row}, seed {each.seed}"
        tags = {"sweep.name": "ablations", "sweep.row": each.row, "sweep.seed": str(each.seed)}
        assert json.loads(config.run_tags) == tags
        assert (found["masks"], found["labelled"], found["workspace"]) == (DATA[1], DATA[3], "")
    assert len({created["display_name"] for created in kfp.all("runs")}) == 4
    assert kfp.all("runs")[2]["runtime_config"]["parameters"]["differs"] == "train.concepts=8 evaluate.templates=single"
    # Each run has its own MLflow run, which the exit handler closes.
    pods = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    assert set(pods) == {"exec-fetch-data", "exec-fetch-labelled", "exec-train", "exec-evaluate", "exec-finish"}
    assert all(pod["fieldPathAsEnv"][0]["name"] == "PIXELCLIP_PIPELINE_RUN" for pod in pods.values())


def test_second_call_submits_only_what_is_missing(kfp, run, file):
    run("submit-sweep", str(file), *DATA)
    states = ["SUCCEEDED", "RUNNING", "FAILED", "CANCELED"]
    for created, state in zip(kfp.all("runs"), states, strict=True):
        created["state"] = state
    lost = kfp.kept["runs"].pop(kfp.all("runs")[0]["run_id"])
    code, out, _ = run("submit-sweep", str(file), *DATA)
    assert code == 0 and rows_of(kfp)[3:] == [("full", 0)], "the run that KFP does not have is submitted again"
    assert kfp.all("runs")[3]["display_name"] == lost["display_name"]
    for created, state in zip(kfp.all("runs")[:3], states[1:], strict=True):
        assert f"{state:<10} {created['display_name']}: {kfp.url}/#/runs/details/{created['run_id']}" in out
    assert out.endswith("1 of 4 runs submitted\n2 failed earlier; --retry-failed submits them again\n")

    code, out, _ = run("submit-sweep", str(file), *DATA, "--retry-failed")
    assert code == 0 and rows_of(kfp)[4:] == [("K 8", 0), ("K 8", 3)] and out.endswith("2 of 4 runs submitted\n")
    code, out, _ = run("submit-sweep", str(file), *DATA, "--retry-failed")
    assert code == 0 and len(kfp.all("runs")) == 6, "the repeated runs count, not the failed ones before"


def test_changed_settings_and_data_are_new_runs_and_an_added_row_costs_only_its_own(kfp, run, file):
    run("submit-sweep", str(file), *DATA)
    write_sweep(file, rows={**ROWS, "K 9": {"train.concepts": 9}}, seeds=[0, 3], settings={"train.steps": 7, "train.crop": 96})
    assert run("submit-sweep", str(file), *DATA)[0] == 0 and rows_of(kfp)[4:] == [("K 9", 0), ("K 9", 3)]
    # A setting of the machine changes no result, and neither does another image.
    write_sweep(file, rows=ROWS, seeds=[0], settings={"train.steps": 7, "train.crop": 96, "train.workers": 2})
    assert run("submit-sweep", str(file), *DATA, "--image", "r/p:2")[0] == 0 and len(kfp.all("runs")) == 6
    write_sweep(file, rows={"full": {"train.crop": 80}}, seeds=[0], settings={"train.steps": 7})
    assert run("submit-sweep", str(file), *DATA)[0] == 0 and len(kfp.all("runs")) == 7
    assert run("submit-sweep", str(file), "--masks", "s3://other/masks", *DATA[2:])[0] == 0 and len(kfp.all("runs")) == 8


def test_interrupted_submission_is_continued(kfp, run, file):
    run("submit-sweep", str(file), *DATA)
    names = [created["display_name"] for created in kfp.all("runs")]
    for created in kfp.all("runs")[2:]:
        del kfp.kept["runs"][created["run_id"]]
    assert run("submit-sweep", str(file), *DATA)[0] == 0
    assert [created["display_name"] for created in kfp.all("runs")] == names


def test_long_names_of_rows_are_cut_but_differ(kfp, run):
    rows = {f"{'long ' * 40}{end}": {"train.concepts": end} for end in (8, 9)}
    assert run("submit-sweep", str(write_sweep(Path("long.yaml"), rows=rows)), *DATA)[0] == 0
    names = [created["display_name"] for created in kfp.all("runs")]
    assert len(set(names)) == 2 and all(len(name) <= 120 and ", seed 0 (" in name for name in names)


def test_workspace_has_a_folder_for_every_run(kfp, run, file):
    Path("cluster.yaml").write_text("volume: {claim: shared}\nexperiment: sweeps")
    assert run("submit-sweep", str(file), *DATA, "--workspace", "/workspace/a")[0] == 0
    folders = [created["runtime_config"]["parameters"]["workspace"] for created in kfp.all("runs")]
    assert folders == [f"/workspace/a/{row}/seed-{seed}" for row in ("full", "k-8") for seed in (0, 3)]
    assert [each["display_name"] for each in kfp.all("experiments")] == ["sweeps"]


@pytest.mark.parametrize(
    ("content", "words", "message"),
    [
        ({"rows": {"a": {"train.stepz": 1}}}, DATA, "unknown setting 'train.stepz', did you mean 'train.steps'?"),
        ({"rows": ROWS}, ("--masks", "", *DATA[2:]), "masks must name a folder"),
        (
            {"rows": ROWS},
            (*DATA[:2], "--labelled", "https://x.y/z?key=secret"),
            "--labelled https://x.y/z contains credentials",
        ),
        ({"rows": {"a": {"train.clip": "ViT:https://u:secret@x.y/z"}}}, DATA, "contains credentials or a query"),
        ({"rows": ROWS}, (*DATA, "--workspace", "/workspace/a"), "--workspace /workspace/a: must be a folder on the volume"),
        ({"rows": {"a": {"train.batch_size": 1, "train.accumulate": 2}}}, DATA, "train.batch_size 1 is too small"),
        ({"ranges": {"train.concepts": {"linear": [2, 8]}}, "trials": 2}, (*DATA, "--retry-failed"), "--retry-failed: s.yaml"),
    ],
)
def test_errors_are_reported_before_anything_is_sent(kfp, run, content, words, message):
    code, out, err = run("submit-sweep", str(write_sweep(Path("s.yaml"), **content)), *words)
    assert code == 2 and message in err and out == "" and "secret" not in err
    assert kfp.asked == []
