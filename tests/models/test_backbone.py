import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F

from helpers import tiny
from pixelclip.models.backbone import Backbone


@pytest.fixture(scope="module")
def clip() -> open_clip.CLIP:
    return tiny.clip_of().eval().requires_grad_(False)


def images(height: int, width: int) -> torch.Tensor:
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(0))


def test_global_features_equal_encode_image(clip):
    x = images(32, 32)
    torch.testing.assert_close(Backbone(clip.visual).image_features(x), clip.encode_image(x))


@pytest.mark.parametrize("residual", ["cls", "patch"])
@pytest.mark.parametrize(("height", "width"), [(32, 32), (48, 24), (8, 40)])
def test_dense_features_equal_a_literal_implementation(clip, residual, height, width):
    visual, x = clip.visual, images(height, width)
    h, w = height // 8, width // 8
    position = visual.positional_embedding[1:].reshape(4, 4, 64).permute(2, 0, 1)[None]
    position = F.interpolate(position, size=(h, w), mode="bicubic", align_corners=False)[0].permute(1, 2, 0).reshape(h * w, 64)
    tokens = visual.conv1(x).flatten(2).transpose(1, 2) + position
    cls = (visual.class_embedding + visual.positional_embedding[0]).expand(2, 1, 64)
    tokens = visual.ln_pre(torch.cat([cls, tokens], dim=1))
    tokens = visual.transformer.resblocks[0](tokens)
    block = visual.transformer.resblocks[1]
    # Attention masked to the diagonal reduces to out_proj(v_proj(.)) of each patch.
    alone = torch.full((h * w + 1, h * w + 1), float("-inf")).fill_diagonal_(0)
    value = block.attention(block.ln_1(tokens), attn_mask=alone)[:, 1:]
    y = value + (tokens[:, :1] if residual == "cls" else tokens[:, 1:])
    y = visual.ln_post(y + block.mlp(block.ln_2(y))) @ visual.proj
    expected = y.reshape(2, h, w, 64).permute(0, 3, 1, 2)
    torch.testing.assert_close(Backbone(visual, residual)(x), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["convnext", "convnext_mlp"])
def test_dense_features_of_a_convnext_equal_a_loop_over_locations(kind):
    visual = tiny.clip_of(kind).eval().requires_grad_(False).visual
    maps, dense = visual.trunk.forward_features(images(64, 96)), Backbone(visual)(images(64, 96))
    assert dense.shape == (2, 64, 2, 3)
    for image, y, x in np.ndindex(2, 2, 3):
        location = visual.trunk.head.norm(maps[image : image + 1, :, y : y + 1, x : x + 1])
        torch.testing.assert_close(dense[image, :, y, x], visual.head(location.flatten(1))[0], atol=1e-4, rtol=1e-4)


def test_trained_parameters_are_attention_and_position(clip):
    names = set(Backbone(clip.visual).trained_parameters())
    expected = {name for name, _ in clip.named_parameters() if name.startswith("visual.") and ".attn." in name}
    assert names == expected | {"visual.positional_embedding"}


def test_unsupported_towers_are_rejected():
    with pytest.raises(ValueError, match="Linear is not supported"):
        Backbone(torch.nn.Linear(2, 2))
    config = {**tiny.CLIP_CONFIG, "vision_cfg": {**tiny.CLIP_CONFIG["vision_cfg"], "pool_type": "avg"}}
    with pytest.raises(ValueError, match="must pool at the CLS token"):
        Backbone(open_clip.CLIP(**config).visual)
