"""Compilation of the pipeline, description and validation of its parameters, components as plain functions."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from kfp import components, local
from kfp.components import load_component_from_file
from kfp.local import docker_task_handler
from kfp.local.orchestrator import enhanced_dag_orchestrator

from helpers import fake_data, tiny
from helpers.kfp_steps import accept_supervisor
from helpers.promotions import aliases
from helpers.training import SMALL
from pixelclip import masks as stage_masks
from pixelclip import shards as stage_shards
from pixelclip import train as stage_train
from pixelclip.settings import load, load_all
from pixelclip.storage.files import read_json, write_json
from pixelclip_pipelines.artifacts import located
from pixelclip_pipelines.cluster_config import Cluster
from pixelclip_pipelines.cluster_sections import Volume
from pixelclip_pipelines.docker_patch import missing_outputs
from pixelclip_pipelines.docker_runner import containers
from pixelclip_pipelines.parameters import SETTING_OF, arguments, parse
from pixelclip_pipelines.pixelclip import build
from pixelclip_pipelines.run import compile_to, run_locally

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("pipeline") / "pixelclip.yaml"
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("PIXELCLIP_IMAGE", raising=False)
        compile_to(path)
    return path


def spec_of(compiled: Path) -> dict:
    return next(yaml.safe_load_all(compiled.read_text()))


def test_kfp_accepts_the_compiled_yaml(compiled):
    loaded = load_component_from_file(str(compiled))
    assert isinstance(loaded, components.YamlComponent)
    assert loaded.component_spec.name == "pixelclip"


def test_steps_depend_on_each_other_as_documented(compiled):
    tasks = spec_of(compiled)["components"]["comp-exit-handler-1"]["dag"]["tasks"]
    needs = {name: set(task.get("dependentTasks", [])) for name, task in tasks.items()}
    assert needs == {
        "pin-revision": set(),
        "fetch-data": {"pin-revision"},
        "fetch-labelled": {"pin-revision"},
        "shards": {"fetch-data", "pin-revision"},
        "masks": {"shards", "pin-revision"},
        "train": {"masks", "pin-revision"},
        "evaluate-clip": {"pin-revision", "fetch-labelled"},
        "evaluate": {"fetch-labelled", "train", "evaluate-clip", "pin-revision"},
        "register": {"train", "evaluate", "pin-revision"},
    }


def test_pipeline_without_a_labelled_set_has_neither_its_parameter_nor_evaluations(compiled, tmp_path):
    compile_to(tmp_path / "unlabelled.yaml", labelled=False)
    loaded = load_component_from_file(str(tmp_path / "unlabelled.yaml"))
    assert loaded.component_spec.name == "pixelclip-unlabelled"
    with_set, without = spec_of(compiled), spec_of(tmp_path / "unlabelled.yaml")
    parameters = with_set["root"]["inputDefinitions"]["parameters"]
    assert without["root"]["inputDefinitions"]["parameters"] == {k: v for k, v in parameters.items() if k != "data_labelled"}
    tasks, others = (spec["components"]["comp-exit-handler-1"]["dag"]["tasks"] for spec in (with_set, without))
    changed = ("pin-revision", "register", "fetch-labelled", "evaluate-clip", "evaluate")
    assert {name: task for name, task in others.items() if name not in changed} == {
        name: task for name, task in tasks.items() if name not in changed
    }
    assert set(others) & set(changed) == {"pin-revision", "register"}
    assert set(others["register"]["inputs"]["artifacts"]) == {"model"}
    passed, other = (each["pin-revision"]["inputs"]["parameters"] for each in (tasks, others))
    assert other == {name: value for name, value in passed.items() if name != "data_labelled"}


def test_parameter_defaults_equal_the_settings(compiled):
    parameters = spec_of(compiled)["root"]["inputDefinitions"]["parameters"]
    for name, setting in SETTING_OF.items():
        stage, _, field = setting.partition(".")
        assert parameters[name]["defaultValue"] == getattr(load(stage), field)


def test_default_image_is_the_development_image(compiled):
    executors = spec_of(compiled)["deploymentSpec"]["executors"]
    assert {executor["container"]["image"] for executor in executors.values()} == {"pixelclip:dev"}


def test_arguments_reach_every_stage():
    given = arguments("i", "l", "", ROOT / "params.yaml", {"steps": 7, "train.prompt_tokens": 3, "masks.max_masks": 9})
    assert given["train_steps"] == 7
    settings = parse(given["settings"])
    assert settings["train.prompt_tokens"] == "3"
    assert settings["masks.max_masks"] == "9"
    config = load("train", overrides={**settings, "train.steps": given["train_steps"]})
    assert (config.steps, config.prompt_tokens, config.side) == (7, 3, load("train", ROOT / "params.yaml").side)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"steps": 0}, "steps: Input should be greater than or equal to 1"),
        ({"step": 5}, "did you mean 'steps'"),
        ({"train.stepz": 5}, "did you mean 'steps'"),
        ({"trian.steps": 5}, "did you mean 'train'"),
        ({"generator": "sam9"}, "Input should be 'felzenszwalb', 'given', 'sam', 'dino', 'labels' or 'model'"),
        ({"steps": 5, "train.steps": 6}, "train.steps is given twice"),
        ({"images": "x"}, "see --help"),
        ({"masks.part": "1/2"}, "the pipeline computes all parts"),
    ],
)
def test_invalid_parameter_is_rejected_before_any_step(tmp_path, overrides, message):
    out = tmp_path / "out"
    with pytest.raises(ValueError, match=message.replace("(", r"\(").replace(".", r"\.")):
        run_locally(ROOT, ROOT, out, None, overrides)
    assert not out.exists()


def test_credentials_in_repository_url_are_rejected_before_they_are_logged(tmp_path):
    with pytest.raises(ValueError, match=r"--repo https://git\.example/data\.git contains credentials") as refused:
        run_locally("a", "b", tmp_path / "out", None, {}, repo="https://bot:very-secret@git.example/data.git")
    assert "very-secret" not in str(refused.value) and not (tmp_path / "out").exists()


def test_missing_folder_is_rejected_before_any_step(tmp_path):
    with pytest.raises(ValueError, match="no such folder"):
        run_locally(tmp_path / "nothing", ROOT, tmp_path / "out", None, {})


def test_component_runs_as_a_plain_function(tmp_path):
    from PIL import Image

    from pixelclip_components.shards.component import shards

    (tmp_path / "images").mkdir()
    Image.new("RGB", (20, 10), "red").save(tmp_path / "images" / "a.png")
    images = SimpleNamespace(path=str(tmp_path / "images"), metadata={})
    output = SimpleNamespace(path=str(tmp_path / "shards"), uri="", metadata={})
    shards.python_func(images, output, {"shards.images_per_shard": 10.0})
    assert output.metadata["images"] == 1
    assert (tmp_path / "shards" / "000000.tar").is_file()
    shared = SimpleNamespace(path=str(tmp_path / "kfp" / "shards"), uri="s3://bucket/shards", metadata={})
    shards.python_func(images, shared, {}, workspace=str(tmp_path / "space"))
    assert (shared.uri, str(located(shared))) == ("s3://bucket/shards", str(tmp_path / "space" / "shards"))
    assert (tmp_path / "space" / "shards" / "000000.tar").is_file()


@pytest.fixture
def data(tmp_path) -> SimpleNamespace:
    """Create images, a labelled set and settings that train in seconds."""
    files = {f"{number}.jpg": fake_data.encoded(fake_data.pixels(40, 48, number)) for number in range(8)}
    fake_data.write_files(tmp_path / "images", files)
    tiny.labelled_set(tmp_path / "labelled")
    settings = {
        "shards": {"images_per_shard": 3},
        "masks": {"workers": 0, "felzenszwalb_min_size": 20},
        "train": {**SMALL, "steps": 2, "clip": str(tiny.clip_folder(tmp_path / "clip")), "picture_every": 0},
        "evaluate": {"device": "cpu", "pictures": 1},
        "register": {"name": "tiny", "min_gain": -100},
    }
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(settings))
    return SimpleNamespace(images=tmp_path / "images", labelled=tmp_path / "labelled", params=tmp_path / "params.yaml")


def runs_of(client) -> list:
    return client.search_runs([client.get_experiment_by_name("pixelclip").experiment_id])


@pytest.fixture
def loops_read_outputs(monkeypatch):
    """Repair kfp 2.17's local runner, which gives the loop's item to every input that is another task's output."""
    original = enhanced_dag_orchestrator.task_spec_utils.create_parameter_loop_iteration_task_spec

    def repaired(spec, item, name):
        changed = original(spec, item, name)
        for key, value in spec.inputs.parameters.items():
            if value.HasField("task_output_parameter"):
                changed.inputs.parameters[key].CopyFrom(value)
        return changed

    module = enhanced_dag_orchestrator.task_spec_utils
    monkeypatch.setattr(module, "create_parameter_loop_iteration_task_spec", repaired)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.usefixtures("loops_read_outputs")
