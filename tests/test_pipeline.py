"""The pipeline: it compiles, its parameters are described and checked, and its components run as plain functions."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from kfp import components
from kfp.components import load_component_from_file
from kfp.local import docker_task_handler

from pixelclip.config import load
from pixelclip_pipelines.docker import containers
from pixelclip_pipelines.pixelclip import SETTING_OF
from pixelclip_pipelines.run import arguments, compile_to, run_locally

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("pipeline") / "pixelclip.yaml"
    compile_to(path)
    return path


def test_kfp_accepts_the_compiled_yaml(compiled):
    loaded = load_component_from_file(str(compiled))
    assert isinstance(loaded, components.YamlComponent)
    assert loaded.component_spec.name == "pixelclip"


def test_every_parameter_is_described(compiled):
    parameters = yaml.safe_load(compiled.read_text())["root"]["inputDefinitions"]["parameters"]
    assert {"images", "labelled", "settings", "workspace", *SETTING_OF} == set(parameters)
    for name, entry in parameters.items():
        assert len(entry.get("description", "")) > 10, name


def test_steps_stand_in_the_order_of_the_arrow_line(compiled):
    tasks = yaml.safe_load(compiled.read_text())["root"]["dag"]["tasks"]
    needs = {name: set(task.get("dependentTasks", [])) for name, task in tasks.items()}
    assert needs == {
        "shards": set(),
        "masks": {"shards"},
        "train": {"masks"},
        "evaluate": {"train"},
        "register": {"train", "evaluate"},
    }


def test_defaults_are_those_of_the_settings(compiled):
    parameters = yaml.safe_load(compiled.read_text())["root"]["inputDefinitions"]["parameters"]
    for name, setting in SETTING_OF.items():
        stage, _, field = setting.partition(".")
        assert parameters[name]["defaultValue"] == getattr(load(stage), field)


def test_the_image_is_chosen_by_the_environment(compiled):
    executors = yaml.safe_load(compiled.read_text())["deploymentSpec"]["executors"]
    assert {executor["container"]["image"] for executor in executors.values()} == {"pixelclip:dev"}


def test_arguments_reach_every_stage():
    given = arguments("i", "l", "", ROOT / "params.yaml", {"steps": 7, "train.prompt_tokens": 3, "masks.max_masks": 9})
    assert given["steps"] == 7
    assert given["settings"]["train.prompt_tokens"] == 3
    assert given["settings"]["masks.max_masks"] == 9
    config = load("train", overrides={**given["settings"], "train.steps": given["steps"]})
    assert (config.steps, config.prompt_tokens, config.side) == (7, 3, load("train", ROOT / "params.yaml").side)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({"steps": 0}, "steps: Input should be greater than or equal to 1"),
        ({"step": 5}, "did you mean 'steps'"),
        ({"train.stepz": 5}, "did you mean 'steps'"),
        ({"trian.steps": 5}, "did you mean 'train'"),
        ({"generator": "sam9"}, "Input should be 'felzenszwalb', 'given', 'sam' or 'dino'"),
        ({"steps": 5, "train.steps": 6}, "train.steps is given twice"),
        ({"images": "x"}, "see --help"),
    ],
)
def test_a_wrong_parameter_is_refused_before_any_step(tmp_path, overrides, said):
    out = tmp_path / "out"
    with pytest.raises(ValueError, match=said.replace("(", r"\(").replace(".", r"\.")):
        run_locally(ROOT, ROOT, out, None, overrides)
    assert not out.exists()


def test_a_missing_folder_is_refused_before_any_step(tmp_path):
    with pytest.raises(ValueError, match="no such folder"):
        run_locally(tmp_path / "nothing", ROOT, tmp_path / "out", None, {})


def test_a_component_is_a_plain_function_in_a_test(tmp_path):
    from PIL import Image

    from pixelclip_components.shards.component import shards

    (tmp_path / "images").mkdir()
    Image.new("RGB", (20, 10), "red").save(tmp_path / "images" / "a.png")
    logged = {}
    metrics = SimpleNamespace(log_metric=logged.__setitem__)
    output = SimpleNamespace(path=str(tmp_path / "shards"), uri="")
    shards.python_func(str(tmp_path / "images"), output, metrics, {"shards.images_per_shard": 10.0})
    assert logged["images"] == 1
    assert (tmp_path / "shards" / "000000.tar").is_file()
    shared = SimpleNamespace(path="unused", uri="")
    shards.python_func(str(tmp_path / "images"), shared, metrics, {}, workspace=str(tmp_path / "space"))
    assert shared.uri == str(tmp_path / "space" / "shards")
    assert (tmp_path / "space" / "shards" / "000000.tar").is_file()


def test_an_unknown_runner_is_refused_before_any_step(tmp_path):
    with pytest.raises(ValueError, match="runner 'podman': must be one of subprocess, docker"):
        run_locally(ROOT, ROOT, tmp_path / "out", None, {}, "podman")


def test_the_function_that_containers_replace_is_the_one_kfp_has(tmp_path, monkeypatch):
    monkeypatch.setenv("DOCKER_HOST", "tcp://127.0.0.1:9")
    with pytest.raises(ValueError, match="no Docker engine answers"), containers({}, tmp_path):
        pass
    monkeypatch.setattr(docker_task_handler, "run_docker_container", lambda client, image, arguments: 0)
    with pytest.raises(ValueError, match=r"kfp [0-9.]+ runs containers in a way that pixelclip does not know"):
        containers({}, tmp_path).__enter__()
