"""The GPU's code paths; deselected where there is no CUDA device (`pytest -m gpu`)."""

import pytest
import test_train
import tiny
import torch
from test_model import batch

from pixelclip import train
from pixelclip.backbone import Backbone
from pixelclip.dataset import Batch, collate
from pixelclip.decoder import Decoder
from pixelclip.labels import label_map
from pixelclip.model import PixelCLIP
from pixelclip.text import Prompts, TextTower
from pixelclip.views import Sample

pytestmark = pytest.mark.gpu
clip, shards, config = test_train.clip, test_train.shards, test_train.config


def test_a_gpu_trains_as_the_cpu(shards, config, tmp_path):
    for name in ("cpu", "cuda"):
        train.run(shards, tmp_path / name, config(device=name, steps=10, strong_view=False))
    on_cpu, on_gpu = (torch.tensor(test_train.losses(tmp_path / name)) for name in ("cpu", "cuda"))
    torch.testing.assert_close(on_gpu, on_cpu, atol=2e-3, rtol=0)


@pytest.mark.parametrize("precision", ["tf32", "bfloat16"])
def test_low_precision_learns(shards, config, tmp_path, precision):
    settings = {"steps": 60, "precision": precision, "learning_rate_decoder": 2e-3, "strong_view": False}
    train.run(shards, tmp_path / "model", config(device="cuda", **settings))
    losses = test_train.losses(tmp_path / "model")
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])


def test_a_step_waits_for_nothing():
    clip = tiny.clip_of()
    text = TextTower(clip)
    model = PixelCLIP(Backbone(clip.visual), text, Prompts(text, torch.arange(10).view(5, 2)), Decoder()).train().cuda()
    weak, strong, masks, index = (tensor.cuda() for tensor in batch())
    piece = Batch(weak, strong, masks, index, [], counts=[3, 3])
    model.accumulate([piece])  # what is set up once may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        model.accumulate([piece])
        model.update_teacher(0.9)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_labels_and_counts_are_those_of_the_cpu():
    scores = torch.randn(2, 30, 16, 16, generator=torch.Generator().manual_seed(0))
    assert (label_map(scores.cuda(), (150, 90)).cpu() != label_map(scores, (150, 90))).float().mean() < 1e-4


def test_a_pinned_batch_is_the_same_on_the_device():
    masks = torch.rand(5, 16, 16) < 0.5
    bits = (masks.view(5, 2, 8, 16) * 2 ** torch.arange(8)[:, None]).sum(dim=2).byte()
    packed = collate([Sample(torch.rand(3, 8, 8), torch.rand(3, 8, 8), bits)]).pin_memory()
    assert packed.weak.is_pinned() and packed.masks.is_pinned()
    there = packed.to(torch.device("cuda"))
    assert torch.equal(there.masks.cpu(), masks) and torch.equal(there.strong.cpu(), packed.strong)
