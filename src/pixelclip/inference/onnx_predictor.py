"""Predict with an exported ONNX model under onnxruntime, without torch. K classes, h w score grid, H W image."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import BaseModel, Field

from pixelclip.config import Quality
from pixelclip.data.class_names import check_names
from pixelclip.data.images import resize_shortest_edge, to_rgb, turn_upright
from pixelclip.inference.prediction import Prediction
from pixelclip.settings import nearest
from pixelclip.storage.files import parse_json
from pixelclip.workflow.failures import first_line

ONNX = "model.onnx"
"""File of an exported model in its folder."""
METADATA = "pixelclip"
"""Entry of the ONNX file's metadata with an `OnnxMetadata` as JSON."""
_PROVIDERS = {"cpu": ["CPUExecutionProvider"], "cuda": ["CUDAExecutionProvider", "CPUExecutionProvider"]}
_MOST_NAMES = 10  # in a message


class OnnxMetadata(BaseModel):
    """How to prepare an image for an ONNX model, and the classes of its scores, none if its output is features."""

    format: int = Field(ge=1, le=1)
    side: int = Field(ge=1)
    mean: list[float] = Field(min_length=3, max_length=3)
    std: list[float] = Field(min_length=3, max_length=3)
    shortest_edge: int = Field(ge=0)
    longest_edge: int = Field(ge=0)
    classes: list[str]


class OnnxPredictor:
    """Segment images into classes that an ONNX model was exported with.

    Args:
        file: ONNX file written by `pixelclip export --format onnx --classes ...`.
        device: auto, cpu or cuda.

    Raises:
        ValueError: onnxruntime is missing or lacks the device, or the file is damaged, another program's or without classes.
    """

    def __init__(self, file: Path, device: str = "auto") -> None:
        try:
            import onnxruntime
        except ModuleNotFoundError:
            raise ValueError(f"{file}: needs the extra `onnx` (pip install 'pixelclip[onnx]')") from None
        available = onnxruntime.get_available_providers()
        kind = device if device != "auto" else next(name for name in ("cuda", "cpu") if _PROVIDERS[name][0] in available)
        if kind not in _PROVIDERS or _PROVIDERS[kind][0] not in available:
            raise ValueError(f"device {device}: this onnxruntime computes an ONNX model on {', '.join(available)}; use cpu")
        try:
            self.session = onnxruntime.InferenceSession(str(file), providers=_PROVIDERS[kind])
        except Exception as error:  # onnxruntime's exceptions have no common base class
            raise ValueError(f"{file}: cannot be read as an ONNX model: {first_line(error)}") from None
        content = self.session.get_modelmeta().custom_metadata_map.get(METADATA)
        if content is None:
            raise ValueError(f"{file}: was not written by `pixelclip export`: its metadata have no entry {METADATA!r}")
        self.metadata = OnnxMetadata(**parse_json(content, f"{file}: metadata", OnnxMetadata))
        if not self.metadata.classes:
            raise ValueError(f"{file}: was exported without class names; export it again with --classes")

    def __call__(self, image: Image.Image, classes: Sequence[str], quality: Quality = "fast") -> Prediction:
        """Segment one image of any size.

        Args:
            image: any mode; rotated according to its EXIF orientation.
            classes: names among those of the export, in any order.
            quality: fast; the ONNX file has the size of a single view.

        Raises:
            ValueError: invalid class names, one that the model does not know, or another quality.
        """
        if quality != "fast":
            raise ValueError(f"quality {quality!r} needs a model folder; an ONNX model computes 'fast' only")
        names, known = check_names(classes), self.metadata.classes
        if unknown := [name for name in names if name not in known]:
            listed = ", ".join(map(repr, known[:_MOST_NAMES])) + (", ..." if len(known) > _MOST_NAMES else "")
            hint = nearest(unknown[0], known)
            raise ValueError(f"class {unknown[0]!r} is not in this ONNX model{hint}; it was exported with {listed}")
        upright = turn_upright(image)
        resized = resize_shortest_edge(upright, self.metadata.shortest_edge, self.metadata.longest_edge)
        images = resized_square(resized, self.metadata.side, self.metadata.mean, self.metadata.std)
        scores = self.session.run(["scores"], {"images": images})[0][0][[known.index(name) for name in names]]
        return Prediction(label_map(scores, (upright.height, upright.width)), scores, names)


def find_onnx(path: Path) -> Path | None:
    """Return the ONNX file that a path names, itself or `model.onnx` in a folder; None if it is another kind of model."""
    if path.suffix.lower() == ".onnx":
        return path
    return path / ONNX if (path / ONNX).is_file() else None


def metadata_json(metadata: OnnxMetadata) -> str:
    """Format metadata for `METADATA`."""
    return json.dumps(metadata.model_dump())


def resized_square(image: Image.Image, side: int, mean: Sequence[float], std: Sequence[float]) -> NDArray[np.float32]:
    """Compute `pixelclip.data.tensors.resized_square` without torch: [1, 3, side, side]."""
    pixels = np.asarray(to_rgb(image))  # [H, W, 3]
    (top, bottom, down), (left, right, across) = (_between(length, side) for length in pixels.shape[:2])
    rows = pixels[np.concatenate([top, bottom])][:, np.concatenate([left, right])].astype(np.float32)
    corners = (rows / 255 - np.array(mean, np.float32)) / np.array(std, np.float32)  # [2 * side, 2 * side, 3]
    rows = corners[:side] + (corners[side:] - corners[:side]) * down[:, None, None]
    square = rows[:, :side] + (rows[:, side:] - rows[:, :side]) * across[:, None]
    return np.ascontiguousarray(square.transpose(2, 0, 1)[None])


def label_map(scores: NDArray[np.float32], size: tuple[int, int]) -> NDArray[np.uint16]:
    """Return the class with the highest bilinearly resized score at every pixel; ties go to the lowest class.

    Args:
        scores: [K, h, w].
        size: (H, W).

    Returns:
        [H, W].
    """
    best, labels = np.full(size, -np.inf, np.float32), np.zeros(size, np.uint16)
    for number, grid in enumerate(scores):  # one class at a time: all of them at full size may take gigabytes
        values = resized(grid, size)
        better = values > best
        best[better], labels[better] = values[better], number
    return labels


def resized(grid: NDArray[np.float32], size: tuple[int, int]) -> NDArray[np.float32]:
    """Resize a grid [h, w] bilinearly to `size` (H, W), as torch does: [H, W]."""
    (top, bottom, down), (left, right, across) = (
        _between(points, pixels) for points, pixels in zip(grid.shape, size, strict=True)
    )
    columns = grid[:, left] + (grid[:, right] - grid[:, left]) * across  # [h, W]
    values: NDArray[np.float32] = columns[top] + (columns[bottom] - columns[top]) * down[:, None]
    return values


def _between(length: int, samples: int) -> tuple[Any, Any, Any]:
    """Return the two neighbours, and the weight of the second, of each of `samples` samples along `length` points."""
    at = np.maximum(
        (np.arange(samples, dtype=np.float32) + np.float32(0.5)) * np.float32(length / samples) - np.float32(0.5), 0
    )
    first = np.minimum(at.astype(np.int64), length - 1)
    return first, np.minimum(first + 1, length - 1), (at - first).astype(np.float32)
