"""Open-vocabulary segmentation from images that nobody labelled (PixelCLIP, NeurIPS 2024)."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pixelclip.inference.predictor import Predictor

__all__ = ["__version__", "load"]
__version__ = "0.2.0"


def load(model: Path | str, device: str = "auto") -> "Predictor":
    """Load a model folder: `pixelclip.load("runs/demo/train")(image, ["sky", "dog"]).labels`.

    Args:
        model: model folder written by `train`, or its URL or `s3://` prefix.
        device: auto, cpu, cuda, cuda:N or mps.

    Returns:
        A function of a PIL image and class names that returns a `Prediction`.

    Raises:
        ValueError: not a model folder, or no such device.
    """
    from pixelclip.inference.predictor import Predictor  # imports torch
    from pixelclip.storage.download import local_path

    return Predictor.load(local_path(model), device)
