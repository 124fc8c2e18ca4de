"""A trained model, a labelled set and their evaluation."""

import re
import signal
from dataclasses import dataclass, field
from pathlib import Path

import mlflow
import numpy as np
import pytest

from helpers import tiny
from pixelclip.config import EvaluateConfig
from pixelclip.data.labelled_images import LabelledSet

CONFIG = EvaluateConfig(name="set", device="cpu", batch_size=2, pictures=2)


def with_settings(**settings) -> EvaluateConfig:
    return EvaluateConfig(**(CONFIG.model_dump() | settings))


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """Create a folder with a CLIP, an untrained model, a changed model and a labelled set."""
    base = tmp_path_factory.mktemp("made")
    clip = tiny.clip_folder(base / "clip")
    tiny.model_folder(base / "untrained", clip)
    tiny.model_folder(base / "changed", clip, change=0.05)
    tiny.labelled_set(base / "labelled")
    return base


@pytest.fixture
def client(monkeypatch, tmp_path) -> mlflow.MlflowClient:
    return tiny.mlflow_at(monkeypatch, tmp_path / "mlflow")


def naive_iou(truths: list[np.ndarray], predictions: list[np.ndarray], classes: int) -> list[float | None]:
    """Compute the IoU of every class pixel by pixel; None for a class without labelled pixels."""
    pairs = [
        (t, f)
        for truth, predicted in zip(truths, predictions, strict=True)
        for t, f in zip(truth.flat, predicted.flat, strict=True)
    ]
    pairs = [(t, f) for t, f in pairs if t != 255]
    result = []
    for k in range(classes):
        both, either = sum(t == k == f for t, f in pairs), sum(k in (t, f) for t, f in pairs)
        result.append(both / either if any(t == k for t, _ in pairs) else None)
    return result


RESULT = (
    *("confusion.json", "metrics.json", "per_class.json", "protocol.json", "table.txt", "report.html"),
    *("confusion.png", "segmentations.jpg"),
)


def result(out: Path) -> dict[str, bytes]:
    assert sorted(path.name for path in out.iterdir()) == sorted([*RESULT, "provenance.json", "run.json"])
    files = {name: (out / name).read_bytes() for name in RESULT}
    of_this_run = rb"<td>(written|MLflow run|model)</td>.*?</tr>"
    files["report.html"] = re.sub(of_this_run, b"", files["report.html"])
    return files


class KilledError(Exception):
    pass


@dataclass
class Reads:
    """Indices of the images read; reading index `kill_at` kills the stage, or sends it the signal."""

    kill_at: int = -1
    signal: int = 0
    seen: list[int] = field(default_factory=list)


@pytest.fixture
def reads(monkeypatch) -> Reads:
    read, reads = LabelledSet.read, Reads()

    def watched(self, index):
        if index == reads.kill_at:
            if not reads.signal:
                raise KilledError
            signal.raise_signal(reads.signal)
        reads.seen.append(index)
        return read(self, index)

    monkeypatch.setattr(LabelledSet, "read", watched)
    return reads


@pytest.fixture(scope="module")
def seven(made) -> Path:
    """Create seven images, of which the second is unreadable."""
    labelled = tiny.labelled_set(made / "seven", images=7)
    (labelled / "images" / "1.png").write_bytes(b"no image")
    return labelled
