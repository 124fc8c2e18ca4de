"""Function, command, DVC stage and KFP component of a stage take the same inputs and settings."""

import inspect
import shlex
from importlib import import_module
from pathlib import Path

import pytest
import typer
import yaml

from helpers.imports import child, imported_with_theirs
from pixelclip.cli.app import app
from pixelclip.cli.pipeline import pipeline
from pixelclip.config import SETTINGS, STAGES, EvaluateConfig, lasting
from pixelclip_pipelines.predict import build

ROOT = Path(__file__).parents[1]
DVC = yaml.safe_load((ROOT / "dvc.yaml").read_text())
COMMANDS = typer.main.get_command(app).commands
NAMES = [*STAGES, "evaluate_clip"]
OF_TRAINING = {"clip", "side", "residual"}  # settings of train that evaluate_clip reads, besides section evaluate
PIPELINE_STAGES = [stage for stage in NAMES if stage != "toy"]  # scenes are painted before the pipeline starts
PREDICTION = ["fetch_model", "predict", "merge"]  # components of pixelclip-predict
DVC_STAGES = [stage for stage in NAMES if stage != "fetch_data"]  # DVC already has the data that it tracks


def run_inputs(stage: str) -> list[str]:
    """Return the names of a stage's inputs, from the signature of its function."""
    names = list(inspect.signature(import_module(f"pixelclip.{stage}").run).parameters)
    position = names.index("out")
    assert names[position + 1] == "config"
    return names[:position] + names[position + 2 :]


def named(stage: str) -> set[str]:
    """Return the inputs that commands and components must name; others default to settings of `train`."""
    return set(run_inputs(stage)) - (OF_TRAINING if stage == "evaluate_clip" else set())


def component(stage: str):
    return getattr(import_module(f"pixelclip_components.{stage}.component"), stage)


@pytest.mark.parametrize("stage", NAMES)
def test_function_takes_the_settings_of_its_stage(stage):
    config = inspect.signature(import_module(f"pixelclip.{stage}").run).parameters["config"].annotation
    assert config is STAGES.get(stage, EvaluateConfig)


@pytest.mark.parametrize("stage", NAMES)
def test_command_takes_the_same_inputs(stage):
    options = {parameter.name for parameter in COMMANDS[stage].params}
    own = {"masks": {"part", "preview"}, "train": {"run_name"}}.get(stage, set())  # aliases of settings, and a picture
    assert options - own == {*run_inputs(stage), "out", "params", "settings"}


@pytest.mark.parametrize("stage", DVC_STAGES)
def test_dvc_stage_calls_the_command_with_the_same_inputs(stage):
    words = shlex.split(DVC["stages"][stage]["cmd"])
    assert words[:2] == ["pixelclip", stage]
    given = dict(zip(words[2::2], words[3::2], strict=True))
    options = {name: f"--{name.replace('_', '-')}" for name in named(stage)}
    assert set(given) == {*options.values(), "--out", "--params"}
    entry = DVC["stages"][stage]
    assert entry["outs"] == [given["--out"]]
    for name, option in options.items():
        assert any(given[option].startswith(dep) for dep in entry["deps"]), name


@pytest.mark.parametrize("stage", DVC_STAGES)
def test_dvc_stage_depends_on_every_module_and_lasting_setting(stage):
    entry = DVC["stages"][stage]
    code = {dep for dep in entry["deps"] if dep.startswith("src/pixelclip") and "assets" not in dep}
    imported = {f"src/pixelclip/{child(module)}" for module in imported_with_theirs(stage)}
    assert code == ({"src/pixelclip"} if stage == "register" else imported)  # register ships the package with the model
    expected = {f"{stage}.{name}" for name in lasting(SETTINGS[stage]())}
    if stage == "evaluate_clip":
        own = {f"evaluate.{name}" for name in lasting(SETTINGS[stage]()) if name != "residual"}
        expected = own | {f"train.{name}" for name in OF_TRAINING}
    assert set(entry["params"]) in ({stage}, expected)
    if set(entry["params"]) == {stage}:
        assert set(lasting(STAGES[stage]())) == set(STAGES[stage].model_fields)


@pytest.mark.parametrize("stage", PIPELINE_STAGES)
def test_component_takes_the_same_inputs(stage):
    spec = component(stage).component_spec
    settings = {name for name in spec.inputs if name in SETTINGS[stage].model_fields or name == "registry_name"}
    other = {
        "train": {"parts"},  # masks from several steps
        "fetch_data": {"fetch"},  # cache key
        "evaluate_clip": {"clip_version", "data_version"},  # cache keys
    }
    assert set(spec.inputs) - settings - other.get(stage, set()) == {*named(stage), "settings", "workspace"}
    assert ("metrics" in spec.outputs) == (stage == "evaluate")  # the one step that people compare


def test_components_of_a_prediction_take_the_options_of_the_commands():
    options = {name: {parameter.name for parameter in COMMANDS[name].params} for name in ("predict", "merge")}
    inputs = {name: set(component(name).component_spec.inputs) for name in options}
    assert inputs["predict"] == options["predict"] - {"photos", "out", "device"} | {"images", "workspace"}
    assert inputs["merge"] == options["merge"] | {"workspace"}
    given = set(build().component_spec.inputs)
    assert given == inputs["predict"] - {"part"} | {"out", "repo", "revision"}
    submit = typer.main.get_command(pipeline).commands["submit-predict"]
    assert {parameter.name for parameter in submit.params} == given | {"name", "cron", "every", "cluster", "image", "endpoint"}
    defaults = {name: each.default for name, each in build().component_spec.inputs.items() if each.default is not None}
    assert {parameter.name: parameter.default for parameter in submit.params if parameter.name in defaults} == defaults


@pytest.mark.parametrize("stage", [*PIPELINE_STAGES, *PREDICTION])
def test_component_body_only_translates(stage):
    function = component(stage).python_func
    source, _ = inspect.getsourcelines(function)
    start = next(i for i, line in enumerate(source) if '"""' in line) + 1
    body = [line for line in source[start:] if line.strip() and not line.strip().startswith(("from ", "import "))]
    assert len(body) <= 10
    assert not any(word in line for line in body for word in (" if ", "while ", "try:"))


@pytest.mark.parametrize("stage", [*PIPELINE_STAGES, *PREDICTION])
def test_component_readme_lists_inputs_and_outputs(stage):
    text = (ROOT / "components" / stage / "README.md").read_text()
    spec = component(stage).component_spec
    for name in [*spec.inputs, *spec.outputs]:
        assert f"`{name}`" in text, name
