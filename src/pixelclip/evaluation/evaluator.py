"""Evaluate image towers on a labelled set, in one or several processes, with checkpoints."""

from collections.abc import Iterable, Iterator, Mapping
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

from pixelclip.config import BEST, QUALITIES, EvaluateConfig, Refinement
from pixelclip.data.images import resize_shortest_edge
from pixelclip.data.labelled_images import LabelledSet
from pixelclip.data.tensors import normalise, resized_square, to_tensor
from pixelclip.distributed import ProcessGroup, pick_precision
from pixelclip.evaluation.classify import (
    Annotations,
    GivenMasks,
    classify_masks,
    predict_refined,
    predict_whole,
    predict_windows,
    segment_masks,
    truth_masks,
)
from pixelclip.evaluation.confusion import CLIP, OURS, EvaluationCounts, Predictions, read_npz, to_npz
from pixelclip.inference.refinement.refine import View
from pixelclip.models.backbone import Backbone
from pixelclip.models.checkpoint import Clip
from pixelclip.storage.files import write_atomically
from pixelclip.storage.progress import track
from pixelclip.workflow.bad_samples import BadSamples
from pixelclip.workflow.termination import Terminated, deferred

_NAMED = 10  # maximum number of absent classes listed by name
STATE_FOLDER = "state"
"""Folder in a stage's partial output, with the counts and examples from which an interrupted evaluation resumes."""
LabelMaps = dict[int, NDArray[np.uint16]]
"""Label maps by sample index."""


@dataclass(frozen=True)
class TowerEvaluation:
    """Result of `evaluate_towers`.

    Args:
        counts: counts summed over all images.
        label_maps: label maps of the examples, by tower.
        examples: image and truth [H, W] of the report's pictures, by sample index.
    """

    counts: EvaluationCounts
    label_maps: dict[str, LabelMaps]
    examples: dict[int, tuple[Image.Image, NDArray[np.uint16]]]


@dataclass(frozen=True)
class _LabelledImage:
    index: int
    image: Image.Image
    labels: NDArray[np.uint8]
    masks: Annotations


