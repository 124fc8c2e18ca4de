"""Dense features from CLIP's image tower, on the modules of open_clip (PixelCLIP, section 3.1).

B images, P patches, D tower width, C embedding width, h w feature grid.
"""

import math
import re
from typing import Any, Literal

import torch
import torch.nn.functional as F
from open_clip.timm_model import TimmModel
from open_clip.transformer import ResidualAttentionBlock, VisionTransformer
from timm.models.convnext import ConvNeXt
from torch import Tensor, nn

from pixelclip.models.attention import run_block
from pixelclip.models.positions import resize_position
from pixelclip.models.timm_vit import SUPPORTED, check_timm_vit, dense_timm_vit, global_timm_vit, is_timm_vit

Residual = Literal["cls", "patch"]
POSITIONS = ("positional_embedding", "pos_embed")
"""Names of a ViT's position embedding in open_clip and timm."""
_POOL = re.compile(r"\.attn_pool\.(?!q\.|latent)")  # of an attention pool all but its query, which dense features do not use


def full_precision(x: Tensor) -> Tensor:
    """Convert autocast's half-precision results to float32; keep float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class Backbone(nn.Module):
    """Dense features of a CLIP ViT or ConvNeXt.

    In a ViT, the last block uses only its value path, so that a patch keeps its own content instead of a mixture of all
    patches (MaskCLIP). If the ViT pools by attention, like SigLIP, its pool does so instead. In a ConvNeXt, the head's norm and
    the projection are applied at every grid position, without pooling.

    Args:
        visual: open_clip's `VisionTransformer` pooled at the CLS token, or its `TimmModel` around a ViT or a ConvNeXt.
        residual: token added to a ViT's last value path: the CLS token (reference implementation) or the patch's own token
            (MaskCLIP). Unused by an attention pool and a ConvNeXt.
        precision: autocast's dtype; features are returned in float32 or wider.

    Raises:
        ValueError: the tower is not supported.
    """

    def __init__(self, visual: nn.Module, residual: Residual = "cls", precision: torch.dtype | None = None) -> None:
        super().__init__()
        trunk = visual.trunk if isinstance(visual, TimmModel) else visual
        self.is_convnext, self.is_timm_vit = isinstance(trunk, ConvNeXt), is_timm_vit(trunk)
        if isinstance(visual, VisionTransformer):
            _check_vit(visual)
        elif self.is_convnext:
            _check_convnext(visual)
        elif self.is_timm_vit:
            check_timm_vit(trunk, residual)
        else:
            raise ValueError(f"image tower {type(trunk).__name__} is not supported; {SUPPORTED}")
        self.visual: Any = visual
        self.residual = residual
        self.precision = precision

    @property
    def patch_size(self) -> tuple[int, int]:
        """Height and width in pixels of one position of the feature grid."""
        if self.is_convnext:
            stride = int(self.visual.trunk.feature_info[-1]["reduction"])
            return stride, stride
        if self.is_timm_vit:
            height, width = self.visual.trunk.patch_embed.feat_ratio(as_scalar=False)
            return height, width
        height, width = self.visual.conv1.kernel_size
        return height, width

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """Return the trainable parameters: attention, its pool and position embedding of a ViT, or all of a ConvNeXt."""
        return {
            f"visual.{name}": parameter
            for name, parameter in self.visual.named_parameters()
            if self.is_convnext or name.endswith(POSITIONS) or ".attn." in name or _POOL.search(name)
        }

    def image_features(self, images: Tensor) -> Tensor:
        """Return CLIP's global features [B, C] of images [B, 3, H, W] of any size, not normalised."""
        with self._autocast(images):
            if self.is_convnext:
                return full_precision(self.visual(images))
            if self.is_timm_vit:
                return full_precision(global_timm_vit(self.visual, images))
            pooled, _ = self.visual._pool(self.visual.transformer(_embed(self.visual, images)[0]))
            return full_precision(pooled if self.visual.proj is None else pooled @ self.visual.proj)

    def forward(self, images: Tensor) -> Tensor:
        """Compute dense features.

        Args:
            images: [B, 3, H, W], normalised; H and W are at least one patch and may differ.

        Returns:
            [B, C, h, w] with h = H // patch, w = W // patch; not normalised.
        """
        with self._autocast(images):
            if self.is_convnext:
                return full_precision(_dense_convnext(self.visual, images))
            dense = dense_timm_vit if self.is_timm_vit else _dense_vit
            return full_precision(dense(self.visual, images, self.residual))

    def _autocast(self, like: Tensor) -> torch.autocast:
        return torch.autocast(like.device.type, self.precision, enabled=self.precision is not None)


