"""Training samples: masked shards -> weak and strong view of a random crop, and its masks on the grid (method.md, step 1).

Every sample is a pure function of (seed, position in the training run), so that a resumed run, or one with other
workers, sees the very same data. B images, N masks, H W mask grid.
"""

import math
import tarfile
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import chain, pairwise

import numpy as np
import torch
import torchvision.transforms.v2.functional as TF
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from pixelclip.images import decode_image, to_rgb
from pixelclip.pixels import normalise, to_tensor
from pixelclip.rle import RunMasks
from pixelclip.shards import index_shard, parse_masks, read_part
from pixelclip.sources import RemoteFile, Shard


@dataclass(frozen=True)
class Views:
    """How a training sample is drawn; lengths in pixels, see the settings of the same names."""

    side: int
    mask_grid: int
    shortest_edge: int
    longest_edge: int
    crop: int
    color_jitter: bool
    flip: bool
    strong_view: bool
    cutout_min: float
    cutout_max: float
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


@dataclass(frozen=True)
class Sample:
    """`weak`, `strong` [3, side, side], normalised; `masks` [N, H, W], bool; `position` in the stream."""

    weak: Tensor
    strong: Tensor
    masks: Tensor
    position: int = -1


@dataclass(frozen=True)
class Batch:
    """`weak`, `strong` [B, 3, side, side]; `masks` [N, H, W]; `image_index` [N]; `bad`: samples that were left out.

    `counts`, where it is known, says how many masks each image has, and that they stand image by image.
    """

    weak: Tensor
    strong: Tensor
    masks: Tensor
    image_index: Tensor
    bad: list[str]
    positions: list[int] = field(default_factory=list)
    counts: list[int] | None = None

    def to(self, device: torch.device) -> "Batch":
        """The same batch on a device."""
        weak, strong, masks, index = (
            x.to(device, non_blocking=True) for x in (self.weak, self.strong, self.masks, self.image_index)
        )
        return Batch(weak, strong, masks, index, self.bad, self.positions, self.counts)


class MaskedImages(Dataset[Sample | str]):
    """Masked shards, addressed by position in the endless, shuffled stream of samples.

    Args:
        shards: tars with images and masks; samples without masks are counted in `without_masks` and left out.
        views: how samples are drawn.
        seed: of the order and of the views.
        masked: False leaves masks aside: every sample is one mask of the whole image, of which CutOut leaves what is seen.
        shards_at_once: how many shards are mixed with each other, 0 for all: those in a store pass the cache one group after
            the other, the next one on its way while one is used.

    Raises:
        ValueError: a shard is no tar, or no sample has masks.
    """

    def __init__(self, shards: Sequence[Shard], views: Views, seed: int, masked: bool = True, shards_at_once: int = 0) -> None:
        self.shards = list(shards)
        self.views = views
        self.seed = seed
        self.masked = masked
        self.shards_at_once = shards_at_once
        rows: list[tuple[int, int, int, int, int]] = []
        self.bad: list[str] = []
        self.without_masks = 0
        for number, path in enumerate(self.shards):
            members, bad = index_shard(path)
            self.bad += [f"{name}: {reason}" for name, reason in bad]
            whole = [m for m in members if m.json_size or not masked]
            self.without_masks += len(members) - len(whole)
            rows += [(number, m.image_offset, m.image_size, m.json_offset, m.json_size) for m in whole]
        if not rows:
            needed = "has masks; run the masks stage first" if masked else "is an image"
            raise ValueError(f"{str(self.shards[0]).rpartition('/')[0]}: no sample of its shards {needed}")
        self._members = np.array(rows, dtype=np.int64)  # one flat array: workers share it, and it stays small
        self._order: tuple[int, NDArray[np.int64]] | None = None
        self._groups: list[NDArray[np.int64]] = []  # of this epoch's order: the shards that are mixed with each other
        self._group = -1  # the one that is being read
        self._group_of = np.zeros(0, np.int64)  # of every shard

    def __len__(self) -> int:
        return len(self._members)

    def member(self, position: int) -> int:
        """The sample that stands at a position of the stream: every epoch is a new permutation."""
        epoch, place = divmod(position, len(self))
        if self._order is None or self._order[0] != epoch:
            self._order = (epoch, self._shuffle(np.random.default_rng([self.seed, 1, epoch])))
        return int(self._order[1][place])

    def _shuffle(self, generator: np.random.Generator) -> NDArray[np.int64]:
        if not self.shards_at_once:
            return generator.permutation(len(self))
        shards, size = generator.permutation(len(self.shards)), self.shards_at_once
        self._groups, self._group = [shards[first : first + size] for first in range(0, len(shards), size)], -1
        self._group_of = np.argsort(shards) // size
        first_member = np.searchsorted(self._members[:, 0], np.arange(len(shards) + 1))  # a shard's samples stand together
        of_shard = [np.arange(first, last) for first, last in pairwise(first_member.tolist())]
        mixed = [np.concatenate([of_shard[shard] for shard in np.sort(group)]) for group in self._groups]
        return np.concatenate([generator.permutation(members) for members in mixed])

    def _bring_next(self, shard: int) -> None:
        """Has the next group's shards brought from their store while the group of this one is read."""
        if not self._groups or (group := int(self._group_of[shard])) == self._group:
            return
        self._group = group
        coming = [self.shards[number] for number in chain(*self._groups[group + 1 : group + 2])]
        if remote := [tar for tar in coming if isinstance(tar, RemoteFile)]:
            threading.Thread(target=_bring, args=(remote,), daemon=True).start()

    def read(self, index: int) -> tuple[Image.Image, RunMasks]:
        """Reads sample `index`: its image and its masks.

        Raises:
            ValueError: unreadable; the message names the sample.
        """
        shard, image_offset, image_size, json_offset, json_size = (int(v) for v in self._members[index])
        self._bring_next(shard)
        path = self.shards[shard]
        try:
            image = to_rgb(decode_image(read_part(path, image_offset, image_size)))
            if not self.masked:
                return image, RunMasks.whole((image.height, image.width))
            return image, parse_masks(read_part(path, json_offset, json_size), image.size)
        except (OSError, ValueError) as error:
            raise ValueError(f"{path}: {_member_name(path, image_offset)}: {error}") from None

    def __getitem__(self, position: int) -> Sample | str:
        """Draws the sample at a position, or says why it cannot be used."""
        try:
            image, masks = self.read(self.member(position))
        except ValueError as error:
            return str(error)
        generator = np.random.default_rng([self.seed, 2, position])
        return replace(draw(image, masks, self.views, generator), position=position)