@torch.no_grad()
def evaluate_towers(
    towers: Mapping[str, Backbone],
    clip: Clip,
    classes: Tensor,
    dataset: LabelledSet,
    config: EvaluateConfig,
    group: ProcessGroup,
    state: Path,
    stage: str = "evaluate",
) -> TowerEvaluation:
    """Evaluate towers on the same images with the same classifier and protocol; their results are independent.

    Args:
        towers: `OURS`, `CLIP` or both; their precision is set from the settings.
        clip: the CLIP that the towers belong to.
        classes: its classifier, [classes, embedding width].
        dataset: labelled set; every process evaluates its own part of the batches.
        config: settings, with the side in pixels.
        group: process group; every process returns the full result.
        state: folder for checkpoints and examples; an interrupted evaluation resumes from it.
        stage: name of the stage in messages.

    Raises:
        ValueError: too many unreadable samples.
    """
    towers = {name: tower.to(group.device).eval() for name, tower in towers.items()}
    for tower in towers.values():
        tower.precision = pick_precision(config.precision, group.device)
    example_indices = np.linspace(0, len(dataset) - 1, min(config.pictures, len(dataset))).round().astype(int).tolist()
    # Checkpoints depend on process count, batch size and examples, so each combination has its own folder.
    state = state / f"processes-{group.size}_batch-{config.batch_size}_pictures-{config.pictures}"
    checkpoint = state / f"counts-{group.rank}-of-{group.size}.npz"
    batches = group.local_range(-(-len(dataset) // config.batch_size))  # whole ones, the same for any number of processes
    indices = range(batches.start * config.batch_size, min(batches.stop * config.batch_size, len(dataset)))
    counts = EvaluationCounts.zeros(names := tower_names(towers, config), len(dataset.classes), indices.start)
    if checkpoint.is_file():
        counts.load(checkpoint)
        if group.is_main:
            print(f"{stage}: resumes after {counts.next_index} images", flush=True)
    bad = BadSamples(stage, config.max_bad_share, counts.bad_samples)
    given = GivenMasks(config.masks_folder) if config.reads_masks else None
    saved_index = counts.next_index
    done = saved_index - indices.start
    bar = track(indices[done:], stage, "image", len(indices), done, enabled=group.is_main)
    samples = _read_samples(dataset, bar, config, given, bad)
    with deferred() as received:
        while batch := list(islice(samples, config.batch_size)):
            truths = [sample.labels for sample in batch]
            predictions = _predict(batch, list(towers.values()), clip, classes, config)
            counts.add(truths, predictions)
            if CLIP in towers:
                whole_images = _resize_batch([sample.image for sample in batch], clip.side, clip, group.device)
                similarities = F.normalize(towers[CLIP].image_features(whole_images), dim=-1) @ classes.T
                counts.add_recalled(truths, similarities.cpu())
            for sample, predicted in zip(batch, predictions, strict=True):
                if sample.index in example_indices:
                    _save_example(_example_file(state, sample.index), sample, names, predicted)
            counts.next_index = batch[-1].index + 1
            number = received()
            if number or counts.next_index - saved_index >= config.checkpoint_every:
                counts.save(checkpoint)
                saved_index = counts.next_index
            if number:
                raise Terminated(number, f"after {saved_index} of {indices.stop} images")
    counts.save(checkpoint)  # what follows may be interrupted, too
    counts.all_reduce(group)
    bad.found = counts.bad_samples
    (bad.check if group.is_main else bad.stop_if_too_many)(len(dataset))
    own_examples = [_example_file(state, index) for index in example_indices if index in indices]
    return _with_examples(counts, names, own_examples, group)


def tower_names(towers: Iterable[str], config: EvaluateConfig) -> list[str]:
    """Return the keys of the results of `evaluate_towers`: the towers, with setting `best` each once more with `BEST`."""
    towers = [*towers]
    return towers + [f"{tower}{BEST}" for tower in towers if config.best]


def _with_examples(
    counts: EvaluationCounts, towers: Iterable[str], files: Iterable[Path], group: ProcessGroup
) -> TowerEvaluation:
    """Combine the counts with the saved examples of all processes."""
    evaluation = TowerEvaluation(counts, {tower: {} for tower in towers}, {})
    names = ["image", "truth", *(f"map{tower}" for tower in towers)]
    own = [(path.stem, read_npz(path, names)) for path in files if path.is_file()]
    for stem, saved in chain(*group.all_gather_object(own)):
        index = int(stem.removeprefix("example-"))
        evaluation.examples[index] = Image.fromarray(saved["image"]), saved["truth"]
        for name, maps in evaluation.label_maps.items():
            maps[index] = saved[f"map{name}"]
    return evaluation


def _save_example(file: Path, sample: _LabelledImage, towers: Iterable[str], predicted: Predictions) -> None:
    label_maps = zip(towers, predicted.label_maps, strict=True)
    arrays = {f"map{tower}": labels.cpu().numpy().astype(np.uint16) for tower, labels in label_maps}
    arrays |= {"image": np.asarray(sample.image), "truth": sample.labels.astype(np.uint16)}
    write_atomically(file, to_npz(**arrays))


def _example_file(state: Path, index: int) -> Path:
    return state / f"example-{index}.npz"


def _read_samples(
    dataset: LabelledSet, indices: Iterable[int], config: EvaluateConfig, given: GivenMasks | None, bad: BadSamples
) -> Iterator[_LabelledImage]:
    for index in indices:
        try:
            image, labels = dataset.read(index)
            masks = _masks(dataset.pairs[index][0], image, labels, config, given)
        except ValueError as error:
            bad.found.append(str(error))
            bad.stop_if_too_many(len(dataset))
            continue
        yield _LabelledImage(index, image, labels, masks)


def _masks(
    path: Path, image: Image.Image, labels: NDArray[np.uint8], config: EvaluateConfig, given: GivenMasks | None
) -> Annotations:
    if config.protocol != "masks" and not given:
        return []
    if given:
        return given.read(path.stem, image.size)
    if config.masks == "felzenszwalb":
        return segment_masks(image, config.felzenszwalb_scale, config.felzenszwalb_sigma, config.felzenszwalb_min_size)
    return truth_masks(labels)


def _predict(
    batch: list[_LabelledImage], towers: list[Backbone], clip: Clip, classes: Tensor, config: EvaluateConfig
) -> list[Predictions]:
    if config.protocol == "slide":
        full_size = (normalise(to_tensor(sample.image).to(classes.device), clip.mean, clip.std)[None] for sample in batch)
        return [predict_windows(towers, image, classes, config) for image in full_size]
    if config.protocol == "whole" and config.steps:
        return _refined(batch, towers, clip, classes, config, config)
    photos = (sample.image for sample in batch)
    if config.protocol == "whole":
        photos = (resize_shortest_edge(photo, config.shortest_edge, config.longest_edge) for photo in photos)
    images = _resize_batch(photos, config.side, clip, classes.device)
    if config.protocol == "whole":
        plain = predict_whole(towers, images, [sample.labels.shape for sample in batch], classes, config.feature_grid)
        best = _refined(batch, towers, clip, classes, config, QUALITIES["best"]) if config.best else []
        return [_joined(*each) for each in zip(plain, best, strict=True)] if best else plain
    features = torch.stack([tower(images) for tower in towers], dim=1)  # [B, T, C, h, w]
    return [
        classify_masks(feature, sample.masks, classes, sample.labels) for feature, sample in zip(features, batch, strict=True)
    ]


def _refined(
    batch: list[_LabelledImage],
    towers: list[Backbone],
    clip: Clip,
    classes: Tensor,
    config: EvaluateConfig,
    refinement: Refinement,
) -> list[Predictions]:
    view = View(
        config.side,
        config.window,
        config.feature_grid,
        config.shortest_edge,
        config.longest_edge,
        tuple(clip.mean),
        tuple(clip.std),
    )
    given = refinement.segments == "given"
    return [
        Predictions(
            predict_refined(towers, sample.image, classes, view, refinement, sample.masks if given else None),
            [0] * len(towers),
            0,
        )
        for sample in batch
    ]


def _joined(first: Predictions, second: Predictions) -> Predictions:
    """Join the predictions of two groups of towers for one image."""
    return Predictions(first.label_maps + second.label_maps, first.correct_masks + second.correct_masks, first.num_masks)


def _resize_batch(images: Iterable[Image.Image], side: int, clip: Clip, device: torch.device) -> Tensor:
    return torch.cat([resized_square(image, side, clip.mean, clip.std, device) for image in images])


def compute_metrics(counts: EvaluationCounts, num_images: int, masks: bool, labelled: Path) -> dict[str, float]:
    """Compute the metrics of CLIP, or of both towers, keyed by metric name, without the `/NAME` suffix.

    Those of quality=best follow, with `BEST` at the end of their names.

    Raises:
        ValueError: no image, labelled pixel or labelled mask was evaluated.
    """
    confusions = {tower: confusion for tower, confusion in counts.confusions.items() if not tower.endswith(BEST)}
    if len(counts.bad_samples) == num_images:
        raise ValueError(f"{labelled}: none of the {num_images} images could be evaluated, for the reasons above")
    if not confusions[CLIP].counts.any():
        raise ValueError(f"{labelled}: the label maps contain no labelled pixel")
    metrics = {f"miou{tower}": confusion.miou() for tower, confusion in confusions.items()}
    if OURS in confusions:
        metrics["gain"] = metrics["miou"] - metrics["miou_clip"]
    metrics |= {f"pixel_accuracy{tower}": confusion.pixel_accuracy() for tower, confusion in confusions.items()}
    if masks:
        *correct, num_masks = counts.masks.tolist()
        if not num_masks:
            raise ValueError(f"{labelled}: no mask covers a labelled pixel")
        metrics |= {f"mask_accuracy{tower}": 100 * hits / num_masks for tower, hits in zip(confusions, correct, strict=True)}
    recalled, present = counts.recalled.tolist()
    metrics["image_recall_clip"] = recalled / max(present, 1)
    metrics["images"] = float(num_images - len(counts.bad_samples))
    best = {tower: confusion for tower, confusion in counts.confusions.items() if tower.endswith(BEST)}
    metrics |= {f"miou{tower}": confusion.miou() for tower, confusion in best.items()}
    if f"{OURS}{BEST}" in best:
        metrics[f"gain{BEST}"] = metrics[f"miou{BEST}"] - metrics[f"miou{CLIP}{BEST}"]
    return metrics | {f"pixel_accuracy{tower}": confusion.pixel_accuracy() for tower, confusion in best.items()}


def name_metrics(values: Mapping[str, float], label: str) -> dict[str, float]:
    """Name the result of `compute_metrics`: `KEY/LABEL`, and `KEY/LABEL.best` for quality=best."""
    return {f"{key.removesuffix(BEST)}/{label}{BEST if key.endswith(BEST) else ''}": value for key, value in values.items()}


def absent_classes(dataset: LabelledSet, counts: EvaluationCounts) -> str:
    """Return a warning that names the classes without labelled pixels and the probable reason; empty if there are none."""
    present = counts.confusions[CLIP].counts.sum(axis=1) > 0
    absent = [name for name, found in zip(dataset.classes, present, strict=True) if not found]
    if not absent:
        return ""
    named = ", ".join(absent[:_NAMED]) + (f" and {len(absent) - _NAMED} more" if len(absent) > _NAMED else "")
    binary = len(present) == 2 and present[0]
    reason = "; if the maps hold 0 and 255 (which is ignored), write 1 for the second class" if binary else ""
    occur = "occurs" if len(absent) == 1 else "occur"
    return f"{len(absent)} of {len(present)} classes never {occur} in the label maps: {named}{reason}"


def per_class_iou(names: list[str], counts: EvaluationCounts) -> list[dict[str, Any]]:
    """Return one row per class: IoU of both towers in points (None without labelled pixels), number of labelled pixels."""

    def points(value: float) -> float | None:
        return None if np.isnan(value) else round(100 * float(value), 4)

    ours, clip = counts.confusions[OURS], counts.confusions[CLIP]
    columns = zip(names, ours.iou(), clip.iou(), ours.counts.sum(axis=1), strict=True)
    return [{"class": name, "iou": points(a), "iou_clip": points(b), "pixels": int(n)} for name, a, b, n in columns]
