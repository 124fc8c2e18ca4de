"""STAGE masks: add class-agnostic masks in SA-1B's annotation format to shards (PixelCLIP, section 4.1).

Generators: `sam` (also SAM 2), `dino` (k-means), `felzenszwalb` (graph segmentation without weights), `given` (existing masks),
`labels` (label maps without their classes), `model` (a trained PixelCLIP, for a second round).
"""

import json
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar, cast

from PIL import Image

from pixelclip.config import MasksConfig
from pixelclip.data.images import decode_image, to_rgb
from pixelclip.data.shard_format import Member, ShardSummary, ShardWriter, index_shard, read_part
from pixelclip.data.shard_sources import Shard, describe_shards, list_shards
from pixelclip.mask_generators import EncodedSample, Generate
from pixelclip.mask_generators.shrink import shrink_sample
from pixelclip.storage.download import local_copy, local_path
from pixelclip.storage.files import read_json, write_json
from pixelclip.storage.progress import count
from pixelclip.workflow.bad_samples import BadSamples
from pixelclip.workflow.cpus import count_workers
from pixelclip.workflow.stage import Metrics, Stage, describe
from pixelclip.workflow.termination import Terminated, deferred
from pixelclip.workflow.worker_processes import start_worker, worker_context

_WINDOW = 64  # samples in flight between the main process and the workers
GENERATORS = {
    **dict.fromkeys(("felzenszwalb", "given", "labels"), "workers"),
    **dict.fromkeys(("sam", "dino", "model"), "device"),
}
"""Where each generator's module runs: `generate` in worker processes, or `load_generator` on the device."""
_MOST_WORKERS = {"workers": 32, "device": 4}  # workers by default: beside a device they only decode images
Masked = tuple[EncodedSample, dict[str, Any]]
"""A sample with its annotation document. Functions returning `... | str` return an error message on failure."""
_T = TypeVar("_T")


def run(shards: Path | str, out: Path, config: MasksConfig) -> Metrics:
    """Write shards with masks. An interrupted run keeps its finished shards.

    Args:
        shards: folder of shards, manifest or `s3://` prefix.
        out: output folder; masked shards keep their names.
        config: settings.

    Returns:
        `{"images": ..., "masks": ..., "masks_per_image": ..., "bad_images": ...}`.

    Raises:
        ValueError: no shards, too many unusable samples, or a worker process was killed.
    """
    most = _MOST_WORKERS[GENERATORS[config.generator]]
    config = config.model_copy(update={"workers": count_workers(config.workers, most)})
    tars = _part_of(list_shards(shards), config.part, shards)
    names = [tar.name for tar in tars]
    if duplicates := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{shards}: shard names must be unique: masked shards keep them; duplicates: {', '.join(duplicates)}")
    inputs = {"shards": describe_shards(shards)}
    if config.given_folder:
        _check_given(Path(config.given_folder), tars[0])
        inputs["given"] = describe(Path(config.given_folder))
    labels = local_path(config.labels_folder) if config.labels_folder else None
    if labels:
        _module(config).check(labels, config, tars[0])
        inputs["labels"] = {**describe(labels), "path": config.labels_folder}
    weights = _weights(config.weights) if config.weights else None
    if weights:
        inputs["weights"] = {**describe(weights), "path": config.weights}
    stage, bad = Stage("masks", out, inputs, config), BadSamples("masks", config.max_bad_share)
    if stage.finished:
        metrics = stage.reuse()
        bad.found = [line for tar in tars for line in read_json(_summary(stage.out, tar), ShardSummary)["bad"]]
        bad.stop_if_too_many(int(metrics["images"]) + len(bad.found))  # the finished run may have had a higher limit
        return metrics
    if labels:
        config = config.model_copy(update={"labels_folder": str(labels)})  # a local copy for the workers
    with stage, _start_pool(config.workers) as pool:
        print(f"masks: generator {config.generator}, {len(tars)} shards", flush=True)
        on_device = GENERATORS[config.generator] == "device"
        generate: Generate | None = _module(config).load_generator(weights, config) if on_device else None
        images, masks = _mask_shards(tars, stage.folder, config, partial(_results, config, pool, generate), bad)
        bad.check(images + len(bad.found))
        if not images:
            raise ValueError(f"{shards}: none of the images could be masked")
        counts = {"images": images, "masks": masks, "masks_per_image": masks / images, "bad_images": len(bad.found)}
        metrics = stage.finish({name: float(count) for name, count in counts.items()}, files=["*.tar"])
        each = f"{masks / images:.1f} masks per image by generator {config.generator}"
        print(f"masks: {images:,} images with {each}, {len(bad.found):,} unusable", flush=True)
        return metrics


