"""STAGE masks: shards -> shards with nameless masks in SA-1B's annotation format (PixelCLIP, section 4.1).

Generators: `felzenszwalb` (graph segmentation, needs no weights) and `given` (masks that exist already).
"""

import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as rle
from tqdm import tqdm

from pixelclip.config import MasksConfig
from pixelclip.images import decode_image, to_rgb
from pixelclip.shards import (
    BadSamples,
    Member,
    ShardWriter,
    describe_shards,
    index_shard,
    list_shards,
    parse_annotation,
    read_part,
)
from pixelclip.stage import Metrics, Stage, describe
from pixelclip.storage import read_json, write_json

Sample = tuple[str, bytes, bytes]  # key, image, JSON of its shard (empty: none)
Result = tuple[dict[str, Any] | None, str]  # annotation document or None, and why not
_WINDOW = 64


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
    key, data, annotation = sample
    if config.given_folder:
        path = Path(config.given_folder) / f"{key}.json"
        try:
            annotation = path.read_bytes()
        except OSError as error:
            raise ValueError(f"{path}: {error.strerror}") from None
    if not annotation:
        raise ValueError("no JSON with masks beside the image")
    document = parse_annotation(annotation, decode_image(data).size)
    for entry in document["annotations"]:
        if not isinstance(entry.get("area"), int | float):
            entry["area"] = int(rle.area(entry["segmentation"]))
    return document


_GENERATORS: dict[str, Callable[[Sample, MasksConfig], dict[str, Any]]] = {
    "felzenszwalb": _from_felzenszwalb,
    "given": _from_given,
}


def _mask_one(sample: Sample, config: MasksConfig) -> Result:
    """Runs in a worker: the annotation of one sample, or why it has none."""
    try:
        document = _GENERATORS[config.generator](sample, config)
    except ValueError as error:
        return None, str(error)
    if config.max_masks:
        largest = sorted(document["annotations"], key=lambda entry: -entry["area"])
        document["annotations"] = largest[: config.max_masks]
    if not document["annotations"]:
        return None, "no mask found"
    return document, ""


def run(shards: Path, out: Path, config: MasksConfig) -> Metrics:
    """Gives every sample of the shards its masks; finished shards of an interrupted run are kept.

    Args:
        shards: Shards.
        out: folder of masked shards to make, of the same names.
        config: settings.

    Returns:
        `{"images": ..., "masks": ..., "masks_per_image": ..., "bad_images": ...}`.

    Raises:
        ValueError: no shard, or too many samples that cannot be used.
    """
    tars = list_shards(shards)
    names = [tar.name for tar in tars]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{shards}: masked shards keep their names, which must differ; found twice: {', '.join(twice)}")
    inputs = {"shards": describe_shards(shards)} | (
        {"given": describe(Path(config.given_folder))} if config.given_folder else {}
    )
    stage = Stage("masks", out, inputs, config)
    if stage.finished:
        return stage.reuse()
    with stage, _start_pool(config.workers) as pool:
        images, masks, bad = 0, 0, BadSamples("masks", config.max_bad_share)
        for tar in tars:
            summary = stage.folder / f"{tar.stem}.summary.json"
            if not (summary.is_file() and (stage.folder / tar.name).is_file()):
                write_json(summary, _mask_shard(tar, stage.folder / tar.name, config, pool))
            counted = read_json(summary)
            images, masks = images + counted["images"], masks + counted["masks"]
            bad.found += counted["bad"]
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


def _mask_shard(tar: Path, out: Path, config: MasksConfig, pool: Executor | None) -> dict[str, Any]:
    members, bad = index_shard(tar)
    found_bad = [f"{name}: {reason}" for name, reason in bad]
    images, masks = 0, 0
    results = _map(partial(_mask_one, config=config), (_read(tar, member) for member in members), pool)
    shown = tqdm(members, desc=f"masks {tar.stem}", unit="image")
    with ShardWriter(out) as writer:
        for member, (document, reason) in zip(shown, results, strict=True):
            if document is None:
                found_bad.append(f"{tar}: {member.key}: {reason}")
                continue
            writer.add(f"{member.key}.jpg", read_part(tar, member.image_offset, member.image_size))
            writer.add(f"{member.key}.json", json.dumps(document, separators=(",", ":")).encode())
            images, masks = images + 1, masks + len(document["annotations"])
    return {"images": images, "masks": masks, "bad": found_bad}


def _read(tar: Path, member: Member) -> Sample:
    annotation = read_part(tar, member.json_offset, member.json_size) if member.json_size else b""
    return member.key, read_part(tar, member.image_offset, member.image_size), annotation


def _start_pool(workers: int) -> AbstractContextManager[Executor | None]:
    if workers == 0:
        return nullcontext()
    context = get_context("forkserver")
    context.set_forkserver_preload([__name__, "skimage.segmentation"])
    return ProcessPoolExecutor(workers, mp_context=context)


def _map(function: Callable[[Sample], Result], samples: Iterator[Sample], pool: Executor | None) -> Iterator[Result]:
    if pool is None:
        yield from map(function, samples)
        return
    window: deque[Future[Result]] = deque()
    for sample in samples:  # a bounded window, so that a shard never stands in memory twice
        window.append(pool.submit(function, sample))
        if len(window) >= _WINDOW:
            yield window.popleft().result()
    for future in window:
        yield future.result()
