"""ViTs of timm against naive loops over their tokens, computed by timm's own modules."""

import copy

import pytest
import torch
import torch.nn.functional as F
from open_clip.timm_model import TimmModel
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer

from helpers import tiny
from pixelclip.models.backbone import Backbone

COMMON = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
TRUNKS = {
    "siglip": lambda: VisionTransformer(**COMMON, class_token=False, global_pool="map", num_classes=0),
    "pe": lambda: Eva(**COMMON, use_rot_pos_emb=True, global_pool="map", attn_pool_num_heads=2, attn_pool_mlp_ratio=2),
    "vit": lambda: VisionTransformer(**COMMON, global_pool="token", num_classes=64, init_values=0.5),
    "vit without class token": lambda: VisionTransformer(
        **COMMON, class_token=False, reg_tokens=2, no_embed_class=True, global_pool="avg", num_classes=64
    ),
    "eva": lambda: Eva(**COMMON, qkv_fused=True, global_pool="avg", num_classes=64, init_values=0.5),
    "eva02": lambda: Eva(
        **COMMON, qkv_fused=False, swiglu_mlp=True, scale_mlp=True, scale_attn_inner=True, use_rot_pos_emb=True,
        ref_feat_shape=(4, 4), global_pool="token", num_classes=64,
    ),
}  # fmt: skip
SIZES = [(32, 32), (48, 24), (8, 40)]


def tower(name: str) -> TimmModel:
    """Build open_clip's image tower around a small trunk with random weights."""
    visual = TimmModel("test_vit", 64, pool="token", proj=None)
    visual.trunk = TRUNKS[name]()
    visual.load_state_dict(tiny._vary(visual.state_dict(), seed=0))
    return visual.eval().requires_grad_(False)


def images(height: int, width: int) -> torch.Tensor:
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(0))


def at_size(visual: TimmModel, size: tuple[int, int]) -> TimmModel:
    """Return a copy for images of one size, with the position embedding resized as in the reference implementation."""
    visual = copy.deepcopy(visual)
    trunk, position = visual.trunk, visual.trunk.pos_embed.clone()
    trunk.set_input_size(size)
    prefix = position.shape[1] - 16
    maps = position[:, prefix:].reshape(1, 4, 4, 32).permute(0, 3, 1, 2)
    maps = F.interpolate(maps, size=(size[0] // 8, size[1] // 8), mode="bicubic", align_corners=False)
    trunk.pos_embed.copy_(torch.cat([position[:, :prefix], maps.permute(0, 2, 3, 1).reshape(1, -1, 32)], dim=1))
    return visual


def close(actual: torch.Tensor, expected: list[torch.Tensor], size: tuple[int, int]) -> None:
    dense = torch.stack(expected, dim=-1).unflatten(-1, (size[0] // 8, size[1] // 8))  # [B, C, h, w]
    torch.testing.assert_close(actual, dense, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", TRUNKS)
@pytest.mark.parametrize("size", SIZES)
def test_global_features_equal_timms(name, size):
    visual, x = tower(name), images(*size)
    residual = "patch" if name == "vit without class token" else "cls"
    actual = Backbone(visual, residual).image_features(x)
    torch.testing.assert_close(actual, at_size(visual, size)(x), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ["siglip", "pe"])
def test_attention_pool_is_applied_to_every_token_alone(name, size):
    visual, x = tower(name), images(*size)
    trunk = at_size(visual, size).trunk
    tokens = trunk.forward_features(x)
    expected = []
    for index in range(trunk.num_prefix_tokens, tokens.shape[1]):
        values = trunk.attn_pool.kv(tokens[:, index])[:, 32:]
        y = trunk.attn_pool.proj(values)
        y = y + trunk.attn_pool.mlp(trunk.attn_pool.norm(y))
        torch.testing.assert_close(y, trunk.attn_pool(tokens[:, index : index + 1]), atol=1e-5, rtol=1e-5)  # timm's own pool
        expected.append(trunk.head(trunk.fc_norm(y)))
    close(Backbone(visual)(x), expected, size)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("residual", ["cls", "patch"])
@pytest.mark.parametrize("name", ["vit", "vit without class token", "eva", "eva02"])
def test_last_block_sees_every_token_alone(name, residual, size):
    visual, x = tower(name), images(*size)
    if residual == "cls" and name == "vit without class token":
        with pytest.raises(ValueError, match="no class token: set residual=patch"):
            Backbone(visual, residual)
        return
    trunk = at_size(visual, size).trunk
    *_, last = trunk.blocks
    inputs = []
    last.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
    trunk.forward_features(x)
    tokens, expected = inputs[0], []
    for index in range(trunk.num_prefix_tokens, tokens.shape[1]):
        own = tokens[:, index : index + 1]
        if residual == "patch":
            y = last(own)  # timm's own block
        else:
            first, second = (last.gamma_1, last.gamma_2) if "eva" in name else (last.ls1.gamma, last.ls2.gamma)
            y = tokens[:, :1] + last.attn(last.norm1(own)) * (1 if first is None else first)
            y = y + last.mlp(last.norm2(y)) * (1 if second is None else second)
        expected.append(trunk.head(trunk.fc_norm(trunk.norm(y)))[:, 0])
    close(Backbone(visual, residual)(x), expected, size)


def test_partial_patches_are_dropped():
    backbone, x = Backbone(tower("siglip")), images(30, 41)
    assert backbone.patch_size == (8, 8)
    torch.testing.assert_close(backbone(x), backbone(x[..., :24, :40]))


@pytest.mark.parametrize(("name", "pooled"), [("siglip", True), ("eva02", False)])
def test_attention_and_position_are_trained(name, pooled):
    visual = tower(name)
    names = set(Backbone(visual).trained_parameters())
    query = ("attn_pool.latent", "attn_pool.q.weight", "attn_pool.q.bias")  # dense features do not use it
    used = [each for each, _ in visual.named_parameters() if not each.endswith(query)]
    expected = {f"visual.{each}" for each in used if "attn" in each or "pos" in each}
    assert names == expected
    assert any(each.startswith("visual.trunk.attn_pool.") for each in names) is pooled


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("test_vit_relpos", "image tower VisionTransformerRelPos is not supported"),
        ("test_efficientnet", "image tower EfficientNet is not supported"),
    ],
)
def test_other_towers_are_refused_with_the_list_of_supported_ones(name, reason):
    with pytest.raises(ValueError, match=rf"{reason}; supported are .*SigLIP.*EVA-CLIP.*ConvNeXt") as error:
        Backbone(TimmModel(name, 64))
    assert "\n" not in str(error.value)


def test_block_with_norms_after_attention_is_refused():
    visual = TimmModel("test_vit", 64)
    visual.trunk = Eva(**COMMON, use_post_norm=True)  # EVA02-E-14
    with pytest.raises(ValueError, match=r"ends in EvaBlockPostNorm.*; supported are"):
        Backbone(visual)
