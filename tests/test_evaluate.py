"""Metrics against naive loops and closed forms; the stage on a tiny model against the Predictor."""

import json
from pathlib import Path

import mlflow
import numpy as np
import pytest
import tiny
import torch
from PIL import Image

from pixelclip import evaluate as stage
from pixelclip import tracking
from pixelclip.benchmarks import open_folder
from pixelclip.checkpoint import load_clip, load_model
from pixelclip.config import EvaluateConfig
from pixelclip.evaluate import Confusion, present_recall, run
from pixelclip.predict import Predictor
from pixelclip.storage import read_json

CONFIG = EvaluateConfig(name="set", device="cpu", batch_size=2, pictures=2)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A CLIP, an untrained model, a changed one, a labelled set."""
    base = tmp_path_factory.mktemp("made")
    clip = tiny.clip_folder(base / "clip")
    tiny.model_folder(base / "untrained", clip)
    tiny.model_folder(base / "changed", clip, change=0.05)
    tiny.labelled_set(base / "labelled")
    return base


@pytest.fixture
def client(monkeypatch, tmp_path) -> mlflow.MlflowClient:
    return tiny.mlflow_at(monkeypatch, tmp_path / "mlflow")


def naive_iou(truths: list[np.ndarray], founds: list[np.ndarray], classes: int) -> list[float | None]:
    """Pixel by pixel; None for a class that no truth holds."""
    pairs = [(t, f) for truth, found in zip(truths, founds, strict=True) for t, f in zip(truth.flat, found.flat, strict=True)]
    pairs = [(t, f) for t, f in pairs if t != 255]
    result = []
    for k in range(classes):
        both, either = sum(t == k == f for t, f in pairs), sum(k in (t, f) for t, f in pairs)
        result.append(both / either if any(t == k for t, _ in pairs) else None)
    return result


def test_iou_and_accuracy_are_those_of_a_naive_loop():
    random = np.random.default_rng(0)
    truths = [random.choice([0, 1, 2, 4, 255], (9, 11)).astype(np.uint8) for _ in range(3)]  # no truth of class 3
    founds = [random.integers(0, 5, truth.shape) for truth in truths]
    confusion = Confusion.zeros(5)
    for truth, found in zip(truths, founds, strict=True):
        confusion.add(truth, found)
    expected = naive_iou(truths, founds, 5)
    assert expected[3] is None and np.isnan(confusion.iou()[3])
    present = [value for value in expected if value is not None]
    np.testing.assert_allclose(confusion.iou()[[0, 1, 2, 4]], present)
    assert confusion.miou() == pytest.approx(100 * sum(present) / 4)
    hits = sum(int(((t == f) & (t != 255)).sum()) for t, f in zip(truths, founds, strict=True))
    assert confusion.pixel_accuracy() == pytest.approx(100 * hits / sum(int((t != 255).sum()) for t in truths))


def test_closed_forms():
    half = Confusion.zeros(2)
    half.add(np.array([[0, 0, 1, 1]]), np.array([[0, 1, 1, 1]]))  # IoU 1/2 and 2/3
    np.testing.assert_allclose(half.iou(), [1 / 2, 2 / 3])
    assert half.miou() == pytest.approx(100 * 7 / 12)
    assert half.pixel_accuracy() == 75
    perfect = Confusion.zeros(3)
    perfect.add(np.array([[0, 2, 255]]), np.array([[0, 2, 1]]))
    assert perfect.miou() == perfect.pixel_accuracy() == 100


def test_ignored_pixels_alone_change_nothing():
    confusion = Confusion.zeros(2)
    confusion.add(np.full((2, 2), 255, np.uint8), np.ones((2, 2), int))
    assert not confusion.counts.any()


def test_present_recall_by_hand():
    similarities = torch.tensor([[0.9, 0.1, 0.5], [0.1, 0.2, 0.3], [0.0, 0.0, 1.0]])
    present = [np.array([0, 1]), np.array([2]), np.array([], int)]  # {0, 2} holds 0; {2} holds 2; nothing to find
    assert present_recall(similarities, present) == pytest.approx(2 / 3)


def test_the_stage_agrees_with_the_predictor(made, client, tmp_path, capsys):
    out = tmp_path / "out"
    metrics = run(made / "changed", made / "labelled", out, CONFIG)

    truths = [np.asarray(Image.open(path)) for path in sorted((made / "labelled" / "labels").iterdir())]
    images = [Image.open(path) for path in sorted((made / "labelled" / "images").iterdir())]
    iou = {}
    for suffix, folder in (("", "changed"), ("_clip", "untrained")):
        predictor = Predictor.load(made / folder, "cpu")
        founds = [predictor(image, tiny.CLASSES).labels for image in images]
        iou[suffix] = naive_iou(truths, founds, 3)
        assert iou[suffix][2] is None  # "sky" is in no label map
        assert metrics[f"miou{suffix}/set"] == pytest.approx(100 * (iou[suffix][0] + iou[suffix][1]) / 2)
    assert metrics["gain/set"] == metrics["miou/set"] - metrics["miou_clip/set"] != 0
    assert metrics["images/set"] == 3
    assert 0 <= metrics["image_recall_clip/set"] <= 1
    names = ("miou", "miou_clip", "gain", "pixel_accuracy", "pixel_accuracy_clip", "image_recall_clip", "images")
    assert metrics.keys() == {f"{name}/set" for name in names}
    assert read_json(out / "metrics.json") == metrics

    rows = read_json(out / "per_class.json")
    assert [row["class"] for row in rows] == list(tiny.CLASSES)
    assert rows[2] == {"class": "sky", "iou": None, "iou_clip": None, "pixels": 0}
    assert rows[0]["iou"] == pytest.approx(100 * iou[""][0], abs=1e-3)
    assert sum(row["pixels"] for row in rows) == sum(int((truth != 255).sum()) for truth in truths)
    assert f"{metrics['miou/set']:.1f}" in capsys.readouterr().out
    assert (out / "report.html").read_text().count("<figure>") == 4 * CONFIG.pictures

    (logged,) = client.search_runs([client.get_experiment_by_name("pixelclip").experiment_id])
    assert logged.data.metrics == metrics
    assert logged.data.params["evaluate.templates"] == "ensemble"
    assert logged.data.tags["labelled.set.md5"] == read_json(out / "provenance.json")["inputs"]["labelled"]["md5"]
    assert {file.path for file in client.list_artifacts(logged.info.run_id)} >= {"report.html", "per_class.json"}

    assert run(made / "changed", made / "labelled", out, CONFIG) == metrics
    assert "evaluate: reused" in capsys.readouterr().out


def test_an_untrained_model_gains_exactly_nothing(made, client, tmp_path):
    metrics = run(made / "untrained", made / "labelled", tmp_path / "out", CONFIG)
    assert metrics["gain/set"] == 0
    assert metrics["pixel_accuracy/set"] == metrics["pixel_accuracy_clip/set"]


def test_the_batch_size_changes_nothing(made):
    model, clip, labelled = load_model(made / "changed"), load_clip(str(made / "clip")), open_folder(made / "labelled")
    found = [
        stage.measure(model, clip, labelled, CONFIG.model_copy(update={"batch_size": size}), torch.device("cpu")).metrics
        for size in (1, 3)
    ]
    assert found[0] == pytest.approx(found[1], abs=0.2)  # a pixel may fall the other way by rounding


def test_a_clip_that_was_changed_since_the_training_is_refused(made, client, tmp_path):
    clip = tiny.clip_folder(tmp_path / "clip")
    model = tiny.model_folder(tmp_path / "model", clip)
    tiny.clip_folder(clip, seed=1)
    with pytest.raises(ValueError, match=r"clip: is not the CLIP that .*model was trained from"):
        run(model, made / "labelled", tmp_path / "out", CONFIG)
    assert not (tmp_path / "out").exists()
    # Named on purpose, another CLIP is measured.
    other = CONFIG.model_copy(update={"clip": str(clip)})
    assert run(model, made / "labelled", tmp_path / "out", other)["gain/set"] != 0


def test_a_bad_image_stops_or_is_left_out_and_named(made, client, tmp_path, capsys):
    labelled = tiny.labelled_set(tmp_path / "labelled", images=4)
    (labelled / "images" / "1.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"images/1\.png"):
        run(made / "changed", labelled, tmp_path / "out", CONFIG)
    tolerant = CONFIG.model_copy(update={"max_bad_share": 0.5})
    assert run(made / "changed", labelled, tmp_path / "out", tolerant)["images/set"] == 3
    assert "1.png" in capsys.readouterr().out


def test_only_ignored_pixels(made, client, tmp_path):
    labelled = tiny.labelled_set(tmp_path / "labelled", images=1)
    Image.fromarray(np.full((20, 40), 255, np.uint8)).save(labelled / "labels" / "0.png")
    with pytest.raises(ValueError, match="no labelled pixel"):
        run(made / "changed", labelled, tmp_path / "out", CONFIG)


def test_a_tracking_store_lost_while_measuring_costs_no_result(made, client, tmp_path, monkeypatch, capsys):
    def then_lose(*arguments):
        result = measure(*arguments)
        (tmp_path / "mlflow" / "mlflow.db").write_bytes(b"no database")
        return result

    measure = stage.measure
    monkeypatch.setattr(stage, "measure", then_lose)
    monkeypatch.setattr(tracking, "_CLOSE_SECONDS", 0.5)
    metrics = run(made / "changed", made / "labelled", tmp_path / "out", CONFIG)
    assert json.loads((tmp_path / "out" / "metrics.json").read_text()) == metrics
    assert "is lost" in capsys.readouterr().out