@pytest.mark.filterwarnings("ignore:.*(custom or non-Python base image|have no effect)")
def test_masks_in_parts_give_the_same_model_as_the_stages_alone(data, tmp_path, monkeypatch):
    accept_supervisor(monkeypatch)
    client = tiny.mlflow_at(monkeypatch, tmp_path / "mlflow")
    monkeypatch.setenv("PIXELCLIP_PIPELINE_RUN", "run-1")
    space = tmp_path / "space"
    local.init(local.SubprocessRunner(use_venv=False), pipeline_root=str(tmp_path / "kfp"), raise_on_error=True)
    shared = Cluster(parts=3, volume=Volume(claim="shared", mount=str(tmp_path)))
    build(shared)(**arguments(str(data.images), str(data.labelled), str(space), data.params, {}))
    assert {path.name for path in (space / "masks").iterdir()} == {"1-of-3", "2-of-3", "3-of-3"}
    (run,) = runs_of(client)
    assert (run.data.tags["kfp.run_id"], run.info.status) == ("run-1", "FINISHED")
    shown = next(tmp_path.glob("kfp/*/register/links")).read_text()
    assert "| images | `" in shown and "| labelled | `" in shown

    configs = load_all(data.params, {})
    alone = tmp_path / "alone"
    stage_shards.run(data.images, alone / "shards", configs["shards"])
    stage_masks.run(alone / "shards", alone / "masks", configs["masks"])
    trained = stage_train.run(alone / "masks", alone / "train", configs["train"])
    assert read_json(space / "train" / "metrics.json")["train/loss"] == pytest.approx(trained["train/loss"], abs=1e-6)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_failed_step_after_training_fails_the_mlflow_run(data, tmp_path, monkeypatch):
    client = tiny.mlflow_at(monkeypatch, tmp_path / "mlflow")
    (data.labelled / "classes.txt").write_text("")
    with pytest.raises(SystemExit, match="evaluate"):
        run_locally(data.images, data.labelled, tmp_path / "out", data.params, {})
    (run,) = runs_of(client)
    assert run.info.status == "FAILED" and (tmp_path / "out" / "train" / "metrics.json").is_file()


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_model_without_labelled_set_is_unmeasured_until_it_is_evaluated(data, tmp_path, monkeypatch, capsys):
    client = tiny.mlflow_at(monkeypatch, tmp_path / "mlflow")
    out = tmp_path / "out"
    run_locally(data.images, None, out, data.params, {})
    printed = capsys.readouterr().out
    assert "models:/tiny/1 is unmeasured: it was registered without an evaluation" in printed
    assert aliases(client, "tiny") == {}
    assert [run.info.status for run in runs_of(client)] == ["FINISHED"]
    made = {path.name for path in out.iterdir() if not path.name.startswith(".")}
    assert made == {"shards", "masks", "train", "register_unmeasured", "pipeline.log"}

    run_locally(data.images, data.labelled, out, data.params, {})  # reuses the model
    assert aliases(client, "tiny") == {"champion": "1"}
    assert (out / "metrics.json").is_file() and (out / "report.html").is_file()


