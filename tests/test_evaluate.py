"""Metrics against naive loops and closed forms; the stage against the Predictor: all protocols, resume, two processes."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from helpers import evaluations, tiny, two_ranks
from helpers.evaluations import CONFIG, KilledError, Reads, naive_iou, result, with_settings
from helpers.fake_data import annotation, encoded, write_files
from pixelclip import evaluate as stage
from pixelclip import evaluate_clip
from pixelclip.config import EvaluateConfig
from pixelclip.data.labelled_sets import KINDS, open_folder
from pixelclip.data.tensors import normalise, resize_square, to_tensor
from pixelclip.distributed import ProcessGroup
from pixelclip.evaluate import run
from pixelclip.evaluation.confusion import CLIP, OURS, ConfusionMatrix, count_recalled
from pixelclip.evaluation.evaluator import compute_metrics, evaluate_towers
from pixelclip.inference.predictor import Predictor
from pixelclip.inference.scores import class_scores
from pixelclip.mask_generators.felzenszwalb import felzenszwalb
from pixelclip.models.backbone import Backbone
from pixelclip.models.checkpoint import backbone_of, load_clip, load_model
from pixelclip.models.text import TEMPLATES, TextTower, classifier
from pixelclip.settings import build
from pixelclip.storage.files import read_json
from pixelclip.workflow.termination import Terminated

client, made, reads, seven = evaluations.client, evaluations.made, evaluations.reads, evaluations.seven


def test_iou_and_accuracy_equal_a_naive_loop():
    random = np.random.default_rng(0)
    truths = [random.choice([0, 1, 2, 4, 255], (9, 11)).astype(np.uint8) for _ in range(3)]  # class 3 is never true
    predictions = [random.integers(0, 5, truth.shape) for truth in truths]
    confusion = ConfusionMatrix.zeros(5)
    for truth, predicted in zip(truths, predictions, strict=True):
        confusion.add(truth, predicted)
    expected = naive_iou(truths, predictions, 5)
    assert expected[3] is None and np.isnan(confusion.iou()[3])
    present = [value for value in expected if value is not None]
    np.testing.assert_allclose(confusion.iou()[[0, 1, 2, 4]], present)
    assert confusion.miou() == pytest.approx(100 * sum(present) / 4)
    hits = sum(int(((t == f) & (t != 255)).sum()) for t, f in zip(truths, predictions, strict=True))
    assert confusion.pixel_accuracy() == pytest.approx(100 * hits / sum(int((t != 255).sum()) for t in truths))


def test_metrics_equal_closed_forms():
    half = ConfusionMatrix.zeros(2)
    half.add(np.array([[0, 0, 1, 1]]), np.array([[0, 1, 1, 1]]))  # IoU 1/2 and 2/3
    np.testing.assert_allclose(half.iou(), [1 / 2, 2 / 3])
    assert half.miou() == pytest.approx(100 * 7 / 12)
    assert half.pixel_accuracy() == 75
    perfect = ConfusionMatrix.zeros(3)
    perfect.add(np.array([[0, 2, 255]]), np.array([[0, 2, 1]]))
    assert perfect.miou() == perfect.pixel_accuracy() == 100


def test_ignored_pixels_are_not_counted():
    confusion = ConfusionMatrix.zeros(2)
    confusion.add(np.full((2, 2), 255, np.uint8), np.ones((2, 2), int))
    assert not confusion.counts.any()


def test_recalled_classes_equal_hand_computed_counts():
    similarities = torch.tensor([[0.9, 0.1, 0.5], [0.1, 0.2, 0.3], [0.0, 0.0, 1.0]])
    present = [np.array([0, 1]), np.array([2]), np.array([], int)]  # {0, 2} contains 0; {2} contains 2; no class to recall
    assert count_recalled(similarities, present).tolist() == [2, 3]


def test_stage_agrees_with_the_predictor(made, client, tmp_path, capsys):
    out = tmp_path / "out"
    metrics = run(made / "changed", made / "labelled", out, CONFIG)

    truths = [np.asarray(Image.open(path)) for path in sorted((made / "labelled" / "labels").iterdir())]
    images = [Image.open(path) for path in sorted((made / "labelled" / "images").iterdir())]
    iou = {}
    for suffix, folder in (("", "changed"), ("_clip", "untrained")):
        predictor = Predictor.load(made / folder, "cpu")
        predictions = [predictor(image, tiny.CLASSES).labels for image in images]
        iou[suffix] = naive_iou(truths, predictions, 3)
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
    iou = {f"iou/{row['class'].partition(',')[0]}": row["iou"] for row in rows if row["iou"] is not None}
    recall = {"image_recall_clip": 100 * metrics["image_recall_clip/set"]}
    expected = {name: metrics[f"{name}/set"] for name in names} | recall | iou
    assert logged.data.metrics == pytest.approx({f"eval/set/{key}": value for key, value in expected.items()})
    assert logged.data.tags["mlflow.note.content"].startswith("# Model of this run, evaluated on set")
    assert logged.data.params["evaluate.templates"] == "ensemble"
    assert logged.data.tags["labelled.set.md5"] == read_json(out / "provenance.json")["inputs"]["labelled"]["md5"]
    assert {file.path for file in client.list_artifacts(logged.info.run_id)} >= {
        "report.html",
        "per_class.json",
        "confusion.png",
        "segmentations.jpg",
        "images",
    }

    assert run(made / "changed", made / "labelled", out, CONFIG) == metrics
    assert "evaluate: reused" in capsys.readouterr().out


def best_miou(made, folder):
    """The mIoU of the Predictor with quality=best, by a naive loop."""
    predictor = Predictor.load(made / folder, "cpu")
    truths = [np.asarray(Image.open(path)) for path in sorted((made / "labelled" / "labels").iterdir())]
    images = [Image.open(path) for path in sorted((made / "labelled" / "images").iterdir())]
    iou = naive_iou(truths, [predictor(image, tiny.CLASSES, "best").labels for image in images], 3)
    return pytest.approx(100 * (iou[0] + iou[1]) / 2)


def test_best_is_evaluated_beside_the_plain_metrics_and_agrees_with_the_predictor(made, client, tmp_path):
    plain = run(made / "changed", made / "labelled", tmp_path / "plain", CONFIG)
    with_best = with_settings(best=True)
    metrics = run(made / "changed", made / "labelled", tmp_path / "best", with_best)
    assert metrics["miou/set.best"] == best_miou(made, "changed")
    assert metrics["miou_clip/set.best"] == best_miou(made, "untrained")
    assert metrics["gain/set.best"] == metrics["miou/set.best"] - metrics["miou_clip/set.best"]
    assert {name: metrics[name] for name in plain} == plain
    report = (tmp_path / "best" / "report.html").read_text()
    assert report.count("<figcaption>PixelCLIP best</figcaption>") == with_best.pictures


def test_best_of_a_reused_clip_evaluation_is_that_of_a_fresh_one(made, client, tmp_path):
    config = with_settings(best=True)
    fresh = run(made / "changed", made / "labelled", tmp_path / "fresh", config)
    evaluate_clip.run(str(made / "clip"), made / "labelled", tmp_path / "clip", config, tiny.SIDE, "cls")
    assert run(made / "changed", made / "labelled", tmp_path / "reused", config, tmp_path / "clip") == fresh


def test_masks_that_the_protocol_does_not_use_are_not_read(made, client, tmp_path):
    plain = run(made / "changed", made / "labelled", tmp_path / "plain", CONFIG)
    unused = with_settings(masks="given", masks_folder=str(tmp_path / "nowhere"))
    assert run(made / "changed", made / "labelled", tmp_path / "unused", unused) == plain


def test_refinement_alone_is_named_by_its_settings(made, client, tmp_path):
    metrics = run(made / "changed", made / "labelled", tmp_path / "out", with_settings(pamr_iterations=2, scales=[1.5]))
    assert not any(name.endswith("/set") for name in metrics)
    protocol = read_json(tmp_path / "out" / "protocol.json")
    assert "miou/set." + protocol["refinement"] in metrics
    assert all(word in json.dumps(protocol) for word in ("pamr", "scales", "1.5"))


def test_untrained_model_has_zero_gain(made, client, tmp_path):
    metrics = run(made / "untrained", made / "labelled", tmp_path / "out", CONFIG)
    assert metrics["gain/set"] == 0
    assert metrics["pixel_accuracy/set"] == metrics["pixel_accuracy_clip/set"]


def evaluate_both(
    made: Path, labelled: Path, config: EvaluateConfig, group: ProcessGroup, state: Path
) -> tuple[dict[str, float], int]:
    """Return the metrics of the changed model and its CLIP, and the number of examples."""
    model, clip, dataset = load_model(made / "changed"), load_clip(str(made / "clip")), open_folder(labelled)
    towers = {OURS: backbone_of(model), CLIP: Backbone(clip.model.visual)}
    classes = classifier(TextTower(clip.model).eval(), dataset.classes)
    settings = config.model_copy(update={"side": tiny.SIDE})
    evaluation = evaluate_towers(towers, clip, classes, dataset, settings, group, state)
    return compute_metrics(evaluation.counts, len(dataset), False, Path("labelled")), len(evaluation.examples)


def test_batch_size_does_not_change_metrics(made, tmp_path):
    metrics = [
        evaluate_both(made, made / "labelled", with_settings(batch_size=size), ProcessGroup(), tmp_path / str(size))[0]
        for size in (1, 3)
    ]
    assert metrics[0] == pytest.approx(metrics[1], abs=0.2)  # rounding may change a pixel's class


def test_bfloat16_metrics_are_close_and_recorded_in_the_protocol(made, client, tmp_path):
    exact, near = (
        run(made / "changed", made / "labelled", tmp_path / precision, CONFIG.model_copy(update={"precision": precision}))
        for precision in ("float32", "bfloat16")
    )
    assert near["pixel_accuracy/set"] == pytest.approx(exact["pixel_accuracy/set"], abs=3)
    assert "precision" not in read_json(tmp_path / "float32" / "protocol.json")
    assert read_json(tmp_path / "bfloat16" / "protocol.json")["precision"] == "bfloat16"


def test_clip_changed_after_training_is_rejected(made, client, tmp_path):
    clip = tiny.clip_folder(tmp_path / "clip")
    model = tiny.model_folder(tmp_path / "model", clip)
    tiny.clip_folder(clip, seed=1)
    with pytest.raises(ValueError, match=r"clip: is not the CLIP that .*model was trained from"):
        run(model, made / "labelled", tmp_path / "out", CONFIG)
    assert not (tmp_path / "out").exists()
    # A CLIP set explicitly is accepted.
    other = with_settings(clip=str(clip))
    assert run(model, made / "labelled", tmp_path / "out", other)["gain/set"] != 0


def test_different_clip_and_model_each_use_their_own_text_tower(made, client, tmp_path, monkeypatch):
    narrow = {
        "embed_dim": 48,
        "text_cfg": tiny.CLIP_CONFIG["text_cfg"] | {"width": 64},
    }  # image and text embeddings of a different width
    monkeypatch.setitem(tiny.CLIP_CONFIGS, "narrow", tiny.CLIP_CONFIG | narrow)
    other = tiny.clip_folder(tmp_path / "other", seed=3, kind="narrow")
    both, config = run(made / "changed", made / "labelled", tmp_path / "both", CONFIG), with_settings(clip=str(other))
    metrics = run(made / "changed", made / "labelled", tmp_path / "out", config)
    alone = evaluate_clip.run("", made / "labelled", tmp_path / "clip", config, tiny.SIDE, "cls")
    assert alone.items() <= metrics.items()
    assert {key: metrics[key] for key in ("miou/set", "pixel_accuracy/set")}.items() <= both.items()
    assert metrics["gain/set"] == metrics["miou/set"] - metrics["miou_clip/set"] != both["gain/set"]
    assert run(made / "changed", made / "labelled", tmp_path / "taken", config, tmp_path / "clip") == metrics
    assert result(tmp_path / "taken") == result(tmp_path / "out")


def test_side_below_the_patch_of_a_different_clip_is_rejected_early(made, client, tmp_path, monkeypatch):
    coarse = {"vision_cfg": tiny.CLIP_CONFIG["vision_cfg"] | {"image_size": 64, "patch_size": 64}}
    monkeypatch.setitem(tiny.CLIP_CONFIGS, "coarse", tiny.CLIP_CONFIG | coarse)
    other = tiny.clip_folder(tmp_path / "other", kind="coarse")
    with pytest.raises(ValueError, match=r"evaluate\.side 48 is smaller than one patch"):
        run(made / "changed", made / "labelled", tmp_path / "out", with_settings(clip=str(other)))


def test_label_map_without_an_image_fails_or_is_reported(made, client, tmp_path, capsys):
    labelled = tiny.labelled_set(tmp_path / "labelled", images=4)
    (labelled / "images" / "1.png").rename(labelled / "images" / "1.heic")
    with pytest.raises(ValueError, match=r"labels/1\.png: label map without an image"):
        run(made / "changed", labelled, tmp_path / "out", CONFIG)
    assert run(made / "changed", labelled, tmp_path / "out", with_settings(max_bad_share=0.25))["images/set"] == 3
    assert "labels/1.png: label map without an image" in capsys.readouterr().out


def test_class_that_never_occurs_is_a_warning(made, client, tmp_path, capsys):
    labelled = tiny.labelled_set(tmp_path / "labelled", images=2, classes=["sky", "grass"])
    run(made / "changed", labelled, tmp_path / "out", CONFIG)
    warning = "evaluate: WARNING: 1 of 2 classes never occurs in the label maps: grass"
    reason = "; if the maps hold 0 and 255 (which is ignored), write 1 for the second class"
    assert warning + reason in capsys.readouterr().out
    labels = np.tile(np.arange(2, dtype=np.uint8), (20, 20))
    Image.fromarray(labels).save(labelled / "labels" / "0.png")
    run(made / "changed", labelled, tmp_path / "both", CONFIG)
    assert "never occur" not in capsys.readouterr().out


def test_bad_image_fails_or_is_skipped_and_reported(made, client, tmp_path, capsys):
    labelled = tiny.labelled_set(tmp_path / "labelled", images=4)
    (labelled / "images" / "1.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"images/1\.png"):
        run(made / "changed", labelled, tmp_path / "out", CONFIG)
    tolerant = with_settings(max_bad_share=0.5)
    assert run(made / "changed", labelled, tmp_path / "out", tolerant)["images/set"] == 3
    assert "1.png" in capsys.readouterr().out


def test_only_unreadable_images_are_reported_as_such(made, client, tmp_path, capsys):
    labelled = tiny.labelled_set(tmp_path / "labelled", images=2)
    for image in (labelled / "images").iterdir():
        image.write_bytes(b"no image")
    with pytest.raises(ValueError, match="labelled: none of the 2 images could be evaluated, for the reasons above"):
        run(made / "changed", labelled, tmp_path / "out", with_settings(max_bad_share=1.0))
    assert "0.png" in capsys.readouterr().out


def test_set_without_labelled_pixels_is_rejected(made, client, tmp_path):
    labelled = tiny.labelled_set(tmp_path / "labelled", images=1)
    Image.fromarray(np.full((20, 40), 255, np.uint8)).save(labelled / "labels" / "0.png")
    with pytest.raises(ValueError, match="labelled: the label maps contain no labelled pixel"):
        run(made / "changed", labelled, tmp_path / "out", CONFIG)


def test_masks_without_labelled_pixels_are_rejected(made, client, tmp_path):
    labelled, ignored = tiny.labelled_set(tmp_path / "labelled", images=1), np.zeros((1, 20, 40), bool)
    ignored[:, :3] = True
    masks = write_files(tmp_path / "masks", {"0.json": annotation(ignored)})
    config = with_settings(protocol="masks", masks="given", masks_folder=str(masks))
    with pytest.raises(ValueError, match="labelled: no mask covers a labelled pixel"):
        run(made / "changed", labelled, tmp_path / "out", config)


def test_result_is_kept_if_the_tracking_store_fails_during_evaluation(made, client, tmp_path, monkeypatch, capsys):
    def evaluate_and_lose_store(*arguments):
        evaluation = evaluate_towers(*arguments)
        (tmp_path / "mlflow" / "mlflow.db").write_bytes(b"no database")
        return evaluation

    monkeypatch.setattr(stage, "evaluate_towers", evaluate_and_lose_store)
    monkeypatch.setattr("pixelclip.tracking.run._CLOSE_SECONDS", 0.5)
    metrics = run(made / "changed", made / "labelled", tmp_path / "out", CONFIG)
    assert json.loads((tmp_path / "out" / "metrics.json").read_text()) == metrics
    assert "Lost connection to MLflow" in capsys.readouterr().out


# Protocols, recomputed independently of the stage.


def read_set(folder: Path) -> tuple[list[Image.Image], list[np.ndarray]]:
    images, labels = ([Image.open(path) for path in sorted((folder / part).iterdir())] for part in ("images", "labels"))
    return images, [np.asarray(label) for label in labels]


def tower_and_classes(folder: Path):
    model = load_model(folder)
    text = TextTower(model.clip.model).eval()
    return backbone_of(model).eval(), classifier(text, list(tiny.CLASSES), TEMPLATES["ensemble"])


def tensor(image: Image.Image) -> torch.Tensor:
    return normalise(to_tensor(image), tiny.MEAN, tiny.STD)[None]


def upsample(x: torch.Tensor, size: tuple[int, ...]) -> torch.Tensor:
    return F.interpolate(x, size, mode="bilinear", align_corners=False)


def mean_iou(truths: list[np.ndarray], predictions: list[np.ndarray]) -> float:
    present = [value for value in naive_iou(truths, predictions, len(tiny.CLASSES)) if value is not None]
    return 100 * sum(present) / len(present)


@torch.no_grad()
def test_slide_protocol_equals_a_naive_loop(made, client, tmp_path):
    config = with_settings(protocol="slide", slide_side=40, crop=24, stride=10, feature_grid=5)
    metrics = run(made / "changed", made / "labelled", tmp_path / "out", config)
    images, truths = read_set(made / "labelled")
    for suffix, folder in (("", "changed"), ("_clip", "untrained")):
        tower, classes = tower_and_classes(made / folder)
        predictions = []
        for image, truth in zip(images, truths, strict=True):
            short = min(image.size)
            height, width = round(image.height * 40 / short), round(image.width * 40 / short)
            pixels = upsample(tensor(image), (height, width))
            total, times = torch.zeros(1, 3, height, width), torch.zeros(height, width)
            for y in sorted({*range(0, height - 24, 10), height - 24}):
                for x in sorted({*range(0, width - 24, 10), width - 24}):
                    window = (..., slice(y, y + 24), slice(x, x + 24))
                    total[window] += upsample(class_scores(tower, pixels[window], classes, 5), (24, 24))
                    times[window] += 1
            predictions.append(upsample(total / times, truth.shape)[0].argmax(dim=0).numpy())
        assert metrics[f"miou{suffix}/set.slide"] == pytest.approx(
            mean_iou(truths, predictions), abs=0.1
        )  # rounding may change a pixel's class
    assert metrics["gain/set.slide"] != 0


@torch.no_grad()
@pytest.mark.parametrize("source", ["truth", "felzenszwalb", "given"])
def test_masks_protocol_equals_a_naive_loop(made, client, tmp_path, source):
    images, truths = read_set(made / "labelled")
    settings = {}
    if source == "truth":
        masks = [[truth == k for k in range(3) if (truth == k).any()] for truth in truths]
    elif source == "felzenszwalb":
        settings = {"felzenszwalb_scale": 20.0, "felzenszwalb_sigma": 0.5, "felzenszwalb_min_size": 30}
        segments = [felzenszwalb(image, 20.0, 0.5, 30) for image in images]
        masks = [[labels == k for k in range(labels.max() + 1)] for labels in segments]
        assert min(map(len, masks)) > 2
    else:
        masks = [[y < 9, x < 11, x + y < 6] for y, x in (np.indices(truth.shape) for truth in truths)]
        settings = {"masks_folder": str(tmp_path)}
        write_files(tmp_path, {f"{i}.json": annotation(np.array(image_masks)) for i, image_masks in enumerate(masks)})
    config = with_settings(protocol="masks", masks=source, **settings)
    metrics = run(made / "changed", made / "labelled", tmp_path / "out", config)

    for suffix, folder in (("", "changed"), ("_clip", "untrained")):
        tower, classes = tower_and_classes(made / folder)
        predictions, right = [], []
        for image, truth, chosen in zip(images, truths, masks, strict=True):
            features = upsample(tower(resize_square(tensor(image), tiny.SIDE)), truth.shape)[0]
            painted = np.full(truth.shape, 3)
            for mask in sorted(chosen, key=lambda mask: -mask.sum()):
                name = int((classes @ features[:, torch.from_numpy(mask)].mean(dim=1)).argmax())
                painted[mask] = name
                votes = truth[mask & (truth != 255)].tolist()
                right += [name == max(sorted(set(votes)), key=votes.count)] if votes else []
            predictions.append(painted)
        name = "set.masks" if source == "truth" else f"set.masks-{source}"
        assert metrics[f"miou{suffix}/{name}"] == pytest.approx(mean_iou(truths, predictions))
        assert metrics[f"mask_accuracy{suffix}/{name}"] == pytest.approx(100 * sum(right) / len(right))
    if source == "given":
        assert any((predicted == 3).any() for predicted in predictions)  # pixels in no mask
    assert "mask acc." in (tmp_path / "out" / "table.txt").read_text()


def test_metrics_report_and_run_record_the_protocol(made, client, tmp_path):
    config = with_settings(protocol="masks", templates="single", name="")
    metrics = run(made / "changed", made / "labelled", tmp_path / "out", config)
    assert {name.partition("/")[2] for name in metrics} == {"labelled.masks"}
    protocol = read_json(tmp_path / "out" / "protocol.json")
    expected = {"name": "labelled", "kind": "folder", "protocol": "masks", "templates": "single", "side": 48, "masks": "truth"}
    assert {key: value for key, value in protocol.items() if value is not None} == expected
    assert {"feature_grid", "crop", "stride", "slide_side", "masks_folder", "felzenszwalb_scale"} < protocol.keys()
    settings = "kind folder, protocol masks, templates single, side 48, masks truth"
    assert (tmp_path / "out" / "table.txt").read_text().endswith(settings + "\n")
    page = (tmp_path / "out" / "report.html").read_text()
    assert "<h1>PixelCLIP on labelled.masks</h1>" in page and f"Protocol: {settings}." in page
    (logged,) = client.search_runs([client.get_experiment_by_name("pixelclip").experiment_id])
    assert {file.path for file in client.list_artifacts(logged.info.run_id)} == {"images", "labelled.masks", "lineage.json"}
    assert read_json(Path(client.download_artifacts(logged.info.run_id, "labelled.masks/protocol.json"))) == protocol


def test_benchmark_in_its_published_layout_is_evaluated(made, client, tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (2, 30, 40, 3), dtype=np.uint8)
    labels = np.random.default_rng(1).choice([0, 1, 2, 20, 255], (2, 30, 40)).astype(np.uint8)
    files = {"ImageSets/Segmentation/val.txt": b"a\nb\n", "JPEGImages/of_the_training.jpg": b"never read"}
    for name, pixels, label in zip("ab", noise, labels, strict=True):
        files |= {f"JPEGImages/{name}.jpg": encoded(pixels), f"SegmentationClass/{name}.png": encoded(label, "PNG")}
    write_files(tmp_path / "VOC2012", files)
    metrics = run(made / "changed", tmp_path / "VOC2012", tmp_path / "out", with_settings(kind="voc", name=""))
    assert metrics["images/voc"] == 2
    rows = {row["class"]: row["pixels"] for row in read_json(tmp_path / "out" / "per_class.json")}
    assert len(rows) == 20 and rows["aeroplane"] == (labels == 1).sum() and rows["boat"] == 0
    assert read_json(tmp_path / "out" / "provenance.json")["inputs"]["labelled"]["num_files"] == 4
    assert rows.keys() >= {"diningtable", "tvmonitor"} and read_json(tmp_path / "out" / "protocol.json")["names"] == "reference"
    clip, readable = tmp_path / "clip", with_settings(kind="voc", name="", names="readable")
    evaluate_clip.run(str(made / "clip"), tmp_path / "VOC2012", clip, readable, tiny.SIDE, "cls")
    with pytest.raises(ValueError, match=r"clip: .*: names is 'readable', expected 'reference'$"):
        run(made / "changed", tmp_path / "VOC2012", tmp_path / "new", with_settings(kind="voc", name=""), clip)
    run(made / "changed", tmp_path / "VOC2012", tmp_path / "readable", readable, clip)
    assert "tv, monitor" in (tmp_path / "readable" / "per_class.json").read_text()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stride": 337}, "stride 337 is larger than crop 336: windows would leave gaps"),
        ({"crop": 0}, "crop: .*greater than or equal to 1"),
        ({"protocol": "windows"}, "protocol: Input should be 'whole', 'slide' or 'masks'"),
        ({"masks": "given"}, "masks_folder is required for masks or segments given .*found masks_folder '', masks given"),
        (
            {"masks_folder": "there"},
            "masks_folder is required .* must be empty otherwise .*found masks_folder 'there', masks truth",
        ),
        ({"masks": "sam"}, "masks: Input should be 'truth', 'felzenszwalb' or 'given'"),
        ({"kind": "coco"}, "kind: Input should be 'folder', 'coco-stuff'"),
        ({"checkpoint_every": 0}, "checkpoint_every: .*greater than or equal to 1"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_invalid_settings_are_rejected(settings, message):
    with pytest.raises(ValueError, match=f"here: {message}"):
        build(EvaluateConfig, settings, "here")


def test_every_kind_of_labelled_set_is_a_setting():
    assert EvaluateConfig.model_fields["kind"].annotation.__args__ == KINDS


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"side": 50}, r"evaluate\.side 50 is not a multiple of the patch size \(8\); nearest valid: 48, 56"),
        ({"protocol": "slide", "crop": 7, "stride": 7}, r"evaluate\.crop 7 is smaller than one patch"),
        ({"protocol": "slide", "slide_side": 7}, r"evaluate\.slide_side 7 is smaller than one patch"),
        ({"protocol": "masks", "masks": "given", "masks_folder": "nowhere"}, r"masks_folder nowhere: no such folder"),
        ({"protocol": "masks", "masks": "given", "masks_folder": "."}, r"0\.json: No such file"),
    ],
    ids=["side", "crop", "slide_side", "masks_folder", "a file of masks"],
)
def test_settings_incompatible_with_model_or_files_are_rejected(made, client, tmp_path, monkeypatch, settings, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        run(made / "changed", made / "labelled", tmp_path / "out", with_settings(**settings))


def test_given_masks_with_ambiguous_image_names_are_rejected(made, client, tmp_path):
    labelled = tiny.labelled_set(tmp_path / "labelled", images=1)
    for part in ("images", "labels"):
        (labelled / part / "sub").mkdir()
        (labelled / part / "sub" / "0.png").write_bytes((labelled / part / "0.png").read_bytes())
    config = with_settings(protocol="masks", masks="given", masks_folder=str(tmp_path))
    with pytest.raises(ValueError, match=r"two images are named 0: .*images/0\.png and .*sub/0\.png"):
        run(made / "changed", labelled, tmp_path / "out", config)


def test_folder_name_invalid_in_a_metric_is_rejected(made, client, tmp_path):
    labelled = tiny.labelled_set(tmp_path / "my+set", images=1)
    with pytest.raises(ValueError, match=r"'my\+set' is not a valid MLflow metric name .*set evaluate\.name"):
        run(made / "changed", labelled, tmp_path / "out", with_settings(name=""))


# Resume; several processes.


def kill_reading(index: int, reads: Reads, *arguments) -> None:
    reads.kill_at = index
    with pytest.raises(KilledError):
        run(*arguments)
    reads.kill_at = -1
    reads.seen.clear()


@pytest.mark.parametrize("protocol", ["whole", "slide", "masks"])
def test_interrupted_run_resumes_to_the_same_result(made, seven, client, tmp_path, capsys, reads, protocol):
    slide = {"crop": 24, "stride": 12} if protocol == "slide" else {}
    config = with_settings(protocol=protocol, max_bad_share=0.2, pictures=7, checkpoint_every=1, **slide)
    undisturbed = run(made / "changed", seven, tmp_path / "undisturbed", config)

    kill_reading(6, reads, made / "changed", seven, tmp_path / "out", config)
    assert not (tmp_path / "out").exists()
    capsys.readouterr()
    assert run(made / "changed", seven, tmp_path / "out", config) == undisturbed
    assert reads.seen == [5, 6]  # the last batch, of which one image had been read
    printed = capsys.readouterr().out
    assert "resumes after 5 images" in printed and "1 of 7 samples cannot be used" in printed
    assert result(tmp_path / "out") == result(tmp_path / "undisturbed")
    assert result(tmp_path / "out")["report.html"].count(b"<figure>") == 4 * 6


def test_signal_ends_the_evaluation_after_the_batch(made, seven, client, tmp_path, capsys, reads):
    config = with_settings(max_bad_share=0.2, pictures=7, batch_size=2)
    undisturbed = run(made / "changed", seven, tmp_path / "undisturbed", config)
    reads.kill_at, reads.signal = 3, signal.SIGTERM
    with pytest.raises(Terminated) as ended:
        run(made / "changed", seven, tmp_path / "out", config)
    assert ended.value.code == 143
    assert "evaluate: stopped by SIGTERM after 5 of 7 images; the same command continues" in capsys.readouterr().out
    reads.kill_at = -1
    reads.seen.clear()
    assert run(made / "changed", seven, tmp_path / "out", config) == undisturbed
    assert reads.seen == [5, 6]
    assert result(tmp_path / "out") == result(tmp_path / "undisturbed")
    assert {run.info.status for run in client.search_runs(["1"])} == {"FINISHED"}


@pytest.mark.parametrize("changed", [{"pictures": 3}, {"batch_size": 3}], ids=["pictures", "batch_size"])
def test_checkpoint_of_different_batches_or_examples_is_not_reused(made, client, tmp_path, capsys, reads, changed):
    config = with_settings(batch_size=1, checkpoint_every=1)
    kill_reading(2, reads, made / "changed", made / "labelled", tmp_path / "out", config)
    run(made / "changed", made / "labelled", tmp_path / "out", config.model_copy(update=changed))
    assert reads.seen == [0, 1, 2]
    assert "resumes after" not in capsys.readouterr().out
    run(made / "changed", made / "labelled", tmp_path / "undisturbed", config.model_copy(update=changed))
    assert result(tmp_path / "out") == result(tmp_path / "undisturbed")


class SecondOfTwo(ProcessGroup):
    """Rank 1 of 2; the counts of rank 0 are empty."""

    def all_reduce(self, values):
        return values

    def all_gather_object(self, value):
        return [value]

    def broadcast_object(self, value):
        return value


def test_interrupted_process_resumes_its_own_part(made, seven, tmp_path, reads):
    config, group = with_settings(max_bad_share=0.2, checkpoint_every=1, pictures=3), SecondOfTwo(1, 2)
    undisturbed = evaluate_both(made, seven, config, group, tmp_path / "undisturbed")
    assert reads.seen == [4, 5, 6]  # whole batches of two
    reads.kill_at = 6
    with pytest.raises(KilledError):
        evaluate_both(made, seven, config, group, tmp_path / "state")
    reads.kill_at, reads.seen = -1, []
    assert evaluate_both(made, seven, config, group, tmp_path / "state") == undisturbed
    assert reads.seen == [6]
    assert undisturbed[1] == 1


def test_two_processes_give_the_result_of_one(made, seven, client, tmp_path, reads):
    config = with_settings(max_bad_share=0.2, checkpoint_every=1, pictures=7)
    run(made / "changed", seven, tmp_path / "one", config)
    kill_reading(
        5, reads, made / "changed", seven, tmp_path / "two", config
    )  # two processes cannot resume this checkpoint of one
    settings = [f"{key}={value}" for key, value in config.model_dump(exclude_defaults=True).items()]
    words = ["evaluate", "--model", made / "changed", "--labelled", seven, "--out", tmp_path / "two", *settings]
    printed = two_ranks.start("pixelclip", *map(str, words), threads=torch.get_num_threads())
    assert "resumes after" not in printed
    assert printed.count("mIoU") == printed.count("1 of 7 samples cannot be used") == 1
    assert result(tmp_path / "two") == result(tmp_path / "one")
    assert not list(tmp_path.glob(".two*"))
    (logged,) = client.search_runs([client.get_experiment_by_name("pixelclip").experiment_id])
    written = read_json(tmp_path / "two" / "metrics.json")
    assert {key: logged.data.metrics[f"eval/set/{key}"] for key in ("miou", "images")} == {
        key: written[f"{key}/set"] for key in ("miou", "images")
    }


def test_several_sets_give_the_results_of_single_runs(made, client, tmp_path, capsys):
    other = tiny.labelled_set(tmp_path / "other", images=2, seed=5)
    sets = [str(made / "labelled"), str(other)]
    config = CONFIG.model_copy(update={"name": ""})
    metrics = stage.run_all(made / "changed", sets, tmp_path / "all", config)
    assert metrics == read_json(tmp_path / "all" / "metrics.json")
    names = {key.partition("/")[2] for key in metrics}
    assert names == {Path(sets[0]).name, "other"}
    alone = run(made / "changed", other, tmp_path / "alone", config)
    assert alone.items() <= metrics.items()
    assert "PixelCLIP" in capsys.readouterr().out
    with pytest.raises(ValueError, match="two labelled sets have the name 'other'"):
        stage.run_all(made / "changed", [str(other), str(other)], tmp_path / "twice", config)
    with pytest.raises(ValueError, match="is not voc as published"):
        stage.run_all(made / "changed", [f"voc:{other}"], tmp_path / "voc", config)


@pytest.mark.slow
def test_two_processes_evaluate_several_sets(made, seven, client, tmp_path):
    config = with_settings(max_bad_share=0.2, name="")
    sets = [str(seven), str(made / "labelled")]
    alone = stage.run_all(made / "changed", sets, tmp_path / "one", config)
    settings = [f"{key}={value}" for key, value in config.model_dump(exclude_defaults=True).items()]
    words = ["evaluate", "--model", made / "changed", "--out", tmp_path / "two", *settings]
    words += [word for folder in sets for word in ("--labelled", folder)]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "pixelclip"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*torchrun, *map(str, words)], env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert read_json(tmp_path / "two" / "metrics.json") == pytest.approx(alone)
