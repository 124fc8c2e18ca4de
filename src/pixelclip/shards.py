"""STAGE shards: pack a folder of images into tar shards that WebDataset can stream, optionally shrunk as in the paper."""

from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from PIL import Image

from pixelclip.config import ShardsConfig
from pixelclip.data.images import (
    HEIC_ADVICE,
    HEIC_SUFFIXES,
    IMAGE_SUFFIXES,
    check_upright,
    decode_image,
    encode_jpeg,
    file_orientation,
    to_rgb,
    turn_upright,
)
from pixelclip.data.shard_format import ShardWriter
from pixelclip.storage.download import local_path
from pixelclip.storage.files import files_below, no_such
from pixelclip.storage.progress import track
from pixelclip.workflow.bad_samples import BadSamples
from pixelclip.workflow.stage import Metrics, Stage, describe

_NAMED = 10  # maximum number of suffixes listed for ignored files


def run(images: Path | str, out: Path, config: ShardsConfig) -> Metrics:
    """Pack every image below `images` into shards; a `KEY.json` beside an image is packed with it.

    Args:
        images: a folder or `s3://bucket/folder`, searched recursively.
        out: output folder of shards.
        config: settings.

    Returns:
        `{"images": ..., "bad_images": ..., "shards": ...}`.

    Raises:
        ValueError: there are no images, too many are unusable, or `out` is inside `images`.
    """
    images = local_path(images)
    if not images.is_dir():
        raise ValueError(no_such(images, "folder of images"))
    if out.resolve().is_relative_to(images.resolve()):  # the next run would read the shards as inputs
        raise ValueError(f"{out}: shards must not be inside the folder of images {images}; choose another --out")
    files = files_below(images)
    paths = [path for path in files if path.suffix.lower() in IMAGE_SUFFIXES]
    if not paths:
        heic = f"; {HEIC_ADVICE}" if any(path.suffix.lower() in HEIC_SUFFIXES for path in files) else ""
        raise ValueError(f"{images}: contains no image ({', '.join(IMAGE_SUFFIXES)}){heic}")
    stage = Stage("shards", out, {"images": describe(images)}, config)
    if stage.finished:
        return stage.reuse()
    with stage:
        print(f"shards: {len(paths):,} images found in {images}", flush=True)
        if ignored := _ignored(files):
            print(ignored, flush=True)
        bad = BadSamples("shards", config.max_bad_share)
        samples = _samples(images, paths, config, bad)
        good, shards = 0, 0
        for chunk in iter(lambda: list(islice(samples, config.images_per_shard)), []):
            with ShardWriter(stage.folder / f"{shards:06d}.tar") as writer:
                for members in chunk:
                    for name, data in members:
                        writer.add(name, data)
            good, shards = good + len(chunk), shards + 1
        bad.check(len(paths))
        if not good:
            raise ValueError(f"{images}: none of its {len(paths)} images can be used")
        size = sum(tar.stat().st_size for tar in stage.folder.glob("*.tar"))
        metrics = {"images": float(good), "bad_images": float(len(bad.found)), "shards": float(shards)}
        finished = stage.finish(metrics, files=["*.tar"])
        print(f"shards: {good:,} images in {shards:,} tars, {size:,} bytes", flush=True)
        return finished


def _ignored(files: list[Path]) -> str:
    """Summarise in one line the files that are neither images nor JSON; return an empty string if there are none."""
    counts = Counter(path.suffix.lower() or "none" for path in files)
    ignored = [(suffix, count) for suffix, count in counts.most_common() if suffix not in (*IMAGE_SUFFIXES, ".json")]
    if not ignored:
        return ""
    parts = [f"{suffix} {count}" for suffix, count in ignored[:_NAMED]]
    if len(ignored) > _NAMED:
        parts.append(f"and {len(ignored) - _NAMED} more suffixes")
    named = ", ".join(parts).encode(errors="backslashreplace").decode()
    heic = f". {HEIC_ADVICE}" if counts.keys() & set(HEIC_SUFFIXES) else ""
    return f"shards: ignored files by suffix: {named}; image suffixes are {', '.join(IMAGE_SUFFIXES)}{heic}"


def _samples(root: Path, paths: list[Path], config: ShardsConfig, bad: BadSamples) -> Iterator[list[tuple[str, bytes]]]:
    """Yield the members (name, data) of each usable sample."""
    keys: set[str] = set()
    for path in track(paths, "shards", "image"):
        name = path.relative_to(root).with_suffix("").as_posix()
        key = name.replace(".", "_")  # in WebDataset a key ends at the first dot
        try:
            if key in keys:
                raise ValueError(f"another image has the same key {key!r}")
            data = path.read_bytes()
            members = [(f"{key}.jpg", _as_jpeg(data, config))]
            annotation = path.with_suffix(".json")
            if annotation.is_file():
                check_upright(file_orientation(data), "masks")
                members.append((f"{key}.json", annotation.read_bytes()))
        except (OSError, ValueError) as error:
            bad.add(str(path), str(error))
            continue
        keys.add(key)
        yield members


def _as_jpeg(data: bytes, config: ShardsConfig) -> bytes:
    """Return a plain upright RGB JPEG unchanged; turn, shrink and encode any other image."""
    image = decode_image(data)
    upright = turn_upright(image)
    scale = config.shortest_edge / min(upright.size) if config.shortest_edge else 1.0
    is_plain_jpeg = image.format == "JPEG" and image.mode == "RGB" and image.getexif().get(0x0112, 1) == 1
    if is_plain_jpeg and scale >= 1:
        return data
    if scale < 1:
        width, height = (max(1, round(edge * scale)) for edge in upright.size)
        upright = to_rgb(upright).resize((width, height), Image.Resampling.LANCZOS)
    return encode_jpeg(upright, config.jpeg_quality)
