"""Exports compute what the model computes: under onnxruntime, and loaded by open_clip."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import open_clip
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image

from helpers import tiny
from helpers.registrations import evaluation_of
from pixelclip.commands.export import run
from pixelclip.data.tensors import resized_square
from pixelclip.inference import onnx_predictor
from pixelclip.inference.label_map import label_map
from pixelclip.inference.onnx_predictor import OnnxPredictor
from pixelclip.inference.prediction import INFERENCE
from pixelclip.inference.predictor import Predictor
from pixelclip.models.checkpoint import backbone_of, load_model
from pixelclip.storage.files import write_json

CLASSES = ["dog, puppy", "grass", "sky", "traffic light"]


def photo(width: int = 130, height: int = 90) -> Image.Image:
    blocks = np.random.default_rng(0).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return Image.fromarray(blocks).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module", params=["vit", "convnext"])
def model(request, tmp_path_factory) -> Path:
    base = tmp_path_factory.mktemp(request.param)
    return tiny.model_folder(base / "model", tiny.clip_folder(base / "clip", kind=request.param))


@pytest.fixture(scope="module")
def exported(model) -> Path:
    out = model.parent / "onnx"
    assert run(model, out, "onnx", CLASSES) == [out / "model.onnx"]
    return out


def test_onnx_label_maps_differ_from_torch_in_at_most_one_pixel_in_a_thousand(model, exported):
    by_torch, by_onnx = Predictor.load(model, "cpu"), OnnxPredictor(exported / "model.onnx", "cpu")
    for size in ((130, 90), (33, 200), (7, 5)):
        expected, found = by_torch(photo(*size), CLASSES), by_onnx(photo(*size), CLASSES)
        assert len(np.unique(expected.labels)) > 1 or size == (7, 5)
        assert (found.labels != expected.labels).mean() <= 0.001
        np.testing.assert_allclose(found.scores, expected.scores, atol=1e-4)


def test_onnx_has_the_side_of_the_evaluation(tmp_path):
    registered = tiny.model_folder(tmp_path / "model", tiny.clip_folder(tmp_path / "clip"))
    otherwise = Predictor.load(registered, "cpu")(photo(), CLASSES)
    write_json(registered / INFERENCE, {"shortest_edge": 640, "longest_edge": 2560, "side": 2 * tiny.SIDE})
    run(registered, tmp_path / "onnx", "onnx", CLASSES)
    found = OnnxPredictor(tmp_path / "onnx" / "model.onnx", "cpu")(photo(), CLASSES)
    expected = Predictor.load(registered, "cpu")(photo(), CLASSES)
    np.testing.assert_allclose(found.scores, expected.scores, atol=1e-4)
    assert not np.allclose(found.scores, otherwise.scores, atol=1e-3)


def test_onnx_knows_its_classes_in_any_order(exported):
    predictor = OnnxPredictor(exported / "model.onnx", "cpu")
    some = ["sky", "dog, puppy"]
    whole, part = predictor(photo(), CLASSES), predictor(photo(), some)
    assert np.array_equal(part.scores, whole.scores[[2, 0]])
    with pytest.raises(
        ValueError, match=r"class 'grss' is not in this ONNX model, did you mean 'grass'\?; it was exported with"
    ):
        predictor(photo(), ["grss"])


def test_features_without_classes_and_batches_of_any_size(model, tmp_path):
    run(model, tmp_path, "onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"))
    loaded = load_model(model)
    for batch in (1, 3):
        x = torch.randn(batch, 3, tiny.SIDE, tiny.SIDE, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            expected = backbone_of(loaded).eval()(x).numpy()
        (features,) = session.run(["features"], {"images": x.numpy()})
        np.testing.assert_allclose(features, expected, atol=1e-3)
    with pytest.raises(ValueError, match="exported without class names; export it again with --classes"):
        OnnxPredictor(tmp_path / "model.onnx")


@pytest.mark.parametrize("size", [(130, 90), (3, 200), (48, 48), (1, 1)])
def test_images_and_label_maps_without_torch_equal_those_with_torch(size):
    image = photo(*size)
    found = onnx_predictor.resized_square(image, 48, tiny.MEAN, tiny.STD)
    np.testing.assert_allclose(found, resized_square(image, 48, tiny.MEAN, tiny.STD).numpy(), atol=1e-5)
    scores = np.random.default_rng(1).standard_normal((5, 8, 8)).astype(np.float32)
    labels = label_map(torch.from_numpy(scores)[None], size)[0].numpy()
    assert (onnx_predictor.label_map(scores, size) == labels).mean() > 0.999


def test_predict_with_an_onnx_model_imports_no_torch(exported, tmp_path):
    photo().save(tmp_path / "photo.png")
    script = (
        "import sys; sys.modules['torch'] = None; from pixelclip.cli.app import main; "
        "sys.argv = ['pixelclip', 'predict', 'photo.png', '--classes', 'sky,grass', '--model', sys.argv[1], '--out', 'x.png']; "
        "main()"
    )
    done = subprocess.run([sys.executable, "-c", script, exported], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    expected = OnnxPredictor(exported / "model.onnx", "cpu")(photo(), ["sky", "grass"])
    assert np.array_equal(np.asarray(Image.open(tmp_path / "x.png")), expected.labels)


def test_huggingface_folder_has_a_card_and_loads_in_open_clip(model, tmp_path):
    files = run(model, tmp_path / "hub", "huggingface")
    assert [file.name for file in files] == ["README.md", "open_clip_config.json", "open_clip_model.safetensors"]
    card = ModelCard.load(tmp_path / "hub" / "README.md")
    assert card.data.library_name == "open_clip"
    assert "unmeasured" in card.text and "- train: clip=clip" in card.text and str(model.parent) not in card.text
    loaded = load_model(model)
    clip = open_clip.create_model(f"local-dir:{tmp_path / 'hub'}", require_pretrained=True).eval()
    x = torch.randn(2, 3, 64, 64) if "convnext" in str(model) else torch.randn(2, 3, 32, 32)
    words = open_clip.SimpleTokenizer()(["a dog", "the sky"])
    with torch.no_grad():
        assert torch.equal(clip.encode_image(x), loaded.clip.model.encode_image(x))
        assert torch.equal(clip.encode_text(words), loaded.clip.model.encode_text(words))


def test_card_shows_the_scores_of_this_model_only(model, tmp_path):
    scores = {"miou/set": 44.4, "miou_clip/set": 29.7, "gain/set": 14.7, "images/set": 200.0}
    measured = evaluation_of(tmp_path / "evaluation", model, scores)
    run(model, tmp_path / "hub", "huggingface", evaluation=measured, uri="models:/demo@champion")
    text = (tmp_path / "hub" / "README.md").read_text()
    assert "| mIoU (%) | 29.7 | 44.4 |" in text and "# hub" in text and "--model models:/demo@champion " in text
    other = tiny.model_folder(tmp_path / "other", tiny.clip_folder(tmp_path / "clip"), change=0.5)
    with pytest.raises(ValueError, match="evaluates a different model than"):
        run(other, tmp_path / "no", "huggingface", evaluation=measured)
    assert not (tmp_path / "no").exists()


def test_model_cards_need_no_mlflow():
    script = "import sys; sys.modules['mlflow'] = None; import pixelclip.registry.model_card, pixelclip.models.convert"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("open_clip", (), Path("evaluation")), "--evaluation is for --format huggingface; open_clip has no model card"),
        (("onnx", (), None, "", {"licence": "MIT"}), "--licence and --data-licence are for --format huggingface; onnx has no"),
        (("tflite",), "format 'tflite': must be open_clip, huggingface, onnx"),
        (("huggingface", ["dog"]), "--classes is for --format onnx; huggingface exports the text tower"),
    ],
)
def test_invalid_export_is_one_clear_error(model, tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        run(model, tmp_path / "out", *arguments)
    assert not (tmp_path / "out").exists()


def test_existing_export_is_not_overwritten(model, exported):
    with pytest.raises(ValueError, match=r"model\.onnx already exists; remove it or choose another folder"):
        run(model, exported, "onnx", CLASSES)


def test_damaged_onnx_file_is_one_clear_error(tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"no model")
    with pytest.raises(ValueError, match=r"model\.onnx: cannot be read as an ONNX model: "):
        OnnxPredictor(tmp_path / "model.onnx")
