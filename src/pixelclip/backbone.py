"""CLIP's image tower as a map from images to dense features, on open_clip's modules (PixelCLIP, section 3.1).

B images, P patches, D width of the tower, C embedding width, h w feature grid.
"""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from open_clip.transformer import ResidualAttentionBlock, VisionTransformer
from torch import Tensor, nn

Residual = Literal["cls", "patch"]


class Backbone(nn.Module):
    """Dense features of a CLIP ViT.

    All blocks but the last run as they are; of the last only the value path is used, so that a patch keeps its own
    content instead of a mixture of all patches (MaskCLIP).

    Args:
        visual: open_clip's `VisionTransformer`, pooled at the CLS token.
        residual: what is added to the last block's value path: the CLS token, broadcast to every patch (an oddity of
            the reference, kept), or each patch's own token (MaskCLIP).

    Raises:
        ValueError: the tower is of another kind.
    """

    def __init__(self, visual: nn.Module, residual: Residual = "cls") -> None:
        super().__init__()
        if not isinstance(visual, VisionTransformer):
            raise ValueError(f"image tower {type(visual).__name__} is not supported: open_clip's VisionTransformer is needed")
        last: Any = visual.transformer.resblocks[-1]
        if (
            visual.pool_type != "tok"
            or visual.attn_pool is not None
            or visual.final_ln_after_pool
            or not isinstance(last, ResidualAttentionBlock)
        ):
            raise ValueError("this ViT is not supported: pooling at the CLS token and plain attention blocks are needed")
        self.visual = visual
        self.residual = residual

    @property
    def patch_size(self) -> tuple[int, int]:
        """Height and width of a patch in pixels."""
        height, width = self.visual.conv1.kernel_size
        return height, width

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters that PixelCLIP trains in a ViT: all attention, and the position embedding."""
        trained = {"positional_embedding": self.visual.positional_embedding}
        for i, block in enumerate(self.visual.transformer.resblocks):
            for name, parameter in block.attn.named_parameters():
                trained[f"transformer.resblocks.{i}.attn.{name}"] = parameter
        return {f"visual.{name}": parameter for name, parameter in trained.items()}

    def image_features(self, images: Tensor) -> Tensor:
        """CLIP's own global features [B, C] of images [B, 3, H, W] of any size, not normalised."""
        pooled, _ = self.visual._pool(self.visual.transformer(self._embed(images)[0]))
        return pooled if self.visual.proj is None else pooled @ self.visual.proj

    def forward(self, images: Tensor) -> Tensor:
        """Dense features.

        Args:
            images: [B, 3, H, W], normalised; H and W at least one patch, they need not be equal.

        Returns:
            [B, C, h, w] with h = H // patch, w = W // patch; not normalised.
        """
        x, (height, width) = self._embed(images)  # [B, 1 + P, D]
        *blocks, last = self.visual.transformer.resblocks
        for block in blocks:
            x = block(x)
        y = last.ls_1(_value_path(last, x[:, 1:]))  # [B, P, D]
        y = y + (x[:, :1] if self.residual == "cls" else x[:, 1:])
        y = y + last.ls_2(last.mlp(last.ln_2(y)))
        y = self.visual.ln_post(y)
        if self.visual.proj is not None:
            y = y @ self.visual.proj
        return y.transpose(1, 2).unflatten(2, (height, width))

    def _embed(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        x = self.visual.conv1(images)  # [B, D, h, w]
        grid = (x.shape[2], x.shape[3])
        x = x.flatten(2).transpose(1, 2)  # [B, P, D]
        cls = self.visual.class_embedding.to(x.dtype).expand(len(x), 1, -1)
        x = torch.cat([cls, x], dim=1) + _resize_position(self.visual, grid).to(x.dtype)
        return self.visual.ln_pre(x), grid


def check_side(setting: str, side: int, backbone: Backbone) -> None:
    """Raises ValueError, in the name of `setting`, when a side in pixels holds not even one patch."""
    patch = max(backbone.patch_size)
    if side < patch:
        raise ValueError(f"{setting} {side} is smaller than one patch of this CLIP ({patch} pixels)")


def _value_path(block: Any, x: Tensor) -> Tensor:
    """`out_proj(v_proj(ln_1(x)))` of an attention block: x [B, P, D] -> [B, P, D]."""
    attention, width = block.attn, x.shape[-1]
    weight, bias = attention.in_proj_weight[-width:], attention.in_proj_bias[-width:]
    return attention.out_proj(F.linear(block.ln_1(x), weight, bias))


def _resize_position(visual: Any, grid: tuple[int, int]) -> Tensor:
    """The position embedding [1 + h * w, D] for a grid (h, w), bicubic."""
    position, native = visual.positional_embedding, tuple(visual.grid_size)
    if grid == native:
        return position
    maps = position[1:].T.unflatten(1, native)[None]  # [1, D, h0, w0]
    maps = F.interpolate(maps, size=grid, mode="bicubic", align_corners=False)
    return torch.cat([position[:1], maps[0].flatten(1).T])
