"""Predict label maps from one resized view, from windows, or from given masks, and count correctly classified masks.

Masks are classified zero-shot (PixelCLIP, section 4): dense features are pooled inside each mask, classified and painted.
B images, T towers, N masks, K classes, C embedding width, h w features, H W image, masks and label map.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as rle
from torch import Tensor

from pixelclip.config import EvaluateConfig, Refinement
from pixelclip.data.annotations import annotate, decode_masks, parse_annotation
from pixelclip.data.labelled_images import IGNORE
from pixelclip.data.shard_format import Member, index_shard, read_part
from pixelclip.data.shard_sources import Shard, list_shards, parts
from pixelclip.evaluation.confusion import Predictions
from pixelclip.inference.label_map import label_map
from pixelclip.inference.refinement.refine import View, photo_scores
from pixelclip.inference.scores import best_class, class_scores, resize_shortest, slide_scores
from pixelclip.mask_generators.felzenszwalb import felzenszwalb
from pixelclip.models.backbone import Backbone
from pixelclip.models.clustering import pool_masks
from pixelclip.storage.s3 import is_s3

Annotations = list[dict[str, Any]]
"""Masks of one image as entries of SA-1B's annotation document: RLE takes little memory."""
_PIXELS_AT_ONCE = 1 << 25


def predict_whole(
    towers: Sequence[Backbone], images: Tensor, sizes: Sequence[tuple[int, int]], classes: Tensor, feature_grid: int
) -> list[Predictions]:
    """Predict label maps of the given (H, W) from one resized view of each image, see `class_scores`."""
    label_maps = []
    for tower in towers:
        scores = class_scores(tower, images, classes, feature_grid)
        label_maps.append([label_map(image_scores[None], size)[0] for image_scores, size in zip(scores, sizes, strict=True)])
    return [Predictions(list(maps), [0] * len(towers), 0) for maps in zip(*label_maps, strict=True)]


def predict_refined(
    towers: Sequence[Backbone],
    photo: Image.Image,
    classes: Tensor,
    view: View,
    refinement: Refinement,
    masks: Annotations | None = None,
) -> list[Tensor]:
    """Predict the label map [H, W] of a photo by every tower as `Predictor` does, see `photo_scores`."""
    decoded = None
    if masks is not None:
        none = np.zeros((0, photo.height, photo.width), np.bool_)
        decoded = torch.from_numpy(np.concatenate([*_decode(masks, photo.width * photo.height), none]))
    size = (photo.height, photo.width)
    return [label_map(photo_scores(tower, photo, classes, view, refinement, decoded), size)[0] for tower in towers]


def predict_windows(towers: Sequence[Backbone], image: Tensor, classes: Tensor, config: EvaluateConfig) -> Predictions:
    """Predict the label map of one normalised image [1, 3, H, W] from overlapping windows, see `slide_scores`."""
    size, maps = (image.shape[2], image.shape[3]), []
    for tower in towers:
        side = config.slide_side or max(*tower.patch_size, min(size))  # 0 keeps the size, but not below one patch
        resized = resize_shortest(image, side)
        scores = slide_scores(tower, resized, classes, config.crop, config.stride, config.feature_grid, config.batch_size)
        maps.append(best_class(scores, size)[0])
    return Predictions(maps, [0] * len(towers), 0)


def truth_masks(labels: NDArray[np.integer]) -> Annotations:
    """Return one mask per class of a label map [H, W], without ignored pixels."""
    return _masks_of_values(labels, np.setdiff1d(labels, [IGNORE]))


def segment_masks(image: Image.Image, scale: float, sigma: float, min_size: int) -> Annotations:
    """Return the Felzenszwalb segments of an image at full size."""
    segments = felzenszwalb(image, scale, sigma, min_size)
    return _masks_of_values(segments, np.unique(segments))


