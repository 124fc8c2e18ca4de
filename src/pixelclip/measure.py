"""A PixelCLIP and its CLIP over one labelled set: counts of every process, with checkpoints (method.md, "Inference").

B images, T towers, K classes, C embedding width, H W image.
"""

import io
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain
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
from pixelclip.checkpoint import Clip, Model, backbone_of
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
from pixelclip.pixels import normalise, squash, to_tensor
from pixelclip.ranks import Ranks
from pixelclip.report import Example
from pixelclip.shards import BadSamples
from pixelclip.storage import read_json, write_atomically, write_json
from pixelclip.tally import TOWERS, Confusion, Found, Tally, packed
from pixelclip.text import TEMPLATES, TextTower, classifier

_SHOWN_CLASSES = 10  # of a confusion matrix that one can still read


@dataclass(frozen=True)
class Result:
    """What `measure` found.

    Args:
        metrics: by name, without the labelled set's.
        per_class: IoU of both models and the pixels of every class.
        confusion: of the model, see `Confusion.largest`.
        examples: pictures with the label maps of both.
        words: for every concept the nearest class names with their cosines.
    """

    metrics: dict[str, float]
    per_class: list[dict[str, Any]]
    confusion: dict[str, Any]
    examples: list[Example]
    words: list[list[tuple[str, float]]]


@torch.no_grad()
def measure(model: Model, clip: Clip, dataset: LabelledSet, config: EvaluateConfig, ranks: Ranks, state: Path) -> Result:
    """Evaluates model and CLIP with the very same images, classifier and protocol.

    Args:
        model: the model.
        clip: its CLIP.
        dataset: the labelled set; every rank takes its share of the batches.
        config: settings.
        ranks: the processes; each of them returns the result of all.
        state: folder of counts and examples of an unfinished measurement, which continues.

    Raises:
        ValueError: too many unreadable samples, or nothing to count.
    """
    text = TextTower(clip.model).to(ranks.device).eval()
    classes = classifier(text, dataset.classes, TEMPLATES[config.templates])
    towers = [backbone_of(model), Backbone(clip.model.visual, model.residual)]
    towers = [tower.to(ranks.device).eval() for tower in towers]
    wanted = np.linspace(0, len(dataset) - 1, min(config.pictures, len(dataset))).round().astype(int).tolist()
    tally, places = _begin(dataset, config, ranks, state)
    bad = BadSamples("evaluate", config.max_bad_share, tally.bad)
    given = GivenMasks(config.masks_folder) if config.protocol == "masks" and config.masks == "given" else None
    saved = tally.position
    for batch in _batches(dataset, range(saved, places.stop), config, given, bad, quiet=not ranks.first):
        pixels = [normalise(to_tensor(image).to(ranks.device), clip.mean, clip.std)[None] for image in batch.images]
        found = _find(batch, pixels, towers, classes, config, config.side or model.side)
        native = torch.cat([squash(image, clip.side) for image in pixels])
        similarities = F.normalize(towers[1].image_features(native), dim=-1) @ classes.T
        tally.add(batch.labels, found, similarities.cpu())
        for index, image, truth, one in zip(batch.indices, batch.images, batch.labels, found, strict=True):
            if index in wanted:
                _save_example(_example(state, index), Example(image, one.maps[1], one.maps[0], truth))
        tally.position = batch.indices[-1] + 1
        if tally.position - saved >= config.checkpoint_every:
            tally.save(_checkpoint(state, ranks))
            saved = tally.position
    tally.sum(ranks)
    bad.found = tally.bad
    (bad.check if ranks.first else bad.stop_if_too_many)(len(dataset))
    drawn = [_example(state, index) for index in wanted if index in places]
    examples = chain(*ranks.gather_objects([path.read_bytes() for path in drawn if path.is_file()]))
    return Result(
        _metrics(tally, len(dataset), masks=config.protocol == "masks"),
        _per_class(dataset.classes, tally.confusions),
        tally.confusions[0].largest(dataset.classes, _SHOWN_CLASSES),
        [_load_example(data) for data in examples],
        _nearest_words(model, text, classes, dataset.classes),
    )


