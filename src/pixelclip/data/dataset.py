"""Training dataset: read batches of weak and strong views with their masks from shards (PixelCLIP, section 3).

Every sample is a pure function of (seed, position in the sample stream), so that the data of a run does not depend on resumes
or the number of workers.
"""

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

from pixelclip.data.annotations import parse_annotation
from pixelclip.data.images import check_upright, decode_image, orientation_of, to_rgb, turn_upright
from pixelclip.data.images import image_size as header_size
from pixelclip.data.rle import RunMasks
from pixelclip.data.shard_format import index_shard, read_part
from pixelclip.data.shard_sources import RemoteFile, Shard
from pixelclip.data.views import TrainingSample, Views, draw, shrink_factor, unpack
from pixelclip.workflow.worker_processes import start_worker, worker_context


@dataclass(frozen=True)
class _Images:
    weak: Tensor
    strong: Tensor
    masks: Tensor
    image_index: Tensor
    bad: list[str]
    sample_indices: list[int] = field(default_factory=list)
    counts: list[int] | None = None
    crops: Tensor | None = None


class Batch(_Images):
    """B images with N masks: `weak`, `strong` [B, 3, side, side]; `masks` [N, H, W]; `image_index` [N]; `bad`: skipped samples.

    `counts`, if given, is the number of masks of each image; the masks are then ordered by image. `crops`
    [B, 3, dino_side, dino_side], uint8, are the weak views for DINO, if it is used.
    """


class PackedBatch(_Images):
    """A batch on its way from a worker to the device: masks are packed, [N, ceil(H / 8), W], see `unpack`."""

    def pin_memory(self) -> "PackedBatch":
        """Copy to pinned memory; called by the DataLoader."""
        weak, strong, masks, index = (x.pin_memory() for x in (self.weak, self.strong, self.masks, self.image_index))
        crops = None if self.crops is None else self.crops.pin_memory()
        return PackedBatch(weak, strong, masks, index, self.bad, self.sample_indices, self.counts, crops)

    def to(self, device: torch.device) -> Batch:
        """Copy to a device asynchronously and unpack the masks."""
        tensors = (self.weak, self.strong, self.masks, self.image_index)
        weak, strong, masks, index = (x.to(device, non_blocking=True) for x in tensors)
        crops = None if self.crops is None else self.crops.to(device, non_blocking=True)
        return Batch(weak, strong, unpack(masks), index, self.bad, self.sample_indices, self.counts, crops)


