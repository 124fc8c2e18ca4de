"""Images and given masks shrunk before masks are generated (the paper's halving of SA-1B)."""

import json

from PIL import Image

from pixelclip.data.annotations import annotate, parse_annotation
from pixelclip.data.images import (
    cell_centres,
    check_upright,
    decode_image,
    encode_jpeg,
    file_orientation,
    to_rgb,
    turn_upright,
)
from pixelclip.mask_generators import EncodedSample


def shrink_sample(sample: EncodedSample, shortest_edge: int, quality: int) -> EncodedSample:
    """Turn an image upright and shrink it to at most `shortest_edge` pixels on its shorter side.

    Masks are resized by nearest neighbour, but not turned.

    Raises:
        ValueError: the image or the JSON cannot be read, or EXIF data turn an image with masks.
    """
    key, data, annotation = sample
    turn = file_orientation(data)
    if annotation:
        check_upright(turn, "masks")
    if not shortest_edge and turn == 1:
        return sample
    image = to_rgb(turn_upright(decode_image(data)))
    if not shortest_edge or min(image.size) <= shortest_edge:
        return EncodedSample(key, encode_jpeg(image, quality), b"") if turn != 1 else sample
    scale = shortest_edge / min(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    if annotation:
        document, masks = parse_annotation(annotation, image.size)
        small = masks.sample(cell_centres(size[1], image.height), cell_centres(size[0], image.width))  # [N, H, W]
        kept = [index for index, mask in enumerate(small) if mask.any()]
        resized = annotate((small[index] for index in kept), size, key)
        for entry, index in zip(resized["annotations"], kept, strict=True):
            old = document["annotations"][index]
            entry.update({name: old[name] for name in ("id", "predicted_iou", "stability_score") if name in old})
        annotation = json.dumps(resized, separators=(",", ":")).encode()
    return EncodedSample(key, encode_jpeg(image.resize(size, Image.Resampling.LANCZOS), quality), annotation)
