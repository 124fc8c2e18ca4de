"""STAGE shards: a folder of images -> tar shards that WebDataset can stream (and the paper's offline half-size step).

A sample is `KEY.jpg` and, once masked, `KEY.json` in SA-1B's annotation format. Reading goes through an index of member
offsets: samples are then reached in any order, which makes shuffling global and resuming exact, and the same tars can
still be streamed.
"""

import io
import json
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from PIL import Image
from tqdm import tqdm

from pixelclip.config import ShardsConfig
from pixelclip.download import here
from pixelclip.images import decode_image, encode_jpeg, to_rgb, turn_upright
from pixelclip.rle import RunMasks, read_runs
from pixelclip.sources import Shard
from pixelclip.stage import Metrics, Stage, describe
from pixelclip.storage import files_below

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
_NAMED = 10  # bad samples named one by one; the rest are counted


@dataclass
class BadSamples:
    """Counts and names what could not be used; too many stop the stage."""

    stage: str
    max_share: float
    found: list[str] = field(default_factory=list)

    def add(self, name: str, reason: str) -> None:
        """Notes one bad sample."""
        self.found.append(f"{name}: {reason}")

    def stop_if_too_many(self, total: int, found: int | None = None) -> None:
        """Raises ValueError when more than `max_share` of `total` samples are bad; `found`: with those noted elsewhere."""
        found = len(self.found) if found is None else found
        if found > self.max_share * total:
            limit = f"allowed are {self.max_share:.1%} ({self.stage}.max_bad_share)"
            raise ValueError(f"{self._summary(total, found)}\n{limit}")

    def check(self, total: int, found: int | None = None) -> None:
        """Prints the summary at the end; raises as `stop_if_too_many`."""
        found = len(self.found) if found is None else found
        self.stop_if_too_many(total, found)
        if found:
            print(self._summary(total, found), flush=True)

    def _summary(self, total: int, found: int) -> str:
        lines = [f"  {line}" for line in self.found[:_NAMED]]
        if rest := found - len(lines):  # more than are named here, or found by other processes or before a resume
            lines.append(f"  and {rest} more")
        named = "\n".join(lines).encode(errors="backslashreplace").decode()
        return f"{self.stage}: {found} of {total} samples cannot be used:\n{named}"


@dataclass(frozen=True)
class Member:
    """Where a sample's parts stand in its tar: byte offset and size; `json_size` 0 when it has no masks yet."""

    key: str
    image_offset: int
    image_size: int
    json_offset: int = 0
    json_size: int = 0


def index_shard(path: Shard) -> tuple[list[Member], list[tuple[str, str]]]:
    """Lists the samples of a tar without reading them.

    Returns:
        The samples in the order of the tar, and `(name, reason)` of each member that is no part of a whole sample.

    Raises:
        ValueError: the file is no tar at all.
    """
    parts: dict[str, dict[str, tuple[int, int]]] = {}
    bad: list[tuple[str, str]] = []
    try:
        with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            size = file.seek(0, io.SEEK_END)
            try:
                while member := tar.next():
                    tar.members.clear()  # type: ignore[attr-defined]  # tarfile keeps a kilobyte of each
                    if not member.isfile():
                        continue
                    key, _, suffix = member.name.removeprefix("./").rpartition(".")
                    if member.offset_data + member.size > size:
                        bad.append((f"{path}: {member.name}", "truncated: the tar ends before it"))
                    elif suffix in ("jpg", "json"):
                        parts.setdefault(key, {})[suffix] = (member.offset_data, member.size)
                    elif f".{suffix.lower()}" in IMAGE_SUFFIXES:
                        bad.append((f"{path}: {member.name}", "is not read: an image of a shard is called KEY.jpg"))
                file.seek(tar.offset)
                if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):  # tarfile takes a damaged header for the end
                    bad.append((str(path), f"damaged tar: at byte {tar.offset} neither a member nor its end; the rest is lost"))
            except tarfile.ReadError as error:
                bad.append((str(path), f"damaged tar: {error}"))
    except (tarfile.TarError, OSError) as error:
        raise ValueError(f"{path}: cannot be read as a tar: {error}") from None
    members = []
    for key, found in parts.items():
        if "jpg" not in found:
            bad.append((f"{path}: {key}.json", "has no image"))
            continue
        members.append(Member(key, *found["jpg"], *found.get("json", (0, 0))))
    return members, bad


def read_part(path: Shard, offset: int, size: int) -> bytes:
    """Reads one member's bytes."""
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(size)