def _bring(tars: Iterable[RemoteFile]) -> None:
    with suppress(ValueError):  # said where the shard is read
        for tar in tars:
            tar.open().close()


def _member_name(path: Shard, offset: int) -> str:
    try:
        return tarfile.TarInfo.frombuf(read_part(path, offset - 512, 512), "utf-8", "replace").name
    except (OSError, tarfile.HeaderError):
        return f"member at byte {offset}"


def draw(image: Image.Image, masks: RunMasks, views: Views, generator: np.random.Generator) -> Sample:
    """Draws a random crop of one image as weak and strong view, with its masks.

    The resize to `shortest_edge` and the crop are one resampling here instead of two; the blur, which the method states
    in pixels of the crop, is scaled to the side.

    Args:
        image: RGB.
        masks: of it.
        views: sizes and switches.
        generator: the only source of randomness.
    """
    left, top, width, height = _crop_box(image.size, views, generator)
    box = (left, top, left + width, top + height)
    pixels = to_tensor(image.resize((views.side, views.side), Image.Resampling.BILINEAR, box=box))
    grid = (np.arange(views.mask_grid) + 0.5) / views.mask_grid
    rows = np.minimum((top + grid * height).astype(np.int64), image.height - 1)
    columns = np.minimum((left + grid * width).astype(np.int64), image.width - 1)
    on_grid = torch.from_numpy(masks.sample(rows, columns))  # [N, H, W]
    if views.color_jitter:
        pixels = _ssd_jitter(pixels, generator)
    if views.flip and generator.random() < 0.5:
        pixels, on_grid = pixels.flip(-1), on_grid.flip(-1)
    strong = pixels
    if views.strong_view:
        strong = _strong_jitter(pixels, generator, blur_scale=views.side / max(width, height) * _scale(image.size, views))
        strong, on_grid = _cut_out(strong, on_grid, views, generator)
    on_grid = on_grid[on_grid.flatten(1).sum(dim=1) > 1].contiguous()
    return Sample(normalise(pixels, views.mean, views.std), normalise(strong, views.mean, views.std), on_grid)


def _scale(size: tuple[int, int], views: Views) -> float:
    """Pixels of the image per pixel of the method's resized image."""
    return 1 / min(views.shortest_edge / min(size), views.longest_edge / max(size))


def _crop_box(size: tuple[int, int], views: Views, generator: np.random.Generator) -> tuple[float, float, float, float]:
    crop = views.crop * _scale(size, views)
    width, height = min(crop, size[0]), min(crop, size[1])
    return generator.uniform(0, size[0] - width), generator.uniform(0, size[1] - height), width, height


