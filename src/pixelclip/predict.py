"""Segment many images with one model, in parts and resumable; merge the parts."""

import json
import shutil
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from pixelclip.config import PredictConfig
from pixelclip.data.class_names import check_names
from pixelclip.data.image_sources import Photo, Photos, check_output, list_photos
from pixelclip.data.images import decode_image, encode_jpeg, to_rgb, turn_upright
from pixelclip.data.shard_sources import parts
from pixelclip.inference.loading import Model, load_predictor
from pixelclip.inference.prediction import INFERENCE, overlay, palette_image, png
from pixelclip.inference.prediction_files import Record, record_of, write_coco, write_label_studio
from pixelclip.settings import build
from pixelclip.storage.files import files_below, parse_json, write_atomically, write_json
from pixelclip.storage.progress import count
from pixelclip.workflow.bad_samples import BadSamples
from pixelclip.workflow.provenance import read_provenance
from pixelclip.workflow.stage import PROVENANCE, Metrics, Stage, describe

COCO, RECORDS, BAD, TASKS = "predictions.json", "predictions.jsonl", "bad_images.json", "label_studio.json"
LABELS, OVERLAYS = "labels", "overlays"
_CHUNKS = ".chunks"
_CHUNK = 32  # images; at most this many are repeated after a kill
_JPEG_QUALITY = 90


def run(images: str, model: Path, out: Path, config: PredictConfig) -> Metrics:
    """Write the label map, overlay and COCO annotations of every image. An interrupted run continues where it was.

    A whole run writes `predictions.json`, one with `config.part` `predictions.jsonl` for `merge`.

    Args:
        images: image, folder, glob, shards (folder of tars, manifest), or an `s3://` object or prefix.
        model: model folder.
        out: output folder.
        config: settings.

    Returns:
        `{"images": ..., "bad_images": ...}`.

    Raises:
        ValueError: no images, too many unusable ones, or an unusable model, class name or setting.
    """
    names = check_names(config.classes)
    check_output(images, str(out))
    photos = list_photos(images, config.part)
    if config.label_studio and photos.in_shards:
        raise ValueError(f"{images}: Label Studio reads image files, not shards; leave out --label-studio")
    inputs = {**photos.inputs, "model": describe(model)}
    if (sizes := model / INFERENCE).is_file():  # not part of the model's own provenance
        inputs["inference"] = describe(sizes)
    stage = Stage("predict", out, inputs, config)
    if stage.finished:
        return stage.reuse()
    with stage:
        predictor = load_predictor(model, config.device)
        _predict(photos, predictor, names, stage.folder, config)
        if photos.ignored:
            print(f"predict: {photos.ignored} files of {images} are neither images nor shards", flush=True)
        return _finish(stage, names, config, sorted((stage.folder / _CHUNKS).glob("*.jsonl")))


def merge(folder: Path, out: Path) -> Metrics:
    """Merge all parts of a prediction into what a run without parts writes.

    Args:
        folder: folder of the outputs of all parts.
        out: output folder.

    Raises:
        ValueError: a part is missing, or they are not parts of one prediction.
    """
    made = {part: read_provenance(part / PROVENANCE) for part in parts(folder)}
    if not made or any(provenance["stage"] != "predict" for provenance in made.values()):
        raise ValueError(f"{folder}: contains no parts of a prediction (outputs of `pixelclip predict --part i/n`)")
    ordered = sorted(made, key=lambda part: int(made[part]["settings"]["part"].partition("/")[0]))
    config = build(PredictConfig, {**made[ordered[0]]["settings"], "part": "", "max_bad_share": 1.0}, str(ordered[0]))
    stage = Stage("merge", out, {f"part_{number}": describe(part) for number, part in enumerate(ordered, 1)}, config)
    if stage.finished:
        return stage.reuse()
    with stage:
        for part in ordered:
            for file in [*files_below(part / LABELS), *(files_below(part / OVERLAYS) if config.overlays else [])]:
                copy = stage.folder / file.relative_to(part)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, copy)
        return _finish(stage, check_names(config.classes), config, [part / RECORDS for part in ordered])


def _predict(photos: Photos, predictor: Model, names: list[str], folder: Path, config: PredictConfig) -> None:
    """Write the files and records of all images, in chunks; skip chunks whose records exist."""
    todo, total = iter(photos), None if photos.in_shards else len(photos.entries)
    done = len([*(folder / _CHUNKS).glob("*.jsonl")]) * _CHUNK
    with count(total, "predict", "image", min(done, total or done)) as progress:
        for number, chunk in enumerate(iter(lambda: list(islice(todo, _CHUNK)), [])):
            file = folder / _CHUNKS / f"{number:08d}.jsonl"
            if file.is_file():
                continue
            records = []
            for photo in chunk:
                records.append(_record(photo, predictor, names, folder, config))
                progress.update()
            write_atomically(file, "".join(f"{json.dumps(record)}\n" for record in records))


def _record(photo: Photo | str, predictor: Model, names: list[str], folder: Path, config: PredictConfig) -> Record:
    if isinstance(photo, str):
        return {"bad": photo}
    data = photo.read() if photo.remote else None  # an error there is an outage or a full cache: the same command continues
    try:
        image = to_rgb(turn_upright(decode_image(photo.read() if data is None else data)))
    except (OSError, ValueError) as error:
        return {"bad": f"{photo.file_name}: {getattr(error, 'strerror', None) or error}"}
    prediction = predictor(image, names, config.quality)
    write_atomically(folder / LABELS / f"{photo.name}.png", png(palette_image(prediction.labels, len(names))))
    if config.overlays:
        write_atomically(folder / OVERLAYS / f"{photo.name}.jpg", encode_jpeg(overlay(image, prediction), _JPEG_QUALITY))
    return record_of(photo, prediction.labels)


class _Record(BaseModel):
    bad: str = ""
    file_name: str = ""
    uri: str = ""
    width: int = 0
    height: int = 0
    annotations: list[dict[str, Any]] = []


def _read(files: Sequence[Path]) -> Iterator[Record]:
    for file in files:
        with file.open(encoding="utf-8") as lines:
            yield from (parse_json(line, str(file), _Record) for line in lines)


def _finish(stage: Stage, names: list[str], config: PredictConfig, files: list[Path]) -> Metrics:
    """Write the files about all images from files of records, and finish the stage."""
    bad, good, records = BadSamples("predict", config.max_bad_share), 0, partial(_read, files)
    for record in records():
        if reason := record.get("bad"):
            bad.found.append(reason)
        else:
            good += 1
    bad.check(good + len(bad.found))
    if not good:
        raise ValueError("predict: none of the images can be used")
    if config.part:
        with (stage.folder / RECORDS).open("wb") as joined:
            for file in files:
                joined.write(file.read_bytes())
    else:
        write_coco(stage.folder / COCO, names, records)
        if config.label_studio:
            write_label_studio(stage.folder / TASKS, names, records)
        if bad.found:
            write_json(stage.folder / BAD, bad.found)
    shutil.rmtree(stage.folder / _CHUNKS, ignore_errors=True)
    return stage.finish({"images": float(good), "bad_images": float(len(bad.found))}, files=[COCO, RECORDS])
