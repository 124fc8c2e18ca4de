"""Damaged inputs of every kind: the right result, a clean error, or valid other content, but no crash and no wrong result."""

import contextlib
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from helpers import faults, tiny
from helpers.fake_data import annotation, encoded, pixels, write_tar
from helpers.mutations import SURVIVED, Kind, count_outcomes
from helpers.samples import blobs
from pixelclip.config import STAGES, EvaluateConfig
from pixelclip.data.annotations import decode_masks, parse_annotation
from pixelclip.data.images import decode_image, to_rgb
from pixelclip.data.shard_format import index_shard, read_part
from pixelclip.evaluation.clip_baseline import COUNTS, MAPS, load_baseline
from pixelclip.evaluation.confusion import CLIP, EvaluationCounts, to_npz
from pixelclip.models.checkpoint import load_model
from pixelclip.settings import load_all
from pixelclip.tracking.journal import CURVES, RUN, Journal
from pixelclip.tracking.server import tracking_uri
from pixelclip.visualization import report
from pixelclip.workflow.provenance import flatten, tags
from pixelclip.workflow.stage import PROVENANCE, describe

SIZE = (32, 24)
TRIALS = [30, pytest.param(1000, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])]


def shards(folder: Path) -> Kind:
    """Tars have checksums of their headers only: a changed image or annotation is other content."""
    members = {}
    for number in range(3):
        members[f"{number}.jpg"] = encoded(pixels(SIZE[1], SIZE[0], number))
        members[f"{number}.json"] = annotation(blobs(SIZE[1], SIZE[0], 2, number))
    path = write_tar(folder / "0.tar", members)

    def read(data: bytes) -> Any:
        path.write_bytes(data)
        samples, bad = index_shard(path)
        found = {}
        for sample in samples:
            image = read_part(path, sample.image_offset, sample.image_size)
            masks = read_part(path, sample.json_offset, sample.json_size) if sample.json_size else b""
            found |= {f"{sample.key}.jpg": image} | ({f"{sample.key}.json": masks} if masks else {})
        if bad:
            assert found.items() <= truth(data).items(), "a sample beside the reported ones is wrong"
            raise ValueError(bad[0])
        return found

    def truth(data: bytes) -> Any:
        found = {}
        with contextlib.suppress(tarfile.ReadError), tarfile.open(fileobj=io.BytesIO(data), ignore_zeros=True) as tar:
            while member := tar.next():
                found |= {member.name: tar.extractfile(member).read()} if member.isfile() else {}
        return found

    return Kind(path.read_bytes(), read, truth)


def annotations(folder: Path) -> Kind:
    """RLE codes have no checksum: pycocotools decodes the same masks."""

    def read(data: bytes) -> Any:
        document, masks = parse_annotation(data, SIZE)
        return document, masks.sample(np.arange(SIZE[1]), np.arange(SIZE[0])).astype(np.uint8).tobytes()

    def truth(data: bytes) -> Any:
        document = json.loads(data)
        return document, decode_masks(document).transpose(2, 0, 1).tobytes()

    return Kind(annotation(blobs(SIZE[1], SIZE[0], 3)), read, truth)


def image(data: bytes) -> Any:
    found = to_rgb(decode_image(data))
    return found.size, found.tobytes()


def jpeg(folder: Path) -> Kind:
    """JPEG has no checksum: what Pillow decodes is other content."""

    def truth(data: bytes) -> Any:
        with Image.open(io.BytesIO(data)) as found:
            return found.size, found.convert("RGB").tobytes()

    return Kind(encoded(pixels(48, 64)), image, truth)


def png(folder: Path) -> Kind:
    """PNG has a checksum in every chunk."""
    return Kind(encoded(pixels(48, 64), "PNG"), image)


def params(folder: Path) -> Kind:
    """A setting that is gone has its default; any other has the value that its text has."""

    def read(data: bytes) -> Any:
        (folder / "params.yaml").write_bytes(data)
        return {stage: config.model_dump() for stage, config in load_all(folder / "params.yaml", {}).items()}

    def truth(data: bytes) -> Any:
        texts = yaml.load(data, yaml.BaseLoader) or {}
        found = {}
        for stage, kind in STAGES.items():
            found[stage] = kind().model_dump()
            for name, text in (texts.get(stage) or {}).items():
                default = found[stage][name]
                found[stage][name] = (
                    text.lower() in ("true", "t", "yes", "y", "on", "1") if isinstance(default, bool) else type(default)(text)
                )
        return found

    return Kind((Path(__file__).parents[2] / "params.yaml").read_bytes(), read, truth)


def provenance(folder: Path) -> Kind:
    """A valid entry with another value is other content: no reader could tell."""
    path = folder / "made" / PROVENANCE
    path.parent.mkdir()

    def read(data: bytes) -> Any:
        path.write_bytes(data)
        found = describe(path.parent)
        if "provenance" in found:
            tags(found["provenance"]), flatten(found["provenance"])
        return found

    def truth(data: bytes) -> Any:
        document = json.loads(data)
        return {"path": str(path.parent), **document["output"], "provenance": document}

    clip = tiny.clip_folder(folder / "clip")
    document = tiny.provenance(tiny.model_folder(folder / "model", clip), clip)
    return Kind(json.dumps(document, indent=2).encode(), read, truth)


