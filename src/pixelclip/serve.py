"""The registered model's code: an MLflow pyfunc from code and safetensors, no pickle. docs/serving.md is its manual.

Request: one row an image, `image` (the bytes of an image file, or base64 of them) and `classes` (`dog|puppy,grass,sky`);
params `overlay` and `score_maps` ask for larger answers.
Response: one row an image, `label_map` (PNG whose values index into the classes), `classes`, `shares` (of the pixels) and
`scores` (highest cosine) as JSON lists, and what was asked for: `overlay` (PNG) and `score_maps` (.npy, [K, h, w] cosines).
"""

import base64
import binascii
import io
import json
import os
import re
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.models import ModelSignature
from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field

from pixelclip.class_names import parse_names
from pixelclip.config import build
from pixelclip.images import decode_image
from pixelclip.predict import Prediction, Predictor, label_image, overlay

ARTIFACT = "pixelclip"
SIGNATURE = ModelSignature(
    inputs=Schema([ColSpec(DataType.binary, "image"), ColSpec(DataType.string, "classes")]),
    outputs=Schema(
        [
            ColSpec(DataType.binary, "label_map"),
            *(ColSpec(DataType.string, name) for name in ("classes", "shares", "scores")),
            *(ColSpec(DataType.binary, name, required=False) for name in ("overlay", "score_maps")),
        ]
    ),
    params=ParamSchema([ParamSpec("overlay", DataType.boolean, False), ParamSpec("score_maps", DataType.boolean, False)]),
)
_ENVIRONMENT = "PIXELCLIP_SERVE_"


class Limits(BaseModel):
    """What a request may ask for; a limit in the model's `model_config`, or PIXELCLIP_SERVE_MAX_BYTES and so on, changes it."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    max_images: int = Field(default=16, ge=1, description="Rows in a request.")
    max_bytes: int = Field(default=20_000_000, ge=1, description="Bytes of an image file.")
    max_pixels: int = Field(default=16_000_000, ge=1, description="Pixels of an image; larger ones are not decoded.")
    max_classes: int = Field(default=1000, ge=1, description="Classes of an image, without synonyms.")
    max_names: int = Field(default=1000, ge=1, description="Names of an image's classes, with synonyms.")
    max_characters: int = Field(default=200, ge=1, description="Characters of a name.")

    @classmethod
    def load(cls, settings: dict[str, Any]) -> "Limits":
        """The limits of a model's configuration and of the environment, which wins; raises ValueError for unusable ones."""
        names = {name: f"{_ENVIRONMENT}{name.upper()}" for name in cls.model_fields}
        given = {name: os.environ[variable] for name, variable in names.items() if os.environ.get(variable)}
        return build(cls, settings | given, f"limits of the served model ({_ENVIRONMENT}*)")


class ServedModel(mlflow.pyfunc.PythonModel):  # type: ignore[misc]
    """Answers MLflow's `predict`."""

    def load_context(self, context: Any) -> None:
        """Loads the model folder that was logged."""
        self.limits = Limits.load(dict(context.model_config or {}))
        self.predictor = Predictor.load(Path(context.artifacts[ARTIFACT]))

    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:
        """Segments every row.

        Raises:
            MlflowException: more than the limits allow, an image that cannot be read, or an unusable list of classes; the
                message names the row. Of other errors MLflow's server shows its client a stack trace.
        """
        if len(model_input) > self.limits.max_images:
            raise MlflowException.invalid_parameter_value(
                f"{len(model_input)} images in one request; at most {self.limits.max_images} are allowed"
            )
        wanted = params or {}
        rows = []
        for number, (image, classes) in enumerate(zip(model_input["image"], model_input["classes"], strict=True)):
            try:
                rows.append(self._answer(image, classes, wanted))
            except ValueError as error:
                raise MlflowException.invalid_parameter_value(f"row {number}: {error}") from None
        columns = [
            "label_map",
            "classes",
            "shares",
            "scores",
            *(name for name in ("overlay", "score_maps") if wanted.get(name)),
        ]
        return pd.DataFrame(rows, columns=columns)

    def _answer(self, data: Any, classes: Any, wanted: dict[str, Any]) -> dict[str, Any]:
        _check_cell("image", data, (bytes, str), "bytes or base64")
        _check_cell("classes", classes, (str,), "text")
        _check_classes(classes, self.limits)
        names = parse_names(classes)
        image = decode_image(_bytes(data, self.limits.max_bytes), self.limits.max_pixels)
        prediction = self.predictor(image, names)
        counts = np.bincount(prediction.labels.ravel(), minlength=len(names))
        answer = {
            "label_map": _png(label_image(prediction.labels)),
            "classes": json.dumps(prediction.classes),
            "shares": json.dumps([round(float(count) / prediction.labels.size, 6) for count in counts]),
            "scores": json.dumps([round(float(score), 6) for score in prediction.scores.max(axis=(1, 2))]),
        }
        if wanted.get("overlay"):
            answer["overlay"] = _png(overlay(image, prediction))
        if wanted.get("score_maps"):
            answer["score_maps"] = _npy(prediction)
        return answer


def _check_cell(column: str, found: Any, kinds: tuple[type, ...], needed: str) -> None:
    # MLflow lets any cell of JSON pass, whatever the signature says; of null it makes NaN.
    if not isinstance(found, kinds):
        empty = found is None or (isinstance(found, float) and np.isnan(found))
        raise ValueError(f"{column}: {needed} must stand here, found {'nothing' if empty else type(found).__name__}")


def _check_classes(classes: str, limits: Limits) -> None:
    # Every name is encoded in eight templates, and a tokenizer's time goes by the square of its length.
    num_classes = classes.count(",") + 1
    num_names = num_classes + classes.count("|")
    if num_classes > limits.max_classes:
        raise ValueError(f"classes: {num_classes} names; at most {limits.max_classes} are allowed")
    if num_names > limits.max_names:
        raise ValueError(f"classes: {num_names} names with synonyms; at most {limits.max_names} are allowed")
    longest = max(map(len, re.split("[,|]", classes)))
    if longest > limits.max_characters:
        raise ValueError(f"classes: a name of {longest} characters; at most {limits.max_characters} are allowed")


def _bytes(data: bytes | str, limit: int) -> bytes:
    # Base64 holds three bytes in four characters: what is too long is not decoded first.
    size = len(data) * 3 // 4 - 2 if isinstance(data, str) else len(data)
    if size > limit:
        raise ValueError(f"image: {size} bytes; at most {limit} are allowed")
    if isinstance(data, str):
        try:
            return base64.b64decode(data, validate=True)
        except binascii.Error as error:
            raise ValueError(f"image: neither bytes nor base64: {error}") from None
    return data


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def _npy(prediction: Prediction) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, prediction.scores.astype(np.float32), allow_pickle=False)
    return buffer.getvalue()


mlflow.models.set_model(ServedModel())