def test_unknown_runner_is_rejected_before_any_step(tmp_path):
    with pytest.raises(ValueError, match="runner 'podman': must be one of subprocess, docker"):
        run_locally(ROOT, ROOT, tmp_path / "out", None, {}, runner="podman")


def test_output_that_points_to_a_missing_folder_is_missing(tmp_path):
    pointer = {"uri": str(tmp_path / "kfp" / "model"), "metadata": {"location": str(tmp_path / "space" / "train")}}
    fake_data.write_files(tmp_path / "kfp", {"model": b"where it is"})
    write_json(tmp_path / "output.json", {"artifacts": {"model": {"artifacts": [pointer]}}})
    declared = {"outputFile": str(tmp_path / "output.json"), "artifacts": {"model": {"artifacts": [{}]}}}
    assert missing_outputs(declared) == ["model"]
    (tmp_path / "space" / "train").mkdir(parents=True)
    assert missing_outputs(declared) == []


def test_unsupported_kfp_version_is_rejected(tmp_path, monkeypatch):
    monkeypatch.setenv("DOCKER_HOST", "tcp://127.0.0.1:9")
    with pytest.raises(ValueError, match="no Docker engine answers"), containers({}, tmp_path):
        pass
    monkeypatch.setattr(docker_task_handler, "run_docker_container", lambda client, image, arguments: 0)
    with pytest.raises(ValueError, match=r"kfp [0-9.]+ runs containers in a way that pixelclip does not support"):
        containers({}, tmp_path).__enter__()
