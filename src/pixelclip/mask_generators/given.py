"""Use the masks that a sample already has, in SA-1B's annotation format."""

from typing import Any

from pycocotools import mask as rle

from pixelclip.config import MasksConfig
from pixelclip.data.annotations import parse_annotation
from pixelclip.data.images import decode_image
from pixelclip.mask_generators import EncodedSample


def generate(sample: EncodedSample, _: MasksConfig) -> dict[str, Any]:
    """Return the sample's annotation document without empty masks, with areas counted from the masks.

    Raises:
        ValueError: the sample has no JSON, or the JSON does not fit its image.
    """
    if not sample.annotation:
        raise ValueError("no JSON with masks beside the image")
    document, _masks = parse_annotation(sample.annotation, decode_image(sample.image).size)
    for entry in document["annotations"]:
        entry["area"] = int(rle.area(entry["segmentation"]))  # files state wrong ones, and `max_masks` sorts by it
    document["annotations"] = [entry for entry in document["annotations"] if entry["area"]]
    return document
