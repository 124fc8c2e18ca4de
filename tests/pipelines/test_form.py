"""What KFP's pages show of the compiled pipelines: the form, the graph, *Compare runs*, and the files of artifacts.

KFP 2.17 sorts a form by name and makes a menu of `literals`. Its graph labels a task with `taskInfo.name` and an artifact with
the name of the output; its lists of artifacts show the metadata `display_name`. *Compare runs* has a column for every output of
type system.Metrics.
"""

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args
from urllib.parse import quote

import pytest
import yaml
from kfp import compiler, dsl

from pixelclip.config import MasksConfig
from pixelclip.evaluate import CONFUSION
from pixelclip.storage.files import write_json
from pixelclip_pipelines import sweep, sweep_run
from pixelclip_pipelines.artifacts import record
from pixelclip_pipelines.cluster_config import read
from pixelclip_pipelines.form import described
from pixelclip_pipelines.parameters import arguments
from pixelclip_pipelines.pixelclip import build
from pixelclip_pipelines.run import compile_to
from pixelclip_pipelines.steps import compared, show_confusion, show_metrics

ROOT = Path(__file__).parents[2]
CLUSTER = "parts: 3\nvolume: {claim: shared}"
SWEEP = "rows: {full: {}, plain: {train.flip: false}}"


@pytest.fixture(scope="module", params=["one machine", "parts", "nodes", "sweep", "sweep run"])
def compiled(request, tmp_path_factory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("form")
    (folder / "cluster.yaml").write_text(CLUSTER)
    (folder / "sweep.yaml").write_text(SWEEP)
    out = folder / "pipeline.yaml"
    if request.param == "sweep":
        sweep.compile_to(folder / "sweep.yaml", out)
    elif request.param == "sweep run":
        compiler.Compiler().compile(sweep_run.build(read(folder / "cluster.yaml")), str(out))
    else:
        nodes = 2 if request.param == "nodes" else 1
        compile_to(out, folder / "cluster.yaml" if request.param != "one machine" else None, nodes)
    return next(yaml.safe_load_all(out.read_text()))


def tasks(spec: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Yield key, task and component of every step."""
    for dag in [spec["root"], *spec["components"].values()]:
        for key, task in dag.get("dag", {}).get("tasks", {}).items():
            yield key, task, spec["components"][task["componentRef"]["name"]]


def form(spec: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return dict(sorted(spec["root"]["inputDefinitions"]["parameters"].items()))


# Create run.


def test_every_field_is_documented(compiled):
    table = compiled["pipelineInfo"]["description"]
    rows = dict(line.strip("| ").split(" | ", 1) for line in table.splitlines() if line.startswith("| `"))
    assert list(rows) == [f"`{name}`" for name in form(compiled)]
    for name, field in form(compiled).items():
        assert len(field["description"]) > 10 and "\n" not in field["description"], name
        default, _, meaning = rows[f"`{name}`"].partition(" | ")
        assert meaning == field["description"]
        if "defaultValue" not in field:
            assert default == "required"
        elif field["defaultValue"] == "":
            assert default == "empty"
        elif not isinstance(field["defaultValue"], list):
            assert yaml.safe_load(default.strip("`")) == field["defaultValue"]
    assert len(quote(table)) < 7000, "the client sends it as part of a URL"


def test_required_fields_come_first():
    fields = build().pipeline_spec.root.input_definitions.parameters
    required = [name for name, field in fields.items() if not field.is_optional]
    assert sorted(fields)[: len(required)] == sorted(required) == ["data_images", "data_labelled"]


def test_choices_are_menus(compiled):
    menus = {name: field["literals"] for name, field in form(compiled).items() if "literals" in field}
    generators = list(get_args(MasksConfig.model_fields["generator"].annotation))
    assert "dino" in generators
    assert menus == (
        {"masks_generator": generators} if "masks_generator" in form(compiled) else {}
    )  # a sweep starts from masks


def test_no_field_of_the_pipeline_is_a_dictionary():
    kinds = {field.parameter_type for field in build().pipeline_spec.root.input_definitions.parameters.values()}
    assert kinds == {1, 2, 3}, "numbers and text; KFP shows a dictionary as [object Object]"


def test_only_settings_that_differ_are_shown():
    assert arguments("a", "b", "", None, {"train.crop": 640, "steps": 10_000})["settings"] == ""
    assert (
        arguments("a", "b", "", None, {"train.crop": 80, "evaluate.side": 144})["settings"] == "train.crop=80 evaluate.side=144"
    )


# Graph.


def test_every_task_has_a_display_name_of_its_own(compiled):
    names = {key: task["taskInfo"]["name"] for key, task, _ in tasks(compiled)}
    assert len(set(names.values())) == len(names)
    for key, name in names.items():
        assert name != key and (name[0].isupper() or key.startswith("exit-handler")), key


def test_every_artifact_has_a_display_name_of_its_own(compiled):
    keys, titles = [], []
    for key, _, component in tasks(compiled):
        if "executorLabel" in component:
            for name, output in component.get("outputDefinitions", {}).get("artifacts", {}).items():
                keys.append(name)
                titles.append(output["metadata"]["display_name"])
                assert titles[-1][0].isupper(), (key, name)
    assert len(set(keys)) == len(keys) and len(set(titles)) == len(titles)
    assert {"labelled", "model", "metrics"} <= set(keys)


# Compare runs.


def test_one_step_writes_the_metrics_of_a_run(compiled):
    columns = [
        f"{task['taskInfo']['name']} > {name}"
        for _, task, component in tasks(compiled)
        for name, output in component.get("outputDefinitions", {}).get("artifacts", {}).items()
        if "executorLabel" in component and output["artifactType"]["schemaTitle"] == "system.Metrics"
    ]
    assert columns == ["Evaluate PixelCLIP > metrics"]


def test_compared_metrics_are_those_of_evaluation_and_training(tmp_path):
    write_json(tmp_path / "model" / "metrics.json", {"train/loss": 0.25, "train/steps": 7.0})
    values = compared({"miou/toy": 45.5, "gain/toy": 15.7}, tmp_path / "model")
    shown = dsl.Metrics(name="metrics", uri=str(tmp_path / "step" / "metrics"))
    show_metrics(shown, values)
    expected = {"miou/toy": 45.5, "gain/toy": 15.7, "train/loss": 0.25, "train/steps": 7.0}
    assert shown.metadata == expected == json.loads((tmp_path / "step" / "metrics").read_text())


def test_metrics_of_other_steps_are_metadata_of_their_output():
    output = dsl.Dataset(name="masks", uri="x", metadata={"display_name": "Masks"})
    record(output, {"images": 3.0, "masks_per_image": float("nan")})
    assert output.metadata == {"display_name": "Masks", "images": 3.0}


def test_confusion_matrix_is_also_a_csv_file(tmp_path):
    write_json(tmp_path / CONFUSION, {"classes": ["dog, puppy", "sky"], "counts": [[2, 1], [0, 3]]})
    shown = dsl.ClassificationMetrics(name="confusion", uri=str(tmp_path / "step" / "confusion"))
    show_confusion(shown, tmp_path)
    rows = list(csv.reader((tmp_path / "step" / "confusion").read_text().splitlines()))
    assert rows == [["truth \\ prediction", "dog, puppy", "sky"], ["dog, puppy", "2", "1"], ["sky", "0", "3"]]


def test_description_is_that_of_the_compiled_file(tmp_path):
    compile_to(tmp_path / "pipeline.yaml")
    spec = next(yaml.safe_load_all((tmp_path / "pipeline.yaml").read_text()))
    assert described(build()) == spec["pipelineInfo"]["description"]
