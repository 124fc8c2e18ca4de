"""Dense features from CLIP's image tower, on the modules of open_clip (PixelCLIP, section 3.1).

B images, P patches, D tower width, C embedding width, h w feature grid.
"""

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from open_clip.timm_model import TimmModel
from open_clip.transformer import ResidualAttentionBlock, VisionTransformer
from timm.models.convnext import ConvNeXt
from torch import Tensor, nn

from pixelclip.models.attention import run_block

Residual = Literal["cls", "patch"]


def full_precision(x: Tensor) -> Tensor:
    """Convert autocast's half-precision results to float32; keep float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class Backbone(nn.Module):
    """Dense features of a CLIP ViT or ConvNeXt.

    In a ViT, the last block uses only its value path, so that a patch keeps its own content instead of a mixture of all
    patches (MaskCLIP). In a ConvNeXt, the head's norm and the projection are applied at every grid position, without pooling.

    Args:
        visual: open_clip's `VisionTransformer` pooled at the CLS token, or its `TimmModel` around a ConvNeXt.
        residual: token added to a ViT's last value path: the CLS token (reference implementation) or the patch's own token
            (MaskCLIP).
        precision: autocast's dtype; features are returned in float32 or wider.

    Raises:
        ValueError: the tower is not supported.
    """

    def __init__(self, visual: nn.Module, residual: Residual = "cls", precision: torch.dtype | None = None) -> None:
        super().__init__()
        if isinstance(visual, VisionTransformer):
            _check_vit(visual)
        elif isinstance(visual, TimmModel):
            _check_convnext(visual)
        else:
            raise ValueError(
                f"image tower {type(visual).__name__} is not supported; use open_clip's VisionTransformer or ConvNeXt"
            )
        self.visual = visual
        self.residual = residual
        self.precision = precision

    @property
    def patch_size(self) -> tuple[int, int]:
        """Height and width in pixels of one position of the feature grid."""
        if isinstance(self.visual, TimmModel):
            stride = int(self.visual.trunk.feature_info[-1]["reduction"])
            return stride, stride
        height, width = self.visual.conv1.kernel_size
        return height, width

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """Return the trainable parameters: attention and position embedding of a ViT, or the whole tower of a ConvNeXt."""
        whole, parameters = isinstance(self.visual, TimmModel), self.visual.named_parameters()
        trained = {name: p for name, p in parameters if whole or name == "positional_embedding" or ".attn." in name}
        return {f"visual.{name}": parameter for name, parameter in trained.items()}

    def image_features(self, images: Tensor) -> Tensor:
        """Return CLIP's global features [B, C] of images [B, 3, H, W] of any size, not normalised."""
        with self._autocast(images):
            if isinstance(self.visual, TimmModel):
                return full_precision(self.visual(images))
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
            convnext = isinstance(self.visual, TimmModel)
            dense = _dense_convnext(self.visual, images) if convnext else _dense_vit(self.visual, images, self.residual)
        return full_precision(dense)

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
    cls = visual.class_embedding.to(x.dtype).expand(len(x), 1, -1)
    x = torch.cat([cls, x], dim=1) + _resize_position(visual, grid).to(x.dtype)
    return visual.ln_pre(x), grid


def _check_vit(visual: Any) -> None:
    if (
        visual.pool_type != "tok"
        or visual.attn_pool is not None
        or visual.final_ln_after_pool
        or not isinstance(visual.transformer.resblocks[-1], ResidualAttentionBlock)
    ):
        raise ValueError("this ViT is not supported: it must pool at the CLS token and end in a plain attention block")


def _check_convnext(visual: Any) -> None:
    trunk = visual.trunk
    if not isinstance(trunk, ConvNeXt):
        raise ValueError(f"image tower {type(trunk).__name__} is not supported; the only supported tower of timm is ConvNeXt")
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


def _resize_position(visual: Any, grid: tuple[int, int]) -> Tensor:
    """Resize the position embedding to a grid (h, w) bicubically: [1 + h * w, D]."""
    position, native = visual.positional_embedding, tuple(visual.grid_size)
    if grid == native:
        return position
    maps = position[1:].T.unflatten(1, native)[None]  # [1, D, h0, w0]
    maps = F.interpolate(maps, size=grid, mode="bicubic", align_corners=False)
    return torch.cat([position[:1], maps[0].flatten(1).T])
