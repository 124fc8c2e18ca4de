"""Image towers over one labelled set: counts of every process, with checkpoints (method.md, "Inference").

B images, T towers, K classes, C embedding width, H W image.
"""

import io
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from pixelclip.backbone import Backbone
from pixelclip.benchmarks import LabelledSet
from pixelclip.checkpoint import Clip
from pixelclip.classify import (
    Annotations,
    GivenMasks,
    classify_masks,
    label_whole,
    label_windows,
    segment_masks,
    truth_masks,
)
from pixelclip.config import EvaluateConfig
from pixelclip.pixels import normalise, resized_square, to_tensor
from pixelclip.ranks import ProcessGroup, pick_precision
from pixelclip.shards import BadSamples
from pixelclip.storage import write_atomically
from pixelclip.tally import CLIP, OURS, Found, Tally, packed

Maps = dict[int, NDArray[np.uint16]]
"""Label maps by the number of their image in the labelled set."""


@dataclass(frozen=True)
class Counted:
    """What `measure` found.

    Args:
        tally: the sums over all images.
        maps: of every tower the label maps of the pictures.
        pictures: by number in the labelled set, image and truth [H, W] of those that a report shows.
    """

    tally: Tally
    maps: dict[str, Maps]
    pictures: dict[int, tuple[Image.Image, NDArray[np.uint16]]]


@dataclass(frozen=True)
class _Sample:
    index: int
    image: Image.Image
    labels: NDArray[np.uint8]
    masks: Annotations


@torch.no_grad()
def measure(
    towers: Mapping[str, Backbone],
    clip: Clip,
    classes: Tensor,
    dataset: LabelledSet,
    config: EvaluateConfig,
    ranks: ProcessGroup,
    state: Path,
    stage: str = "evaluate",
) -> Counted:
    """Evaluates towers with the very same images, classifier and protocol; what one gives does not hang on the others.

    Args:
        towers: `OURS`, `CLIP` or both; they get the settings' precision.
        clip: the CLIP that the towers are of.
        classes: [K, C], its classifier.
        dataset: the labelled set; every rank takes its share of the batches.
        config: settings, with the side in pixels.
        ranks: the processes; each of them returns the result of all.
        state: folder of counts and examples of an unfinished measurement, which continues.
        stage: whose work it is, in messages.

    Raises:
        ValueError: too many unreadable samples.
    """
    towers = {name: tower.to(ranks.device).eval() for name, tower in towers.items()}
    for tower in towers.values():
        tower.precision = pick_precision(config.precision, ranks.device)
    wanted = np.linspace(0, len(dataset) - 1, min(config.pictures, len(dataset))).round().astype(int).tolist()
    # Counts of other batches or shares do not fit, and other pictures may be missing: they are kept apart.
    state = state / f"processes-{ranks.size}_batch-{config.batch_size}_pictures-{config.pictures}"
    tally, places = _begin(stage, towers, dataset, config, ranks, state)
    bad = BadSamples(stage, config.max_bad_share, tally.bad)
    given = GivenMasks(config.masks_folder) if config.protocol == "masks" and config.masks == "given" else None
    saved = tally.position
    shown = tqdm(range(saved, places.stop), stage, places.stop, unit="image", initial=saved, disable=not ranks.is_main)
    samples = _samples(dataset, shown, config, given, bad)
    while batch := list(islice(samples, config.batch_size)):
        labels = [sample.labels for sample in batch]
        found = _find(batch, list(towers.values()), clip, classes, config)
        tally.add(labels, found)
        if CLIP in towers:
            native = _resized_square(batch, clip.side, clip, ranks.device)
            similarities = F.normalize(towers[CLIP].image_features(native), dim=-1) @ classes.T
            tally.recall(labels, similarities.cpu())
        for sample, one in zip(batch, found, strict=True):
            if sample.index in wanted:
                maps = {tower: labels.cpu().numpy() for tower, labels in zip(towers, one.maps, strict=True)}
                _save_example(_example(state, sample.index), sample, maps)
        tally.position = batch[-1].index + 1
        if tally.position - saved >= config.checkpoint_every:
            tally.save(_checkpoint(state, ranks))
            saved = tally.position
    tally.sum(ranks)
    bad.found = tally.bad
    (bad.check if ranks.is_main else bad.stop_if_too_many)(len(dataset))
    drawn = [index for index in wanted if index in places and _example(state, index).is_file()]
    packs = chain(*ranks.all_gather_object([(index, _example(state, index).read_bytes()) for index in drawn]))
    return _counted(tally, dict(packs))


def _counted(tally: Tally, packs: Mapping[int, bytes]) -> Counted:
    counted = Counted(tally, {tower: {} for tower in tally.confusions}, {})
    for index, data in packs.items():
        with np.load(io.BytesIO(data), allow_pickle=False) as saved:
            counted.pictures[index] = Image.fromarray(saved["image"]), saved["truth"]
            for tower, maps in counted.maps.items():
                maps[index] = saved[f"map{tower}"]
    return counted


