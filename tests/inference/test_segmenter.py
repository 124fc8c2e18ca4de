"""The model in Python: kinds of photos, results, quality, the original CLIP."""

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import pixelclip
from helpers import tiny
from pixelclip.config import QUALITIES
from pixelclip.inference.prediction import palette_image
from pixelclip.inference.predictor import Predictor
from pixelclip.inference.refinement.pamr import pamr
from pixelclip.inference.segmenter import Segmenter
from pixelclip.models.checkpoint import load_clip, load_model

NAMES = ["dog|puppy", "grass", "sky"]
WITH_COMMAS = ["dog, puppy", "grass", "sky"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    base = tmp_path_factory.mktemp("segmenter")
    return tiny.model_folder(base / "model", tiny.clip_folder(base / "clip"), change=0.2)


@pytest.fixture(scope="module")
def model(folder) -> Segmenter:
    return pixelclip.load(folder, "cpu")


def pixels(width: int = 60, height: int = 40) -> np.ndarray:
    blocks = np.random.default_rng(0).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return blocks[np.arange(height) * 5 // height][:, np.arange(width) * 5 // width]


def test_path_image_array_and_list_give_the_predictor_s_labels(model, tmp_path):
    array = pixels()
    image = Image.fromarray(array)
    image.save(tmp_path / "photo.png")
    expected = model.predictor(image, WITH_COMMAS)
    assert len(np.unique(expected.labels)) > 1
    photos = [tmp_path / "photo.png", str(tmp_path / "photo.png"), image, array]
    for result in [*(model(photo, NAMES) for photo in photos), *model(photos, NAMES)]:
        assert np.array_equal(result.labels, expected.labels) and result.labels.shape == (40, 60)
        assert np.array_equal(result.scores, expected.scores)
    assert model([], NAMES) == []


def test_result_has_shares_score_maps_and_pictures(model, tmp_path):
    result = model(pixels(), NAMES)
    assert result.names == NAMES
    assert result.shares == pytest.approx({name: (result.labels == i).mean() for i, name in enumerate(NAMES)})
    maps = np.stack([result.score_map(name) for name in NAMES])
    assert maps.shape == (3, 40, 60) and np.array_equal(maps.argmax(axis=0), result.labels)
    with pytest.raises(ValueError, match=r"no class 'cat'; the classes are dog\|puppy, grass, sky"):
        result.score_map("cat")
    labels, shown = result.save(tmp_path / "new" / "labels.png")
    with Image.open(labels) as image, Image.open(shown) as picture:
        assert image.mode == "P" and np.array_equal(np.asarray(image), result.labels)
        # Without the photo, the overlay has exactly the palette's colours.
        assert np.array_equal(np.asarray(image.convert("RGB")), np.asarray(result.overlay(opacity=1))[:40, :60])
        assert np.array_equal(np.asarray(picture), np.asarray(result.overlay()))
    with Image.open(io.BytesIO(result._repr_png_())) as image:
        assert image.format == "PNG"


def test_large_result_is_shown_small_in_a_notebook(model):
    with Image.open(io.BytesIO(model(pixels(3000, 100), NAMES)._repr_png_())) as image:
        assert max(image.size) <= 1024


@pytest.mark.parametrize(("count", "mode"), [(1, "P"), (256, "P"), (257, "L"), (300, "I;16")])
def test_label_map_has_a_palette_for_up_to_256_classes(count, mode):
    labels = np.array([[0, count - 1 if count != 257 else 3]], np.uint16)
    image = palette_image(labels, count)
    assert image.mode == mode and np.array_equal(np.asarray(image), labels)


@pytest.mark.parametrize(
    ("photo", "classes", "message"),
    [
        (pixels(), "dog,grass", r"expected a list of names such as .*, found the text 'dog,grass'"),
        (pixels(), [], "the list of class names is empty"),
        (pixels(), ["dog", 3], "expected names such as .*, found 3"),
        (pixels(), ["dog|puppy", "dog, puppy"], "found twice: 'dog, puppy'"),
        (pixels(), ["a\x1b[31m"], "must not contain control characters"),
        (pixels().astype(float), ["dog"], r"array: expected uint8 \[H, W, 3\], found float64 \[40, 60, 3\]"),
        (pixels()[..., 0], ["dog"], r"found uint8 \[40, 60\]"),
        (np.zeros((0, 5, 3), np.uint8), ["dog"], r"found uint8 \[0, 5, 3\]"),
        ("nowhere.jpg", ["dog"], "nowhere.jpg: no such file"),
        (3, ["dog"], "found int"),
        ([pixels(), None], ["dog"], "photo 1: .*found NoneType"),
    ],
)
def test_invalid_input_is_one_clear_line(model, photo, classes, message):
    with pytest.raises(ValueError, match=message) as error:
        model(photo, classes)
    assert "\n" not in str(error.value)


def test_baseline_is_the_clip_of_the_training(folder, model):
    loaded = load_model(folder)
    original = replace(loaded, clip=load_clip(loaded.config["clip"]["spec"]))
    expected = Predictor(original, "cpu")(Image.fromarray(pixels()), WITH_COMMAS)
    found = pixelclip.load(folder, "cpu", baseline="clip")(pixels(), NAMES)
    assert np.array_equal(found.scores, expected.scores)
    assert not np.allclose(found.scores, model(pixels(), NAMES).scores)
    with pytest.raises(ValueError, match="baseline must be 'clip' or None"):
        pixelclip.load(folder, baseline="dino")


def test_another_clip_than_that_of_the_training_is_rejected(tmp_path):
    clip = tiny.clip_folder(tmp_path / "clip")
    folder = tiny.model_folder(tmp_path / "model", clip)
    tiny.clip_folder(clip, seed=1)
    with pytest.raises(ValueError, match=r"clip: is not the CLIP that .*model was trained from"):
        pixelclip.load(folder, "cpu", baseline="clip")


def naive_windows(predictor: Predictor, image: Image.Image, classes: torch.Tensor, scale: float, size) -> torch.Tensor:
    """Average the cosines of windows, one window at a time, at the centres of the cells of a grid: [K, h, w]."""
    side = predictor.side
    width, height = (max(side, int(edge * scale * side / max(image.size))) for edge in image.size)
    resized = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR), np.float32) / 255
    pixels = torch.from_numpy((resized - predictor.clip.mean) / predictor.clip.std).float().permute(2, 0, 1)[None]
    rows, columns = ((torch.arange(n) + 0.5) * edge / n for n, edge in zip(size, (height, width), strict=True))
    total, times = torch.zeros(len(classes), *size), torch.zeros(size)
    tops, lefts = ({0, edge - side} for edge in (height, width))  # enough up to a scale of 1.75
    for y in tops:
        for x in lefts:
            features = predictor.backbone(pixels[:, :, y : y + side, x : x + side])
            down, across = torch.meshgrid(2 * (rows - y) / side - 1, 2 * (columns - x) / side - 1, indexing="ij")
            points = torch.stack([across, down], dim=2)[None]
            grid = torch.nn.functional.grid_sample(features, points, padding_mode="border", align_corners=False)[0]
            inside = (down >= -1) & (down < 1) & (across >= -1) & (across < 1)
            total += inside * torch.einsum("kc,chw->khw", classes, grid / grid.norm(dim=0))
            times += inside
    return total / times


@torch.no_grad()
def test_best_quality_refines_the_mean_over_scales_of_windows(model):
    image = Image.fromarray(pixels(90, 70))
    fast, best = model(image, NAMES), model(image, NAMES, quality="best")
    assert best.labels.shape == (70, 90) and not np.array_equal(fast.labels, best.labels)
    classes, size = next(iter(model.predictor._classifiers.values())), (64, round(90 * 64 / 70))
    scales = QUALITIES["best"].scales
    mean = sum(naive_windows(model.predictor, image, classes, scale, size) for scale in scales) / len(scales)
    small = np.asarray(image.resize((size[1], size[0]), Image.Resampling.BILINEAR), np.float32).transpose(2, 0, 1) / 255
    expected = pamr(mean[None], torch.from_numpy(small)[None], QUALITIES["best"].pamr_iterations)[0]
    np.testing.assert_allclose(best.scores, expected, atol=1e-5)


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (500, 2), (300, 200)])
def test_best_quality_takes_any_size(model, size):
    assert model(pixels(*size), NAMES, "best").labels.shape == size[::-1]


def test_unknown_quality_is_rejected(model):
    with pytest.raises(ValueError, match=r"quality must be fast or best \(found 'good'\)"):
        model(pixels(), NAMES, "good")
