"""Files of many predictions: a COCO dataset and Label Studio tasks, written image by image.

A record is the JSON of one image: `file_name`, `uri`, `width`, `height` and `annotations`, one mask per class that was
predicted; or `bad`, why the image cannot be used.
"""

import json
import os
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO
from urllib.parse import quote
from xml.sax.saxutils import quoteattr

import numpy as np
from numpy.typing import NDArray

from pixelclip.data.annotations import annotate
from pixelclip.data.image_sources import Photo
from pixelclip.data.images import palette
from pixelclip.data.rle import RunMasks, read_runs

Record = dict[str, Any]
Records = Callable[[], Iterator[Record]]
"""Reads the records; called once for every array of a file, so that none has to be in memory."""
_KEPT = ("segmentation", "area", "bbox")
_RUN_BITS, _MOST_REPEATS = 27, 1 << 16


def record_of(photo: Photo, labels: NDArray[np.uint16]) -> Record:
    """Return the record of an image with a label map [H, W]; annotations are in the order of the classes."""
    height, width = labels.shape
    present = np.unique(labels)
    entries = annotate((labels == value for value in present), (width, height), key="")["annotations"]
    annotations = [
        {"category_id": int(value), **{key: entry[key] for key in _KEPT}, "iscrowd": 0}
        for value, entry in zip(present, entries, strict=True)
    ]
    return {"file_name": photo.file_name, "uri": photo.uri, "width": width, "height": height, "annotations": annotations}


def write_coco(path: Path, names: list[str], records: Records) -> None:
    """Write a COCO dataset: `category_id` is the class index, as in the label maps; masks are compressed RLE."""
    images = ({"id": number, **_without(record, "annotations", "uri")} for number, record in _good(records))
    masks = ({"image_id": number, **annotation} for number, record in _good(records) for annotation in record["annotations"])
    annotations = ({"id": number, **mask} for number, mask in enumerate(masks, 1))
    categories = [{"id": number, "name": name} for number, name in enumerate(names)]
    header = {"info": {"description": "Predictions of pixelclip"}, "licenses": [], "categories": categories}
    with _replacing(path) as file:
        file.write(json.dumps(header)[:-1])
        for key, items in (("images", images), ("annotations", annotations)):
            file.write(f', "{key}": ')
            _write_array(file, items)
        file.write("}\n")


def write_label_studio(path: Path, names: list[str], records: Records) -> None:
    """Write tasks with predictions for Label Studio, and beside them `label_studio.xml`, its labelling interface.

    Images in a store keep their `s3://` URI, others are paths for Label Studio's local storage.
    """

    def tasks() -> Iterator[Record]:
        for _, record in _good(records):
            uri = record["uri"] if "://" in record["uri"] else f"/data/local-files/?d={quote(record['uri'].lstrip('/'))}"
            result = [_brush(record, annotation, names) for annotation in record["annotations"]]
            yield {"data": {"image": uri}, "predictions": [{"model_version": "pixelclip", "result": result}]}

    with _replacing(path) as file:
        _write_array(file, tasks())
    colours = palette(len(names))
    labels = "".join(
        f"    <Label value={quoteattr(name)} background={quoteattr('#' + bytes(colour).hex())}/>\n"
        for name, colour in zip(names, colours, strict=True)
    )
    interface = (
        f'<View>\n  <Image name="image" value="$image" zoom="true"/>\n  <BrushLabels name="labels" toName="image">\n{labels}'
    )
    with _replacing(path.with_suffix(".xml")) as file:
        file.write(f"{interface}  </BrushLabels>\n</View>\n")


def _brush(record: Record, annotation: Record, names: list[str]) -> Record:
    size = record["height"], record["width"]
    mask = RunMasks(read_runs([annotation["segmentation"]["counts"]], size[0] * size[1]), size).decode(0)
    name = names[annotation["category_id"]]
    return {
        "id": uuid.uuid5(uuid.NAMESPACE_URL, f"{record['uri']} {name}").hex[:10],
        "type": "brushlabels",
        "from_name": "labels",
        "to_name": "image",
        "original_width": size[1],
        "original_height": size[0],
        "image_rotation": 0,
        "value": {"format": "rle", "rle": brush_rle(mask), "brushlabels": [name]},
    }


def brush_rle(mask: NDArray[np.bool_]) -> list[int]:
    """Encode a mask [H, W] as the bytes of Label Studio's brush: rle-pack of its RGBA pixels, 255 inside and 0 outside.

    A header of 53 bits: number of values (32), bits of a value - 1 (5), and bits of the four kinds of run lengths - 1 (4 each).
    A run of equal values is the bit 1, the kind (2), the length - 1 and the value (8). Only runs of 16 bits are written.
    Source: https://github.com/thi-ng/umbrella/tree/develop/packages/rle-pack.
    """
    flat = mask.ravel()
    starts = np.flatnonzero(np.diff(flat, prepend=~flat[:1]))
    lengths = np.diff(starts, append=flat.size) * 4
    pieces = -(-lengths // _MOST_REPEATS)  # of each run; all but the last of them are full
    repeats = np.full(pieces.sum(), _MOST_REPEATS, np.int64)
    repeats[np.cumsum(pieces) - 1] = lengths - (pieces - 1) * _MOST_REPEATS
    values = np.repeat(flat[starts], pieces) * 255
    words = (0b111 << 24) | ((repeats - 1) << 8) | values
    runs = (words[:, None] >> np.arange(_RUN_BITS - 1, -1, -1)) & 1
    header = f"{flat.size * 4:032b}{7:05b}" + "".join(f"{bits - 1:04b}" for bits in (3, 4, 8, 16))
    packed = np.packbits(np.concatenate([np.array([*map(int, header)]), runs.ravel()]).astype(np.uint8))
    return [int(byte) for byte in packed]


def _good(records: Records) -> Iterator[tuple[int, Record]]:
    return enumerate((record for record in records() if "bad" not in record), 1)


def _without(record: Record, *keys: str) -> Record:
    return {key: value for key, value in record.items() if key not in keys}


def _write_array(file: TextIO, items: Iterable[Record]) -> None:
    separator = "[\n"
    for item in items:
        file.write(separator + json.dumps(item, separators=(",", ":"), allow_nan=False))
        separator = ",\n"
    file.write("[]" if separator == "[\n" else "\n]")


@contextmanager
def _replacing(path: Path) -> Iterator[TextIO]:
    """Open a file that gets its name when it is complete."""
    temporary = path.with_name(f".{path.name}.partial")
    with temporary.open("w", encoding="utf-8") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
