"""The model card contains the facts of model and evaluation, and no path of the machine."""

from pathlib import Path

import pytest

from helpers import tiny
from helpers.registrations import evaluation_of
from pixelclip.registry.model_card import model_card
from pixelclip.storage.files import write_json
from pixelclip.workflow.stage import describe

METRICS = {"miou/set": 44.46, "miou_clip/set": 29.75, "gain/set": 14.71, "images/set": 200.0}
ROWS = [
    {"class": "sky", "iou": 54.0, "iou_clip": 18.0, "pixels": 5},
    {"class": "a|b <i>", "iou": 20.0, "iou_clip": 24.5, "pixels": 5},
    {"class": "sun", "iou": None, "iou_clip": None, "pixels": 0},
]


@pytest.fixture
def model(tmp_path) -> Path:
    return tiny.model_folder(tmp_path / "model", tiny.clip_folder(tmp_path / "clip"))


def measured(folder: Path, model: Path, rows: list[dict[str, object]]) -> Path:
    write_json(evaluation_of(folder, model, METRICS) / "per_class.json", rows)
    return folder


def test_card_has_scores_usage_data_limits_and_settings(model, tmp_path):
    card = model_card(model, measured(tmp_path / "e", model, ROWS), name="demo", uri="models:/demo/3", picture="a.jpg")
    assert card.startswith("# demo\n")
    for line in (
        "| mIoU (%) | 29.8 | 44.5 |",
        "| gain in mIoU (points) |  | +14.7 |",
        "| sky | 18.0 | 54.0 | +36.0 |",
        "| a&#124;b &lt;i> | 24.5 | 20.0 | -4.5 |",
        f"| shards (read by masks) | shards | 1 | `{'0' * 32}` |",
        f"| clip (read by train) | clip | 2 | `{describe(tmp_path / 'clip')['md5']}` |",
        "- It is worse than CLIP on 1 class, the worst first: a&#124;b &lt;i>.",
        "- masks: generator=given",
        "- train: clip=clip, steps=3",
    ):
        assert line in card.splitlines(), line
    assert "On `set`, 200 images" in card and "--model models:/demo/3 " in card and "](a.jpg)" in card
    assert "Licence of the weights: not stated." in card
    assert "sun" not in card and str(tmp_path) not in card and "/there" not in card


def test_card_without_evaluation_says_that_the_model_is_unmeasured(model):
    card = model_card(model)
    assert "unmeasured" in card and "mIoU" not in card and "--model model " in card


def test_card_of_a_hundred_classes_stays_short(model, tmp_path):
    rows = [{"class": f"{i} " + "x" * 90, "iou": 50.0, "iou_clip": float(i), "pixels": 1} for i in range(100)]
    card = model_card(model, measured(tmp_path / "e", model, rows))
    assert len(card) < 5000 and "of 100 classes the 10 with the largest and with the smallest gain" in card
    shown = [int(line.split()[1]) for line in card.splitlines() if "xx |" in line]
    assert shown == [*range(10), *range(90, 100)]


def test_damaged_classes_are_an_error(model, tmp_path):
    folder = measured(tmp_path / "e", model, [{"class": "sky", "iou": "54"}])
    with pytest.raises(ValueError, match=r"per_class\.json: 0\.iou: "):
        model_card(model, folder)
