"""Prediction on images of every shape and mode, and the command `pixelclip predict`."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import pixelclip
from helpers import tiny
from pixelclip.cli.app import main
from pixelclip.distributed import pick_device
from pixelclip.inference.label_map import label_map
from pixelclip.inference.prediction import Prediction, label_image, overlay
from pixelclip.inference.predictor import Predictor
from pixelclip.inference.scores import best_class, class_scores, resize_shortest, slide_scores
from pixelclip.models.backbone import Backbone
from pixelclip.models.checkpoint import backbone_of, load_model

CLASSES = ["dog, puppy", "grass", "sky", "traffic light"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    base = tmp_path_factory.mktemp("predict")
    return tiny.model_folder(base / "model", tiny.clip_folder(base / "clip"))


@pytest.fixture(scope="module")
def predictor(folder) -> Predictor:
    return Predictor.load(folder, "cpu")


def noise(width: int, height: int, channels: int = 3) -> np.ndarray:
    blocks = np.random.default_rng(0).integers(0, 256, (5, 5, channels), dtype=np.uint8)
    return blocks[np.arange(height) * 5 // height][:, np.arange(width) * 5 // width]


def naive(scores: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Argmax of scores resized to full size."""
    return torch.nn.functional.interpolate(torch.from_numpy(scores)[None], size, mode="bilinear")[0].argmax(dim=0).numpy()


def test_notebook_entry_point_loads_the_same_predictor(folder, predictor):
    image = Image.fromarray(noise(40, 30))
    assert np.array_equal(pixelclip.load(str(folder), "cpu")(image, CLASSES).labels, predictor(image, CLASSES).labels)
    with pytest.raises(ValueError, match=r"^nowhere: "):
        pixelclip.load("nowhere")


@pytest.mark.parametrize(("width", "height"), [(1, 1), (7, 300), (300, 7), (640, 480)])
def test_images_of_any_size_and_aspect_are_segmented(predictor, width, height):
    image = Image.fromarray(noise(width, height))
    prediction = predictor(image, CLASSES)
    assert prediction.labels.shape == (height, width)
    assert prediction.scores.shape == (4, 64, 64)
    assert np.array_equal(prediction.labels, naive(prediction.scores, (height, width)))
    assert overlay(image, prediction).width >= width


def test_prediction_has_several_classes(predictor):
    assert len(np.unique(predictor(Image.fromarray(noise(64, 64)), CLASSES).labels)) > 1


def test_label_map_is_the_argmax_at_full_size():
    scores = torch.randn(2, 37, 5, 6, generator=torch.Generator().manual_seed(0))
    expected = torch.stack([torch.from_numpy(naive(image_scores.numpy(), (23, 31))) for image_scores in scores])
    assert torch.equal(label_map(scores, (23, 31)), expected)


def test_first_class_wins_a_tie():
    assert label_map(torch.zeros(1, 40, 2, 2), (3, 3)).unique().tolist() == [0]


def naive_slide(backbone, image, classes, crop, stride, grid) -> torch.Tensor:
    """Average the scores of all windows at full size: [K, H, W]."""
    _, _, height, width = image.shape

    def starts(length: int) -> list[int]:
        offsets, start = [], 0
        while start + crop < length:
            offsets.append(start)
            start += stride
        return [*offsets, max(length - crop, 0)]

    total, times = torch.zeros(len(classes), height, width), torch.zeros(height, width)
    for y in starts(height):
        for x in starts(width):
            window = image[:, :, y : y + crop, x : x + crop]
            scores = class_scores(backbone, window, classes, grid)
            large = torch.nn.functional.interpolate(scores, window.shape[2:], mode="bilinear", align_corners=False)[0]
            total[:, y : y + crop, x : x + crop] += large
            times[y : y + crop, x : x + crop] += 1
    assert times.min() >= 1
    return total / times


def random_classes(count: int, width: int = 64) -> torch.Tensor:
    classes = torch.randn(count, width, generator=torch.Generator().manual_seed(1))
    return torch.nn.functional.normalize(classes, dim=1)


