"""The Predictor, `evaluate` and imported checkpoints against the literal inference of tests/helpers/reference_inference.py."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from helpers import evaluations, reference_inference, tiny
from helpers.evaluations import naive_iou, with_settings
from pixelclip import evaluate
from pixelclip.config import ImportConfig
from pixelclip.data.labelled_sets import open_labelled
from pixelclip.distributed import ProcessGroup
from pixelclip.evaluation.confusion import OURS
from pixelclip.evaluation.evaluator import evaluate_towers
from pixelclip.inference.predictor import Predictor
from pixelclip.models import convert
from pixelclip.models.checkpoint import backbone_of, load_model
from pixelclip.models.decoder import Decoder
from pixelclip.models.text import TextTower, classifier

client = evaluations.client
NAMES = ["dog", "grass", "sky", "traffic light", "bed "]
SIDES = {"vit": 320, "convnext": 640}


def photo(width: int, height: int) -> Image.Image:
    """Return smooth shapes with fine noise, which an antialiased filter removes and a plain bilinear one samples."""
    random = np.random.default_rng(width * 7 + height)
    shapes = Image.fromarray(random.integers(0, 256, (5, 6, 3), dtype=np.uint8)).resize(
        (width, height), Image.Resampling.BICUBIC
    )
    noise = random.integers(-60, 61, (height, width, 3))
    return Image.fromarray((np.asarray(shapes) + noise).clip(0, 255).astype(np.uint8))


@pytest.fixture(scope="module", params=list(SIDES))
def kind(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(kind, tmp_path_factory) -> Path:
    """Import a checkpoint in the reference's layout with random weights."""
    base = tmp_path_factory.mktemp("imported")
    clip, tokens = tiny.clip_of(kind).state_dict(), torch.randn(6, 4, 32, generator=torch.Generator().manual_seed(5))
    torch.save(reference_inference.checkpoint(clip, tokens, Decoder().state_dict()), base / "released.pth")
    folder = tiny.clip_config(base / "clip", tiny.CLIP_CONFIGS[kind])
    convert.run(base / "released.pth", base / "model", ImportConfig(clip=str(folder)))
    return base / "model"


def reference_scores(kind: str, image: Image.Image) -> torch.Tensor:
    clip = tiny.clip_of(kind).eval()
    return reference_inference.scores(clip, image, NAMES, SIDES[kind], tiny.MEAN, tiny.STD)


SIZES = [(60, 95), (200, 131), (640, 480), (65, 2600)]  # the last at the limit of the longest edge
SLOW = [(60, 60), (640, 640), (1065, 1200), (2600, 65), (1920, 1065), (1065, 1920), (2600, 1733), (1733, 2600), (2600, 2600)]


@pytest.mark.parametrize("size", SIZES + [pytest.param(size, marks=pytest.mark.slow) for size in SLOW])
def test_predictor_equals_the_reference_in_every_pixel_but_ties(model, kind, size):
    image = photo(*size)
    labels = Predictor.load(model, "cpu")(image, NAMES).labels
    assert len(np.unique(labels)) > 1
    reference_inference.assert_same_but_ties(labels, reference_scores(kind, image))


def test_evaluation_of_an_imported_checkpoint_equals_the_reference(model, kind, client, tmp_path):
    labelled = tiny.labelled_set(tmp_path / "set", NAMES, images=1)
    random, expected, truths = np.random.default_rng(1), [], []
    for number, size in enumerate([(61, 97), (97, 64), (60, 180)]):
        image, truth = photo(*size), random.integers(0, 5, size[::-1], dtype=np.uint8)
        truth[:5] = 255
        image.save(labelled / "images" / f"{number}.png")
        Image.fromarray(truth).save(labelled / "labels" / f"{number}.png")
        expected.append(reference_scores(kind, image))
        truths.append(truth)

    loaded, dataset = load_model(model), open_labelled(labelled)
    classes = classifier(TextTower(loaded.clip.model).eval(), dataset.classes)
    config, group = with_settings(pictures=3, side=SIDES[kind]), ProcessGroup()
    found = evaluate_towers({OURS: backbone_of(loaded)}, loaded.clip, classes, dataset, config, group, tmp_path / "state")
    maps = found.label_maps[OURS]
    for index, scores in enumerate(expected):
        reference_inference.assert_same_but_ties(maps[index], scores)

    clip = tiny.clip_folder(tmp_path / "clip", kind=kind)
    metrics = evaluate.run(model, labelled, tmp_path / "out", with_settings(clip=str(clip)))
    iou = naive_iou(truths, [scores.argmax(dim=0).numpy() for scores in expected], 5)
    assert metrics["miou/set"] == pytest.approx(100 * sum(iou) / 5, abs=0.05)  # a tie may be broken differently
    assert metrics["gain/set"] == 0
