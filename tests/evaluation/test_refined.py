"""Evaluation of refined predictions against the Predictor; plain metrics do not change."""

import numpy as np
import pytest
from PIL import Image

from helpers import evaluations, tiny
from helpers.evaluations import CONFIG, naive_iou, with_settings
from pixelclip import evaluate_clip
from pixelclip.config import EvaluateConfig
from pixelclip.evaluate import run
from pixelclip.evaluation.protocol import metric_label, protocol_of, read_protocol
from pixelclip.inference.predictor import Predictor
from pixelclip.storage.files import read_json

client, made = evaluations.client, evaluations.made


def test_best_is_measured_beside_the_single_pass_and_agrees_with_the_predictor(made, client, tmp_path):
    labelled = made / "labelled"
    plain = run(made / "changed", labelled, tmp_path / "plain", CONFIG)
    both = run(made / "changed", labelled, tmp_path / "both", with_settings(best=True))
    assert {key: both[key] for key in plain} == plain
    kinds = ("miou", "miou_clip", "gain", "pixel_accuracy", "pixel_accuracy_clip")
    assert both.keys() - plain.keys() == {f"{kind}/set.best" for kind in kinds}
    truths = [np.asarray(Image.open(path)) for path in sorted((labelled / "labels").iterdir())]
    images = [Image.open(path) for path in sorted((labelled / "images").iterdir())]
    for suffix, folder in (("", "changed"), ("_clip", "untrained")):
        predictor = Predictor.load(made / folder, "cpu")
        iou = naive_iou(truths, [predictor(image, tiny.CLASSES, "best").labels for image in images], 3)
        assert both[f"miou{suffix}/set.best"] == pytest.approx(100 * (iou[0] + iou[1]) / 2)
    assert "scales [1.25, 1.75]" in read_protocol(tmp_path / "both")["best"]
    assert read_protocol(tmp_path / "plain").keys() == read_protocol(tmp_path / "both").keys() - {"best", "window"}
    page = (tmp_path / "both" / "report.html").read_text()
    assert page.count("<figure>") == 5 * CONFIG.pictures
    assert page.count("PixelCLIP best</figcaption>") == CONFIG.pictures
    assert read_json(tmp_path / "plain" / "per_class.json") == read_json(tmp_path / "both" / "per_class.json")


def test_saved_clip_gives_the_same_metrics(made, client, tmp_path):
    config, labelled = with_settings(best=True), made / "labelled"
    expected = run(made / "changed", labelled, tmp_path / "one", config)
    clip = tmp_path / "clip"
    found = evaluate_clip.run(str(made / "clip"), labelled, clip, config, tiny.SIDE, "cls")
    assert found["miou_clip/set.best"] == expected["miou_clip/set.best"]
    assert run(made / "changed", labelled, tmp_path / "two", config, clip) == expected
    with pytest.raises(ValueError, match="does not match the evaluation of the model: best is"):
        run(made / "changed", labelled, tmp_path / "three", CONFIG, clip)


def test_refined_metrics_have_a_name_of_their_own():
    config = EvaluateConfig(name="set", scales=[1.5], pamr_iterations=10, window=32)
    protocol = protocol_of(config)
    assert metric_label(protocol) == "set.scales-pamr"
    assert "pamr_iterations 10" in protocol["refined"]
    assert metric_label(protocol_of(EvaluateConfig(name="set", best=True))) == "set"
    assert not {"refinement", "refined", "best", "window"} & protocol_of(EvaluateConfig(name="set")).keys()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"best": True, "protocol": "slide"}, "need protocol whole"),
        ({"flip": True, "protocol": "masks"}, "need protocol whole"),
        ({"best": True, "flip": True}, "set it without others"),
        ({"segments": "given"}, "masks_folder is required"),
        ({"scales": [0.5]}, "greater than or equal to 1"),
    ],
)
def test_settings_that_do_not_fit_are_rejected(settings, message):
    with pytest.raises(ValueError, match=message):
        EvaluateConfig(**settings)
