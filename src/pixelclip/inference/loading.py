"""Load a model of either kind; torch is imported only for a model folder."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from PIL import Image

from pixelclip.config import Quality
from pixelclip.inference.onnx_predictor import OnnxPredictor, find_onnx
from pixelclip.inference.prediction import Prediction


class Model(Protocol):
    """A `Predictor` or an `OnnxPredictor`."""

    def __call__(self, image: Image.Image, classes: Sequence[str], quality: Quality) -> Prediction:
        """Segment one image."""


def load_predictor(path: Path, device: str = "auto", original_clip: bool = False) -> Model:
    """Load a model folder, or an ONNX file or its folder.

    Args:
        path: model folder, ONNX file or its folder.
        device: see `Predictor` and `OnnxPredictor`.
        original_clip: see `Predictor.load`.

    Raises:
        ValueError: see `Predictor.load` and `OnnxPredictor`; an ONNX file does not contain the original CLIP.
    """
    if file := find_onnx(path):
        if original_clip:
            raise ValueError(f"{file}: an ONNX model does not name the CLIP that it was trained from")
        return OnnxPredictor(file, device)
    from pixelclip.inference.predictor import Predictor  # imports torch

    return Predictor.load(path, device, original_clip)
