"""The functions of `import pixelclip`."""

import inspect
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import typer
import yaml
from mlflow import MlflowClient

import pixelclip
from helpers import training
from pixelclip import api
from pixelclip.cli.app import app
from pixelclip.cli.app import main as command_line
from pixelclip.config import PredictConfig

clip, shards, config = training.clip, training.shards, training.config
PAGE = Path(__file__).parents[1] / "docs" / "python.md"
COMMANDS = typer.main.get_command(app).commands
LIGHT = """
import sys
import pixelclip
print([name for name in ("torch", "numpy", "PIL", "pydantic", "mlflow", "pixelclip.api") if name in sys.modules])
"""


def test_import_is_light():
    done = subprocess.run([sys.executable, "-c", LIGHT], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"


FUNCTIONS = [name for name in pixelclip.__all__ if name not in ("__version__", "load")]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_function_takes_the_options_of_its_command(name):
    options = {parameter.name for parameter in COMMANDS[name].params}
    own = {"masks": {"part"}, "train": {"run_name"}}.get(name, set())  # aliases of settings
    parameters = inspect.signature(getattr(pixelclip, name)).parameters
    settings = set(PredictConfig.model_fields) if name == "predict" else {"settings"} & set(parameters)
    assert {*parameters} - {"settings"} | settings == options - own
    assert name == "merge" or parameters["settings"].kind is inspect.Parameter.VAR_KEYWORD


def test_stage_is_a_module_and_a_function():
    import pixelclip.shards as module
    from pixelclip import shards as same

    assert module is same is pixelclip.shards is sys.modules["pixelclip.shards"]
    assert callable(pixelclip.shards) and inspect.signature(module.run)
    with pytest.raises(AttributeError, match="module 'pixelclip' has no attribute 'segment'"):
        pixelclip.segment  # noqa: B018


def test_functions_write_what_the_commands_write(tmp_path, monkeypatch):
    metrics = pixelclip.toy(tmp_path / "a", train_scenes=3, test_scenes=1, side=32)
    assert metrics == json.loads((tmp_path / "a" / "metrics.json").read_text())
    words = ["toy", "--out", str(tmp_path / "b"), "train_scenes=3", "test_scenes=1", "side=32"]
    monkeypatch.setattr(sys, "argv", ["pixelclip", *words])
    with pytest.raises(SystemExit, match="0"):
        command_line()
    written, expected = (json.loads((tmp_path / out / "provenance.json").read_text()) for out in "ab")
    assert written["output"] == expected["output"] and written["settings"] == expected["settings"]


@pytest.fixture
def registered(tmp_path, config, clip, monkeypatch):
    """Take a new user's folder from images to the champion `pixelclip-toy`, in Python; then work there."""
    config()  # an empty MLflow database
    monkeypatch.chdir(tmp_path)
    pixelclip.toy("toy", train_scenes=8, test_scenes=2, side=48)
    pixelclip.shards("toy/images", "shards")
    masks = pixelclip.masks("shards", "masks", workers=0, preview=1, felzenszwalb_min_size=20)
    assert masks["images"] == 8 and (tmp_path / "masks" / "preview.jpg").is_file()
    pixelclip.train("masks", "model", **{**training.SMALL, "clip": clip, "steps": 2, "picture_every": 0})
    metrics = pixelclip.evaluate("model", "toy/toy", "evaluation", device="cpu", pictures=0)
    plain = pixelclip.evaluate_clip("toy/toy", "clip", str(clip), 32, device="cpu", pictures=0)
    assert plain["miou_clip/toy"] == metrics["miou_clip/toy"]
    pixelclip.register("model", "registration", evaluation="evaluation", name="pixelclip-toy")
    MlflowClient().set_registered_model_alias("pixelclip-toy", "champion", "1")
    return tmp_path


def test_blocks_of_the_page_run_in_order(registered, clip):
    shutil.copytree("toy/images", "photos")
    shutil.copytree("toy/toy", "labelled")
    shutil.copyfile(next(Path("photos").iterdir()), "photo.jpg")
    sections = {"masks": {"workers": 0, "felzenszwalb_min_size": 20}, "evaluate": {"device": "cpu", "pictures": 0}}
    sections["train"] = {**training.SMALL, "clip": str(clip), "steps": 2, "picture_every": 0}
    Path("params.yaml").write_text(yaml.safe_dump(sections))
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
    assert len(blocks) == 5
    folder = pixelclip.load("model", "cpu")("photo.jpg", ["dog|puppy", "grass", "sky"])
    assert np.array_equal(names["result"].labels, folder.labels)  # the registered model and its folder
    assert (registered / "labels.overlay.png").is_file() and (registered / "predictions" / "label_studio.xml").is_file()
    whole, merged = (Path(out, "predictions.json").read_bytes() for out in ("predictions", "merged"))
    assert merged == whole
    assert Path("work/model/model.safetensors").is_file()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"setps": 3}, "unknown setting 'setps', did you mean 'steps'"),
        ({"steps": "many"}, r"steps: .*found 'many'"),
        ({"masks.generator": "sam"}, "masks.generator is not a setting of stage train"),
    ],
)
def test_invalid_setting_is_rejected_before_anything_starts(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        api.train("nowhere", tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
