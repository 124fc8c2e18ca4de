"""The registered model: an MLflow pyfunc of code and safetensors, without pickle (docs/serving.md).

Request: one row per image with `image` (an image file, as bytes or base64) and `classes` (`dog|puppy,grass,sky`, or a list of
names); the params `overlay` and `score_maps` request further columns; `quality` is fast or best.
Response: one row per image with `format_version`, `label_map` (PNG of class indices), the lists `classes`, `shares` (of the
pixels) and `scores` (highest cosine), and on request `overlay` (PNG) and `score_maps` (.npy, [K, h, w] cosines). With
`format_version=1`, until 0.3, the lists are JSON texts and the column `format_version` is missing.
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
from mlflow.types.schema import Array

from pixelclip.data.class_names import parse_names
from pixelclip.data.images import decode_image
from pixelclip.inference.limits import Limits, check_classes
from pixelclip.inference.prediction import label_image, overlay, png
from pixelclip.inference.predictor import Predictor
from pixelclip.settings import cut

ARTIFACT = "pixelclip"
SIGNATURE = ModelSignature(
    inputs=Schema([ColSpec(DataType.binary, "image"), ColSpec(DataType.string, "classes")]),
    outputs=Schema(
        [
            ColSpec(DataType.long, "format_version"),
            ColSpec(DataType.binary, "label_map"),
            ColSpec(Array(DataType.string), "classes"),
            *(ColSpec(Array(DataType.double), name) for name in ("shares", "scores")),
            *(ColSpec(DataType.binary, name, required=False) for name in ("overlay", "score_maps")),
        ]
    ),
    params=ParamSchema(
        [
            ParamSpec("overlay", DataType.boolean, False),
            ParamSpec("score_maps", DataType.boolean, False),
            ParamSpec("quality", DataType.string, "fast"),
            ParamSpec("format_version", DataType.long, 2),
        ]
    ),
)
_FORMAT_VERSIONS = (1, 2)


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
        options = {param.name: param.default for param in SIGNATURE.params} | (params or {})
        if options["format_version"] not in _FORMAT_VERSIONS:
            raise MlflowException.invalid_parameter_value(
                f"format_version must be 1 or 2 (found {options['format_version']!r})"
            )
        rows = []
        for number, (image, classes) in enumerate(zip(model_input["image"], model_input["classes"], strict=True)):
            try:
                with self.slots:
                    rows.append(self._segment(image, classes, options))
            except ValueError as error:
                raise MlflowException.invalid_parameter_value(f"row {number}: {error}") from None
        columns = [column.name for column in SIGNATURE.outputs.inputs if column.required or options.get(column.name)]
        if options["format_version"] == 1:
            columns.remove("format_version")
        return pd.DataFrame(rows, columns=columns)

    def _segment(self, data: Any, classes: Any, options: dict[str, Any]) -> dict[str, Any]:
        _check_cell("image", data, (bytes, str), "bytes or base64")
        _check_cell("classes", classes, (str, list), "text or a list of names")
        classes = classes if isinstance(classes, str) else _joined(classes)
        check_classes(classes, self.limits)
        names = parse_names(classes)
        image = decode_image(_bytes(data, self.limits.max_bytes), self.limits.max_pixels)
        prediction = self.predictor(image, names, options["quality"])
        counts = np.bincount(prediction.labels.ravel(), minlength=len(names))
        lists = {
            "classes": prediction.classes,
            "shares": [round(float(count) / prediction.labels.size, 6) for count in counts],
            "scores": [round(float(score), 6) for score in prediction.scores.max(axis=(1, 2))],
        }
        as_text = options["format_version"] == 1
        row = {
            "format_version": options["format_version"],
            "label_map": png(label_image(prediction.labels)),
            **{name: json.dumps(values) if as_text else values for name, values in lists.items()},
        }
        if options["overlay"]:
            row["overlay"] = png(overlay(image, prediction))
        if options["score_maps"]:
            buffer = io.BytesIO()
            np.save(buffer, prediction.scores.astype(np.float32), allow_pickle=False)
            row["score_maps"] = buffer.getvalue()
        return row


def _check_cell(column: str, cell: Any, types: tuple[type, ...], expected: str) -> None:
    # MLflow does not check cells of JSON against the signature, and turns null into NaN.
    if not isinstance(cell, types):
        empty = cell is None or (isinstance(cell, float) and np.isnan(cell))
        raise ValueError(f"{column}: expected {expected}, found {'nothing' if empty else type(cell).__name__}")


def _joined(names: list[Any]) -> str:
    """Return a list of names as text; raise ValueError for what is no name, or a comma, which would make two of it."""
    for name in names:
        _check_cell("classes", name, (str,), "a name")
        if "," in name:
            raise ValueError(
                f"classes: a name of a list must not contain a comma, found {cut(name)}; write synonyms with a bar"
            )
    return ",".join(names)


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


mlflow.models.set_model(ServedModel())
