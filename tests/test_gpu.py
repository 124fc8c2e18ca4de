"""Code paths on a GPU (`pytest -m gpu`)."""

import numpy as np
import pytest
import torch
from PIL import Image

from helpers import mask_classes, random_dino, random_sam, tiny, training
from helpers.fake_data import pixels
from helpers.samples import batch
from pixelclip import train
from pixelclip.config import MasksConfig
from pixelclip.data.dataset import Batch, collate
from pixelclip.data.views import TrainingSample
from pixelclip.distributed import pick_precision
from pixelclip.evaluation.classify import classify_masks
from pixelclip.evaluation.confusion import ConfusionMatrix
from pixelclip.inference.label_map import label_map
from pixelclip.inference.predictor import Predictor
from pixelclip.mask_generators.dino import load_dino, load_generator, patch_tokens, segment
from pixelclip.mask_generators.sam import SamGenerator
from pixelclip.models.backbone import Backbone
from pixelclip.models.decoder import Decoder
from pixelclip.models.pixelclip import PixelCLIP
from pixelclip.models.text import Prompts, TextTower

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda")
clip, shards, config = training.clip, training.shards, training.config


@pytest.fixture(autouse=True)
def float32():
    """Disable TF32, which cuDNN uses by default."""
    pick_precision("float32", DEVICE)


def test_gpu_trains_like_the_cpu(shards, config, tmp_path):
    for name in ("cpu", "cuda"):
        train.run(shards, tmp_path / name, config(device=name, steps=10, strong_view=False))
    on_cpu, on_gpu = (torch.tensor(training.losses(tmp_path / name)) for name in ("cpu", "cuda"))
    torch.testing.assert_close(on_gpu, on_cpu, atol=2e-3, rtol=0)


@pytest.mark.parametrize("precision", ["tf32", "bfloat16"])
def test_low_precision_learns(shards, config, tmp_path, precision):
    settings = {"steps": 60, "precision": precision, "learning_rate_decoder": 2e-3, "strong_view": False}
    train.run(shards, tmp_path / "model", config(device="cuda", **settings))
    losses = training.losses(tmp_path / "model")
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])


def test_step_does_not_synchronize():
    clip = tiny.clip_of()
    text = TextTower(clip)
    model = PixelCLIP(Backbone(clip.visual), text, Prompts(text, torch.arange(10).view(5, 2)), Decoder()).train().cuda()
    weak, strong, masks, index = (tensor.cuda() for tensor in batch())
    micro_batch = Batch(weak, strong, masks, index, [], counts=[3, 3])
    model.accumulate([micro_batch])  # one-time initialisation may synchronize
    torch.cuda.set_sync_debug_mode("error")
    try:
        model.accumulate([micro_batch])
        model.update_teacher(0.9)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_label_map_equals_the_cpu():
    scores = torch.randn(2, 30, 16, 16, generator=torch.Generator().manual_seed(0))
    assert (label_map(scores.cuda(), (150, 90)).cpu() != label_map(scores, (150, 90))).float().mean() < 1e-4


def test_pinned_batch_is_unchanged_on_the_device():
    masks = torch.rand(5, 16, 16) < 0.5
    bits = (masks.view(5, 2, 8, 16) * 2 ** torch.arange(8)[:, None]).sum(dim=2).byte()
    packed = collate([TrainingSample(torch.rand(3, 8, 8), torch.rand(3, 8, 8), bits)]).pin_memory()
    assert packed.weak.is_pinned() and packed.masks.is_pinned()
    on_gpu = packed.to(torch.device("cuda"))
    assert torch.equal(on_gpu.masks.cpu(), masks) and torch.equal(on_gpu.strong.cpu(), packed.strong)


@pytest.fixture(scope="module")
def dino_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("dino") / "dino.pth"
    torch.save(random_dino.weights(), path)
    return path


