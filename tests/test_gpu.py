"""The GPU's code paths; deselected where there is no CUDA device (`pytest -m gpu`)."""

import pytest
import test_train
import torch

from pixelclip import train
from pixelclip.dataset import collate
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


def test_a_pinned_batch_is_the_same_on_the_device():
    masks = torch.rand(5, 16, 16) < 0.5
    bits = (masks.view(5, 2, 8, 16) * 2 ** torch.arange(8)[:, None]).sum(dim=2).byte()
    packed = collate([Sample(torch.rand(3, 8, 8), torch.rand(3, 8, 8), bits)]).pin_memory()
    assert packed.weak.is_pinned() and packed.masks.is_pinned()
    batch = packed.to(torch.device("cuda"))
    assert torch.equal(batch.masks.cpu(), masks) and torch.equal(batch.strong.cpu(), packed.strong)