@torch.no_grad()
@pytest.mark.parametrize(
    ("size", "crop", "stride", "grid"),
    [
        ((40, 56), 24, 8, 6),
        ((37, 61), 24, 9, 5),  # offsets that are not multiples of the patch, last window moved back
        ((17, 90), 32, 32, 8),  # lower than a window, windows without overlap
        ((24, 24), 24, 7, 4),  # one window
        ((11, 13), 24, 24, 3),  # smaller than a window
        ((40, 56), 20, 9, 5),  # windows of two patches and a half
    ],
)
def test_slide_scores_equal_a_naive_loop(folder, size, crop, stride, grid):
    backbone = backbone_of(load_model(folder)).eval()
    image = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0))
    classes = random_classes(37)
    expected = naive_slide(backbone, image, classes, crop, stride, grid)
    parts = list(slide_scores(backbone, image, classes, crop, stride, grid, windows_at_once=3))
    assert max(part.shape[1] for part in parts) < 37  # never all classes at full size
    torch.testing.assert_close(torch.cat(parts, dim=1)[0], expected, atol=1e-5, rtol=1e-4)
    assert torch.equal(best_class(parts, (50, 70)), label_map(torch.cat(parts, dim=1), (50, 70)))


@torch.no_grad()
def test_slide_scores_of_a_convnext_equal_a_naive_loop():
    backbone = Backbone(tiny.clip_of("convnext").visual).eval()
    image = torch.randn(1, 3, 70, 100, generator=torch.Generator().manual_seed(0))
    for crop in (64, 48):  # with and without whole patches
        scores = torch.cat(list(slide_scores(backbone, image, random_classes(3), crop, 20, 8)), dim=1)[0]
        expected = naive_slide(backbone, image, random_classes(3), crop, 20, 8)
        torch.testing.assert_close(scores, expected, atol=1e-5, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["vit", "convnext"])
