"""Turn label maps into class-agnostic masks: training on ground-truth masks without their labels (PixelCLIP, Table 6)."""

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pixelclip.config import MasksConfig
from pixelclip.data.annotations import annotate
from pixelclip.data.images import cell_centres, decode_image
from pixelclip.data.labelled_images import IGNORE, LabelledSet, Split
from pixelclip.data.labelled_sets import open_labelled
from pixelclip.data.shard_format import index_shard
from pixelclip.data.shard_sources import Shard
from pixelclip.mask_generators import EncodedSample


def generate(sample: EncodedSample, config: MasksConfig) -> dict[str, Any]:
    """Return one mask per class, or per connected component, as an annotation document; ignored pixels are in no mask.

    The sample may be a shrunk copy of the labelled image; its label map is then resized by nearest neighbour.

    Raises:
        ValueError: the sample has no label map, or one of another shape, or an invalid one.
    """
    labelled, indices = _open(config.labels_folder, config.labels_kind, config.labels_split)
    if (index := indices.get(_name(sample.key))) is None:
        raise ValueError(f"no label map in {config.labels_folder}")
    size = decode_image(sample.image).size
    labels = _resize(labelled.read(index)[1], size)
    return annotate(_masks(labels, config.labels_unit == "component"), size, sample.key)


def check(folder: Path, config: MasksConfig, shard: Shard) -> None:
    """Raise ValueError if no sample of a shard has a label map, so that a wrong folder fails early.

    Args:
        folder: local copy of `config.labels_folder`.
        config: settings.
        shard: the first shard.
    """
    indices = _open(str(folder), config.labels_kind, config.labels_split)[1]
    keys = [member.key for member in index_shard(shard)[0]]
    if keys and not any(_name(key) in indices for key in keys):
        raise ValueError(
            f"masks.labels_folder {config.labels_folder}: no label map of {keys[0]}, and none of any other of the "
            f"{len(keys)} samples of {shard}"
        )


@cache
def _open(folder: str, kind: str, split: Split) -> tuple[LabelledSet, dict[str, int]]:
    """Open a labelled set once per process, and index its images by name."""
    labelled = open_labelled(Path(folder), kind, split)
    indices: dict[str, int] = {}
    for index, (image, _) in enumerate(labelled.pairs):
        if not image.is_file():  # a label map without an image
            continue
        if (other := indices.setdefault(_name(image.stem), index)) != index:
            raise ValueError(
                f"label maps are matched by image name, but two images are named {image.stem}: "
                f"{labelled.pairs[other][0]} and {image}"
            )
    return labelled, indices


def _name(key: str) -> str:
    """Return the last part of a key; stage shards writes dots in names as underscores."""
    return key.rpartition("/")[2].replace(".", "_")


def _resize(labels: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    """Resize a label map [H, W] to the (width, height) of an image that was shrunk with its aspect ratio kept."""
    width, height = size
    scale = min(size) / min(labels.shape)
    if scale > 1 or any(abs(edge - scale * whole) > 1 for edge, whole in zip((height, width), labels.shape, strict=True)):
        raise ValueError(f"label map has size {labels.shape[::-1]}, but the image has {size} and is no shrunk copy")
    return labels[cell_centres(height, labels.shape[0])][:, cell_centres(width, labels.shape[1])]


def _masks(labels: NDArray[np.uint8], components: bool) -> Iterator[NDArray[np.bool_]]:
    regions = labels
    if components:
        from skimage.measure import label

        regions = label(np.where(labels == IGNORE, -1, labels.astype(np.int16)), background=-1, connectivity=2)
    outside = 0 if components else IGNORE
    return (regions == number for number in np.setdiff1d(regions, [outside]))
