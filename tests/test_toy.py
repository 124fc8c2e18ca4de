"""Painted scenes, and the toy CLIP that is trained on their captions."""

from functools import cache
from importlib.resources import files
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

from pixelclip.toy_scenes.scenes import CLASSES, Scene, paint
from pixelclip.toy_scenes.toy_clip import train_clip

HELD_OUT = 20_240_919  # a seed whose scenes are in no training run
WEIGHTS = Path(str(files("pixelclip"))) / "assets" / "toy_clip"
TEMPLATES = (
    "itap of a {}.", "a bad photo of the {}.", "a origami {}.", "a photo of the large {}.", "a {} in a video game.",
    "art of the {}.", "a photo of the small {}.", "A photo of a {} in the scene",
)  # fmt: skip


@cache
def scenes() -> list[Scene]:
    return [paint(HELD_OUT, index) for index in range(150)]


def present(scene: Scene) -> list[str]:
    return [CLASSES[i] for i in np.unique(scene.label)]


def test_scene_depends_on_seed_and_index_only() -> None:
    paint(1, 2)
    for again, scene in ((paint(HELD_OUT, i), scenes()[i]) for i in (7, 3)):
        assert np.array_equal(again.image, scene.image) and np.array_equal(again.label, scene.label)
        assert again.caption == scene.caption
    assert not np.array_equal(paint(HELD_OUT + 1, 3).image, scenes()[3].image)


@pytest.mark.parametrize("side", [64, 128, 200])
def test_image_and_label_have_the_requested_side(side: int) -> None:
    scene = paint(0, 0, side)
    assert scene.image.shape == (side, side, 3) and scene.label.shape == (side, side)
    assert scene.image.dtype == scene.label.dtype == np.uint8


@pytest.mark.parametrize(("seed", "index", "side"), [(-1, 0, 128), (0, -1, 128), (0, 0, 31), (0, 0, 1000)])
def test_arguments_out_of_range_are_rejected(seed: int, index: int, side: int) -> None:
    with pytest.raises(ValueError, match=f"seed {seed}, index {index}, side {side}"):
        paint(seed, index, side)


def test_every_class_occurs_and_covers_enough_pixels() -> None:
    shares = np.stack([np.bincount(s.label.ravel(), minlength=len(CLASSES)) / s.label.size for s in scenes()])
    assert len(CLASSES) == len(set(CLASSES)) == 19
    assert ((shares > 0).mean(0) > 0.08).all()
    assert shares[shares > 0].min() >= 0.02


def test_captions_name_only_present_classes_and_rarely_all() -> None:
    complete = 0
    for scene in scenes():
        named = [name for name in CLASSES if name in scene.caption]
        assert named and set(named) <= set(present(scene)), scene.caption
        complete += len(named) == len(present(scene))
    assert complete < 0.4 * len(scenes())


def test_shipped_clip_recognises_classes_of_held_out_scenes() -> None:
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{WEIGHTS}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{WEIGHTS}")
    model.eval()
    with torch.no_grad():
        prompts = [tokenizer([template.format(name) for name in CLASSES]) for template in TEMPLATES]
        classifier = torch.stack([model.encode_text(tokens, normalize=True) for tokens in prompts]).mean(0)
        images = torch.stack([preprocess(Image.fromarray(scene.image)) for scene in scenes()])
        similarity = model.encode_image(images, normalize=True) @ torch.nn.functional.normalize(classifier, dim=-1).T
    recall = []
    for scene, row in zip(scenes(), similarity, strict=True):
        truth = np.unique(scene.label)
        recall.append(np.isin(truth, row.topk(len(truth)).indices.numpy()).mean())
    assert np.mean(recall) >= 0.85


def test_shipped_clip_is_below_10_mb() -> None:
    assert sum(file.stat().st_size for file in WEIGHTS.iterdir()) < 10_000_000


def test_training_is_deterministic_and_keeps_the_global_random_state(tmp_path: Path) -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    losses = [train_clip(tmp_path / name, num_scenes=16, steps=2, batch_size=8)["loss"] for name in ("one", "two")]
    assert losses[0] == losses[1]
    assert torch.equal(torch.get_rng_state(), state)
    written = [(tmp_path / name / "open_clip_model.safetensors").read_bytes() for name in ("one", "two")]
    assert written[0] == written[1]
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == sorted(path.name for path in WEIGHTS.iterdir())


def test_fewer_scenes_than_a_batch_are_rejected(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="num_scenes 4"):
        train_clip(tmp_path, num_scenes=4, batch_size=8)
