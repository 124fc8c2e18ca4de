"""Read, check and write masks in SA-1B's annotation format: JSON with COCO's compressed RLE."""

import json
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pixelclip.data.rle import RunMasks, read_runs


def annotate(masks: Iterable[NDArray[np.bool_]], size: tuple[int, int], key: str) -> dict[str, Any]:
    """Encode masks as an annotation document.

    Args:
        masks: non-empty masks [H, W]; an iterator is consumed one mask at a time.
        size: (width, height) of the image.
        key: key of the sample.
    """
    from pycocotools import mask as rle  # an extra that inference does not need

    width, height = size
    annotations = []
    for index, mask in enumerate(masks):
        code = rle.encode(np.asfortranarray(mask, dtype=np.uint8))
        rows, columns = np.nonzero(mask)
        annotations.append(
            {
                "id": index,
                "segmentation": {"size": [height, width], "counts": code["counts"].decode()},
                "area": len(rows),
                "bbox": [float(v) for v in rle.toBbox(code)],
                "predicted_iou": 1.0,
                "stability_score": 1.0,
                "point_coords": [[float(columns[len(columns) // 2]), float(rows[len(rows) // 2])]],
                "crop_box": [0.0, 0.0, float(width), float(height)],
            }
        )
    image = {"image_id": 0, "width": width, "height": height, "file_name": f"{key}.jpg"}
    return {"image": image, "annotations": annotations}


def decode_masks(document: dict[str, Any]) -> NDArray[np.uint8]:
    """Decode the masks of an annotation document to 0 and 1: [H, W, masks]."""
    from pycocotools import mask as rle

    codes = [annotation["segmentation"] for annotation in document["annotations"]]
    return rle.decode(codes) if codes else np.zeros((0, 0, 0), np.uint8)


def parse_annotation(data: bytes, size: tuple[int, int], may_be_empty: bool = False) -> tuple[dict[str, Any], RunMasks]:
    """Parse an annotation document and validate its masks.

    Args:
        data: the JSON.
        size: (width, height) of its image.
        may_be_empty: accept a document without masks or with only empty ones.

    Returns:
        The document and its masks.

    Raises:
        ValueError: not JSON, no annotations, only empty masks, or a mask whose size differs from the image's.
    """
    try:
        document = json.loads(data, parse_constant=_reject_constant)
        codes = [annotation["segmentation"] for annotation in document["annotations"]]
        sizes = {tuple(code["size"]) for code in codes}
        counts_are_text = all(isinstance(code["counts"], str) for code in codes)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"unreadable JSON: {error}") from None
    except (KeyError, TypeError) as error:
        raise ValueError(f"not in SA-1B's annotation format: {type(error).__name__} {error}") from None
    if not (codes or may_be_empty):
        raise ValueError("no mask found")
    if not all(len(edges) == 2 and all(type(edge) is int for edge in edges) for edges in sizes):
        raise ValueError("not in SA-1B's annotation format: size must be two integers, height and width")
    if not counts_are_text:
        raise ValueError("not in SA-1B's annotation format: counts must be a compressed RLE string")
    width, height = size
    if wrong := sizes - {(height, width)}:
        shapes = ", ".join(f"{w}x{h}" for h, w in sorted(wrong))
        raise ValueError(f"mask has size {shapes}, but the image is {width}x{height}")
    masks = RunMasks(read_runs([code["counts"] for code in codes], height * width), (height, width))
    if not may_be_empty and not any(runs[1::2].any() for runs in masks.runs):
        raise ValueError(f"all {len(masks)} masks are empty")
    return document, masks


def _reject_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")
