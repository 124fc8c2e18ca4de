"""Draw training views and concept maps, evaluated examples, a gallery of each concept's nearest masks, and previews."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from pixelclip.config import BEST
from pixelclip.data.annotations import parse_annotation
from pixelclip.data.dataset import Batch, MaskedImages
from pixelclip.data.images import cell_centres, colour_labels, decode_image, fitted, palette, to_rgb
from pixelclip.data.rle import RunMasks
from pixelclip.data.shard_format import index_shard, read_part
from pixelclip.data.shard_sources import list_shards
from pixelclip.data.tensors import normalise, resize_square, to_tensor
from pixelclip.evaluation.confusion import CLIP, OURS
from pixelclip.evaluation.evaluator import TowerEvaluation
from pixelclip.inference.prediction import with_legend
from pixelclip.models.pixelclip import PixelCLIP, StepOutput
from pixelclip.models.text import TEMPLATES, classifier, nearest_names
from pixelclip.storage.files import write_json

UNLABELLED = "unlabelled or ignored"
GALLERY, SHEET = "gallery.json", "gallery.jpg"
_GALLERY_IMAGES, _GALLERY_BEST, _GALLERY_ROWS, _THUMBNAIL = 256, 6, 500, 96
_CELL, _TITLE = (256, 512), 16  # maximum width and height of a picture in `panels`, height of its letters
_LEGEND_ENTRIES = 24
_PREVIEW = (1200, 240)  # maximum width and height of an image in a preview


@dataclass(frozen=True)
class Example:
    """An image with the label maps [H, W] of CLIP, PixelCLIP, the truth, and PixelCLIP with quality=best.

    Those of CLIP and of quality=best are None if they were not evaluated.
    """

    image: Image.Image
    clip: NDArray[np.integer] | None
    ours: NDArray[np.integer]
    truth: NDArray[np.integer]
    best: NDArray[np.integer] | None = None


def to_pixels(normalised: Tensor, mean: Sequence[float], std: Sequence[float]) -> NDArray[np.uint8]:
    """Invert `normalise`: [3, H, W] to [H, W, 3], uint8."""
    image = normalised.cpu() * torch.tensor(std).view(3, 1, 1) + torch.tensor(mean).view(3, 1, 1)
    return np.round(image.clamp(0, 1).permute(1, 2, 0).numpy() * 255).astype(np.uint8)


def training_picture(
    micro_batches: Sequence[Batch], output: StepOutput, mean: Sequence[float], std: Sequence[float], words: Sequence[str]
) -> Image.Image:
    """Draw one row per image: student view, masks coloured by concept, and the student's best concept of every pixel.

    Args:
        micro_batches: micro-batches of the step.
        output: result of the step, with logits.
        mean, std: normalisation of the views.
        words: nearest word of each concept, for the legend.
    """
    rows: list[list[Image.Image]] = []
    batch = next(batch for batch in micro_batches if len(batch.masks))  # `output.logits` belongs to this batch
    concepts = output.logits.shape[1]
    side = batch.masks.shape[-1]
    shown: Counter[int] = Counter()
    for image in range(len(output.logits)):
        of_image = (batch.image_index == image).cpu()
        labels = np.full(batch.masks.shape[1:], -1)
        for mask, concept in zip(batch.masks.cpu()[of_image], output.shown_index.cpu()[of_image].tolist(), strict=True):
            labels[mask.numpy()] = concept
        predicted = output.logits[image].argmax(dim=0).cpu().numpy()
        shown.update(np.concatenate([labels[labels >= 0], predicted.ravel()]).tolist())
        view = Image.fromarray(to_pixels(batch.strong[image], mean, std)).resize((side, side))
        rows.append([view, *(Image.fromarray(colour_labels(each, concepts)) for each in (labels, predicted))])
    entries = [(concept, f"{words[concept]} ({concept})") for concept, _ in shown.most_common(_LEGEND_ENTRIES)]
    return _panels(rows, ("student's view", "masks by concept", "best concept"), entries, palette(concepts))


@torch.no_grad()
def concept_words(model: PixelCLIP, names: Sequence[str]) -> list[str]:
    """Return the nearest of `names` to each concept; empty strings for a tokenizer that cannot tell the names apart."""
    concepts = model.concepts()
    try:
        classes = classifier(model.text, names, TEMPLATES["single"])
    except ValueError:
        return [""] * len(concepts)
    return [name.partition(",")[0] for ((name, _),) in nearest_names(concepts, classes, names, 1)]


def segmentation_picture(examples: Sequence[Example], classes: Sequence[str]) -> Image.Image:
    """Draw one row per example: image, labels by CLIP, PixelCLIP and PixelCLIP best as far as evaluated, and the truth."""
    rows, counts = [], np.zeros(len(classes) + 1, np.int64)  # the last counts pixels without a class
    for example in examples:
        maps = [labels for labels in (example.clip, example.ours, example.best, example.truth) if labels is not None]
        coloured = (Image.fromarray(colour_labels(labels, len(classes))) for labels in maps)
        rows.append([example.image, *coloured])
        for labels in maps:
            counts += np.bincount(np.minimum(labels, len(classes)).ravel(), minlength=len(counts))
    order = np.argsort(-counts, kind="stable")[:_LEGEND_ENTRIES].tolist()
    names = [*(name.partition(",")[0] for name in classes), UNLABELLED]
    entries = [(index, names[index]) for index in order if counts[index]]
    colours = np.concatenate([palette(len(classes)), np.zeros((1, 3), np.uint8)])
    optional = {"CLIP": examples[0].clip is not None, "PixelCLIP": True, "PixelCLIP best": examples[0].best is not None}
    titles = ("image", *(title for title, present in optional.items() if present), "truth")
    return _panels(rows, titles, entries, colours)


def examples_of(evaluation: TowerEvaluation) -> list[Example]:
    """Return the examples of an evaluation of PixelCLIP, alone or with CLIP."""
    maps = evaluation.label_maps
    clip, best = maps.get(CLIP, {}), maps.get(f"{OURS}{BEST}", {})
    return [Example(image, clip.get(i), maps[OURS][i], truth, best.get(i)) for i, (image, truth) in evaluation.examples.items()]


def _panels(
    rows: Sequence[Sequence[Image.Image]], titles: Sequence[str], entries: list[tuple[int, str]], colours: NDArray[np.uint8]
) -> Image.Image:
    """Arrange pictures in a table with a title above each column and a legend of colours below.

    Args:
        rows: pictures of any size; each is scaled to fit a cell.
        titles: one per column.
        entries: index in `colours` and name of each entry of the legend, at least one.
        colours: [N, 3].
    """
    font = ImageFont.load_default(_TITLE)
    top = round(1.5 * _TITLE)
    cells = [[fitted(picture.size, _CELL) for picture in row] for row in rows]
    heights = [max(height for _, height in row) for row in cells]
    sheet = Image.new("RGB", (_CELL[0] * len(titles), top + sum(heights)), "white")
    draw = ImageDraw.Draw(sheet)
    for column, title in enumerate(titles):
        draw.text((column * _CELL[0] + 4, 2), title, fill="black", font=font)
    for row, sizes, height in zip(rows, cells, heights, strict=True):
        for column, (picture, size) in enumerate(zip(row, sizes, strict=True)):
            filter_ = Image.Resampling.NEAREST if column else Image.Resampling.BILINEAR  # label maps have no colours between
            sheet.paste(picture.resize(size, filter_), (column * _CELL[0], top))
        top += height
    return with_legend(sheet, entries, colours, size=_TITLE)


@torch.no_grad()
def gallery(model: PixelCLIP, dataset: MaskedImages, folder: Path, device: torch.device) -> None:
    """Write a gallery of the masks nearest to each concept, from a sample of training images.

    It consists of `gallery.json` (`[{"concept", "masks", "best": [{"file", "box", "cosine"}]}]`, most used concept first) and
    `gallery.jpg`, one sheet of all thumbnails with a row per concept: `box` is [left, top, right, bottom] in pixels. (KFP moves
    every file on its own, so many thumbnails would be slow.) Unreadable samples are skipped.
    """
    views = dataset.views
    concepts = model.concepts()
    best: list[list[tuple[float, Image.Image]]] = [[] for _ in concepts]
    counts = [0] * len(concepts)
    for index in range(min(_GALLERY_IMAGES, len(dataset))):
        try:
            image, masks = dataset.read(index)
        except ValueError:
            continue
        rows, columns = (cell_centres(views.mask_grid, edge) for edge in masks.size)
        on_grid = torch.from_numpy(masks.sample(rows, columns))  # [N, H, W]
        pixels = resize_square(normalise(to_tensor(image), views.mean, views.std)[None], views.side).to(device)
        image_index = torch.zeros(len(on_grid), dtype=torch.long, device=device)
        features = model.mask_features(pixels, on_grid.to(device), image_index)
        cosines = features @ F.normalize(concepts, dim=-1).T
        nearest_concepts = zip(*(column.tolist() for column in cosines.max(dim=-1)), strict=True)
        for number, (cosine, concept) in enumerate(nearest_concepts):
            counts[concept] += 1
            kept = best[concept]
            if len(kept) < _GALLERY_BEST or cosine > kept[-1][0]:
                kept.append((cosine, _thumbnail(image, masks.decode(number))))
                kept.sort(key=lambda entry: -entry[0])
                del kept[_GALLERY_BEST:]
    order = sorted(range(len(best)), key=lambda concept: -counts[concept])
    shown = max(1, sum(map(bool, best)))  # an unused concept has no row; the used ones are first
    size = _THUMBNAIL * _GALLERY_BEST * math.ceil(shown / _GALLERY_ROWS), _THUMBNAIL * min(shown, _GALLERY_ROWS)
    sheet = Image.new("RGB", size, "white")
    entries = []
    for number, concept in enumerate(order):
        block, row = divmod(number, _GALLERY_ROWS)  # side by side, since a JPEG has at most 65,535 rows of pixels
        pictures = []
        for rank, (cosine, thumbnail) in enumerate(best[concept]):
            left, top = (block * _GALLERY_BEST + rank) * _THUMBNAIL, row * _THUMBNAIL
            sheet.paste(thumbnail, (left, top))
            box = [left, top, left + _THUMBNAIL, top + _THUMBNAIL]
            pictures.append({"file": SHEET, "box": box, "cosine": round(cosine, 4)})
        entries.append({"concept": concept, "masks": counts[concept], "best": pictures})
    sheet.save(folder / SHEET, quality=90)
    write_json(folder / GALLERY, entries)


def preview(masks: Path | str, count: int, path: Path) -> int:
    """Write a preview of shards with masks: one row per image with its masks in colours, smaller ones on top.

    Args:
        masks: shards with masks.
        count: maximum number of images.
        path: JPEG file to write.

    Returns:
        Number of images shown; unreadable samples are reported and skipped.

    Raises:
        ValueError: there is no readable sample with masks.
    """
    rows: list[Image.Image] = []
    samples = ((tar, member) for tar in list_shards(masks) for member in index_shard(tar)[0] if member.json_size)
    for tar, member in samples:
        try:
            image = to_rgb(decode_image(read_part(tar, member.image_offset, member.image_size)))
            _, runs = parse_annotation(read_part(tar, member.json_offset, member.json_size), image.size)
        except ValueError as error:
            print(f"preview: {tar}: {member.key}: {error}", flush=True)
            continue
        rows.append(_preview_row(image, runs))
        if len(rows) == count:
            break
    if not rows:
        raise ValueError(f"{masks}: contains no readable image with masks")
    sheet = Image.new("RGB", (max(row.width for row in rows), sum(row.height for row in rows)), "white")
    top = 0
    for row in rows:
        sheet.paste(row, (0, top))
        top += row.height
    sheet.save(path, quality=88)
    return len(rows)


def _preview_row(image: Image.Image, masks: RunMasks) -> Image.Image:
    width, height = fitted(image.size, _PREVIEW)
    photo = np.asarray(image.resize((width, height)), np.float32)
    small = masks.sample(cell_centres(height, image.height), cell_centres(width, image.width))  # [N, h, w]
    labels = np.full((height, width), -1)
    for number in np.argsort(-small.sum(axis=(1, 2)), kind="stable"):
        labels[small[number]] = number
    painted = np.where(labels[..., None] >= 0, 0.35 * photo + 0.65 * colour_labels(labels, len(small)), photo * 0.4)
    edge = np.zeros(labels.shape, bool)
    edge[1:] |= labels[1:] != labels[:-1]
    edge[:, 1:] |= labels[:, 1:] != labels[:, :-1]
    painted[edge] = 255
    return Image.fromarray(np.concatenate([photo, painted], axis=1).round().astype(np.uint8))


def _thumbnail(image: Image.Image, mask: NDArray[np.bool_]) -> Image.Image:
    """Crop the image around a mask and fade the pixels outside it."""
    rows, columns = np.nonzero(mask)
    if len(rows) == 0:
        return Image.new("RGB", (_THUMBNAIL, _THUMBNAIL), "white")
    margin = 4
    top, bottom = max(rows.min() - margin, 0), min(rows.max() + margin + 1, mask.shape[0])
    left, right = max(columns.min() - margin, 0), min(columns.max() + margin + 1, mask.shape[1])
    pixels = np.asarray(image, dtype=np.float32)[top:bottom, left:right]
    inside = mask[top:bottom, left:right, None].astype(np.float32)
    shown = Image.fromarray(np.round(pixels * inside + (pixels * 0.15 + 210) * (1 - inside)).clip(0, 255).astype(np.uint8))
    shown = shown.resize(fitted(shown.size, (_THUMBNAIL, _THUMBNAIL)), Image.Resampling.BILINEAR)
    canvas = Image.new("RGB", (_THUMBNAIL, _THUMBNAIL), "white")
    canvas.paste(shown, ((_THUMBNAIL - shown.width) // 2, (_THUMBNAIL - shown.height) // 2))
    return canvas
