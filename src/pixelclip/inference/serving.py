"""The registered model: an MLflow pyfunc of code and safetensors, without pickle (docs/serving.md).

Request: one row per image with `image` (an image file, as bytes or base64) and `classes` (`dog|puppy,grass,sky`); the params
`overlay` and `score_maps` request further columns; `quality` is fast or best.
Response: one row per image with `label_map` (PNG of class indices), `classes`, `shares` (of the pixels) and `scores` (highest
cosine) as JSON lists, and on request `overlay` (PNG) and `score_maps` (.npy, [K, h, w] cosines).
"""

import base64
import binascii
import io
import json
import threading
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.models import ModelSignature
from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema
from PIL import Image

from pixelclip.data.class_names import parse_names
from pixelclip.data.images import decode_image
from pixelclip.inference.limits import Limits, check_classes
from pixelclip.inference.prediction import label_image, overlay
from pixelclip.inference.predictor import Predictor

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
    params=ParamSchema(
        [
            ParamSpec("overlay", DataType.boolean, False),
            ParamSpec("score_maps", DataType.boolean, False),
            ParamSpec("quality", DataType.string, "fast"),
        ]
    ),
)


class ServedModel(mlflow.pyfunc.PythonModel):  # type: ignore[misc]
    """The model behind MLflow's `predict`."""

    def load_context(self, context: Any) -> None:
        """Load the logged model folder."""
        self.limits = Limits.load(dict(context.model_config or {}))
        # The server has a thread per request, and an image may take a gigabyte while it is segmented.
        self.slots = threading.Semaphore(self.limits.max_parallel)
        self.predictor = Predictor.load(Path(context.artifacts[ARTIFACT]))

    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:
        """Segment every row.

        Raises:
            MlflowException: a limit is exceeded, or an image or list of classes is invalid; the message names the row. MLflow
                returns a stack trace for any other exception type.
        """
        if len(model_input) > self.limits.max_images:
            raise MlflowException.invalid_parameter_value(
                f"{len(model_input)} images in one request; at most {self.limits.max_images} are allowed"
            )
        options = params or {}
        rows = []
        for number, (image, classes) in enumerate(zip(model_input["image"], model_input["classes"], strict=True)):
            try:
                with self.slots:
                    rows.append(self._segment(image, classes, options))
            except ValueError as error:
                raise MlflowException.invalid_parameter_value(f"row {number}: {error}") from None
        columns = [column.name for column in SIGNATURE.outputs.inputs if column.required or options.get(column.name)]
        return pd.DataFrame(rows, columns=columns)

    def _segment(self, data: Any, classes: Any, options: dict[str, Any]) -> dict[str, Any]:
        _check_cell("image", data, (bytes, str), "bytes or base64")
        _check_cell("classes", classes, (str,), "text")
        check_classes(classes, self.limits)
        names = parse_names(classes)
        image = decode_image(_bytes(data, self.limits.max_bytes), self.limits.max_pixels)
        prediction = self.predictor(image, names, options.get("quality", "fast"))
        counts = np.bincount(prediction.labels.ravel(), minlength=len(names))
        row = {
            "label_map": _png(label_image(prediction.labels)),
            "classes": json.dumps(prediction.classes),
            "shares": json.dumps([round(float(count) / prediction.labels.size, 6) for count in counts]),
            "scores": json.dumps([round(float(score), 6) for score in prediction.scores.max(axis=(1, 2))]),
        }
        if options.get("overlay"):
            row["overlay"] = _png(overlay(image, prediction))
        if options.get("score_maps"):
            buffer = io.BytesIO()
            np.save(buffer, prediction.scores.astype(np.float32), allow_pickle=False)
            row["score_maps"] = buffer.getvalue()
        return row


def _check_cell(column: str, cell: Any, types: tuple[type, ...], expected: str) -> None:
    # MLflow does not check cells of JSON against the signature, and turns null into NaN.
    if not isinstance(cell, types):
        empty = cell is None or (isinstance(cell, float) and np.isnan(cell))
        raise ValueError(f"{column}: expected {expected}, found {'nothing' if empty else type(cell).__name__}")


def _bytes(data: bytes | str, limit: int) -> bytes:
    # Base64 encodes three bytes in four characters, so the size is checked before decoding.
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


mlflow.models.set_model(ServedModel())
