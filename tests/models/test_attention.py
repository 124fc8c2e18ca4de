import open_clip
import pytest
import torch

from helpers import tiny
from pixelclip.models.attention import run_block


@pytest.mark.parametrize("tower", ["visual", "text"])
def test_block_equals_open_clip(tower):
    clip = tiny.clip_of()
    transformer = clip.visual.transformer if tower == "visual" else clip.transformer
    block = transformer.resblocks[0]
    x = torch.randn(3, 7, block.attn.embed_dim, requires_grad=True)
    mask = clip.attn_mask[:7, :7] if tower == "text" else None
    actual, expected = run_block(block, x, mask), block(x, attn_mask=mask)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
    inputs = [x, *block.parameters()]
    for ours, theirs in zip(*(torch.autograd.grad(y.square().sum(), inputs) for y in (actual, expected)), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_other_block_class_is_called_unchanged():
    block = open_clip.transformer.CustomResidualAttentionBlock(32, 2, qk_norm=True)
    x = torch.randn(2, 5, 32)
    torch.testing.assert_close(run_block(block, x), block(x))


def test_layer_scale_is_applied():
    block = open_clip.transformer.ResidualAttentionBlock(32, 2, ls_init_value=0.3)
    x = torch.randn(2, 5, 32)
    torch.testing.assert_close(run_block(block, x), block(x), atol=1e-5, rtol=1e-5)
