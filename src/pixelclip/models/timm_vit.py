"""Dense features of CLIP's image towers whose trunk is a ViT of timm: SigLIP, SigLIP2, EVA-CLIP, MobileCLIP-B and others.

B images, P patches, X prefix tokens (class token, registers), D tower width, C embedding width, h w feature grid.
"""

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import AttentionPoolLatent
from timm.layers.attention import Attention
from timm.models.eva import Eva, EvaAttention, EvaBlock
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor

from pixelclip.models.positions import resize_position

SUPPORTED = (
    "supported are ViTs of open_clip that pool at their class token, ViTs of timm (SigLIP, SigLIP2, EVA-CLIP, PE, ViTamin, "
    "MobileCLIP-B) and ConvNeXts of timm"
)


def is_timm_vit(trunk: Any) -> bool:
    """Return whether a trunk is one of timm's two ViT classes; their subclasses compute something else."""
    return type(trunk) in (VisionTransformer, Eva)


def check_timm_vit(trunk: Any, residual: str) -> None:
    """Raise ValueError unless `dense_timm_vit` supports the trunk with this residual."""
    if getattr(trunk, "rope_mixed", False):
        raise ValueError(f"this ViT is not supported: its rotary position embedding differs between blocks; {SUPPORTED}")
    if (pool := trunk.attn_pool) is not None:
        if not isinstance(pool, AttentionPoolLatent) or pool.latent_len != 1 or pool.pos_embed is not None:
            raise ValueError(
                f"this ViT is not supported: its attention pool must have one query and no position embedding; {SUPPORTED}"
            )
        return
    last = trunk.blocks[-1]
    if (type(last), type(last.attn)) not in ((Block, Attention), (EvaBlock, EvaAttention)):
        found = f"it ends in {type(last).__name__} with {type(last.attn).__name__}"
        raise ValueError(f"this ViT is not supported: {found}, not in a plain attention block; {SUPPORTED}")
    if residual == "cls" and trunk.cls_token is None:
        raise ValueError("this ViT has no class token: set residual=patch")


def global_timm_vit(visual: Any, images: Tensor) -> Tensor:
    """Return the global features [B, C] of images [B, 3, H, W] of any size; `visual` is open_clip's `TimmModel`."""
    trunk = visual.trunk
    x, rope, _ = _embed(trunk, images)
    return visual.head(trunk.forward_head(trunk.norm(_run(trunk.blocks, x, rope))))


def dense_timm_vit(visual: Any, images: Tensor, residual: str) -> Tensor:
    """Compute dense features.

    A tower that pools by attention runs all its blocks; its pool then takes the value path of every patch, as if the patch were
    the only one. Any other tower takes the value path in its last block, with the `residual` of `Backbone`, and its norms and
    projections at every patch.

    Args:
        visual: open_clip's `TimmModel` around a ViT that passes `check_timm_vit`.
        images: [B, 3, H, W], normalised.
        residual: `cls` or `patch`.

    Returns:
        [B, C, h, w], not normalised.
    """
    trunk = visual.trunk
    prefix, pool = trunk.num_prefix_tokens, trunk.attn_pool
    x, rope, grid = _embed(trunk, images)  # [B, X + P, D]
    if pool is not None:
        x = trunk.norm(_run(trunk.blocks, x, rope))[:, prefix:]
        y = pool.proj(_linear_rows(pool.kv, x, pool.proj))
        y = y if pool.mlp is None else y + pool.mlp(pool.norm(y))
    else:
        *blocks, last = trunk.blocks
        x = _run(blocks, x, rope)
        own = x[:, prefix:]
        y = (x[:, :1] if residual == "cls" else own) + _scale(last, 1, _value_path(last.attn, last.norm1(own)))
        y = trunk.norm(y + _scale(last, 2, last.mlp(last.norm2(y))))
    y = visual.head(trunk.head(trunk.fc_norm(y)))  # [B, P, C]
    return y.transpose(1, 2).unflatten(2, grid)


def _embed(trunk: Any, images: Tensor) -> tuple[Tensor, Tensor | None, tuple[int, int]]:
    """Return the tokens [B, X + P, D] of images of any size, the rotary position embedding, if any, and the grid (h, w)."""
    height, width = trunk.patch_embed.feat_ratio(as_scalar=False)
    grid = (images.shape[2] // height, images.shape[3] // width)
    trunk.patch_embed.strict_img_size = False  # timm would accept only the size of its training
    x = trunk.patch_embed(images[..., : grid[0] * height, : grid[1] * width]).flatten(1, -2)  # [B, P, D]
    prefix = [token.expand(x.shape[0], -1, -1) for token in (trunk.cls_token, trunk.reg_token) if token is not None]
    position = trunk.pos_embed
    if position is not None:
        without = 0 if trunk.no_embed_class else trunk.num_prefix_tokens
        position = resize_position(position[0], trunk.patch_embed.grid_size, grid, without).to(x.dtype)
    if position is not None and trunk.no_embed_class:
        x = x + position
    x = torch.cat([*prefix, x], dim=1)
    if position is not None and not trunk.no_embed_class:
        x = x + position
    rope = getattr(trunk, "rope", None)
    if rope is not None:
        rope.update_feat_shape(list(grid))  # recomputes its table if the grid changes
        rope = rope.get_embed(list(grid))
    return trunk.norm_pre(x), rope, grid


def _run(blocks: Any, x: Tensor, rope: Tensor | None) -> Tensor:
    for block in blocks:
        x = block(x) if rope is None else block(x, rope=rope)
    return x


def _value_path(attention: Any, x: Tensor) -> Tensor:
    """Return the output of a self-attention in which every token sees only itself: [B, P, D] -> [B, P, D]."""
    if not isinstance(attention, EvaAttention):
        value = _linear_rows(attention.qkv, x, attention.proj)
    elif attention.qkv is None:
        value = attention.v_proj(x)
    else:
        value = F.linear(x, attention.qkv.weight[-attention.proj.in_features :], attention.v_bias)
    value = attention.norm(value)
    gate = getattr(attention, "gate", None)
    return attention.proj(value if gate is None else value * gate(x).sigmoid())


def _linear_rows(linear: Any, x: Tensor, after: Any) -> Tensor:
    """Apply the values' rows, the last ones, of a joint projection; as many as the projection `after` the attention takes."""
    count = after.in_features
    return F.linear(x, linear.weight[-count:], None if linear.bias is None else linear.bias[-count:])


def _scale(block: Any, number: int, x: Tensor) -> Tensor:
    """Apply the first or second layer scale of a block, if it has one."""
    if isinstance(block, EvaBlock):
        gamma = getattr(block, f"gamma_{number}")
        return x if gamma is None else gamma * x
    return getattr(block, f"ls{number}")(x)