def _begin(
    stage: str, towers: Collection[str], dataset: LabelledSet, config: EvaluateConfig, ranks: ProcessGroup, state: Path
) -> tuple[Tally, range]:
    """This rank's tally, continued where there is one, and its images: whole batches, the same with any number of ranks."""
    batches = ranks.share(-(-len(dataset) // config.batch_size))
    places = range(batches.start * config.batch_size, min(batches.stop * config.batch_size, len(dataset)))
    tally = Tally.zeros(towers, len(dataset.classes), places.start)
    if _checkpoint(state, ranks).is_file():
        tally.load(_checkpoint(state, ranks))
        if ranks.is_main:
            print(f"{stage}: continues after {tally.position} images", flush=True)
    return tally, places


def _checkpoint(state: Path, ranks: ProcessGroup) -> Path:
    return state / f"counts-{ranks.rank}-of-{ranks.size}.npz"


def _example(state: Path, index: int) -> Path:
    return state / f"example-{index}.npz"


def _save_example(path: Path, sample: _Sample, maps: Mapping[str, NDArray[np.integer]]) -> None:
    arrays = {f"map{tower}": labels.astype(np.uint16) for tower, labels in maps.items()}
    write_atomically(path, packed(image=np.asarray(sample.image), truth=sample.labels.astype(np.uint16), **arrays))


def _samples(
    dataset: LabelledSet, indices: Iterable[int], config: EvaluateConfig, given: GivenMasks | None, bad: BadSamples
) -> Iterator[_Sample]:
    for index in indices:
        try:
            image, labels = dataset.read(index)
            masks = _masks(dataset.pairs[index][0], image, labels, config, given)
        except ValueError as error:
            bad.found.append(str(error))
            bad.stop_if_too_many(len(dataset))
            continue
        yield _Sample(index, image, labels, masks)


def _masks(
    path: Path, image: Image.Image, label: NDArray[np.uint8], config: EvaluateConfig, given: GivenMasks | None
) -> Annotations:
    if config.protocol != "masks":
        return []
    if given:
        return given.read(path.stem, image.size)
    if config.masks == "felzenszwalb":
        return segment_masks(image, config.felzenszwalb_scale, config.felzenszwalb_sigma, config.felzenszwalb_min_size)
    return truth_masks(label)


def _find(batch: list[_Sample], towers: list[Backbone], clip: Clip, classes: Tensor, config: EvaluateConfig) -> list[Found]:
    if config.protocol == "slide":
        windows: dict[str, int] = {
            "side": config.slide_side,
            "crop": config.crop,
            "stride": config.stride,
            "feature_grid": config.feature_grid,
            "windows_at_once": config.batch_size,
        }
        whole = (normalise(to_tensor(sample.image).to(classes.device), clip.mean, clip.std)[None] for sample in batch)
        return [label_windows(towers, image, classes, **windows) for image in whole]
    images = _resized_square(batch, config.side, clip, classes.device)
    if config.protocol == "whole":
        return label_whole(towers, images, [sample.labels.shape for sample in batch], classes, config.feature_grid)
    features = torch.stack([tower(images) for tower in towers], dim=1)  # [B, T, C, h, w]
    return [
        classify_masks(feature, sample.masks, classes, sample.labels) for feature, sample in zip(features, batch, strict=True)
    ]


def _resized_square(batch: list[_Sample], side: int, clip: Clip, device: torch.device) -> Tensor:
    return torch.cat([resized_square(sample.image, side, clip.mean, clip.std, device) for sample in batch])


def metrics_of(tally: Tally, num_images: int, masks: bool, labelled: Path) -> dict[str, float]:
    """The figures by name, without the labelled set's.

    Args:
        tally: of CLIP, or of both towers.
        num_images: how many the set holds.
        masks: whether masks were classified.
        labelled: the labelled set, in messages.

    Raises:
        ValueError: nothing was counted.
    """
    towers = tally.confusions
    if len(tally.bad) == num_images:
        raise ValueError(f"{labelled}: none of its {num_images} images could be measured, for the reasons above")
    if not towers[CLIP].counts.any():
        raise ValueError(f"{labelled}: the label maps hold no labelled pixel at all")
    metrics = {f"miou{tower}": confusion.miou() for tower, confusion in towers.items()}
    if OURS in towers:
        metrics["gain"] = metrics["miou"] - metrics["miou_clip"]
    metrics |= {f"pixel_accuracy{tower}": confusion.pixel_accuracy() for tower, confusion in towers.items()}
    if masks:
        *hits, counted = tally.masks.tolist()
        if not counted:
            raise ValueError(f"{labelled}: no mask of its images holds a labelled pixel")
        metrics |= {f"mask_accuracy{tower}": 100 * hit / counted for tower, hit in zip(towers, hits, strict=True)}
    found, present = tally.recalled.tolist()
    metrics["image_recall_clip"] = found / max(present, 1)
    metrics["images"] = float(num_images - len(tally.bad))
    return metrics


def per_class(names: list[str], tally: Tally) -> list[dict[str, Any]]:
    """One row a class: IoU of both towers in points (None when the truth does not hold the class), pixels of truth."""

    def points(value: float) -> float | None:
        return None if np.isnan(value) else round(100 * float(value), 4)

    ours, clip = tally.confusions[OURS], tally.confusions[CLIP]
    both = zip(names, ours.iou(), clip.iou(), ours.counts.sum(axis=1), strict=True)
    return [{"class": name, "iou": points(a), "iou_clip": points(b), "pixels": int(n)} for name, a, b, n in both]