def _ssd_jitter(pixels: Tensor, generator: np.random.Generator) -> Tensor:
    """SSD's colour jitter: brightness, contrast, saturation and hue, each half of the time."""

    def contrast(x: Tensor) -> Tensor:
        return x * generator.uniform(0.5, 1.5) if generator.random() < 0.5 else x

    contrast_first = generator.random() < 0.5
    if generator.random() < 0.5:
        pixels = pixels + generator.uniform(-32, 32) / 255
    pixels = (contrast(pixels) if contrast_first else pixels).clamp(0, 1)
    if generator.random() < 0.5:
        pixels = TF.adjust_saturation(pixels, generator.uniform(0.5, 1.5))
    if generator.random() < 0.5:
        pixels = TF.adjust_hue(pixels, generator.uniform(-18, 18) / 360)
    return (pixels if contrast_first else contrast(pixels)).clamp(0, 1)


def _strong_jitter(pixels: Tensor, generator: np.random.Generator, blur_scale: float) -> Tensor:
    """ColorJitter(.5, .5, .5, .25) p .8, grey p .2, Gaussian blur with sigma U(.1, 2) p .5."""
    if generator.random() < 0.8:
        brightness, contrast, saturation = (float(v) for v in generator.uniform(0.5, 1.5, 3))
        hue = generator.uniform(-0.25, 0.25)
        for index in generator.permutation(4):
            if index == 0:
                pixels = TF.adjust_brightness(pixels, brightness)
            elif index == 1:
                pixels = TF.adjust_contrast(pixels, contrast)
            elif index == 2:
                pixels = TF.adjust_saturation(pixels, saturation)
            else:
                pixels = TF.adjust_hue(pixels, hue)
    if generator.random() < 0.2:
        pixels = TF.rgb_to_grayscale(pixels, num_output_channels=3)
    if generator.random() < 0.5:
        sigma = generator.uniform(0.1, 2.0) * blur_scale
        radius = min(max(1, math.ceil(3 * sigma)), (min(pixels.shape[1:]) - 1) // 2)
        pixels = TF.gaussian_blur(pixels, [2 * radius + 1] * 2, [max(sigma, 0.05)] * 2)
    return pixels


def _cut_out(pixels: Tensor, masks: Tensor, views: Views, generator: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Blackens a random rectangle and takes it out of the masks."""
    if views.cutout_max == 0:
        return pixels, masks
    height, width = generator.uniform(views.cutout_min, views.cutout_max, 2)
    top, left = generator.uniform(0, 1 - height), generator.uniform(0, 1 - width)

    def without(x: Tensor) -> Tensor:
        rows, columns = (
            slice(round(a * n), round((a + b) * n)) for a, b, n in ((top, height, x.shape[-2]), (left, width, x.shape[-1]))
        )
        x = x.clone()
        x[..., rows, columns] = 0
        return x

    return without(pixels), without(masks)


def collate(samples: Sequence[Sample | str]) -> Batch:
    """Joins samples into a batch; those that could not be read are named in `bad`."""
    good = [sample for sample in samples if isinstance(sample, Sample)]
    bad = [sample for sample in samples if isinstance(sample, str)]
    if not good:
        empty = torch.zeros(0)
        return Batch(empty, empty, empty.bool(), empty.long(), bad)
    counts = [len(sample.masks) for sample in good]
    return Batch(
        weak=torch.stack([sample.weak for sample in good]),
        strong=torch.stack([sample.strong for sample in good]),
        masks=torch.cat([sample.masks for sample in good]),
        image_index=torch.repeat_interleave(torch.arange(len(good)), torch.tensor(counts)),
        bad=bad,
        positions=[sample.position for sample in good],
        counts=counts,
    )


def positions(batch_size: int, share: range, pieces: int, start: int, stop: int) -> Iterator[list[int]]:
    """Where in the stream a process reads: for every step its share of the batch, in pieces.

    Args:
        batch_size: images in one optimizer step, of all processes.
        share: this process's part of `range(batch_size)`.
        pieces: how many lists a step gives.
        start: first step.
        stop: the step after the last.
    """
    cuts = [len(share) * piece // pieces for piece in range(pieces + 1)]
    for step in range(start, stop):
        for first, last in pairwise(cuts):
            yield [step * batch_size + place for place in share[first:last]]


class _Listed(Sampler[list[int]]):
    def __init__(self, lists: Iterable[list[int]]) -> None:
        self._lists = lists

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self._lists)


def load_batches(dataset: MaskedImages, lists: Iterable[list[int]], workers: int, pin: bool) -> DataLoader[Batch]:
    """One batch for every list of positions, in order, whatever the number of workers."""
    return DataLoader(
        dataset,  # type: ignore[arg-type]
        batch_sampler=_Listed(lists),
        collate_fn=collate,
        num_workers=workers,
        multiprocessing_context="forkserver" if workers else None,
        pin_memory=pin,
    )
