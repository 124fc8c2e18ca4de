"""STAGE masks: shards -> shards with nameless masks in SA-1B's annotation format (PixelCLIP, section 4.1).

Generators: `sam` and `dino` (k-means), `felzenszwalb` (graph segmentation, needs no weights), `given` (masks that exist).
"""

import json
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as rle
from tqdm import tqdm

from pixelclip.config import MasksConfig
from pixelclip.download import local_copy
from pixelclip.images import decode_image, encode_jpeg, nearest, to_rgb
from pixelclip.shards import (
    BadSamples,
    Member,
    ShardWriter,
    index_shard,
    parse_annotation,
    read_part,
)
from pixelclip.sources import Shard, describe_shards, list_shards
from pixelclip.stage import Metrics, Stage, describe
from pixelclip.storage import read_json, write_json

Sample = tuple[str, bytes, bytes]  # key, image, JSON of its shard (empty: none)
Result = tuple[dict[str, Any] | None, str]  # annotation document or None, and why not
_WINDOW = 64
_Found = TypeVar("_Found")


def felzenszwalb(image: Image.Image, scale: float, sigma: float, min_size: int) -> NDArray[np.int64]:
    """Graph segmentation (Felzenszwalb and Huttenlocher, 2004).

    Returns:
        [H, W], the segment of every pixel, counted from 0.
    """
    from skimage.segmentation import felzenszwalb as segment

    return np.asarray(segment(np.asarray(to_rgb(image)), scale=scale, sigma=sigma, min_size=min_size))