def _begin(dataset: LabelledSet, config: EvaluateConfig, ranks: Ranks, state: Path) -> tuple[Tally, range]:
    """This rank's tally, continued where there is one, and its images: whole batches, the same with any number of ranks."""
    made_by = {"processes": ranks.size, "batch_size": config.batch_size, "pictures": config.pictures}
    if ranks.first:
        about = state / "made_by.json"
        there = read_json(about) if about.is_file() else made_by
        if there != made_by:
            changed = ", ".join(
                f"{key} {there.get(key)} → {value}" for key, value in made_by.items() if there.get(key) != value
            )
            print(f"evaluate: starts again, the interrupted run cannot be continued with other {changed}", flush=True)
            shutil.rmtree(state)
        write_json(about, made_by)
    ranks.from_first(None)  # nobody reads or writes before it is clear what stays
    batches = ranks.share(-(-len(dataset) // config.batch_size))
    places = range(batches.start * config.batch_size, min(batches.stop * config.batch_size, len(dataset)))
    tally = Tally.zeros(len(dataset.classes), places.start)
    if _checkpoint(state, ranks).is_file():
        tally.load(_checkpoint(state, ranks))
        if ranks.first:
            print(f"evaluate: continues after {tally.position} images", flush=True)
    return tally, places


def _checkpoint(state: Path, ranks: Ranks) -> Path:
    return state / f"counts-{ranks.rank}-of-{ranks.size}.npz"


def _example(state: Path, index: int) -> Path:
    return state / f"example-{index}.npz"


def _save_example(path: Path, example: Example) -> None:
    maps = {key: getattr(example, key).astype(np.uint16) for key in ("clip", "ours", "truth")}
    write_atomically(path, packed(image=np.asarray(example.image), **maps))


def _load_example(data: bytes) -> Example:
    with np.load(io.BytesIO(data), allow_pickle=False) as saved:
        return Example(Image.fromarray(saved["image"]), saved["clip"], saved["ours"], saved["truth"])


@dataclass(frozen=True)
class _Batch:
    indices: list[int] = field(default_factory=list)
    images: list[Image.Image] = field(default_factory=list)
    labels: list[NDArray[np.uint8]] = field(default_factory=list)
    masks: list[Annotations] = field(default_factory=list)


def _batches(
    dataset: LabelledSet, places: range, config: EvaluateConfig, given: GivenMasks | None, bad: BadSamples, quiet: bool
) -> Iterator[_Batch]:
    batch = _Batch()
    shown = tqdm(places, desc="evaluate", unit="image", initial=places.start, total=places.stop, disable=quiet)
    for index in shown:
        try:
            image, label = dataset.read(index)
            masks = _masks(dataset.pairs[index][0], image, label, config, given)
        except ValueError as error:
            bad.found.append(str(error))
            bad.stop_if_too_many(len(dataset))
            continue
        batch.indices.append(index)
        batch.images.append(image)
        batch.labels.append(label)
        batch.masks.append(masks)
        if len(batch.indices) == config.batch_size:
            yield batch
            batch = _Batch()
    if batch.indices:
        yield batch


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


def _find(
    batch: _Batch, pixels: list[Tensor], towers: list[Backbone], classes: Tensor, config: EvaluateConfig, side: int
) -> list[Found]:
    if config.protocol == "slide":
        windows: dict[str, int] = {
            "side": config.slide_side,
            "crop": config.crop,
            "stride": config.stride,
            "feature_grid": config.feature_grid,
            "windows_at_once": config.batch_size,
        }
        return [label_windows(towers, image, classes, **windows) for image in pixels]
    squashed = torch.cat([squash(image, side) for image in pixels])
    if config.protocol == "whole":
        return label_whole(towers, squashed, [label.shape for label in batch.labels], classes, config.feature_grid)
    features = torch.stack([tower(squashed) for tower in towers], dim=1)  # [B, T, C, h, w]
    each = zip(features, batch.masks, batch.labels, strict=True)
    return [classify_masks(feature, masks, classes, label) for feature, masks, label in each]


def _metrics(tally: Tally, num_images: int, masks: bool) -> dict[str, float]:
    if not tally.confusions[0].counts.any():
        raise ValueError("evaluate: the label maps hold no labelled pixel at all")
    both = list(zip(TOWERS, tally.confusions, strict=True))
    metrics = {f"miou{suffix}": confusion.miou() for suffix, confusion in both}
    metrics["gain"] = metrics["miou"] - metrics["miou_clip"]
    metrics |= {f"pixel_accuracy{suffix}": confusion.pixel_accuracy() for suffix, confusion in both}
    if masks:
        *hits, counted = tally.masks.tolist()
        if not counted:
            raise ValueError("evaluate: no mask holds a labelled pixel")
        metrics |= {f"mask_accuracy{suffix}": 100 * hit / counted for suffix, hit in zip(TOWERS, hits, strict=True)}
    found, present = tally.recalled.tolist()
    metrics["image_recall_clip"] = found / max(present, 1)
    metrics["images"] = float(num_images - len(tally.bad))
    return metrics


def _per_class(names: list[str], confusions: list[Confusion]) -> list[dict[str, Any]]:
    """One row a class: IoU of both models in points (None when the truth does not hold the class), pixels of truth."""

    def points(value: float) -> float | None:
        return None if np.isnan(value) else round(100 * float(value), 4)

    ours, clip = confusions
    both = zip(names, ours.iou(), clip.iou(), ours.counts.sum(axis=1), strict=True)
    return [{"class": name, "iou": points(a), "iou_clip": points(b), "pixels": int(n)} for name, a, b, n in both]


def _nearest_words(model: Model, text: TextTower, classes: Tensor, names: list[str]) -> list[list[tuple[str, float]]]:
    """For every concept the three nearest class names. The text tower was frozen, so CLIP's own serves."""
    concepts = F.normalize(model.prompts.to(classes.device)(text), dim=-1)
    top = (concepts @ classes.T).topk(min(3, len(names)), dim=-1)
    pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
    return [[(names[i], round(value, 4)) for i, value in zip(*row, strict=True)] for row in pairs]
