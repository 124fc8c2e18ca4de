"""report.html is complete, self-contained, and escapes class names."""

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from helpers import tiny
from pixelclip.storage.files import read_json
from pixelclip.visualization.pictures import Example
from pixelclip.visualization.report import write_report
from pixelclip.workflow.provenance import used_settings

CLASSES = ["<b>&", 'a "quoted" <script>alert(1)</script>', "sky"]
ROWS = [
    {"class": CLASSES[0], "iou": 40.0, "iou_clip": 20.0, "pixels": 7},
    {"class": CLASSES[1], "iou": None, "iou_clip": None, "pixels": 0},
    {"class": CLASSES[2], "iou": 60.0, "iou_clip": 50.0, "pixels": 9},
]
METRICS = {
    "miou/set": 50.0, "miou_clip/set": 35.0, "gain/set": 15.0, "pixel_accuracy/set": 61.0,
    "pixel_accuracy_clip/set": 42.0, "image_recall_clip/set": 0.5, "images/set": 2.0,
}  # fmt: skip


class Page(HTMLParser):
    """Parsed page: tags with their attributes, and the text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.source = path.read_text()
        self.feed(self.source)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data

    def pictures(self) -> list[Image.Image]:
        sources = [attributes["src"] for tag, attributes in self.tags if tag == "img"]
        assert all(source.startswith("data:image/jpeg;base64,") for source in sources)
        return [Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2], validate=True))) for source in sources]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    base = tmp_path_factory.mktemp("report")
    return tiny.model_folder(base / "model", tiny.clip_folder(base / "clip"))


LABELS = np.array([[0, 2], [255, 2]], np.uint8)
EXAMPLE = Example(Image.new("RGB", (20, 10), "red"), LABELS, LABELS, LABELS)


def report(path: Path, model: Path, words=((),), example: Example = EXAMPLE) -> Page:
    write_report(
        path,
        name="set",
        protocol="whole, side 144",
        metrics=METRICS,
        per_class=ROWS,
        examples=[example],
        classes=CLASSES,
        model=model,
        words=list(words),
        confusion={"classes": [CLASSES[0], "sky"], "counts": [[3, 1], [0, 9]]},
        run="r1 at sqlite:///mlflow.db",
    )
    return Page(path)


def test_report_loads_no_external_resource(model, tmp_path):
    page = report(tmp_path / "report.html", model)
    for tag, attributes in page.tags:
        assert tag not in ("script", "link", "iframe", "object")
        for name in ("src", "href", "srcset", "data", "poster"):
            assert attributes.get(name, "data:").startswith("data:"), (tag, attributes)
    assert not re.search(r"url\(|@import|https?://", page.source)


def test_report_starts_with_date_run_model_and_data(model, tmp_path):
    text = report(tmp_path / "report.html", model).text.partition("IoU per class")[0]
    md5 = read_json(model / "provenance.json")["output"]["md5"]
    assert re.search(r"written\s*20\d\d-\d\d-\d\d \d\d:\d\d UTC", text)
    assert all(fact in text for fact in ("r1 at sqlite:///mlflow.db", md5, "revision abc", f"/there/shards, md5 {'0' * 32}"))


def test_confusion_matrix_is_in_percent_of_each_true_class(model, tmp_path):
    page = report(tmp_path / "report.html", model)
    cells = [attributes["title"] for tag, attributes in page.tags if tag == "td" and "title" in attributes]
    assert cells == [f"{CLASSES[0]} as {CLASSES[0]}: 75.0 %", f"{CLASSES[0]} as sky: 25.0 %", f"sky as {CLASSES[0]}: 0.0 %",
                     "sky as sky: 100.0 %"]  # fmt: skip


def test_legend_names_the_unlabelled_colour(model, tmp_path):
    assert "unlabelled or ignored" in report(tmp_path / "a.html", model).text
    full = np.zeros((2, 2), np.uint8)
    example = Example(Image.new("RGB", (2, 2)), full, full, full)
    assert "unlabelled or ignored" not in report(tmp_path / "b.html", model, example=example).text


def test_settings_that_do_not_apply_are_left_out():
    stages = {"stage": "masks", "settings": {"generator": "sam", "sam_x": 1, "dino_x": 2, "seed": 0, "part": ""}, "inputs": {}}
    settings = {"dino": "", "dino_side": 9, "strong_view": False, "cutout_min": 0.1, "seed": 3}
    provenance = {"stage": "train", "settings": settings, "inputs": {"masks": {"provenance": stages}}}
    assert used_settings(provenance) == {
        "masks.generator": "sam", "masks.sam_x": 1, "train.strong_view": False, "train.seed": 3,
    }  # fmt: skip


def test_gain_of_nearly_zero_has_no_minus_sign(model, tmp_path, monkeypatch):
    monkeypatch.setitem(METRICS, "gain/set", -0.01)
    text = report(tmp_path / "report.html", model).text
    assert "+0.0" in text and "-0.0" not in text


def test_class_names_are_escaped(model, tmp_path):
    page = report(tmp_path / "report.html", model)
    assert "<b>&" not in page.source and "&lt;b&gt;&amp;" in page.source
    assert all(name in page.text for name in CLASSES)


def test_report_contains_metrics_pictures_and_settings(model, tmp_path):
    page = report(tmp_path / "report.html", model)
    assert all(text in page.text for text in ("50.0", "+15.0", "20.0 → 40.0", "not in this set", "train.steps", "given"))
    image, clip, ours, truth = page.pictures()
    assert image.size == clip.size == ours.size == truth.size == (320, 160)
    assert np.asarray(image).mean(axis=(0, 1)) == pytest.approx([254, 0, 0], abs=2)
    left, right = np.asarray(truth)[40, 80], np.asarray(truth)[40, 240]
    assert np.abs(left.astype(int) - right).max() > 50  # two classes, two colours
    assert np.asarray(truth)[120, 80].max() < 20  # ignored pixels are black


@pytest.mark.parametrize(("size", "shown"), [((1, 60_000), (1, 1280)), ((60_000, 1), (320, 1))])
def test_pictures_of_a_strip_are_bounded(model, tmp_path, size, shown):
    labels = np.zeros(size[::-1], np.uint8)
    page = report(tmp_path / "report.html", model, example=Example(Image.new("RGB", size), labels, labels, labels))
    assert {picture.size for picture in page.pictures()} == {shown}


def test_classes_are_sorted_by_iou_with_absent_ones_last(model, tmp_path):
    text = report(tmp_path / "report.html", model).text
    assert text.index("50.0 → 60.0") < text.index("20.0 → 40.0") < text.index("not in this set")


def test_curve_and_gallery_are_shown_if_the_model_has_them(tmp_path):
    model = tiny.model_folder(tmp_path / "model", tiny.clip_folder(tmp_path / "clip"))
    plain = report(tmp_path / "plain.html", model)
    assert "polyline" not in [tag for tag, _ in plain.tags] and "Training loss" not in plain.text

    points = [{"step": step, "time": 1, "metrics": {"train/loss": loss}} for step, loss in ((10, 2.0), (20, 1.0), (40, 0.5))]
    (model / "curves.jsonl").write_text("".join(json.dumps(point) + "\n" for point in points))
    sheet = Image.new("RGB", (16, 8), "blue")
    sheet.paste("red", (8, 0, 16, 8))
    sheet.save(model / "gallery.jpg", quality=95, subsampling=0)
    boxed = {"file": "gallery.jpg", "box": [8, 0, 16, 8], "cosine": 0.25}
    (model / "gallery").mkdir()
    Image.new("RGB", (8, 8), "blue").save(model / "gallery" / "0.jpg")
    best = [
        boxed,
        {"file": "gallery/0.jpg", "cosine": 0.22},
        {"file": "gallery/gone.jpg", "cosine": 0.2},
    ]  # two of pixelclip 0.2
    (model / "gallery.json").write_text(json.dumps([{"concept": 1, "masks": 4, "best": best}]))
    page = report(tmp_path / "full.html", model, words=([("no", 0.0)], [(CLASSES[0], 0.5), ("sky", 0.25)]))
    (curve,) = [attributes for tag, attributes in page.tags if tag == "polyline"]
    assert curve["points"] == "150.0,0.0 300.0,120.0 600.0,180.0"
    assert f"{CLASSES[0]}, sky" in page.text and "concept 1 · 4 masks · cosine 0.5" in page.text
    *_, red, blue = page.pictures()
    assert len(page.pictures()) == 4 + 2 and red.size == blue.size == (8, 8)
    assert red.getpixel((4, 4))[0] > 200 > 50 > red.getpixel((4, 4))[2] and blue.getpixel((4, 4))[2] > 200