class GivenMasks:
    """Existing masks, looked up by the name of their image.

    Args:
        source: a folder with `NAME.json` for each image `NAME.*`, or shards with masks of these images (a folder of tars, a
            manifest, `s3://bucket/folder`).

    Raises:
        ValueError: unusable shards, or two samples with the same name.
    """

    def __init__(self, source: str) -> None:
        self._source = source
        self._members: dict[str, tuple[Shard, Member]] | None = None
        if is_s3(source) or Path(source).is_file() or any(Path(source).glob("*.tar")) or parts(Path(source)):
            self._members = {}
            for shard in list_shards(source):
                for member in index_shard(shard)[0]:
                    name = member.key.rpartition("/")[2]
                    if other := self._members.get(name):
                        raise ValueError(
                            f"{source}: masks are matched by image name, but there are two samples named {name}: "
                            f"{other[1].key} in {other[0]}, {member.key} in {shard}"
                        )
                    self._members[name] = (shard, member)

    def read(self, name: str, size: tuple[int, int]) -> Annotations:
        """Read the masks of an image, possibly none; empty masks are dropped.

        Args:
            name: file name of the image without its suffix.
            size: (width, height) of the image.

        Raises:
            ValueError: the masks are missing, damaged or of a different size; the message names the file.
        """
        where = f"{self._source}: {name}" if self._members is not None else str(Path(self._source, f"{name}.json"))
        try:
            document, _ = parse_annotation(self._read_bytes(name), size, may_be_empty=True)
        except (OSError, ValueError) as error:
            raise ValueError(f"{where}: {getattr(error, 'strerror', error)}") from None
        return [entry for entry in document["annotations"] if _area(entry)]

    def _read_bytes(self, name: str) -> bytes:
        if self._members is None:
            return Path(self._source, f"{name}.json").read_bytes()
        shard, member = self._members.get(name.replace(".", "_"), (None, None))
        if shard is None or member is None or not member.json_size:
            raise ValueError("no masks in these shards")
        return read_part(shard, member.json_offset, member.json_size)


def _masks_of_values(values: NDArray[np.integer], selected: NDArray[np.integer]) -> Annotations:
    document = annotate((values == value for value in selected), values.shape[::-1], key="")
    return list(document["annotations"])


def _area(entry: dict[str, Any]) -> int:
    return int(rle.area(entry["segmentation"]))


def classify_masks(features: Tensor, annotations: Annotations, classes: Tensor, truth: NDArray[np.integer]) -> Predictions:
    """Classify the masks of one image and paint them into label maps, smaller masks on top.

    Features are averaged as if upsampled bilinearly to the full size of the masks; masks are decoded in chunks.

    Args:
        features: [T, C, h, w] of the image from every tower, not normalised.
        annotations: non-empty masks of the image; the list may be empty.
        classes: [K, C], unit length.
        truth: label map [H, W].
    """
    maps = [np.full(truth.shape, len(classes), np.int64) for _ in features]
    correct, num_masks = [0] * len(features), 0
    for masks in _decode(sorted(annotations, key=_area, reverse=True), truth.size):
        true = majority(masks, truth)
        num_masks += int((true != IGNORE).sum())
        on_device = torch.from_numpy(masks).to(features.device)
        image_index = torch.zeros(len(masks), dtype=torch.long, device=features.device)
        for tower, painted in enumerate(maps):
            pooled = pool_masks(features[tower : tower + 1], on_device, image_index)
            predicted = (pooled @ classes.T).argmax(dim=1).cpu().numpy()
            correct[tower] += int(((true != IGNORE) & (predicted == true)).sum())
            for mask, label in zip(masks, predicted, strict=True):
                painted[mask] = label
    return Predictions([torch.from_numpy(painted) for painted in maps], correct, num_masks)


def majority(masks: NDArray[np.bool_], truth: NDArray[np.integer]) -> NDArray[np.int64]:
    """Return the most frequent true class in each mask [N, H, W], the lowest on a tie; `IGNORE` without labelled pixels."""
    inside = [truth[mask & (truth != IGNORE)] for mask in masks]
    return np.array([np.bincount(values).argmax() if len(values) else IGNORE for values in inside], np.int64)


def _decode(annotations: Annotations, num_pixels: int) -> Iterator[NDArray[np.bool_]]:
    """Decode masks in order into chunks [N, H, W] of bounded memory."""
    size = max(1, _PIXELS_AT_ONCE // num_pixels)
    for start in range(0, len(annotations), size):
        masks = decode_masks({"annotations": annotations[start : start + size]})  # [H, W, N]
        yield np.ascontiguousarray(masks.transpose(2, 0, 1)).view(np.bool_)
