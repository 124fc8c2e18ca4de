"""STAGE evaluate: a PixelCLIP and the CLIP it came from on one labelled set, with one classifier (method.md, "Inference").

B images, K classes, C embedding width, H W image.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from pixelclip.backbone import Backbone, check_side
from pixelclip.benchmarks import IGNORE, LabelledSet, open_folder
from pixelclip.checkpoint import Clip, Model, backbone_of, clip_folder, load_clip, load_model
from pixelclip.config import EvaluateConfig
from pixelclip.pixels import normalise, squash, to_tensor
from pixelclip.predict import class_scores, label_map
from pixelclip.ranks import pick_device
from pixelclip.report import Example, write_report
from pixelclip.shards import BadSamples
from pixelclip.stage import PROVENANCE, Metrics, Stage, describe
from pixelclip.storage import read_json, write_atomically, write_json
from pixelclip.text import TEMPLATES, TextTower, classifier
from pixelclip.tracking import Run

REPORT, PER_CLASS, TABLE = "report.html", "per_class.json", "table.txt"


@dataclass
class Confusion:
    """Pixel counts of truth (rows) against prediction (columns)."""

    counts: NDArray[np.int64]

    @classmethod
    def zeros(cls, classes: int) -> "Confusion":
        """An empty one."""
        return cls(np.zeros((classes, classes), np.int64))

    def add(self, truth: NDArray[np.integer], predicted: NDArray[np.integer]) -> None:
        """Counts one image; `IGNORE`d pixels are left out."""
        valid = truth != IGNORE
        classes = len(self.counts)
        joint = truth[valid].astype(np.int64) * classes + predicted[valid]
        self.counts += np.bincount(joint, minlength=classes**2).reshape(classes, classes)

    def iou(self) -> NDArray[np.float64]:
        """Intersection over union of every class; NaN for one that the truth does not hold."""
        hit, truth, predicted = np.diag(self.counts), self.counts.sum(axis=1), self.counts.sum(axis=0)
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.where(truth > 0, hit / (truth + predicted - hit), np.nan)

    def miou(self) -> float:
        """Mean IoU in points over the classes that the truth holds."""
        return float(100 * np.nanmean(self.iou()))

    def pixel_accuracy(self) -> float:
        """Correct pixels in percent."""
        return float(100 * np.trace(self.counts) / self.counts.sum())


def present_recall(similarities: Tensor, present: Sequence[NDArray[np.integer]]) -> float:
    """Share of the present classes that are among an image's n most similar ones, n being how many are present.

    Args:
        similarities: [B, K], image with class.
        present: the classes in the truth of each image.
    """
    found = total = 0
    for row, classes in zip(similarities, present, strict=True):
        top = set(row.topk(len(classes)).indices.tolist())
        found, total = found + len(top & set(classes.tolist())), total + len(classes)
    return found / max(total, 1)


def run(model: Path, labelled: Path, out: Path, config: EvaluateConfig) -> Metrics:
    """Measures a model and its CLIP on a labelled set and writes the report.

    Args:
        model: model folder.
        labelled: labelled set.
        out: folder to make: metrics, `table.txt`, `per_class.json`, `report.html`.
        config: settings.

    Returns:
        `miou/NAME`, `miou_clip/NAME`, `gain/NAME`, `pixel_accuracy/NAME`, ... in points; `image_recall_clip/NAME` in 0..1.

    Raises:
        ValueError: unusable model, CLIP or labelled set, or MLflow unreachable.
    """
    loaded = load_model(model)
    spec = config.clip or loaded.config["clip"]["spec"]
    weights = clip_folder(spec)
    named = {"model": model, "labelled": labelled} | ({"clip": weights} if weights else {})
    dataset = open_folder(labelled)
    device = pick_device(config.device)
    stage = Stage("evaluate", out, {key: describe(path) for key, path in named.items()}, config)
    if stage.finished:
        return stage.reuse()
    trained_from = loaded.config["clip"]["md5"]
    if not config.clip and weights and trained_from and stage.inputs["clip"]["md5"] != trained_from:
        raise ValueError(f"{weights}: is not the CLIP that {model} was trained from (other md5); name it by evaluate.clip")
    check_side("evaluate.side", config.side or loaded.side, backbone_of(loaded))
    with stage:
        name = config.name or labelled.resolve().name
        tracked = Run.attach(model, stage.folder, read_json(model / PROVENANCE))
        # These two need MLflow at once, so they stand before the long work and not between it and its result.
        tracked.params({f"evaluate.{key}": value for key, value in stage.settings.items()})
        tracked.tags({f"labelled.{name}.md5": stage.inputs["labelled"]["md5"]})
        result = measure(loaded, load_clip(spec), dataset, config, device)
        metrics = {f"{key}/{name}": value for key, value in result.metrics.items()}
        shown = table(result.per_class, metrics, name)
        print(shown, flush=True)
        write_atomically(stage.folder / TABLE, shown + "\n")
        write_json(stage.folder / PER_CLASS, result.per_class)
        write_report(
            stage.folder / REPORT,
            name=name,
            metrics=metrics,
            per_class=result.per_class,
            examples=result.examples,
            classes=dataset.classes,
            model=model,
            words=result.words,
        )
        tracked.values(metrics)
        tracked.artifact(stage.folder / REPORT)
        tracked.artifact(stage.folder / PER_CLASS)
        tracked.finish()
        return stage.finish(metrics, files=["metrics.json", PER_CLASS])


@dataclass(frozen=True)
class Result:
    """What `measure` found; `words`: for every concept the nearest class names with their cosines."""

    metrics: dict[str, float]
    per_class: list[dict[str, Any]]
    examples: list[Example]
    words: list[list[tuple[str, float]]]


@torch.no_grad()
def measure(model: Model, clip: Clip, dataset: LabelledSet, config: EvaluateConfig, device: torch.device) -> Result:
    """Evaluates model and CLIP with the very same images, classifier, side and grid."""
    side = config.side or model.side
    text = TextTower(clip.model).to(device).eval()
    classes = classifier(text, dataset.classes, TEMPLATES[config.templates])
    towers = {
        "": backbone_of(model).to(device).eval(),
        "_clip": Backbone(clip.model.visual, model.residual).to(device).eval(),
    }
    confusions = {suffix: Confusion.zeros(len(classes)) for suffix in towers}
    bad = BadSamples("evaluate", config.max_bad_share)
    wanted = set(np.linspace(0, len(dataset) - 1, min(config.pictures, len(dataset))).round().astype(int).tolist())
    examples: list[Example] = []
    similarities: list[Tensor] = []
    present: list[NDArray[np.integer]] = []
    for indices, images, labels in _batches(dataset, config.batch_size, bad):
        pixels = [normalise(to_tensor(image).to(device), clip.mean, clip.std)[None] for image in images]
        squashed = torch.cat([squash(image, side) for image in pixels])
        predicted: dict[str, list[NDArray[np.integer]]] = {}
        for suffix, tower in towers.items():
            scores = class_scores(tower, squashed, classes, config.feature_grid)
            predicted[suffix] = [label_map(s[None], t.shape)[0].cpu().numpy() for s, t in zip(scores, labels, strict=True)]
            for truth, found in zip(labels, predicted[suffix], strict=True):
                confusions[suffix].add(truth, found)
        native = torch.cat([squash(image, clip.side) for image in pixels])
        similarities.append(F.normalize(towers["_clip"].image_features(native), dim=-1) @ classes.T)
        present += [np.setdiff1d(truth, [IGNORE]) for truth in labels]
        for place, index in enumerate(indices):
            if index in wanted:
                examples.append(Example(images[place], predicted["_clip"][place], predicted[""][place], labels[place]))
    bad.check(len(dataset))
    if not any(confusion.counts.any() for confusion in confusions.values()):
        raise ValueError("evaluate: the label maps hold no labelled pixel at all")
    miou = {suffix: confusion.miou() for suffix, confusion in confusions.items()}
    metrics = {f"miou{suffix}": value for suffix, value in miou.items()}
    metrics["gain"] = miou[""] - miou["_clip"]
    metrics |= {f"pixel_accuracy{suffix}": confusion.pixel_accuracy() for suffix, confusion in confusions.items()}
    metrics["image_recall_clip"] = present_recall(torch.cat(similarities).cpu(), present)
    metrics["images"] = float(len(dataset) - len(bad.found))
    return Result(
        metrics, _per_class(dataset.classes, confusions), examples, _nearest_words(model, text, classes, dataset.classes)
    )


def _batches(
    dataset: LabelledSet, size: int, bad: BadSamples
) -> Iterator[tuple[list[int], list[Image.Image], list[NDArray[np.uint8]]]]:
    indices: list[int] = []
    images: list[Image.Image] = []
    labels: list[NDArray[np.uint8]] = []
    for index in tqdm(range(len(dataset)), desc="evaluate", unit="image"):
        try:
            image, label = dataset.read(index)
        except ValueError as error:
            bad.found.append(str(error))
            bad.stop_if_too_many(len(dataset))
            continue
        indices.append(index)
        images.append(image)
        labels.append(label)
        if len(indices) == size:
            yield indices, images, labels
            indices, images, labels = [], [], []
    if indices:
        yield indices, images, labels


def _per_class(names: list[str], confusions: dict[str, Confusion]) -> list[dict[str, Any]]:
    """One row a class: IoU of both models in points (None when the truth does not hold the class), pixels of truth."""

    def points(value: float) -> float | None:
        return None if np.isnan(value) else round(100 * float(value), 4)

    pixels = confusions[""].counts.sum(axis=1)
    both = zip(names, confusions[""].iou(), confusions["_clip"].iou(), pixels, strict=True)
    return [{"class": name, "iou": points(a), "iou_clip": points(b), "pixels": int(n)} for name, a, b, n in both]


def _nearest_words(model: Model, text: TextTower, classes: Tensor, names: list[str]) -> list[list[tuple[str, float]]]:
    """For every concept the three nearest class names. The text tower was frozen, so CLIP's own serves."""
    concepts = F.normalize(model.prompts.to(classes.device)(text), dim=-1)
    top = (concepts @ classes.T).topk(min(3, len(names)), dim=-1)
    pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
    return [[(names[i], round(value, 4)) for i, value in zip(*row, strict=True)] for row in pairs]


def table(per_class: list[dict[str, Any]], metrics: Metrics, name: str) -> str:
    """The result as text: IoU per class of CLIP and PixelCLIP, then the means."""

    def cell(value: float | None) -> str:
        return f"{'-' if value is None else format(value, '.1f'):>9}"

    width = max(12, *(len(row["class"]) for row in per_class))
    lines = [f"{name:<{width}} {'CLIP':>9} {'PixelCLIP':>9} {'gain':>9}"]
    for row in per_class:
        gain = None if row["iou"] is None else row["iou"] - row["iou_clip"]
        lines.append(f"{row['class']:<{width}} {cell(row['iou_clip'])} {cell(row['iou'])} {cell(gain)}")
    for label, key in (("mIoU", "miou"), ("pixel acc.", "pixel_accuracy")):
        ours, clip = metrics[f"{key}/{name}"], metrics[f"{key}_clip/{name}"]
        lines.append(f"{label:<{width}} {cell(clip)} {cell(ours)} {cell(ours - clip)}")
    lines.append(f"image-level recall of CLIP: {metrics[f'image_recall_clip/{name}']:.3f}")
    return "\n".join(lines)
