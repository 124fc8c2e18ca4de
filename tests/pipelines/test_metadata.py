"""Metadata of every component's outputs, as KFP's executor writes them: KFP fails a step whose metadata contain null or NaN."""

import json
import math
import shutil
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from kfp.dsl.executor import Executor

from helpers import fake_data, tiny
from helpers.training import SMALL
from pixelclip import train as train_stage

TYPES = {"data": "Dataset", "shards": "Dataset", "masks": "Dataset", "model": "Model", "metrics": "Metrics", "report": "HTML"}
TYPES |= {"confusion": "ClassificationMetrics", "links": "Markdown", "table": "Markdown", "plot": "HTML"}
OUTPUTS = {
    "pin_revision": [],
    "fetch_data": ["data", "metrics"],
    "shards": ["shards", "metrics"],
    "masks": ["masks", "metrics"],
    "train": ["model", "metrics"],
    "train_job": ["model", "metrics"],
    "evaluate_clip": ["evaluation", "metrics"],
    "evaluate": ["evaluation", "metrics", "confusion", "report"],
    "register": ["registration", "metrics", "links"],
    "finish": [],
    "sweep_table": ["table", "plot"],
    "fetch_model": ["model"],
    "predict": ["predictions"],
    "merge": ["predictions"],
}


class Steps:
    """Run components in KFP's executor and keep what it writes for the launcher."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.written: dict[str, dict[str, Any]] = {}

    def run(self, name: str, inputs: dict[str, list[dict[str, Any]]], /, **parameters: Any) -> dict[str, dict[str, Any]]:
        def output(key: str) -> dict[str, Any]:
            type_name = f"system.{TYPES.get(key, 'Artifact')}"
            return {"name": key, "type": {"schemaTitle": type_name}, "uri": str(self.folder / name / key), "metadata": {}}

        folder = self.folder / name
        folder.mkdir()
        executor_input = {
            "inputs": {
                "artifacts": {key: {"artifacts": artifacts} for key, artifacts in inputs.items()},
                "parameterValues": parameters,
            },
            "outputs": {
                "artifacts": {key: {"artifacts": [output(key)]} for key in OUTPUTS[name]},
                "outputFile": str(folder / "executor_output.json"),
            },
        }
        component = getattr(import_module(f"pixelclip_components.{name}.component"), name)
        Executor(executor_input, component.python_func).execute()
        self.written[name] = json.loads((folder / "executor_output.json").read_text())
        artifacts = self.written[name].get("artifacts", {})
        return {key: {**output(key), **artifacts[key]["artifacts"][0]} for key in OUTPUTS[name]}


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Iterator[dict[str, dict[str, Any]]]:
    """What every component writes for data with an unreadable image and a class that no image contains."""
    base = tmp_path_factory.mktemp("metadata")
    steps = Steps(base)
    images = {f"images/{number}.jpg": fake_data.encoded(fake_data.pixels(40, 48, number)) for number in range(6)}
    labelled = tiny.labelled_set(base / "labelled")
    with (labelled / "classes.txt").open("a") as classes:
        classes.write("nowhere\n")
    files = {f"labelled/{path.relative_to(labelled)}": path.read_bytes() for path in labelled.rglob("*") if path.is_file()}
    tracked = {"data": images | files | {"images/bad.jpg": b"no image"}}
    tiny.dvc_repository(base / "repo", str(base / "remote"), tracked, {})
    clip = str(tiny.clip_folder(base / "clip"))
    chosen = {"clip": clip, "steps": 1, "batch_size": 2, "concepts": 4, "seed": 0}
    settings = {f"train.{key}": value for key, value in SMALL.items() if key not in chosen}
    settings |= {"train.picture_every": 0, "shards.max_bad_share": 0.5, "masks.workers": 0, "evaluate.device": "cpu"}
    settings |= {"evaluate.side": 32, "evaluate.pictures": 1}
    everywhere = {"settings": settings, "workspace": ""}
    with pytest.MonkeyPatch.context() as patch:
        tiny.mlflow_at(patch, base / "mlflow")
        patch.setenv("PIXELCLIP_PIPELINE_RUN", "run-1")
        patch.setenv("PIXELCLIP_REVISION", "r" * 40)
        repo = str(base / "repo")
        steps.run("pin_revision", {}, repo=repo, revision="v1", clip=clip, **everywhere)
        pins = steps.written["pin_revision"]["parameterValues"]
        data, truth = {}, {}
        for path, into in (("data/images", data), ("data/labelled", truth)):
            made = steps.run("fetch_data", {}, repo=repo, path=path, revision=pins["commit"], fetch=pins["fetch"], **everywhere)
            shutil.move(base / "fetch_data", base / path.replace("/", "-"))
            into.update(made["data"], uri=str(base / path.replace("/", "-") / "data"))
        packed = steps.run("shards", {"images": [data]}, **everywhere)["shards"]
        masked = steps.run("masks", {"shards": [packed]}, generator="felzenszwalb", part="", **everywhere)["masks"]
        trained = steps.run("train", {"masks": [masked]}, **chosen, **everywhere)

        # The TrainJob itself is tested in test_trainjob.py.
        def on_nodes(job: str, workspace: str, config: Any) -> dict[str, float]:
            return train_stage.run(Path(masked["uri"]), Path(workspace, "train"), config)

        patch.setattr("pixelclip_pipelines.trainjob.train_on_nodes", on_nodes)
        steps.run("train_job", {"masks": [masked]}, job="{}", **chosen, settings=settings, workspace=str(base / "space"))
        versions = {"clip_version": pins["clip_version"], "data_version": "v"}
        reused = {**versions, "settings": pins["clip_settings"], "workspace": ""}
        baseline = steps.run("evaluate_clip", {"labelled": [truth]}, clip=clip, **reused)["evaluation"]
        tested = {"model": [trained["model"]], "labelled": [truth], "clip_evaluation": [baseline]}
        evaluation = steps.run("evaluate", tested, **everywhere)["evaluation"]
        assert None in [row["iou"] for row in json.loads((base / "evaluate/evaluation/per_class.json").read_text())]
        final = {"model": [trained["model"]], "evaluation": [evaluation]}
        registered = steps.run("register", final, registry_name="tiny", min_gain=-100.0, **everywhere)
        steps.run("sweep_table", {"metrics": [registered["metrics"]]}, name="s", runs=[{"row": "a", "seed": 0, "differs": {}}])
        status = {"state": "FAILED", "pipelineJobResourceName": "r", "pipelineTaskName": "pixelclip", "error": {}}
        steps.run("finish", {}, status=status)
        yield steps.written


def leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, dict | list):
        for each in value.values() if isinstance(value, dict) else value:
            yield from leaves(each)
    else:
        yield value


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*An input example was not provided")
@pytest.mark.parametrize("component", OUTPUTS)
def test_metadata_contain_neither_null_nor_nan(written, component):
    artifacts = written[component].get("artifacts", {})
    assert sorted(artifacts) == sorted(OUTPUTS[component])
    found = [each["artifacts"][0]["metadata"] for each in artifacts.values()]
    values = list(leaves(found))
    assert not [value for value in values if value is None or (isinstance(value, float) and not math.isfinite(value))], found
    if "metrics" in artifacts:
        assert artifacts["metrics"]["artifacts"][0]["metadata"], "metrics are in the metadata"


def test_components_are_all_here():
    folder = Path(__file__).parents[2] / "components"
    assert sorted(OUTPUTS) == sorted(path.parent.name for path in folder.glob("*/component.py"))