def _module(config: MasksConfig) -> ModuleType:
    """Import the generator's module; late, because worker processes do not need torch."""
    own = config.generator == "model"
    return import_module("pixelclip.inference.self_masks" if own else f"pixelclip.mask_generators.{config.generator}")


def _weights(uri: str) -> Path:
    if not uri.startswith("models:/"):
        return local_copy(uri)
    from pixelclip.registry.model_version import fetch  # imports MLflow, which takes seconds

    return fetch(uri)


def _part_of(tars: list[Shard], part: str, shards: Path | str) -> list[Shard]:
    if not part:
        return tars
    number, count = (int(word) for word in part.split("/"))
    if count > len(tars):
        raise ValueError(f"masks.part {part}: {shards} has only {len(tars)} shards, so at most {len(tars)} parts are possible")
    return tars[number - 1 :: count]


def _check_given(folder: Path, tar: Shard) -> None:
    """Raise ValueError if the folder has no masks for the first shard, so that a wrong folder fails early."""
    if not folder.is_dir():
        raise ValueError(f"masks.given_folder {folder}: no such folder")
    members = index_shard(tar)[0]
    if members and not any((folder / f"{member.key}.json").is_file() for member in members):
        raise ValueError(
            f"masks.given_folder: {folder}/{members[0].key}.json: no such file, and none for any other of the "
            f"{len(members)} samples of {tar}"
        )


def _summary(folder: Path, tar: Shard) -> Path:
    return folder / f"{tar.stem}.summary.json"


def _num_bytes(tar: Shard) -> int:
    return tar.stat().st_size if isinstance(tar, Path) else tar.size


@contextmanager
def _start_pool(workers: int) -> Iterator[Executor | None]:
    if workers == 0:
        yield None
        return
    pool = ProcessPoolExecutor(workers, worker_context([__name__, "skimage.segmentation"]), start_worker)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


_Results = Callable[[Shard, list[Member]], Iterator[Masked | str]]
"""A shard and its members -> for each member, in order, the masked sample or an error message."""


def _mask_shards(tars: list[Shard], folder: Path, config: MasksConfig, results: _Results, bad: BadSamples) -> tuple[int, int]:
    """Mask the unfinished shards; return the numbers of images and masks in all shards."""
    images, masks, done, num_bytes = 0, 0, 0, sum(map(_num_bytes, tars))
    for tar in tars:
        summary = _summary(folder, tar)
        if not (summary.is_file() and (folder / tar.name).is_file()):
            try:
                write_json(summary, _mask_shard(tar, folder / tar.name, results))
            except BrokenProcessPool:
                raise ValueError(
                    f"{tar}: a worker process died, possibly out of memory: set masks.workers below {config.workers}; "
                    "the same command resumes with this shard"
                ) from None
        counts = read_json(summary, ShardSummary)
        images, masks, done = images + counts["images"], masks + counts["masks"], done + _num_bytes(tar)
        bad.found += counts["bad"]
        # The total number of samples is estimated from bytes: counting them would download every remote shard twice.
        if len(bad.found) > config.max_bad_share * (images + len(bad.found)) * num_bytes / done:
            bad.stop_if_too_many(images + len(bad.found))
    return images, masks


def _mask_shard(tar: Shard, out: Path, results: _Results) -> dict[str, Any]:
    """Write one masked shard; return the numbers of images and masks, and the bad samples.

    After SIGTERM or Ctrl-C the samples so far are kept, and the next call continues with the following one.
    """
    members, bad_members = index_shard(tar)
    begun = out.with_name(f".{out.stem}.begun.json")  # next to the unfinished tar; only if that ends with a whole sample
    none = {"images": 0, "masks": 0, "bad": [f"{name}: {reason}" for name, reason in bad_members]}
    counts: dict[str, Any] = read_json(begun, ShardSummary) if begun.is_file() else none
    done = counts["images"] + len(counts["bad"]) - len(bad_members)
    begun.unlink(missing_ok=True)
    progress = count(len(members), f"masks {tar.stem}", "image", done)
    between: Terminated | None = None  # raised between two samples; elsewhere the tar may end within one
    try:
        with deferred() as received, ShardWriter(out, append=done > 0) as writer, progress:
            left = members[done:]
            for member, result in zip(left, results(tar, left), strict=True):
                _add(writer, result, counts, f"{tar}: {member.key}")
                done += 1
                progress.update()
                if number := received():
                    between = Terminated(number, f"after {done} of {len(members)} images of {tar}")
                    raise between
    except Terminated as stop:
        if stop is between:
            write_json(begun, counts)
        raise
    return counts


