"""Compare with tensors recorded from the reference implementation (tests/golden)."""

import os
import re
import sys
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import open_clip
import pytest
import torch

from pixelclip.data.dataset import Batch
from pixelclip.data.tensors import normalise, resize_square
from pixelclip.inference.label_map import label_map
from pixelclip.inference.scores import class_scores, resize_scores
from pixelclip.models.backbone import Backbone
from pixelclip.models.clustering import merge_by_concept, sinkhorn
from pixelclip.models.decoder import Decoder
from pixelclip.models.pixelclip import PixelCLIP
from pixelclip.models.text import Prompts, TextTower, classifier

HERE = Path(__file__).parents[1] / "golden"
FOLDER = Path(os.environ.get("PIXELCLIP_GOLDEN") or HERE)
FILES = sorted(FOLDER.glob("seed*.npz"))
SIDE, GRID, IMAGE = 80, 64, 96

sys.path.insert(0, str(HERE))
import inputs  # noqa: E402


def test_golden_files_exist():
    assert FILES, f"{FOLDER} holds no seed*.npz"


@cache
def _setup(path: Path) -> SimpleNamespace:
    seed = int(re.fullmatch(r"seed(\d+)", path.stem)[1])
    clip = open_clip.CLIP(
        embed_dim=inputs.SIZES["embed_dim"],
        quick_gelu=True,
        vision_cfg={**inputs.SIZES["vision"]},
        text_cfg={**inputs.SIZES["text"]},
    )
    inputs.fill(clip.named_parameters(), seed)
    decoder = Decoder()
    inputs.fill(decoder.named_parameters(), 1000 + seed)
    tower = TextTower(clip)
    prompts = Prompts(tower, inputs.concept_words(seed))
    model = PixelCLIP(Backbone(clip.visual), tower, prompts, decoder).train()
    images, strong, masks = inputs.batch(seed)
    mean, std = np.array(inputs.PIXEL_MEAN) / 255, np.array(inputs.PIXEL_STD) / 255

    def view(pixels: list[torch.Tensor], side: int) -> torch.Tensor:
        return resize_square(normalise(torch.stack(pixels) / 255, mean.tolist(), std.tolist()), side)

    stacked = torch.cat(masks)[:, None].float()
    small = torch.nn.functional.interpolate(stacked, size=(GRID, GRID), mode="nearest")[:, 0].bool()
    index = torch.repeat_interleave(torch.arange(len(masks)), torch.tensor([len(m) for m in masks]))
    keep = small.flatten(1).sum(dim=1) > 1
    return SimpleNamespace(
        seed=seed,
        golden=np.load(path),
        model=model,
        weak=view(images, SIDE),
        native=view(images, 64),
        strong=view(strong, SIDE),
        masks=small[keep],
        index=index[keep],
    )


@pytest.fixture(params=FILES, ids=lambda path: path.stem)
def case(request) -> SimpleNamespace:
    return _setup(request.param)


def _close(actual: torch.Tensor, expected: np.ndarray, tolerance: float = 1e-4) -> None:
    np.testing.assert_allclose(actual.detach().numpy(), expected, rtol=0, atol=tolerance)


def test_dense_features(case):
    with torch.no_grad():
        _close(case.model.student(case.weak).permute(0, 2, 3, 1), case.golden["dense"])
        _close(case.model.student(case.native).permute(0, 2, 3, 1), case.golden["dense_native"])


def test_concepts(case):
    _close(case.model.concepts(), case.golden["concepts"])


def test_sinkhorn(case):
    _close(sinkhorn(100 * inputs.wave("logits", (37, 8), 0.3, case.seed), 3), case.golden["sinkhorn"])


def test_decoder(case):
    _close(case.model.decoder(inputs.wave("cost", (3, 1, 5, 5), 0.3, case.seed)), case.golden["head"])


def test_targets_loss_and_gradients(case):
    model = case.model
    model.zero_grad()
    output = model.accumulate([Batch(case.weak, case.strong, case.masks, case.index, [])])
    targets = merge_by_concept(case.masks, case.index, output.concept_index, 2, inputs.CONCEPTS)
    expected = np.unpackbits(case.golden["targets"])
    assert np.mean(targets.flatten().numpy() != expected) <= 0.005
    assert abs(output.loss.item() - float(case.golden["loss"])) <= 1e-5

    parameters = {"sem_seg_head.predictor.prompt_tokens": model.prompts.tokens}
    parameters |= {f"sem_seg_head.predictor.clip_model.{name}": p for name, p in model.student.named_parameters()}
    parameters |= {f"head.{name}": p for name, p in model.decoder.named_parameters()}
    keys = [key for key in case.golden if key.startswith("gradnorm/")]
    trained = {f"gradnorm/{name}" for name, p in parameters.items() if p.grad is not None}
    assert trained == set(keys)
    for key in keys:
        norm, expected_norm = parameters[key.removeprefix("gradnorm/")].grad.norm().item(), float(case.golden[key])
        assert norm == pytest.approx(expected_norm, rel=0.01, abs=1e-9), key


def test_classifier_and_inference(case):
    classes = classifier(case.model.text, ["dog", "traffic light", "sky, clouds", "aeroplane"])
    _close(classes, case.golden["class_text"])
    with torch.no_grad():
        scores = class_scores(case.model.student, case.weak[:1], classes)
    _close(resize_scores(scores, (IMAGE, IMAGE))[0, :, ::7, ::7], case.golden["sem_seg"])
    labels = label_map(scores, (IMAGE, IMAGE))[0].numpy()
    assert np.mean(labels != case.golden["sem_seg_argmax"]) <= 0.005
