"""Loading of training samples from shards like SA-1B's, and literally: decode and resize everything, then crop."""

import atexit
import io
import json
import math
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision.transforms.v2.functional as TF
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as rle
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from bench.case import Case
from pixelclip.config import TrainConfig
from pixelclip.data.dataset import Batch, MaskedImages, collate
from pixelclip.data.shard_format import ShardWriter, index_shard, read_part
from pixelclip.data.views import Views

EDGES, MASKS, QUALITY = (1500, 2250), 100, 90  # as SA-1B's published images; half of ours are in portrait format
IMAGES, PASSES, BATCH, WORKERS = 12, 4, 6, 2
KEPT = IMAGES // BATCH
Plain = tuple[Tensor, Tensor, Tensor]
_MEAN, _STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def paper_views() -> Views:
    """Return views with the default settings, which are the paper's, and CLIP's mean and deviation."""
    config = TrainConfig()
    names = set(Views.__dataclass_fields__) - {"mean", "std"}
    return Views(**{name: getattr(config, name) for name in names}, mean=_MEAN, std=_STD)


def write_shards(folder: Path, images: int = IMAGES, edges: tuple[int, int] = EDGES, masks: int = MASKS) -> list[Path]:
    """Write one tar of images with textures of all sizes and, as in SA-1B, a hundred overlapping masks per image."""
    generator = np.random.default_rng(0)
    with ShardWriter(folder / "0.tar") as writer:
        for number in range(images):
            height, width = edges if number % 2 else edges[::-1]
            image, codes = _texture(generator, height, width), []
            for _ in range(masks):
                outlines = _outlines(generator, height, width)
                codes.append(rle.merge(rle.frPyObjects(outlines, height, width)))
            buffer = io.BytesIO()
            Image.fromarray(image).save(buffer, "JPEG", quality=QUALITY)
            entries = [_entry(code, number) for code in codes if rle.area(code)]
            document = {"image": {"image_id": number, "width": width, "height": height}, "annotations": entries}
            writer.add(f"sa_{number}.jpg", buffer.getvalue())
            writer.add(f"sa_{number}.json", json.dumps(document).encode())
    return [folder / "0.tar"]


