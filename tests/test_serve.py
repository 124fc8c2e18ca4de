"""The registered model as others call it: logged as code and safetensors, loaded and asked by MLflow."""

import base64
import io
import json
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest
import tiny
from PIL import Image

from pixelclip import serve
from pixelclip.predict import Predictor

# MLflow asks for an example input, with which it would run the model once more when it is logged.
pytestmark = pytest.mark.filterwarnings("ignore:.*An input example was not provided")


def photo(width: int, height: int, seed: int) -> bytes:
    blocks = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(blocks).resize((width, height)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    base = tmp_path_factory.mktemp("serve")
    return tiny.model_folder(base / "model", tiny.clip_folder(base / "clip"))


@pytest.fixture(scope="module")
def logged(folder, tmp_path_factory) -> Path:
    """The model as MLflow saves it."""
    path = tmp_path_factory.mktemp("logged") / "model"
    mlflow.pyfunc.save_model(
        path,
        python_model=serve.__file__,
        artifacts={serve.ARTIFACT: str(folder)},
        signature=serve.SIGNATURE,
        pip_requirements=[],
    )
    return path


@pytest.fixture(scope="module")
def model(logged) -> mlflow.pyfunc.PyFuncModel:
    return mlflow.pyfunc.load_model(str(logged))


def test_every_row_is_answered_as_by_the_predictor(model, folder):
    rows = [(photo(50, 30, 0), "dog|puppy,grass,sky", ["dog, puppy", "grass", "sky"]), (photo(9, 60, 1), "a,b", ["a", "b"])]
    answers = model.predict(pd.DataFrame({"image": [row[0] for row in rows], "classes": [row[1] for row in rows]}))
    assert list(answers.columns) == ["label_map", "classes"]
    predictor = Predictor.load(folder, "cpu")
    for (image, _, names), answer in zip(rows, answers.itertuples(), strict=True):
        assert json.loads(answer.classes) == names
        expected = predictor(Image.open(io.BytesIO(image)), names).labels
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(answer.label_map))), expected)


def test_base64_is_answered_like_bytes(model):
    image = photo(20, 20, 2)
    loaded = model.unwrap_python_model()  # an HTTP client sends text, which MLflow may hand on as it is
    frames = [pd.DataFrame({"image": [data], "classes": ["a,b"]}) for data in (image, base64.b64encode(image).decode())]
    first, second = (loaded.predict(None, frame) for frame in frames)
    assert first.equals(second)


@pytest.mark.parametrize(
    ("image", "classes", "message"),
    [
        (b"no image", "a,b", "row 1: unreadable image"),
        ("not base64!", "a,b", "row 1: image: neither bytes nor base64"),
        ("é", "a,b", "row 1: "),
        (None, "a,,b", "row 1: classes: blank class name at position 2"),
    ],
)
def test_a_bad_row_is_named(model, image, classes, message):
    good = photo(20, 20, 2)
    frame = pd.DataFrame({"image": [good, good if image is None else image], "classes": ["a,b", classes]})
    with pytest.raises(ValueError, match=message):
        model.unwrap_python_model().predict(None, frame)


def test_no_rows_no_answers(model):
    answers = model.unwrap_python_model().predict(None, pd.DataFrame({"image": [], "classes": []}))
    assert len(answers) == 0 and list(answers.columns) == ["label_map", "classes"]


def test_nothing_logged_is_a_pickle(logged):
    files = [path for path in logged.rglob("*") if path.is_file()]
    assert any(path.name == "model.safetensors" for path in files)
    for path in files:
        assert path.suffix in (".safetensors", ".json", ".py", ".yaml", ".yml", ".txt", "")
        assert path.suffix != "" or path.name == "MLmodel"
        assert not path.read_bytes().startswith((b"\x80", b"PK"))  # a pickle, or torch's zip with one inside
