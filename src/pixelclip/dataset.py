"""Training samples: masked shards -> batches of weak and strong views with their masks (method.md, step 1).

Every sample is a pure function of (seed, position in the training run), so that a resumed run, or one with other
workers, sees the very same data. B images, N masks, H W mask grid.
"""

import multiprocessing
import tarfile
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import chain, pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from pixelclip.annotations import parse_annotation
from pixelclip.images import decode_image, to_rgb
from pixelclip.images import image_size as header_size
from pixelclip.rle import RunMasks
from pixelclip.shard_format import index_shard, read_part
from pixelclip.sources import RemoteFile, Shard
from pixelclip.views import Sample, Views, draw, shrink, unpack


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
    sample_indices: list[int] = field(default_factory=list)
    counts: list[int] | None = None


@dataclass(frozen=True)
class PackedBatch:
    """A batch on its way from a worker to the device: its masks take an eighth, [N, ceil(H / 8), W], see `unpack`."""

    weak: Tensor
    strong: Tensor
    masks: Tensor
    image_index: Tensor
    bad: list[str]
    sample_indices: list[int]
    counts: list[int]

    def pin_memory(self) -> "PackedBatch":
        """The same in memory that a GPU copies from by itself; the DataLoader calls it."""
        weak, strong, masks, index = (x.pin_memory() for x in self._tensors())
        return PackedBatch(weak, strong, masks, index, self.bad, self.sample_indices, self.counts)

    def to(self, device: torch.device) -> Batch:
        """The batch on a device, which is not waited for."""
        weak, strong, masks, index = (x.to(device, non_blocking=True) for x in self._tensors())
        return Batch(weak, strong, unpack(masks), index, self.bad, self.sample_indices, self.counts)

    def _tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.weak, self.strong, self.masks, self.image_index


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
        rows: list[NDArray[np.int64]] = []
        self.bad: list[str] = []
        self.without_masks = 0
        for number, path in enumerate(self.shards):
            members, bad = index_shard(path)
            self.bad += [f"{name}: {reason}" for name, reason in bad]
            whole = [m for m in members if m.json_size or not masked]
            self.without_masks += len(members) - len(whole)
            places = [(number, m.image_offset, m.image_size, m.json_offset, m.json_size) for m in whole]
            rows.append(np.array(places, np.int64).reshape(-1, 5))  # a shard at a time: its lists are not kept
        if not sum(map(len, rows)):
            needed = "has masks; run the masks stage first" if masked else "is an image"
            raise ValueError(f"{str(self.shards[0]).rpartition('/')[0]}: no sample of its shards {needed}")
        self._members = torch.from_numpy(np.concatenate(rows)).share_memory_()  # 40 bytes a sample, for all workers at once
        self._order: tuple[int, NDArray[np.uint32]] | None = None  # 4 bytes a sample and worker
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

    def _shuffle(self, generator: np.random.Generator) -> NDArray[np.uint32]:
        everything = np.arange(len(self), dtype=np.uint32)
        if not self.shards_at_once:
            return generator.permutation(everything)
        shards, size = generator.permutation(len(self.shards)), self.shards_at_once
        self._groups, self._group = [shards[first : first + size] for first in range(0, len(shards), size)], -1
        self._group_of = np.argsort(shards) // size
        first_member = np.searchsorted(
            self._members.numpy()[:, 0], np.arange(len(shards) + 1)
        )  # a shard's samples stand together
        of_shard = [everything[first:last] for first, last in pairwise(first_member.tolist())]
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
        return self._read(index, for_crop=False)[:2]

    def _read(self, index: int, for_crop: bool) -> tuple[Image.Image, RunMasks, int]:
        """As `read`; for a crop the image may come shrunk, by the number that is returned last."""
        shard, image_offset, image_size, json_offset, json_size = self._members[index].tolist()
        self._bring_next(shard)
        path = self.shards[shard]
        try:
            data = read_part(path, image_offset, image_size)
            size = header_size(data)
            by = shrink(size, self.views) if for_crop else 1
            image = to_rgb(decode_image(data, shrink=by))
            shrunk = by if image.size != size else 1  # only a JPEG is
            if not self.masked:
                return image, RunMasks.whole(size[::-1]), shrunk
            return image, parse_annotation(read_part(path, json_offset, json_size), size)[1], shrunk
        except (OSError, ValueError) as error:
            raise ValueError(f"{path}: {_member_name(path, image_offset)}: {error}") from None

    def __getitem__(self, position: int) -> Sample | str:
        """Draws the sample at a position, or says why it cannot be used."""
        try:
            image, masks, shrunk = self._read(self.member(position), for_crop=True)
        except ValueError as error:
            return str(error)
        generator = np.random.default_rng([self.seed, 2, position])
        return replace(draw(image, masks, self.views, generator, shrunk), position=position)


def _bring(tars: Iterable[RemoteFile]) -> None:
    with suppress(ValueError):  # said where the shard is read
        for tar in tars:
            tar.open().close()


def _member_name(path: Shard, offset: int) -> str:
    try:
        return tarfile.TarInfo.frombuf(read_part(path, offset - 512, 512), "utf-8", "replace").name
    except (OSError, tarfile.HeaderError):
        return f"member at byte {offset}"


def collate(samples: Sequence[Sample | str]) -> PackedBatch:
    """Joins samples into a batch; those that could not be read are named in `bad`."""
    good = [sample for sample in samples if isinstance(sample, Sample)]
    bad = [sample for sample in samples if isinstance(sample, str)]
    if not good:
        empty = torch.zeros(0)
        return PackedBatch(empty, empty, torch.zeros(0, 0, 0, dtype=torch.uint8), empty.long(), bad, [], [])
    counts = [len(sample.packed) for sample in good]
    return PackedBatch(
        weak=default_collate([sample.weak for sample in good]),  # which stacks in memory that workers share
        strong=default_collate([sample.strong for sample in good]),
        masks=torch.cat([sample.packed for sample in good]),
        image_index=torch.repeat_interleave(torch.arange(len(good)), torch.tensor(counts)),
        bad=bad,
        sample_indices=[sample.position for sample in good],
        counts=counts,
    )


def sample_indices(batch_size: int, share: range, pieces: int, start: int, stop: int) -> Iterator[list[int]]:
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


def load_batches(dataset: MaskedImages, lists: Iterable[list[int]], workers: int, pin: bool) -> DataLoader[PackedBatch]:
    """One batch for every list of sample_indices, in order, whatever the number of workers."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__", __name__])  # imported once, and in memory once, for all workers
    return DataLoader(
        dataset,  # type: ignore[arg-type]
        batch_sampler=lists,
        collate_fn=collate,
        num_workers=workers,
        multiprocessing_context=context if workers else None,
        pin_memory=pin,
    )