POINTS = [{"step": step, "time": 10**12 + step, "metrics": {"train/loss": 1 / step, "speed": 2.0}} for step in (1, 2, 5)]


def journal(folder: Path) -> tuple[int, list[Any]]:
    found = Journal(None, folder, "r1")
    return found._num_delivered, found.points


def run_json(folder: Path) -> Kind:
    """Points that `run.json` does not count as delivered are compared with those of the server."""
    (folder / CURVES).write_text("".join(json.dumps(point) + "\n" for point in POINTS))

    def read(data: bytes) -> Any:
        (folder / RUN).write_bytes(data)
        return journal(folder)

    def truth(data: bytes) -> Any:
        state = json.loads(data)
        same = (state["run_id"], state["tracking_uri"]) == ("r1", tracking_uri())
        delivered = min(state["delivered"], len(POINTS)) if same else 0
        return delivered, POINTS[delivered:]

    state = {"run_id": "r1", "tracking_uri": tracking_uri(), "delivered": 1}
    return Kind(json.dumps(state, indent=2).encode(), read, truth)


def curves(folder: Path) -> Kind:
    """An incomplete last line was left by a killed process."""

    def read(data: bytes) -> Any:
        (folder / CURVES).write_bytes(data)
        (folder / RUN).unlink(missing_ok=True)
        _, points = journal(folder)
        report._curve(folder / CURVES)
        return points

    def truth(data: bytes) -> Any:
        return [json.loads(line) for line in data.split(b"\n")[:-1]]

    return Kind("".join(json.dumps(point) + "\n" for point in POINTS).encode(), read, truth)


def baseline(folder: Path, name: str) -> Kind:
    counts = EvaluationCounts.zeros([CLIP], 3, 5)
    counts.confusions[CLIP].counts += np.arange(12).reshape(3, 4)
    counts.save(folder / COUNTS)
    maps = {str(index): np.arange(20, dtype=np.uint16).reshape(4, 5) + index for index in (0, 3)}
    (folder / MAPS).write_bytes(to_npz(**maps))

    def read(data: bytes) -> Any:
        (folder / name).write_bytes(data)
        found, label_maps = load_baseline(folder, 3, EvaluateConfig())
        if label_maps.keys() != {0, 3}:
            raise ValueError("as evaluate does")
        arrays = {key: array.tolist() for key, array in found.arrays().items()}
        return arrays, found.next_index, found.bad_samples, {key: array.tolist() for key, array in label_maps.items()}

    return Kind((folder / name).read_bytes(), read)


def counts_npz(folder: Path) -> Kind:
    """Zip has checksums."""
    return baseline(folder, COUNTS)


def maps_npz(folder: Path) -> Kind:
    """Zip has checksums."""
    return baseline(folder, MAPS)


def model(folder: Path, name: str, seen: Callable[[Any], Any]) -> Kind:
    """The provenance has a checksum of both files."""
    tiny.model_folder(folder / "model", tiny.clip_folder(folder / "clip"))
    path = folder / "model" / name

    def read(data: bytes) -> Any:
        path.write_bytes(data)
        return seen(load_model(path.parent))

    return Kind(path.read_bytes(), read)


def weights(folder: Path) -> Kind:
    def seen(loaded: Any) -> Any:
        parts = {"clip": loaded.clip.model, "prompts": loaded.prompts}
        found = {f"{part}.{name}": tensor for part, each in parts.items() for name, tensor in each.state_dict().items()}
        return {name: tensor.numpy().tobytes() for name, tensor in found.items()}

    return model(folder, "model.safetensors", seen)


def config(folder: Path) -> Kind:
    def seen(loaded: Any) -> Any:
        return loaded.config, loaded.side, loaded.residual, loaded.clip.mean, loaded.clip.std

    return model(folder, "config.json", seen)


KINDS = {
    "shard (tar)": shards,
    "annotation JSON": annotations,
    "JPEG": jpeg,
    "PNG": png,
    "params.yaml": params,
    "provenance.json": provenance,
    "run.json": run_json,
    "curves.jsonl": curves,
    "counts.npz": counts_npz,
    "maps.npz": maps_npz,
    "model.safetensors": weights,
    "config.json": config,
}


@pytest.mark.parametrize("trials", TRIALS)
@pytest.mark.parametrize("name", KINDS)
def test_damaged_file_is_never_a_crash_or_a_wrong_result(tmp_path, monkeypatch, name, trials):
    tiny.mlflow_at(monkeypatch, tmp_path / "mlflow")
    folder = tmp_path / "kind"
    folder.mkdir()
    outcomes = count_outcomes(KINDS[name](folder), trials)
    survived = sum(outcomes[each] for each in SURVIVED)
    if trials >= 1000:
        counts = ", ".join(f"{outcomes[each]} {each}" for each in SURVIVED)
        faults.record(f"{name} damaged ({counts})", trials, survived)
    assert survived == trials, outcomes