def annotate(masks: Iterable[NDArray[np.bool_]], size: tuple[int, int], key: str, quality: float = 1.0) -> dict[str, Any]:
    """Writes masks as SA-1B's annotation document.

    Args:
        masks: non-empty masks [H, W]; one at a time is in memory where they come from an iterator.
        size: (width, height) of the image.
        key: of the sample.
        quality: written as predicted IoU and stability score.
    """
    width, height = size
    annotations = []
    for index, mask in enumerate(masks):
        code = rle.encode(np.asfortranarray(mask, dtype=np.uint8))
        rows, columns = np.nonzero(mask)
        annotations.append(
            {
                "id": index,
                "segmentation": {"size": [height, width], "counts": code["counts"].decode()},
                "area": len(rows),
                "bbox": [float(v) for v in rle.toBbox(code)],
                "predicted_iou": quality,
                "stability_score": quality,
                "point_coords": [[float(columns[len(columns) // 2]), float(rows[len(rows) // 2])]],
                "crop_box": [0.0, 0.0, float(width), float(height)],
            }
        )
    image = {"image_id": 0, "width": width, "height": height, "file_name": f"{key}.jpg"}
    return {"image": image, "annotations": annotations}


def decode_masks(document: dict[str, Any]) -> NDArray[np.uint8]:
    """Decodes the masks of an annotation document: [H, W, N], 0 or 1."""
    codes = [annotation["segmentation"] for annotation in document["annotations"]]
    return rle.decode(codes) if codes else np.zeros((0, 0, 0), np.uint8)


def _from_felzenszwalb(sample: Sample, config: MasksConfig) -> dict[str, Any]:
    key, data, _ = sample
    image = decode_image(data)
    segments = felzenszwalb(image, config.felzenszwalb_scale, config.felzenszwalb_sigma, config.felzenszwalb_min_size)
    return annotate((segments == number for number in np.unique(segments)), image.size, key)


def _from_given(sample: Sample, config: MasksConfig) -> dict[str, Any]:
    _, data, annotation = sample
    if not annotation:
        raise ValueError("no JSON with masks beside the image")
    document, _ = parse_annotation(annotation, decode_image(data).size)
    for entry in document["annotations"]:
        if not isinstance(entry.get("area"), int | float):
            entry["area"] = int(rle.area(entry["segmentation"]))
    return document


_GENERATORS: dict[str, Callable[[Sample, MasksConfig], dict[str, Any]]] = {
    "felzenszwalb": _from_felzenszwalb,
    "given": _from_given,
}


def _prepare(sample: Sample, config: MasksConfig) -> tuple[Sample, str]:
    """Runs in a worker: the sample as its generator sees it, or why it cannot be used."""
    key, data, annotation = sample
    if config.generator != "given":
        annotation = b""  # masks of before are neither read nor resized
    try:
        if config.given_folder:
            path = Path(config.given_folder) / f"{key}.json"
            try:
                annotation = path.read_bytes()
            except OSError as error:
                raise ValueError(f"{path}: {error.strerror}") from None
        return shrink((key, data, annotation), config.shortest_edge, config.jpeg_quality), ""
    except ValueError as error:
        return sample, str(error)


def _mask_one(sample: Sample, config: MasksConfig) -> tuple[Sample, Result]:
    """Runs in a worker: the sample, and its annotation or why it has none."""
    sample, reason = _prepare(sample, config)
    if reason:
        return sample, (None, reason)
    try:
        return sample, (_keep(_GENERATORS[config.generator](sample, config), config), "")
    except ValueError as error:
        return sample, (None, str(error))


def _keep(document: dict[str, Any], config: MasksConfig) -> dict[str, Any]:
    if config.max_masks:
        largest = sorted(document["annotations"], key=lambda entry: -entry["area"])
        document["annotations"] = largest[: config.max_masks]
    if not document["annotations"]:
        raise ValueError("no mask found")
    return document


def shrink(sample: Sample, shortest_edge: int, quality: int) -> Sample:
    """A sample whose image is at most `shortest_edge` pixels on its shorter side, its masks resized (nearest) with it.

    Raises:
        ValueError: image or JSON cannot be read.
    """
    key, data, annotation = sample
    if not shortest_edge:
        return sample
    image = to_rgb(decode_image(data))
    if min(image.size) <= shortest_edge:
        return sample
    scale = shortest_edge / min(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    if annotation:
        document, masks = parse_annotation(annotation, image.size)
        small = masks.sample(nearest(size[1], image.height), nearest(size[0], image.width))  # [N, H, W]
        kept = [index for index, mask in enumerate(small) if mask.any()]
        fresh = annotate((small[index] for index in kept), size, key)
        for entry, index in zip(fresh["annotations"], kept, strict=True):
            old = document["annotations"][index]
            entry.update({name: old[name] for name in ("id", "predicted_iou", "stability_score") if name in old})
        annotation = json.dumps(fresh, separators=(",", ":")).encode()
    return key, encode_jpeg(image.resize(size, Image.Resampling.LANCZOS), quality), annotation


Generate = Callable[[list[tuple[str, Image.Image]]], Iterable[dict[str, Any]]]
"""Keys and images of a batch -> their annotation documents."""


def _on_device(
    tar: Shard, samples: Iterator[tuple[Sample, str]], generate: Generate, config: MasksConfig
) -> Iterator[tuple[Sample, Result]]:
    """SAM and DINO: batches of images on one device, while the next is read and the last written."""
    opened = _ahead(_open(batch) for batch in iter(lambda: list(islice(samples, config.batch_size)), []))
    for batch, found in _ahead((batch, _generate(tar, batch, generate)) for batch in opened):
        for sample, image in batch:
            try:
                if isinstance(image, str):
                    raise ValueError(image)
                yield sample, (_keep(next(found), config), "")
            except ValueError as error:
                yield sample, (None, str(error))


_Opened = list[tuple[Sample, Image.Image | str]]  # an image, or why there is none


def _open(batch: list[tuple[Sample, str]]) -> _Opened:
    opened: _Opened = []
    for sample, reason in batch:
        try:
            opened.append((sample, reason or to_rgb(decode_image(sample[1]))))
        except ValueError as error:
            opened.append((sample, str(error)))
    return opened


def _generate(tar: Shard, batch: _Opened, generate: Generate) -> Iterator[dict[str, Any]]:
    good = [(key, image) for (key, _, _), image in batch if not isinstance(image, str)]
    try:
        return iter(list(generate(good)) if good else [])
    except Exception as error:  # of a model and a device, whose own words name no image
        kind = ValueError if isinstance(error, ValueError) else RuntimeError
        raise kind(f"{tar}: {', '.join(key for key, _ in good)}: {error}") from error


def _ahead(items: Iterator[_Found]) -> Iterator[_Found]:
    """The items, of which a thread makes one more than is asked for."""
    end = object()
    with ThreadPoolExecutor(1) as thread:
        following = thread.submit(next, items, end)
        while (item := following.result()) is not end:
            following = thread.submit(next, items, end)
            yield cast(_Found, item)


def _sam(weights: Path, config: MasksConfig) -> Generate:
    from pixelclip.ranks import pick_device, pick_precision
    from pixelclip.sam import SamGenerator
    from pixelclip.sam_weights import load_sam

    prefix = "sam_"
    settings = {name.removeprefix(prefix): value for name, value in config.model_dump().items() if name.startswith(prefix)}
    device = pick_device(config.device)
    settings["precision"] = pick_precision(config.sam_precision, device)
    generator = SamGenerator(load_sam(weights).to(device), **settings)

    def generate(batch: list[tuple[str, Image.Image]]) -> Iterator[dict[str, Any]]:
        for (key, image), entries in zip(batch, generator([np.asarray(image) for _, image in batch]), strict=True):
            yield {**annotate([], image.size, key), "annotations": entries}

    return generate


def _dino(weights: Path, config: MasksConfig) -> Generate:
    import torch

    from pixelclip.dino import IMAGENET_MEAN, IMAGENET_STD, load_dino, segment
    from pixelclip.pixels import resized_square
    from pixelclip.ranks import pick_device, pick_precision

    device = pick_device(config.device)
    pick_precision("float32", device)  # what ran before in this process may have left TF32 on
    dino = load_dino(weights).to(device)
    if config.dino_side % (patch := dino.patch_embed.patch_size[0]):
        raise ValueError(f"masks.dino_side {config.dino_side} is no multiple of this DINO's patch of {patch} pixels")

    def generate(batch: list[tuple[str, Image.Image]]) -> Iterator[dict[str, Any]]:
        views = [resized_square(image, config.dino_side, IMAGENET_MEAN, IMAGENET_STD, device) for _, image in batch]
        seeds = [zlib.crc32(f"{config.seed} {key}".encode()) for key, _ in batch]
        labels = segment(dino, torch.cat(views), config.dino_clusters, seeds).cpu().numpy()  # [B, h, w]
        for (key, image), small in zip(batch, labels, strict=True):
            large = small[nearest(image.height, small.shape[0])][:, nearest(image.width, small.shape[1])]
            yield annotate((large == number for number in np.unique(large)), image.size, key)

    return generate


def run(shards: Path | str, out: Path, config: MasksConfig) -> Metrics:
    """Gives every sample of the shards its masks; finished shards of an interrupted run are kept.

    Args:
        shards: Shards.
        out: folder of masked shards to make, of the same names.
        config: settings.

    Returns:
        `{"images": ..., "masks": ..., "masks_per_image": ..., "bad_images": ...}`.

    Raises:
        ValueError: no shard, too many samples that cannot be used, or a worker process was killed.
    """
    tars = _part_of(list_shards(shards), config.part, shards)
    names = [tar.name for tar in tars]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{shards}: masked shards keep their names, which must differ; found twice: {', '.join(twice)}")
    if config.given_folder:
        _check_given(Path(config.given_folder), tars[0])
    inputs = {"shards": describe_shards(shards)} | (
        {"given": describe(Path(config.given_folder))} if config.given_folder else {}
    )
    weights = local_copy(config.weights) if config.weights else None
    if weights:
        inputs["weights"] = {**describe(weights), "path": config.weights}
    stage, bad = Stage("masks", out, inputs, config), BadSamples("masks", config.max_bad_share)
    if stage.finished:
        metrics = stage.reuse()
        bad.found = [line for tar in tars for line in read_json(_summary(stage.out, tar))["bad"]]
        bad.stop_if_too_many(int(metrics["images"]) + len(bad.found))  # the limit may have been a larger one
        return metrics
    on_device = {"sam": _sam, "dino": _dino}.get(config.generator)
    with stage, _start_pool(config.workers) as pool:
        tools = _Tools(pool, on_device(weights, config) if on_device and weights else None)
        images, masks = _mask_shards(tars, stage.folder, config, tools, bad)
        bad.check(images + len(bad.found))
        if not images:
            raise ValueError(f"{shards}: no image of it could be given a mask")
        metrics = {
            "images": float(images),
            "masks": float(masks),
            "masks_per_image": masks / images,
            "bad_images": float(len(bad.found)),
        }
        return stage.finish(metrics, files=["*.tar"])


def _check_given(folder: Path, tar: Shard) -> None:
    """Refuses a folder without one mask for a shard: a wrong one is known before all its shards are read."""
    if not folder.is_dir():
        raise ValueError(f"masks.given_folder {folder}: no such folder")
    members = index_shard(tar)[0]
    if members and not any((folder / f"{member.key}.json").is_file() for member in members):
        raise ValueError(
            f"masks.given_folder: {folder}/{members[0].key}.json: No such file, nor one for another of the {len(members)} "
            f"samples of {tar}"
        )


def _summary(folder: Path, tar: Shard) -> Path:
    return folder / f"{tar.stem}.summary.json"


def _num_bytes(tar: Shard) -> int:
    return tar.stat().st_size if isinstance(tar, Path) else tar.size


def _part_of(tars: list[Shard], part: str, shards: Path | str) -> list[Shard]:
    if not part:
        return tars
    number, count = (int(word) for word in part.split("/"))
    if count > len(tars):
        raise ValueError(f"masks.part {part}: {shards} has {len(tars)} shards only, so at most {len(tars)} parts")
    return tars[number - 1 :: count]


@dataclass(frozen=True)
class _Tools:
    """What a run sets up once: worker processes, and a generator that works on a device."""

    pool: Executor | None
    generate: Generate | None


def _mask_shards(tars: list[Shard], folder: Path, config: MasksConfig, tools: _Tools, bad: BadSamples) -> tuple[int, int]:
    """Masks the shards that are not finished yet; returns the number of images and masks of all."""
    images, masks, done, whole = 0, 0, 0, sum(map(_num_bytes, tars))
    for tar in tars:
        summary = _summary(folder, tar)
        if not (summary.is_file() and (folder / tar.name).is_file()):
            try:
                write_json(summary, _mask_shard(tar, folder / tar.name, config, tools))
            except BrokenProcessPool:
                raise ValueError(
                    f"{tar}: a worker process died, perhaps for want of memory: set masks.workers below {config.workers}; "
                    "the same command continues with this shard"
                ) from None
        counted = read_json(summary)
        images, masks, done = images + counted["images"], masks + counted["masks"], done + _num_bytes(tar)
        bad.found += counted["bad"]
        # How many samples are to come is judged by bytes: to count them would bring every shard here twice.
        if len(bad.found) > config.max_bad_share * (images + len(bad.found)) * whole / done:
            bad.stop_if_too_many(images + len(bad.found))
    return images, masks


def _mask_shard(tar: Shard, out: Path, config: MasksConfig, tools: _Tools) -> dict[str, Any]:
    members, bad = index_shard(tar)
    found_bad = [f"{name}: {reason}" for name, reason in bad]
    images, masks = 0, 0
    shown = tqdm(total=len(members), desc=f"masks {tar.stem}", unit="image")
    with ShardWriter(out) as writer, shown:
        for (key, data, _), (document, reason) in _results(tar, members, config, tools):
            shown.update()
            if document is None:
                found_bad.append(f"{tar}: {key}: {reason}")
                continue
            writer.add(f"{key}.jpg", data)
            writer.add(f"{key}.json", json.dumps(document, separators=(",", ":")).encode())
            images, masks = images + 1, masks + len(document["annotations"])
    return {"images": images, "masks": masks, "bad": found_bad}


def _results(tar: Shard, members: list[Member], config: MasksConfig, tools: _Tools) -> Iterator[tuple[Sample, Result]]:
    samples = (_read(tar, member) for member in members)
    if tools.generate is None:
        yield from _map(partial(_mask_one, config=config), samples, tools.pool)
    else:
        yield from _on_device(tar, _map(partial(_prepare, config=config), samples, tools.pool), tools.generate, config)


def _read(tar: Shard, member: Member) -> Sample:
    annotation = read_part(tar, member.json_offset, member.json_size) if member.json_size else b""
    return member.key, read_part(tar, member.image_offset, member.image_size), annotation


def _start_pool(workers: int) -> AbstractContextManager[Executor | None]:
    if workers == 0:
        return nullcontext()
    context = get_context("forkserver")
    context.set_forkserver_preload([__name__, "skimage.segmentation"])
    return ProcessPoolExecutor(workers, mp_context=context)


def _map(function: Callable[[Sample], _Found], samples: Iterator[Sample], pool: Executor | None) -> Iterator[_Found]:
    if pool is None:
        yield from map(function, samples)
        return
    window: deque[Future[_Found]] = deque()
    for sample in samples:  # a bounded window, so that a shard never stands in memory twice
        window.append(pool.submit(function, sample))
        if len(window) >= _WINDOW:
            yield window.popleft().result()
    for future in window:
        yield future.result()