class MaskedImages(Dataset[TrainingSample | str]):
    """Dataset of shards with masks, indexed by position in the infinite, shuffled sample stream.

    Args:
        shards: tars with images and masks; samples without masks are counted in `without_masks` and skipped.
        views: parameters of the views.
        seed: seed of the order and of the views.
        masked: if False, masks are not read, and every sample has one mask of the whole image, minus CutOut.
        shards_at_once: number of shards shuffled together, 0 for all. Remote shards then pass through the cache group by group,
            and the next group is prefetched.

    Raises:
        ValueError: a shard is not a tar, or no sample has masks.
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
            offsets = [(number, m.image_offset, m.image_size, m.json_offset, m.json_size) for m in whole]
            rows.append(np.array(offsets, np.int64).reshape(-1, 5))  # one array per shard, so that its lists are freed
        if not sum(map(len, rows)):
            needed = "has masks; run the masks stage first" if masked else "is an image"
            raise ValueError(f"{str(self.shards[0]).rpartition('/')[0]}: no sample in these shards {needed}")
        self._members = torch.from_numpy(np.concatenate(rows)).share_memory_()  # 40 bytes per sample, shared by all workers
        self._order: tuple[int, NDArray[np.uint32]] | None = None  # 4 bytes per sample and worker
        self._groups: list[NDArray[np.int64]] = []  # shards shuffled together, in this epoch's order
        self._group = -1  # index of the group being read
        self._group_of = np.zeros(0, np.int64)  # index of every shard's group

    def __len__(self) -> int:
        return len(self._members)

    def member(self, position: int) -> int:
        """Return the index of the sample at a stream position; every epoch is a new permutation."""
        epoch, offset = divmod(position, len(self))
        if self._order is None or self._order[0] != epoch:
            self._order = (epoch, self._shuffle(np.random.default_rng([self.seed, 1, epoch])))
        return int(self._order[1][offset])

    def _shuffle(self, generator: np.random.Generator) -> NDArray[np.uint32]:
        everything = np.arange(len(self), dtype=np.uint32)
        if not self.shards_at_once:
            return generator.permutation(everything)
        shards, size = generator.permutation(len(self.shards)), self.shards_at_once
        self._groups, self._group = [shards[first : first + size] for first in range(0, len(shards), size)], -1
        self._group_of = np.argsort(shards) // size
        # The samples of a shard are contiguous.
        first_member = np.searchsorted(self._members.numpy()[:, 0], np.arange(len(shards) + 1))
        of_shard = [everything[first:last] for first, last in pairwise(first_member.tolist())]
        mixed = [np.concatenate([of_shard[shard] for shard in np.sort(group)]) for group in self._groups]
        return np.concatenate([generator.permutation(members) for members in mixed])

    def _prefetch_next(self, shard: int) -> None:
        """Download the remote shards of the next group in a thread, once per group."""
        if not self._groups or (group := int(self._group_of[shard])) == self._group:
            return
        self._group = group
        following = [self.shards[number] for number in chain(*self._groups[group + 1 : group + 2])]
        if remote := [tar for tar in following if isinstance(tar, RemoteFile)]:
            threading.Thread(target=_prefetch, args=(remote,), daemon=True).start()

    def read(self, index: int) -> tuple[Image.Image, RunMasks]:
        """Read image and masks of sample `index`.

        Raises:
            ValueError: the sample is unreadable.
        """
        return self._read(index, for_crop=False)[:2]

    def _read(self, index: int, for_crop: bool) -> tuple[Image.Image, RunMasks, int]:
        """Read image, masks and the factor by which the image is shrunk, which may exceed 1 only if it is read for a crop."""
        shard, image_offset, image_size, json_offset, json_size = self._members[index].tolist()
        self._prefetch_next(shard)
        path = self.shards[shard]
        try:
            data = read_part(path, image_offset, image_size)
            size = header_size(data)
            factor = shrink_factor(size, self.views) if for_crop else 1
            decoded = decode_image(data, shrink=factor)
            turn = orientation_of(decoded)
            if self.masked:
                check_upright(turn, "masks")
            elif turn != 1:
                image = to_rgb(turn_upright(decode_image(data)))
                return image, RunMasks.whole(image.size[::-1]), 1
            image = to_rgb(decoded)
            shrunk = factor if image.size != size else 1  # only JPEGs are shrunk
            if not self.masked:
                return image, RunMasks.whole(size[::-1]), shrunk
            return image, parse_annotation(read_part(path, json_offset, json_size), size)[1], shrunk
        except (OSError, ValueError) as error:
            raise ValueError(f"{path}: {_member_name(path, image_offset)}: {error}") from None

    def __getitem__(self, position: int) -> TrainingSample | str:
        """Draw the sample at a stream position; return the reason as a string if it is unusable."""
        try:
            image, masks, shrunk = self._read(self.member(position), for_crop=True)
        except ValueError as error:
            return str(error)
        generator = np.random.default_rng([self.seed, 2, position])
        return replace(draw(image, masks, self.views, generator, shrunk), position=position)


def _prefetch(tars: Iterable[RemoteFile]) -> None:
    with suppress(ValueError):  # raised again when the shard is read
        for tar in tars:
            tar.open().close()


def _member_name(path: Shard, offset: int) -> str:
    try:
        return tarfile.TarInfo.frombuf(read_part(path, offset - 512, 512), "utf-8", "replace").name
    except (OSError, tarfile.HeaderError):
        return f"member at byte {offset}"


def collate(samples: Sequence[TrainingSample | str]) -> PackedBatch:
    """Join samples into a batch; `bad` lists why the others are unusable."""
    good = [sample for sample in samples if isinstance(sample, TrainingSample)]
    bad = [sample for sample in samples if isinstance(sample, str)]
    if not good:
        empty = torch.zeros(0)
        return PackedBatch(empty, empty, torch.zeros(0, 0, 0, dtype=torch.uint8), empty.long(), bad, [], [])
    counts = [len(sample.packed) for sample in good]
    crops = [sample.crop for sample in good if sample.crop is not None]
    return PackedBatch(
        weak=default_collate([sample.weak for sample in good]),  # stacks in shared memory
        strong=default_collate([sample.strong for sample in good]),
        masks=torch.cat([sample.packed for sample in good]),
        image_index=torch.repeat_interleave(torch.arange(len(good)), torch.tensor(counts)),
        bad=bad,
        sample_indices=[sample.position for sample in good],
        counts=counts,
        crops=default_collate(crops) if crops else None,
    )


def sample_indices(batch_size: int, local: range, pieces: int, start: int, stop: int) -> Iterator[list[int]]:
    """Yield the stream positions of every micro-batch of this process.

    Args:
        batch_size: images per optimizer step over all processes.
        local: this process's part of `range(batch_size)`.
        pieces: number of micro-batches per step.
        start: first step.
        stop: step after the last.
    """
    cuts = [len(local) * piece // pieces for piece in range(pieces + 1)]
    for step in range(start, stop):
        for first, last in pairwise(cuts):
            yield [step * batch_size + offset for offset in local[first:last]]


def load_batches(dataset: MaskedImages, lists: Iterable[list[int]], workers: int, pin: bool) -> DataLoader[PackedBatch]:
    """Load one batch for every list of sample indices, in order for any number of workers."""
    return DataLoader(
        dataset,  # type: ignore[arg-type]
        batch_sampler=lists,
        collate_fn=collate,
        num_workers=workers,
        multiprocessing_context=worker_context(["__main__", __name__]) if workers else None,
        worker_init_fn=start_worker,
        pin_memory=pin,
    )