def parse_annotation(data: bytes, size: tuple[int, int], may_be_empty: bool = False) -> tuple[dict[str, Any], RunMasks]:
    """Parse SA-1B's annotation JSON and check what the pipeline relies on.

    Args:
        data: the JSON.
        size: (width, height) of its image.
        may_be_empty: accept a document without masks.

    Returns:
        The document and its masks.

    Raises:
        ValueError: not JSON, no annotations, or a mask of another size than its image.
    """
    try:
        document = json.loads(data)
        codes = [annotation["segmentation"] for annotation in document["annotations"]]
        sizes = {tuple(code["size"]) for code in codes}
        counts_are_text = all(isinstance(code["counts"], str) for code in codes)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"unreadable JSON: {error}") from None
    except (KeyError, TypeError) as error:
        raise ValueError(f"not in SA-1B's annotation format: {type(error).__name__} {error}") from None
    if not (codes or may_be_empty):
        raise ValueError("no mask found")
    if not all(len(found) == 2 and all(type(edge) is int for edge in found) for found in sizes):
        raise ValueError("not in SA-1B's annotation format: size must be two integers, height and width")
    if not counts_are_text:
        raise ValueError("not in SA-1B's annotation format: counts must be a compressed RLE string")
    width, height = size
    wrong = sizes - {(height, width)}
    if wrong:
        found = ", ".join(f"{w}x{h}" for h, w in sorted(wrong))
        raise ValueError(f"mask of size {found}, its image is {width}x{height}")
    return document, RunMasks(read_runs([code["counts"] for code in codes], height * width), (height, width))


class ShardWriter:
    """Writes samples into one tar, byte for byte reproducible; until all are in, it does not exist under its name."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._temporary = path.with_name(f".{path.name}.partial")
        self._tar = tarfile.open(self._temporary, "w", format=tarfile.GNU_FORMAT)  # noqa: SIM115

    def add(self, name: str, data: bytes) -> None:
        """Adds one member."""
        info = tarfile.TarInfo(name)
        info.size = len(data)
        self._tar.addfile(info, io.BytesIO(data))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._tar.close()
        if kind is None:
            self._temporary.replace(self._path)


def run(images: Path | str, out: Path, config: ShardsConfig) -> Metrics:
    """Packs every image below `images` into shards; a `KEY.json` beside an image goes along.

    Args:
        images: a folder or `s3://bucket/folder`, searched recursively.
        out: folder of shards to make.
        config: settings.

    Returns:
        `{"images": ..., "bad_images": ..., "shards": ...}`.

    Raises:
        ValueError: no image found, too many that cannot be used, or `out` inside `images`.
    """
    images = here(images)
    if not images.is_dir():
        raise ValueError(f"{images}: no such folder of images")
    if out.resolve().is_relative_to(images.resolve()):  # its tars would be other input at the next run
        raise ValueError(f"{out}: shards must not stand inside the folder of images {images}; give another --out")
    files = files_below(images)
    paths = [path for path in files if path.suffix.lower() in IMAGE_SUFFIXES]
    if not paths:
        raise ValueError(f"{images}: holds no image ({', '.join(IMAGE_SUFFIXES)})")
    stage = Stage("shards", out, {"images": describe(images)}, config)
    if stage.finished:
        return stage.reuse()
    with stage:
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
        if others := _others(files):
            print(others, flush=True)
        if not good:
            raise ValueError(f"{images}: none of its {len(paths)} images can be used")
        metrics = {"images": float(good), "bad_images": float(len(bad.found)), "shards": float(shards)}
        return stage.finish(metrics, files=["*.tar"])


def _others(files: list[Path]) -> str:
    """Which files are neither images that are read nor JSON of masks, in one line; empty when there are none."""
    suffixes = Counter(path.suffix.lower() or "none" for path in files)
    counted = {suffix: count for suffix, count in suffixes.most_common() if suffix not in (*IMAGE_SUFFIXES, ".json")}
    if not counted:
        return ""
    number, shown = sum(counted.values()), list(counted.items())[:_NAMED]
    said = [f"{suffix} {count}" for suffix, count in shown]
    if len(counted) > len(shown):
        said.append(f"and {len(counted) - len(shown)} more suffixes")
    named = ", ".join(said).encode(errors="backslashreplace").decode()
    many = f"{number} files of other kinds are" if number > 1 else "1 file of another kind is"
    return f"shards: {many} left out ({named}); read are {', '.join(IMAGE_SUFFIXES)}"


def _samples(root: Path, paths: list[Path], config: ShardsConfig, bad: BadSamples) -> Iterator[list[tuple[str, bytes]]]:
    keys: set[str] = set()
    for path in tqdm(paths, desc="shards", unit="image"):
        name = path.relative_to(root).with_suffix("").as_posix()
        key = name.replace(".", "_")  # WebDataset ends a key at the first dot
        try:
            if key in keys:
                raise ValueError(f"another image has the same key {key!r}")
            members = [(f"{key}.jpg", _as_jpeg(path.read_bytes(), config))]
            annotation = path.with_suffix(".json")
            if annotation.is_file():
                members.append((f"{key}.json", annotation.read_bytes()))
        except (OSError, ValueError) as error:
            bad.add(str(path), str(error))
            continue
        keys.add(key)
        yield members


def _as_jpeg(data: bytes, config: ShardsConfig) -> bytes:
    image = decode_image(data)
    upright = turn_upright(image)
    shrink = config.shortest_edge / min(upright.size) if config.shortest_edge else 1.0
    is_plain_jpeg = image.format == "JPEG" and image.mode == "RGB" and image.getexif().get(0x0112, 1) == 1
    if is_plain_jpeg and shrink >= 1:
        return data
    if shrink < 1:
        width, height = (max(1, round(edge * shrink)) for edge in upright.size)
        upright = to_rgb(upright).resize((width, height), Image.Resampling.LANCZOS)
    return encode_jpeg(upright, config.jpeg_quality)