def _add(writer: ShardWriter, result: Masked | str, counts: dict[str, Any], where: str) -> None:
    if isinstance(result, str):
        counts["bad"].append(f"{where}: {result}")
        return
    sample, document = result
    writer.add(f"{sample.key}.jpg", sample.image)
    writer.add(f"{sample.key}.json", json.dumps(document, separators=(",", ":")).encode())
    counts["images"] += 1
    counts["masks"] += len(document["annotations"])


def _results(
    config: MasksConfig, pool: Executor | None, generate: Generate | None, tar: Shard, members: list[Member]
) -> Iterator[Masked | str]:
    samples = (_read(tar, member) for member in members)
    if generate is None:
        return _map(partial(_mask_one, config=config), samples, pool)
    return _on_device(tar, _map(partial(_prepare, config=config), samples, pool), generate, config)


def _read(tar: Shard, member: Member) -> EncodedSample:
    annotation = read_part(tar, member.json_offset, member.json_size) if member.json_size else b""
    return EncodedSample(member.key, read_part(tar, member.image_offset, member.image_size), annotation)


def _map(function: Callable[[EncodedSample], _T], samples: Iterator[EncodedSample], pool: Executor | None) -> Iterator[_T]:
    """Apply a function in order, in worker processes if there is a pool."""
    if pool is None:
        yield from map(function, samples)
        return
    window: deque[Future[_T]] = deque()
    for sample in samples:  # a bounded window keeps only part of a shard in memory
        window.append(pool.submit(function, sample))
        if len(window) >= _WINDOW:
            yield window.popleft().result()
    for future in window:
        yield future.result()


def _prepare(sample: EncodedSample, config: MasksConfig) -> EncodedSample | str:
    """Turn and shrink a sample and load its given masks, in a worker."""
    key, data, annotation = sample
    if config.generator != "given":
        annotation = b""  # existing masks are replaced, so they are neither parsed nor resized
    if config.given_folder:
        path = Path(config.given_folder) / f"{key}.json"
        try:
            annotation = path.read_bytes()
        except OSError as error:
            return f"{path}: {error.strerror}"
    try:
        return shrink_sample(EncodedSample(key, data, annotation), config.shortest_edge, config.jpeg_quality)
    except ValueError as error:
        return str(error)


def _mask_one(sample: EncodedSample, config: MasksConfig) -> Masked | str:
    """Prepare and mask a sample, in a worker."""
    prepared = _prepare(sample, config)
    if isinstance(prepared, str):
        return prepared
    try:
        return prepared, _largest(_module(config).generate(prepared, config), config)
    except ValueError as error:
        return str(error)


def _largest(document: dict[str, Any], config: MasksConfig) -> dict[str, Any]:
    """Keep the `max_masks` largest masks; raise ValueError if there are none."""
    if config.max_masks:
        by_area = sorted(document["annotations"], key=lambda entry: -entry["area"])
        document["annotations"] = by_area[: config.max_masks]
    if not document["annotations"]:
        raise ValueError("no mask found")
    return document


def _on_device(
    tar: Shard, samples: Iterator[EncodedSample | str], generate: Generate, config: MasksConfig
) -> Iterator[Masked | str]:
    """Mask batches of images on the device, while the next batch is decoded and the previous one is written."""
    batches = iter(lambda: list(islice(samples, config.batch_size)), [])
    opened = _ahead([_open(sample) for sample in batch] for batch in batches)
    for batch, documents in _ahead((batch, _generate(tar, batch, generate)) for batch in opened):
        for item in batch:
            try:
                yield item if isinstance(item, str) else (item[0], _largest(next(documents), config))
            except ValueError as error:
                yield str(error)


def _open(sample: EncodedSample | str) -> tuple[EncodedSample, Image.Image] | str:
    try:
        return sample if isinstance(sample, str) else (sample, to_rgb(decode_image(sample.image)))
    except ValueError as error:
        return str(error)


def _generate(tar: Shard, batch: list[tuple[EncodedSample, Image.Image] | str], generate: Generate) -> Iterator[dict[str, Any]]:
    """Mask the images of a batch; an error lists their keys."""
    images = [(item[0].key, item[1]) for item in batch if not isinstance(item, str)]
    try:
        return iter(list(generate(images)) if images else [])
    except Exception as error:  # of the model or the device; its message names no image
        kind = ValueError if isinstance(error, ValueError) else RuntimeError
        raise kind(f"{tar}: {', '.join(key for key, _ in images)}: {error}") from error


def _ahead(items: Iterator[_T]) -> Iterator[_T]:
    """Prefetch one item in a thread."""
    end = object()
    with ThreadPoolExecutor(1) as thread:
        following = thread.submit(next, items, end)
        while (item := following.result()) is not end:
            following = thread.submit(next, items, end)
            yield cast(_T, item)
