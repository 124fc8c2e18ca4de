"""The registered model's code: an MLflow pyfunc from code and safetensors, no pickle.

Request: one row an image, `image` (the bytes of an image file, or base64 of them) and `classes` (`dog|puppy,grass,sky`).
Response: one row an image, `label_map` (bytes of a PNG whose values index into the classes) and `classes` (JSON list).
"""

import base64
import binascii
import io
import json
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
from mlflow.models import ModelSignature
from mlflow.types import ColSpec, DataType, Schema
from PIL import Image

from pixelclip.images import decode_image
from pixelclip.predict import Predictor, label_image
from pixelclip.text import parse_names

ARTIFACT = "pixelclip"
SIGNATURE = ModelSignature(
    inputs=Schema([ColSpec(DataType.binary, "image"), ColSpec(DataType.string, "classes")]),
    outputs=Schema([ColSpec(DataType.binary, "label_map"), ColSpec(DataType.string, "classes")]),
)


class ServedModel(mlflow.pyfunc.PythonModel):  # type: ignore[misc]
    """Answers MLflow's `predict`."""

    def load_context(self, context: Any) -> None:
        """Loads the model folder that was logged."""
        self.predictor = Predictor.load(Path(context.artifacts[ARTIFACT]))

    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:
        """Segments every row.

        Raises:
            ValueError: an image that cannot be read, or an unusable list of classes; the message names the row.
        """
        rows = []
        for number, (image, classes) in enumerate(zip(model_input["image"], model_input["classes"], strict=True)):
            try:
                prediction = self.predictor(_decode(image), parse_names(classes))
            except ValueError as error:
                raise ValueError(f"row {number}: {error}") from None
            buffer = io.BytesIO()
            label_image(prediction.labels).save(buffer, "PNG")
            rows.append({"label_map": buffer.getvalue(), "classes": json.dumps(prediction.classes)})
        return pd.DataFrame(rows, columns=["label_map", "classes"])


def _decode(image: bytes | str) -> Image.Image:
    if isinstance(image, str):
        try:
            image = base64.b64decode(image, validate=True)
        except binascii.Error as error:
            raise ValueError(f"image: neither bytes nor base64: {error}") from None
    return decode_image(image)


mlflow.models.set_model(ServedModel())
