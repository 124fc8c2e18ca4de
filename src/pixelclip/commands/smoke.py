"""The first request to a model before it serves users, and the check of its answer."""

import base64
import contextlib
import io
import json
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from pixelclip.inference.prediction import png
from pixelclip.toy_scenes.scenes import CLASSES, paint

_SIDE = 224  # pixels
_TOLERANCE = 1e-3


class Smoke(NamedTuple):
    """A request to `/invocations` with one image, and what its answer must fit: class names and side in pixels."""

    body: bytes
    classes: list[str]
    side: int


def smoke_request() -> Smoke:
    """Return a request with a painted scene and the classes in it."""
    scene = paint(0, 0, _SIDE)
    classes = [CLASSES[index] for index in np.unique(scene.label)]
    image = base64.b64encode(png(Image.fromarray(scene.image))).decode()
    table = {"columns": ["image", "classes"], "data": [[image, ",".join(classes)]]}
    return Smoke(json.dumps({"dataframe_split": table}).encode(), classes, _SIDE)


def check_answer(request: Smoke, status: int, body: bytes) -> None:
    """Check the answer to a smoke request, in any format version.

    Damaged weights often still load; their features are then not finite, or the same for all classes.

    Raises:
        ValueError: the request failed, or the answer cannot come from a working model; the message says why.
    """
    if status != 200:
        raise ValueError(f"the smoke request failed with status {status}: {_message(body)}")
    try:
        (row,) = json.loads(body)["predictions"]
        classes, shares, scores = (_list(row[name]) for name in ("classes", "shares", "scores"))
        labels = np.asarray(Image.open(io.BytesIO(base64.b64decode(row["label_map"]))))
        shares, scores = np.asarray(shares, np.float64), np.asarray(scores, np.float64)
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise ValueError(f"the answer to the smoke request is not a segmentation: {type(error).__name__}: {error}") from None
    count = len(request.classes)
    if classes != request.classes or shares.shape != (count,) or scores.shape != (count,):
        raise ValueError(f"the answer to the smoke request has other classes: {classes}, expected {request.classes}")
    if labels.shape != (request.side, request.side) or labels.max() >= count:
        raise ValueError(f"the label map of the smoke request has shape {labels.shape} and values up to {labels.max()}")
    if not np.isfinite(scores).all() or np.abs(scores).max() > 1 + _TOLERANCE:
        raise ValueError(f"the scores of the smoke request are not cosines: {scores.tolist()}")
    if np.ptp(scores) == 0:
        raise ValueError(f"the scores of the smoke request are the same for all classes: {scores[0]}")
    if np.abs(shares - np.bincount(labels.ravel(), minlength=count) / labels.size).max() > _TOLERANCE:
        raise ValueError("the shares of the smoke request do not fit its label map")


def _list(value: Any) -> Any:
    return json.loads(value) if isinstance(value, str) else value  # format version 1 has JSON texts


def _message(body: bytes) -> str:
    """Return the last line of MLflow's error message, which follows an outline of the request."""
    text = body.decode(errors="replace")
    with contextlib.suppress(ValueError, KeyError, TypeError):
        text = str(json.loads(text)["message"])
    return (text.strip().splitlines() or [""])[-1][:300]
