"""Masks by a trained model: connected regions of its best concepts."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from pycocotools import mask as rle
from scipy import ndimage

from helpers import tiny
from pixelclip.config import QUALITIES, MasksConfig
from pixelclip.inference.predictor import Predictor
from pixelclip.inference.refinement.refine import photo_scores
from pixelclip.inference.self_masks import load_generator, regions
from pixelclip.models.checkpoint import load_model


def by_scipy(labels: np.ndarray, min_area: int) -> set[bytes]:
    found = set()
    for value in np.unique(labels):
        numbered, count = ndimage.label(labels == value, np.ones((3, 3)))
        found |= {(numbered == number).tobytes() for number in range(1, count + 1) if (numbered == number).sum() >= min_area}
    return found


@pytest.mark.parametrize("min_area", [1, 4, 30])
def test_regions_are_the_connected_parts_of_equal_labels(min_area):
    labels = np.random.default_rng(3).integers(0, 3, (20, 31)).astype(np.int64) * 150  # labels above 255, and 0
    labels[:8, :8] = 300
    found = [mask.tobytes() for mask in regions(labels, min_area)]
    assert len(set(found)) == len(found)
    assert set(found) == by_scipy(labels, min_area)


@torch.no_grad()
def test_masks_are_regions_of_the_refined_scores_of_the_concepts(tmp_path):
    folder = tiny.model_folder(tmp_path / "model", tiny.clip_folder(tmp_path / "clip"))
    blocks = np.random.default_rng(1).integers(0, 256, (4, 6, 3), np.uint8).repeat(13, axis=0).repeat(13, axis=1)
    photo = Image.fromarray(blocks)
    generate = load_generator(folder, MasksConfig(generator="model", weights=str(folder), model_min_area=5, device="cpu"))
    (document,) = generate([("a", photo)])
    model = load_model(folder)
    predictor = Predictor(model, "cpu")
    concepts = F.normalize(model.prompts(predictor.text), dim=1)
    scores = photo_scores(predictor.backbone, photo, concepts, predictor.view, QUALITIES["best"])
    labels = F.interpolate(scores, size=(52, 78), mode="bilinear", align_corners=False).argmax(dim=1)[0].numpy()
    found = {rle.decode(entry["segmentation"]).astype(bool).tobytes() for entry in document["annotations"]}
    assert len(found) == len(document["annotations"]) > 1
    assert found == by_scipy(labels, 5)