def _dense_convnext(visual: Any, images: Tensor) -> Tensor:
    x = visual.trunk.forward_features(images)  # [B, D, h, w]
    x = visual.trunk.head.norm(x).movedim(1, -1)  # [B, h, w, D]
    return visual.head(x).movedim(-1, 1)


def _dense_vit(visual: Any, images: Tensor, residual: Residual) -> Tensor:
    x, (height, width) = _embed(visual, images)  # [B, 1 + P, D]
    *blocks, last = visual.transformer.resblocks
    for block in blocks:
        x = run_block(block, x)
    y = last.ls_1(_value_path(last, x[:, 1:]))  # [B, P, D]
    y = y + (x[:, :1] if residual == "cls" else x[:, 1:])
    y = y + last.ls_2(last.mlp(last.ln_2(y)))
    y = visual.ln_post(y)
    if visual.proj is not None:
        y = y @ visual.proj
    return y.transpose(1, 2).unflatten(2, (height, width))


def _embed(visual: Any, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
    x = visual.conv1(images)  # [B, D, h, w]
    grid = (x.shape[2], x.shape[3])
    x = x.flatten(2).transpose(1, 2)  # [B, P, D]
    cls = visual.class_embedding.to(x.dtype).expand(x.shape[0], 1, -1)  # len(x) would be a constant in ONNX
    position = resize_position(visual.positional_embedding, tuple(visual.grid_size), grid, prefix=1)
    x = torch.cat([cls, x], dim=1) + position.to(x.dtype)
    return visual.ln_pre(x), grid


def _check_vit(visual: Any) -> None:
    if (
        visual.pool_type != "tok"
        or visual.attn_pool is not None
        or visual.final_ln_after_pool
        or not isinstance(visual.transformer.resblocks[-1], ResidualAttentionBlock)
    ):
        reason = "it must pool at the CLS token and end in a plain attention block"
        raise ValueError(f"this ViT is not supported: {reason}; {SUPPORTED}")


def _check_convnext(visual: Any) -> None:
    trunk = visual.trunk
    norm, pre_logits = getattr(trunk.head, "norm", None), getattr(trunk.head, "pre_logits", None)
    if not (isinstance(norm, nn.LayerNorm) and isinstance(pre_logits, nn.Identity) and len(visual.head)):
        raise ValueError("this ConvNeXt is not supported: it must have a norm in the trunk's head and open_clip's projection")


def check_side(setting: str, side: int, backbone: Backbone) -> None:
    """Raise ValueError, naming `setting`, unless a side in pixels is a multiple of the patch size."""
    check_patch(setting, side, backbone)
    check_multiple(setting, side, math.lcm(*backbone.patch_size))


def check_multiple(setting: str, side: int, patch: int) -> None:
    """Raise ValueError, naming `setting`, unless a side in pixels is a multiple of `patch`."""
    if side % patch:
        below = side // patch * patch
        valid = f"{below}, {below + patch}" if below else str(patch)
        raise ValueError(f"{setting} {side} is not a multiple of the patch size ({patch}); nearest valid: {valid}")


def check_patch(setting: str, side: int, backbone: Backbone) -> None:
    """Raise ValueError, naming `setting`, if a side in pixels is smaller than one patch."""
    patch = max(backbone.patch_size)
    if side < patch:
        raise ValueError(f"{setting} {side} is smaller than one patch ({patch} pixels)")


def _value_path(block: Any, x: Tensor) -> Tensor:
    """Apply `out_proj(v_proj(ln_1(x)))` of an attention block: [B, P, D] -> [B, P, D]."""
    attention, width = block.attn, x.shape[-1]
    weight, bias = attention.in_proj_weight[-width:], attention.in_proj_bias[-width:]
    return attention.out_proj(F.linear(block.ln_1(x), weight, bias))
