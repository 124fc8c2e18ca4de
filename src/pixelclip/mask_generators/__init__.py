"""Class-agnostic masks of images: one module per generator, called by stage `masks` through one of two functions.

`generate(sample, config)` masks one sample in a worker process and returns its annotation document; ValueError skips the
sample. `load_generator(weights, config)` loads a model on the device and returns a `Generate`.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from PIL import Image


class EncodedSample(NamedTuple):
    """Key, image file and annotation JSON of a sample; the JSON is empty if there is none."""

    key: str
    image: bytes
    annotation: bytes


Generate = Callable[[list[tuple[str, Image.Image]]], Iterable[dict[str, Any]]]
"""Keys and images of a batch -> their annotation documents."""