def _texture(generator: np.random.Generator, height: int, width: int) -> NDArray[np.uint8]:
    """Create noise at all scales, stronger at coarse ones, as in photographs."""
    image = np.full((height, width, 3), 128, np.float32)
    for cell in (1, 2, 4, 8, 16, 64, 256):
        coarse = generator.normal(0, 3 * cell**0.5, (-(-height // cell), -(-width // cell), 3)).astype(np.float32)
        bands = [Image.fromarray(coarse[..., band]).resize((width, height), Image.Resampling.BILINEAR) for band in range(3)]
        image += np.stack([np.asarray(band) for band in bands], axis=-1)
    return image.clip(0, 255).astype(np.uint8)


def _outlines(generator: np.random.Generator, height: int, width: int) -> list[list[float]]:
    """Draw one to three irregular shapes near each other, from a few pixels to half of the image."""
    radius = 0.5 * min(height, width) * math.exp(generator.uniform(math.log(0.02), 0))
    centre, found = generator.uniform(0, 1, 2) * (width, height), []
    angle = np.linspace(0, 2 * np.pi, max(24, int(radius)), endpoint=False)
    for _ in range(generator.choice([1, 2, 3], p=[0.8, 0.15, 0.05])):
        waves = np.arange(1, 40)[:, None]
        heights, phases = generator.normal(0, 0.25, (39, 1)) / waves, generator.uniform(0, 2 * np.pi, (39, 1))
        distance = radius * (1 + (heights * np.cos(waves * angle + phases)).sum(axis=0)).clip(0.1)
        at = centre + generator.normal(0, radius, 2)
        points = np.stack([at[0] + distance * np.cos(angle), at[1] + distance * np.sin(angle)], axis=-1)
        found.append(points.clip(0, (width - 1, height - 1)).ravel().tolist())
    return found


def _entry(code: dict[str, Any], number: int) -> dict[str, Any]:
    box = [float(edge) for edge in rle.toBbox(code)]
    return {
        "segmentation": {"size": code["size"], "counts": code["counts"].decode()},
        "id": number,
        "bbox": box,
        "area": int(rle.area(code)),
        "predicted_iou": 0.9731,
        "stability_score": 0.9652,
        "point_coords": [[box[0] + box[2] / 2, box[1] + box[3] / 2]],
        "crop_box": [0, 0, *code["size"][::-1]],
    }


class DecodeAll(Dataset[Plain]):
    """The same samples computed literally: decode everything, resize everything, crop, then compute the views of the crop.

    Random numbers are drawn in the order of `pixelclip.data.views.draw`, so that the samples can be compared.
    """

    def __init__(self, shards: Sequence[Path], views: Views, dataset: MaskedImages) -> None:
        self.members = [(path, member) for path in shards for member in index_shard(path)[0]]
        self.views = views
        self.member, self.seed = dataset.member, dataset.seed  # the same order

    def __getitem__(self, position: int) -> Plain:
        path, member = self.members[self.member(position)]
        image = Image.open(io.BytesIO(read_part(path, member.image_offset, member.image_size))).convert("RGB")
        document = json.loads(read_part(path, member.json_offset, member.json_size))
        codes = [annotation["segmentation"] for annotation in document["annotations"]]
        return _draw_from_all(image, codes, self.views, np.random.default_rng([self.seed, 2, position]))


def _draw_from_all(image: Image.Image, codes: Sequence[dict[str, Any]], views: Views, generator: np.random.Generator) -> Plain:
    """Resize, crop, jitter, flip, blur and CutOut at the crop's size; then resize to CLIP's side and the mask grid."""
    scale = min(views.shortest_edge / min(image.size), views.longest_edge / max(image.size))
    width, height = (round(edge * scale) for edge in image.size)
    across, down = min(views.crop, width), min(views.crop, height)
    left = round(generator.uniform(0, image.width - across / scale) * scale)
    top = round(generator.uniform(0, image.height - down / scale) * scale)
    resized = TF.pil_to_tensor(image.resize((width, height), Image.Resampling.BILINEAR))
    weak = TF.to_dtype(TF.crop(resized, top, left, down, across), torch.float32, scale=True)
    masks = (Image.fromarray(rle.decode(code)).resize((width, height), Image.Resampling.NEAREST) for code in codes)
    cropped = torch.stack([TF.crop(torch.from_numpy(np.array(mask)), top, left, down, across) for mask in masks])
    if views.color_jitter:
        weak = _ssd_jitter(weak, generator)
    if views.flip and generator.random() < 0.5:
        weak, cropped = TF.horizontal_flip(weak), TF.horizontal_flip(cropped)
    strong = weak
    if views.strong_view:
        strong = _strong_jitter(weak, generator)
        if views.cutout_max:
            sides = generator.uniform(views.cutout_min, views.cutout_max, 2)
            corner = [generator.uniform(0, 1 - side) for side in sides]
            box = [*(round(p * n) for p, n in zip(corner, (down, across), strict=True))]
            box += [round((p + s) * n) - b for p, s, n, b in zip(corner, sides, (down, across), box, strict=True)]
            strong, cropped = (TF.erase(x, *box, v=torch.zeros(1, dtype=x.dtype)) for x in (strong, cropped))
    grid = TF.resize(cropped, [views.mask_grid] * 2, TF.InterpolationMode.NEAREST_EXACT).bool()
    grid = grid[grid.flatten(1).sum(dim=1) > 1]
    weak, strong = (TF.normalize(TF.resize(x, [views.side] * 2), list(views.mean), list(views.std)) for x in (weak, strong))
    return weak, strong, grid


def _ssd_jitter(x: Tensor, generator: np.random.Generator) -> Tensor:
    first = generator.random() < 0.5
    if generator.random() < 0.5:
        x = (x + generator.uniform(-32, 32) / 255).clamp(0, 1)
    if first and generator.random() < 0.5:
        x = (x * generator.uniform(0.5, 1.5)).clamp(0, 1)
    if generator.random() < 0.5:
        x = _saturate(x, generator.uniform(0.5, 1.5))
    if generator.random() < 0.5:
        x = TF.adjust_hue(x, generator.integers(-18, 18, endpoint=True) / 180)
    if not first and generator.random() < 0.5:
        x = (x * generator.uniform(0.5, 1.5)).clamp(0, 1)
    return x


def _saturate(x: Tensor, factor: float) -> Tensor:
    """Multiply HSV's saturation with Pillow, in bytes as in detectron2; torchvision's saturation differs."""
    hue, saturation, value = TF.to_pil_image(x).convert("HSV").split()
    more = saturation.point(lambda byte: min(255, byte * factor))
    return TF.to_dtype(TF.pil_to_tensor(Image.merge("HSV", (hue, more, value)).convert("RGB")), torch.float32, scale=True)


def _strong_jitter(x: Tensor, generator: np.random.Generator) -> Tensor:
    if generator.random() < 0.8:
        factors = [*generator.uniform(0.5, 1.5, 3), generator.uniform(-0.25, 0.25)]
        adjust = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue)
        for index in generator.permutation(4):
            x = adjust[index](x, float(factors[index]))
    if generator.random() < 0.2:
        x = TF.rgb_to_grayscale(x, num_output_channels=3)
    if generator.random() < 0.5:
        sigma = generator.uniform(0.1, 2.0)
        x = TF.gaussian_blur(x, [2 * math.ceil(3 * sigma) + 1] * 2, [sigma] * 2)
    return x


def _join(samples: Sequence[Plain]) -> Batch:
    weak, strong, masks = zip(*samples, strict=True)
    index = torch.repeat_interleave(torch.arange(len(masks)), torch.tensor([len(of_one) for of_one in masks]))
    return Batch(torch.stack(weak), torch.stack(strong), torch.cat(masks), index, [])


def _read(dataset: Dataset[Any], join: Callable[..., Any]) -> Iterator[Any]:
    """Iterate over batches from new workers, which are forked so that `peak_memory` counts them."""
    lists = [list(range(first, first + BATCH)) for first in range(0, IMAGES * PASSES, BATCH)]
    options: dict[str, Any] = {"num_workers": WORKERS, "multiprocessing_context": "fork"}
    return iter(DataLoader(dataset, batch_sampler=lists, collate_fn=join, **options))


def _first(batches: Iterator[Batch]) -> list[Batch]:
    """Read all batches and return the first few for the comparison; training keeps none."""
    kept: list[Batch] = []
    for batch in batches:
        if len(kept) < KEPT:
            kept.append(batch)
    return kept


def _same(baseline: list[Batch], ours: list[Batch]) -> str:
    """Compare views, and every mask with the nearest mask of its image, since each side may drop masks that the other keeps."""
    std, pixels, differs, total, area, alone = torch.tensor(_STD).view(3, 1, 1), [], 0, 0, 0, 0
    for theirs, mine in zip(baseline, ours, strict=True):
        pixels += [((a - b) * std).abs().mean().item() for a, b in ((theirs.weak, mine.weak), (theirs.strong, mine.strong))]
        for image in range(BATCH):
            old, new = (batch.masks[batch.image_index == image].flatten(1).float() for batch in (theirs, mine))
            apart = old.sum(1)[:, None] + new.sum(1) - 2 * old @ new.T  # pixels in only one of two masks
            nearest = apart.min(dim=1)
            found = nearest.values < 0.5 * old.sum(1)
            differs += int(nearest.values[found].sum())
            area += int(old[found].sum())
            total += int(found.sum()) * old.shape[1]
            alone += int((~found).sum()) + abs(len(new) - len(old))
    agree, off, count = 1 - differs / total, sum(pixels) / len(pixels), total // ours[0].masks[0].numel()
    assert agree >= 0.995 and off < 0.02 and alone <= 0.02 * count, (agree, off, alone)
    masks = f"masks agree in {agree:.3%} of the grid and differ by {differs / area:.2%} of their area"
    return f"{masks} ({alone} of {count} on one side only), views to {255 * off:.1f} of 255"


def make() -> Case:
    """Create the comparison on new shards; every call reads each image several times, with two workers."""
    folder = Path(tempfile.mkdtemp(prefix="pixelclip-loader-"))
    atexit.register(shutil.rmtree, folder)
    shards = write_shards(folder)
    dataset = MaskedImages(shards, paper_views(), seed=0)
    literal = DecodeAll(shards, dataset.views, dataset)

    def ours() -> list[Batch]:
        loaded = _read(dataset, collate)
        return _first(packed.to(torch.device("cpu")) for packed in loaded)

    def baseline() -> list[Batch]:
        return _first(_read(literal, _join))

    size = f"{IMAGES * PASSES} images of {EDGES[0]} x {EDGES[1]} pixels with {MASKS} masks"
    what = f"{size}, crop 640 to 320 pixels and a grid of 256, {WORKERS} workers"
    return Case(what, baseline, ours, _same, rounds=3)
