"""The check of a model's first answer: every way in which an answer can be wrong is named."""

import base64
import json
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from pixelclip.commands.smoke import check_answer, smoke_request
from pixelclip.inference.prediction import png
from pixelclip.toy_scenes.scenes import CLASSES

REQUEST = smoke_request()
COUNT = len(REQUEST.classes)


def label_map(height: int, width: int, values: int = COUNT) -> str:
    labels = (np.arange(height * width) % values).astype(np.uint8).reshape(height, width)
    return base64.b64encode(png(Image.fromarray(labels))).decode()


def good() -> dict:
    """Return an answer whose pixels have each class in turn."""
    pixels = REQUEST.side**2
    return {
        "label_map": label_map(REQUEST.side, REQUEST.side),
        "classes": list(REQUEST.classes),
        "shares": [len(range(index, pixels, COUNT)) / pixels for index in range(COUNT)],
        "scores": [0.2 + 0.01 * index for index in range(COUNT)],
    }


def body(row: dict) -> bytes:
    return json.dumps({"predictions": [row]}).encode()


def test_request_has_an_image_and_the_classes_in_it():
    table = json.loads(REQUEST.body)["dataframe_split"]
    assert table["columns"] == ["image", "classes"]
    ((image, classes),) = table["data"]
    assert base64.b64decode(image).startswith(b"\x89PNG") and classes.split(",") == REQUEST.classes
    assert set(REQUEST.classes) <= set(CLASSES) and COUNT >= 3


def test_both_forms_of_a_good_answer_pass():
    check_answer(REQUEST, 200, body(good()))
    texts = {name: json.dumps(value) if isinstance(value, list) else value for name, value in good().items()}
    check_answer(REQUEST, 200, body(texts))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda row: row.update(scores=[float("nan")] * COUNT), "not cosines"),
        (lambda row: row.update(scores=[None] * COUNT), "not cosines"),
        (lambda row: row["scores"].__setitem__(0, 1.5), "not cosines"),
        (lambda row: row.update(scores=[0.2] * COUNT), "the same for all classes: 0.2"),
        (lambda row: row["classes"].reverse(), "has other classes"),
        (lambda row: row["scores"].pop(), "has other classes"),
        (lambda row: row["shares"].reverse() or row["shares"].__setitem__(0, 0.9), "do not fit its label map"),
        (lambda row: row.update(label_map=label_map(9, 9)), r"has shape \(9, 9\)"),
        (lambda row: row.update(label_map=label_map(REQUEST.side, REQUEST.side, COUNT + 1)), f"values up to {COUNT}"),
        (lambda row: row.update(label_map="no image"), "is not a segmentation"),
        (lambda row: row.pop("scores"), "is not a segmentation: KeyError: 'scores'"),
    ],
)
def test_wrong_answer_is_named(change: Callable[[dict], object], message: str):
    row = good()
    change(row)
    with pytest.raises(ValueError, match=message):
        check_answer(REQUEST, 200, body(row))


def test_failed_request_gives_the_last_line_of_the_message():
    error = {"error_code": "INVALID_PARAMETER_VALUE", "message": "an outline\nof the request\nError: row 0: image: too large"}
    with pytest.raises(ValueError, match="failed with status 400: Error: row 0: image: too large"):
        check_answer(REQUEST, 400, json.dumps(error).encode())
    with pytest.raises(ValueError, match="failed with status 504: Request processing time exceeded limit"):
        check_answer(REQUEST, 504, b"Request processing time exceeded limit")
    with pytest.raises(ValueError, match="is not a segmentation"):
        check_answer(REQUEST, 200, b"<html>")
