"""The mask decoder and the loss on what it gives, some maps at a time (PixelCLIP, section 3.3; method.md, steps 8 and 9).

B images, K concepts, M similarity maps, h w feature grid, H W mask grid.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from pixelclip.backbone import full_precision

_PLACES_AT_ONCE = {"cpu": 3200, "cuda": 2**18}
"""Places of feature grids that are decoded at once: on a CPU what its caches hold (docs/experiments.md), on a GPU a few
hundred MiB an activation."""


class _DoubleConv(nn.Module):
    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.double_conv = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.GroupNorm(groups, channels),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.GroupNorm(groups, channels),
            nn.ReLU(inplace=True),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.double_conv(x)


class Decoder(nn.Module):
    """Sharpens one similarity map at a time; used in training only."""

    def __init__(self) -> None:
        super().__init__()
        self.conv0 = nn.Conv2d(1, 64, 3, padding=1)
        self.up1 = nn.ConvTranspose2d(64, 64, 2, stride=2)
        self.conv1 = _DoubleConv(64, groups=4)
        self.up2 = nn.ConvTranspose2d(64, 32, 2, stride=2)
        self.conv2 = _DoubleConv(32, groups=2)
        self.proj = nn.Conv2d(32, 1, 3, padding=1)

    def forward(self, maps: Tensor) -> Tensor:
        """Turns similarity maps [M, 1, h, w] into mask logits [M, 1, 4h, 4w]."""
        return self.proj(self.conv2(self.up2(self.conv1(self._first(maps)))))

    def _first(self, maps: Tensor) -> Tensor:
        """`up1(conv0(maps))`: [M, 64, 2h, 2w]. Nothing is between the two: one convolution with 4 * 64 outputs."""
        kernel = torch.einsum("iuv,ioab->oabuv", self.conv0.weight[:, 0], self.up1.weight)  # [64, 2, 2, 3, 3]
        ones, twos = self.conv0.bias, self.up1.bias
        assert ones is not None and twos is not None
        bias = torch.einsum("i,ioab->oab", ones, self.up1.weight) + twos[:, None, None]
        quarters = F.conv2d(maps, kernel.flatten(0, 2)[:, None], bias.flatten(), padding=1)  # [M, 64 * 2 * 2, h, w]
        # Channels last from here on: the same numbers, about 1.6 times as fast on a CPU (docs/experiments.md). The weights
        # stay as they are, because a fused optimizer takes weight, gradient and moments as flat memory of one layout.
        return F.pixel_shuffle(quarters, 2).contiguous(memory_format=torch.channels_last)


def decode(decoder: Decoder, maps: Tensor, size: tuple[int, int], precision: torch.dtype | None = None) -> Tensor:
    """Similarity maps [M, h, w] -> mask logits [M, H, W]; `size` is (H, W), `precision` that of autocast."""
    with torch.autocast(maps.device.type, precision, enabled=precision is not None):
        logits = decoder(maps[:, None])  # [M, 1, 4h, 4w]
    return F.interpolate(full_precision(logits), size=size, mode="bilinear", align_corners=False)[:, 0]


def mask_loss(logits: Tensor, targets: Tensor, covered: Tensor, terms: Tensor | None = None) -> Tensor:
    """Binary cross-entropy over all concepts at the covered pixels.

    Args:
        logits: [B, K, H, W].
        targets: [B, K, H, W], bool.
        covered: [B, H, W], bool: pixels inside at least one mask.
        terms: [], what the sum is divided by when these images are only a part of the batch; else their own number.

    Returns:
        A scalar; 0, with zero gradients, when no pixel is covered.
    """
    weight = covered[:, None].to(logits.dtype).expand_as(logits)
    total = F.binary_cross_entropy_with_logits(logits, targets.to(logits.dtype), weight=weight, reduction="sum")
    return total / (covered.sum() * logits.shape[1] if terms is None else terms).clamp_min(1)


def decoded_loss(
    decoder: Decoder,
    maps: Tensor,
    targets: Tensor,
    covered: Tensor,
    image_index: Tensor,
    terms: Tensor,
    precision: torch.dtype | None = None,
    shown: int = 0,
) -> tuple[Tensor, Tensor]:
    """Decodes similarity maps and takes their loss, without ever holding all of what is in between.

    Every map's loss is a summand of its own. So gradients of maps and decoder are found here and now, some maps at a time,
    and `backward` only scales them: what one map leaves behind is gone before the next is decoded.

    Args:
        decoder: the decoder.
        maps: [M, h, w].
        targets: [M, H, W], bool.
        covered: [B, H, W], bool: pixels inside at least one mask.
        image_index: [M], the image of each map.
        terms: [], what the sum is divided by; 0 counts as 1.
        precision: of autocast.
        shown: of how many maps, from the first on, the logits are wanted.

    Returns:
        The loss, a scalar that can be differentiated once, and logits [shown, H, W] without gradient.
    """
    return _DecodedLoss.apply(decoder, targets, covered, image_index, terms, precision, shown, maps, *decoder.parameters())


class _DecodedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *given: Any) -> tuple[Tensor, Tensor]:
        decoder, targets, covered, image_index, terms, precision, shown, maps, *parameters = given
        size = (targets.shape[1], targets.shape[2])
        total = full_precision(maps.new_zeros(()))
        kept, of_maps = [targets.new_zeros(0, *size, dtype=total.dtype)], []
        sums = [torch.zeros_like(parameter) for parameter in parameters]
        count = max(1, _PLACES_AT_ONCE.get(maps.device.type, 2**18) // maps[:1].numel()) if len(maps) else 1
        for first in range(0, len(maps), count):
            some = slice(first, first + count)
            with torch.enable_grad():
                part = maps[some].detach().requires_grad_()
                logits = decode(decoder, part, size, precision)
                loss = mask_loss(logits[:, None], targets[some, None], covered[image_index[some]], terms)
            of_part, *gradients = torch.autograd.grad(loss, [part, *parameters])
            of_maps.append(of_part)
            torch._foreach_add_(sums, gradients)
            total += loss.detach()
            if first < shown:
                kept.append(logits.detach()[: shown - first])
        ctx.save_for_backward(torch.cat(of_maps) if of_maps else torch.zeros_like(maps), *sums)
        logits = torch.cat(kept)
        ctx.mark_non_differentiable(logits)
        return total, logits

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor, _logits: Tensor) -> Any:
        found = torch._foreach_mul(list(ctx.saved_tensors), scale)
        return (*[None] * 7, *found)
