"""The functions of `import pixelclip`."""

import inspect
import json
import subprocess
import sys

import numpy as np
import pytest
import typer
from PIL import Image

import pixelclip
from helpers import training
from pixelclip import api
from pixelclip.cli.app import app
from pixelclip.cli.app import main as command_line

clip, shards, config = training.clip, training.shards, training.config
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
    own = {"part"} if name == "masks" else set()  # an alias of the setting
    parameters = inspect.signature(getattr(pixelclip, name)).parameters
    assert set(parameters) == options - own
    assert parameters["settings"].kind is inspect.Parameter.VAR_KEYWORD


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


def test_images_to_a_trained_model_in_python(tmp_path, config, clip):
    config()  # an empty MLflow database
    pixelclip.toy(tmp_path / "toy", train_scenes=8, test_scenes=2, side=48)
    pixelclip.shards(tmp_path / "toy" / "images", tmp_path / "shards")
    masks = pixelclip.masks(tmp_path / "shards", tmp_path / "masks", workers=0, preview=1, felzenszwalb_min_size=20)
    assert masks["images"] == 8 and (tmp_path / "masks" / "preview.jpg").is_file()
    pixelclip.train(tmp_path / "masks", tmp_path / "model", **{**training.SMALL, "clip": clip, "steps": 2, "picture_every": 0})
    metrics = pixelclip.evaluate(
        tmp_path / "model", tmp_path / "toy" / "toy", tmp_path / "evaluation", device="cpu", pictures=0
    )
    plain = pixelclip.evaluate_clip(tmp_path / "toy" / "toy", tmp_path / "clip", str(clip), 32, device="cpu", pictures=0)
    assert plain["miou_clip/toy"] == metrics["miou_clip/toy"]
    photo = next((tmp_path / "toy" / "toy" / "images").iterdir())
    result = pixelclip.load(tmp_path / "model", "cpu")(photo, ["sky", "dog"])
    with Image.open(photo) as image:
        assert result.labels.shape == (image.height, image.width) and np.unique(result.labels).max() < 2
    assert pixelclip.register(tmp_path / "model", tmp_path / "evaluation", tmp_path / "registration", name="tiny")
    registered = pixelclip.load("models:/tiny/1", "cpu")(photo, ["sky", "dog"])
    assert np.array_equal(registered.labels, result.labels)


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