def test_dino_segments_like_the_cpu(dino_file):
    on_gpu, on_cpu = load_dino(dino_file).to(DEVICE), load_dino(dino_file)
    for size in ((20, 20), (28, 36)):  # the native grid, and one with a resized position embedding
        images = random_dino.images(2, 3, *size)
        torch.testing.assert_close(
            patch_tokens(on_gpu, images.to(DEVICE)).cpu(), patch_tokens(on_cpu, images), atol=1e-3, rtol=1e-3
        )
        segments = segment(on_gpu, images.to(DEVICE), 4, [0, 1]).cpu()
        assert (segments == segment(on_cpu, images, 4, [0, 1])).float().mean() > 0.95


def test_dino_resets_the_global_tf32_flags(dino_file):
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    config = MasksConfig(generator="dino", weights=str(dino_file), dino_side=20, dino_clusters=3, device=str(DEVICE))
    (document,) = load_generator(dino_file, config)([("key", Image.fromarray(pixels(30, 44)))])
    assert sum(entry["area"] for entry in document["annotations"]) == 30 * 44
    assert not (torch.backends.cuda.matmul.allow_tf32 or torch.backends.cudnn.allow_tf32)


def test_predictor_resets_the_global_tf32_flags(tmp_path):
    folder = tiny.model_folder(tmp_path / "model", tiny.clip_folder(tmp_path / "clip"))
    image, names = Image.fromarray(pixels(40, 60)), ["dog", "grass", "sky"]
    on_gpu, on_cpu = Predictor.load(folder, str(DEVICE)), Predictor.load(folder, "cpu")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    actual, expected = on_gpu(image, names), on_cpu(image, names)
    np.testing.assert_allclose(actual.scores, expected.scores, atol=1e-4)
    assert (actual.labels != expected.labels).mean() < 0.01


@pytest.mark.parametrize("settings", ["loose", "crops", "clean crops"])
def test_sam_finds_the_same_masks_as_the_cpu(settings):
    images = [pixels(96, 160, 0), pixels(150, 90, 1)]
    on_gpu, on_cpu = (random_sam.make_local(random_sam.make_sam()).to(device) for device in (DEVICE, "cpu"))
    actual, expected = (SamGenerator(sam, **random_sam.SETTINGS[settings])(images) for sam in (on_gpu, on_cpu))
    for some, others in zip(actual, expected, strict=True):
        assert abs(len(some) - len(others)) <= 0.05 * len(others)  # a mask near a threshold may be missing
        for best in (random_sam.best_ious(some, others), random_sam.best_ious(others, some)):
            assert np.median(best) > 0.98 and best.mean() > 0.95


def test_sam_in_bfloat16_finds_similar_masks():
    images = [pixels(96, 160, 0), pixels(150, 90, 1)]
    sam = random_sam.make_local(random_sam.make_sam()).to(DEVICE)
    exact, short = (SamGenerator(sam, **random_sam.LOOSE, precision=precision)(images) for precision in (None, torch.bfloat16))
    assert exact != short
    for some, others in zip(short, exact, strict=True):
        for best in (random_sam.best_ious(some, others), random_sam.best_ious(others, some)):
            assert np.median(best) > 0.95 and best.mean() > 0.85


def test_mask_classification_equals_the_cpu():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(2, mask_classes.WIDE, 5, 6, generator=generator)  # of two towers
    classes = torch.randn(mask_classes.NUM_CLASSES, mask_classes.WIDE, generator=generator)
    masks = mask_classes.entries(mask_classes.some_masks())
    size = (mask_classes.HEIGHT, mask_classes.WIDTH)
    truth = torch.randint(0, mask_classes.NUM_CLASSES, size, generator=generator).numpy().astype(np.uint8)
    truth[:3] = 255
    found, expected = (classify_masks(features.to(d), masks, classes.to(d), truth) for d in (DEVICE, "cpu"))
    assert (found.correct_masks, found.num_masks) == (expected.correct_masks, expected.num_masks)
    confusions = []
    for labels, device in ((found.label_maps[0], DEVICE), (expected.label_maps[0], "cpu")):
        confusions.append(ConfusionMatrix.zeros(mask_classes.NUM_CLASSES))
        confusions[-1].add(truth, labels.to(device))
    assert np.array_equal(confusions[0].counts, confusions[1].counts) and confusions[0].counts.sum() == (truth != 255).sum()