def test_features_of_partial_patches_are_at_the_right_position(kind):
    """An image of 2.5 patches is padded to 3; without padding the tower drops half a patch and stretches the rest."""
    backbone = Backbone(tiny.clip_of(kind).visual).eval()
    patch = backbone.patch_size[0]
    image = torch.randn(1, 3, 5 * patch // 2, 5 * patch // 2, generator=torch.Generator().manual_seed(0))
    padded = torch.cat([image, image[:, :, -1:].expand(-1, -1, patch // 2, -1)], dim=2)
    padded = torch.cat([padded, padded[..., -1:].expand(-1, -1, -1, patch // 2)], dim=3)
    features = torch.nn.functional.interpolate(backbone(padded), size=(6, 6), mode="bilinear", align_corners=False)
    expected = torch.einsum("bchw,kc->bkhw", torch.nn.functional.normalize(features, dim=1), random_classes(3))
    scores = class_scores(backbone, image, random_classes(3), feature_grid=5)
    torch.testing.assert_close(scores, expected[:, :, :5, :5], atol=1e-5, rtol=1e-4)  # both grids have cells of half a patch


@pytest.mark.parametrize(
    ("size", "side", "expected"),
    [
        ((30, 40), 15, (15, 20)),
        ((70, 31), 62, (140, 62)),
        ((9, 9), 9, (9, 9)),
    ],
)
def test_resizing_keeps_the_aspect(size, side, expected):
    image = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(0))
    resized = resize_shortest(image, side)
    assert resized.shape[2:] == expected
    if size == expected:
        assert torch.equal(resized, image)


def test_order_of_classes_only_permutes_labels(predictor):
    image = Image.fromarray(noise(50, 40))
    forward, backward = predictor(image, CLASSES).labels, predictor(image, CLASSES[::-1]).labels
    assert np.array_equal(forward, 3 - backward)


def test_predictor_always_sets_float32(predictor, monkeypatch):
    calls = []
    monkeypatch.setattr("pixelclip.inference.predictor.pick_precision", lambda name, device: calls.append((name, device.type)))
    predictor(Image.fromarray(noise(20, 20)), CLASSES)
    assert calls == [("float32", "cpu")]


def test_every_image_mode_is_read_as_rgb(predictor):
    rgb = noise(40, 30)
    grey = rgb[:, :, 0]
    indices = (np.arange(30)[:, None] + np.arange(40)) % 200
    colours = np.random.default_rng(1).integers(0, 256, (200, 3), dtype=np.uint8)
    palette = Image.fromarray(indices.astype(np.uint8), "L")
    palette.putpalette(colours.tobytes())
    transparent = palette.copy()
    opaque, hidden = np.full(grey.shape, 255, np.uint8), np.zeros_like(grey)  # transparent pixels are white
    hidden[:9] = 255
    left = hidden[..., None] > 0
    transparent.info["transparency"] = bytes([255] * 100 + [0] * 100)
    cases = {
        "RGBA": (Image.fromarray(np.dstack([rgb, opaque])), rgb),
        "RGBA with transparent pixels": (Image.fromarray(np.dstack([rgb, hidden])), np.where(left, rgb, 255)),
        "grey": (Image.fromarray(grey), np.dstack([grey] * 3)),
        "grey with alpha": (Image.fromarray(np.dstack([grey, hidden])), np.where(left, grey[..., None], 255).repeat(3, axis=2)),
        "palette": (palette, colours[indices]),
        "palette with alpha": (transparent, np.where(indices[..., None] < 100, colours[indices], 255)),
        "black and white": (Image.fromarray(grey > 127), np.dstack([(grey > 127).astype(np.uint8) * 255] * 3)),
    }
    for name, (image, same) in cases.items():
        expected = predictor(Image.fromarray(same), CLASSES).scores
        np.testing.assert_allclose(predictor(image, CLASSES).scores, expected, atol=1e-6, err_msg=name)


def test_exif_orientation_is_applied(predictor, tmp_path):
    pixels = noise(60, 40)
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate clockwise by 90 degrees
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    with Image.open(tmp_path / "a.png") as image:
        prediction = predictor(image, CLASSES)
        shown = overlay(image, prediction)
    upright = Image.fromarray(np.rot90(pixels, -1).copy())
    assert prediction.labels.shape == (60, 40)
    assert np.array_equal(prediction.labels, predictor(upright, CLASSES).labels)
    assert np.array_equal(np.asarray(shown), np.asarray(overlay(upright, prediction)))


def test_overlay_blends_colours_and_has_one_legend_entry_per_class():
    labels = np.zeros((100, 300), np.uint16)
    labels[:, :100] = 2
    prediction = Prediction(labels, np.zeros((3, 1, 1), np.float32), ["a", "b", "c"])
    colours = np.asarray(overlay(Image.new("RGB", (300, 100)), prediction, opacity=1))
    left, right = colours[50, 50], colours[50, 200]
    assert not np.array_equal(left, right)
    assert (colours[:100, :100] == left).all() and (colours[:100, 100:300] == right).all()
    legend = {tuple(colour) for colour in colours[100:].reshape(-1, 3)}
    assert {tuple(left), tuple(right)} <= legend
    white = np.asarray(overlay(Image.new("RGB", (300, 100), "white"), prediction, opacity=0.25))
    np.testing.assert_allclose(white[50, 50], 0.75 * 255 + 0.25 * left, atol=0.5)


@pytest.mark.parametrize("size", [(1, 100_000), (100_000, 1), (40, 30)])
def test_overlay_size_is_bounded_for_any_shape_and_names(size):
    classes = [f"{number} {'long ' * 60}" for number in range(200)]
    labels = (np.arange(size[0] * size[1]) % 200).astype(np.uint16).reshape(size[::-1])
    shown = overlay(Image.new("RGB", size), Prediction(labels, np.zeros((200, 1, 1), np.float32), classes))
    assert max(shown.size) < 23_000 and shown.width * shown.height < 3e7  # with 100 legend rows of 64 pixels
    assert shown.height > min(size[1], 16384)


def test_legend_shortens_only_long_names():
    image, scores = Image.new("RGB", (30, 20)), np.zeros((1, 1, 1), np.float32)
    predictions = [Prediction(np.zeros((20, 30), np.uint16), scores, ["x" * length]) for length in (60, 61, 300)]
    whole, cut, shortest = (np.asarray(overlay(image, prediction)) for prediction in predictions)
    assert np.array_equal(cut, shortest) and not np.array_equal(whole, cut)


@pytest.mark.parametrize(("highest", "mode"), [(255, "L"), (256, "I;16"), (65534, "I;16")])
def test_label_image_keeps_every_value(tmp_path, highest, mode):
    labels = np.array([[0, 1, highest]], np.uint16)
    label_image(labels).save(tmp_path / "labels.png")
    with Image.open(tmp_path / "labels.png") as image:
        assert image.mode == mode
        assert np.asarray(image).tolist() == labels.tolist()


def test_unknown_device_is_rejected_with_its_name():
    with pytest.raises(ValueError, match=r"device 'gpu0' cannot be used: .*allowed: auto, cpu, cuda, cuda:N"):
        pick_device("gpu0")
    assert pick_device("cpu").type == "cpu"


# Command line: pixelclip predict.


@pytest.fixture
def photo(tmp_path) -> Path:
    Image.fromarray(noise(60, 40)).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def command(monkeypatch, *words: object) -> int:
    monkeypatch.setattr(sys, "argv", ["pixelclip", "predict", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        main()
    return ended.value.code or 0


def test_command_writes_label_map_and_overlay(monkeypatch, capsys, predictor, folder, photo, tmp_path):
    out = tmp_path / "new" / "labels.png"
    words = ("--classes", "dog|puppy,grass,sky,traffic light", "--model", folder, "--out", out, "--device", "cpu")
    assert command(monkeypatch, photo, *words) == 0
    expected = predictor(Image.fromarray(noise(60, 40)), CLASSES).labels
    with Image.open(out) as labels, Image.open(out.with_suffix(".overlay.png")) as shown:
        assert np.array_equal(np.asarray(labels), expected)
        assert shown.width >= 60
    printed = capsys.readouterr().out
    for index, name in enumerate(CLASSES):
        fraction = (expected == index).mean()
        assert (f"{100 * fraction:5.1f} %  {name}\n" in printed) == (fraction > 0)
    assert str(out) in printed


def test_more_than_256_classes_give_a_16_bit_label_map(monkeypatch, predictor, folder, photo, tmp_path):
    names = [f"thing {i}" for i in range(260)]
    labels_before = predictor(Image.fromarray(noise(60, 40)), names).labels.astype(int)
    turn = labels_before.min() + 1  # rotate the names so that the lowest predicted class becomes class 259
    (tmp_path / "classes.txt").write_text("\n".join(names[turn:] + names[:turn]) + "\n")
    out = tmp_path / "labels.png"
    assert command(monkeypatch, photo, "--classes", tmp_path / "classes.txt", "--model", folder, "--out", out) == 0
    with Image.open(out) as labels:
        assert labels.mode == "I;16"
        assert np.array_equal(np.asarray(labels), (labels_before - turn) % 260)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"photo": "nothing.jpg"}, "nothing.jpg: no such file"),
        ({"photo": "text.jpg"}, "text.jpg: unreadable image"),
        ({"--classes": "dog,,sky"}, "blank class name at position 2"),
        ({"--classes": "no.txt"}, "no.txt: cannot read class names"),
        ({"--model": "nowhere"}, "nowhere: no such model folder"),
        ({"--out": "labels.jpg"}, "labels.jpg: the label map must be a .png file"),
        ({"--device": "gpu0"}, "device 'gpu0'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_invalid_input_prints_one_line_and_exits_with_2(monkeypatch, capsys, folder, photo, tmp_path, change, message):
    (tmp_path / "text.jpg").write_text("no image")
    monkeypatch.chdir(tmp_path)
    options = {"--classes": "dog,sky", "--model": folder, "--out": "labels.png", "--device": "cpu"} | change
    first = options.pop("photo", photo)
    assert command(monkeypatch, first, *[word for pair in options.items() for word in pair]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("pixelclip: ") and message in printed and printed.count("\n") == 1
    assert not (tmp_path / "labels.png").exists()


def test_incomplete_model_folder_is_rejected(monkeypatch, capsys, photo, tmp_path):
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "config.json").write_text(json.dumps({}))
    words = (photo, "--classes", "dog", "--model", tmp_path / "half", "--out", tmp_path / "o.png")
    assert command(monkeypatch, *words) == 2
    assert "half: is not a complete model folder: model.safetensors, provenance.json missing" in capsys.readouterr().err
