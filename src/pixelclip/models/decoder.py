"""Mask decoder and its loss, computed in chunks of similarity maps (PixelCLIP, section 3.3).

B images, K concepts, M similarity maps, h w feature grid, H W mask grid.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from pixelclip.models.backbone import full_precision

_PIXELS_AT_ONCE = {"cpu": 3200, "cuda": 2**18}
"""Feature grid positions decoded at once. They fit a CPU's caches (docs/experiments.md); on a GPU an activation takes a few
hundred MiB."""


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
    """Upsample and refine similarity maps independently; used only in training."""

    def __init__(self) -> None:
        super().__init__()
        self.conv0 = nn.Conv2d(1, 64, 3, padding=1)
        self.up1 = nn.ConvTranspose2d(64, 64, 2, stride=2)
        self.conv1 = _DoubleConv(64, groups=4)
        self.up2 = nn.ConvTranspose2d(64, 32, 2, stride=2)
        self.conv2 = _DoubleConv(32, groups=2)
        self.proj = nn.Conv2d(32, 1, 3, padding=1)

    def forward(self, maps: Tensor) -> Tensor:
        """Decode similarity maps [M, 1, h, w] to mask logits [M, 1, 4h, 4w]."""
        return self.proj(self.conv2(self.up2(self.conv1(self._first(maps)))))

    def _first(self, maps: Tensor) -> Tensor:
        """Compute `up1(conv0(maps))`, [M, 64, 2h, 2w], as one convolution with 4 * 64 outputs, as no activation is between."""
        kernel = torch.einsum("iuv,ioab->oabuv", self.conv0.weight[:, 0], self.up1.weight)  # [64, 2, 2, 3, 3]
        conv_bias, up_bias = self.conv0.bias, self.up1.bias
        assert conv_bias is not None and up_bias is not None
        bias = torch.einsum("i,ioab->oab", conv_bias, self.up1.weight) + up_bias[:, None, None]
        quarters = F.conv2d(maps, kernel.flatten(0, 2)[:, None], bias.flatten(), padding=1)  # [M, 64 * 2 * 2, h, w]
        # Channels last is about 1.6 times as fast on a CPU, with equal results (docs/experiments.md). The weights keep their
        # layout, because a fused optimizer treats weight, gradient and moments as flat memory of one layout.
        return F.pixel_shuffle(quarters, 2).contiguous(memory_format=torch.channels_last)


def decode(decoder: Decoder, maps: Tensor, size: tuple[int, int], precision: torch.dtype | None = None) -> Tensor:
    """Decode similarity maps [M, h, w] to mask logits [M, H, W]; `size` is (H, W), `precision` autocast's dtype."""
    with torch.autocast(maps.device.type, precision, enabled=precision is not None):
        logits = decoder(maps[:, None])  # [M, 1, 4h, 4w]
    return F.interpolate(full_precision(logits), size=size, mode="bilinear", align_corners=False)[:, 0]


def mask_loss(logits: Tensor, targets: Tensor, covered: Tensor, terms: Tensor | None = None) -> Tensor:
    """Average binary cross-entropy over all concepts at the covered pixels.

    Args:
        logits: [B, K, H, W].
        targets: [B, K, H, W], bool.
        covered: [B, H, W], pixels inside at least one mask, bool, or their weights.
        terms: [], divisor of the sum when these images are part of a larger batch; by default the number of summed terms.

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
    map_weights: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Decode similarity maps and compute their loss, without keeping all activations in memory.

    The loss is a sum over maps. The forward pass therefore computes the gradients of maps and decoder chunk by chunk and frees
    a chunk's activations before it decodes the next; `backward` only scales the gradients.

    Args:
        decoder: the decoder.
        maps: [M, h, w].
        targets: [M, H, W], bool.
        covered: [B, H, W], bool, pixels inside at least one mask.
        image_index: [M], image of each map.
        terms: [], divisor of the sum; 0 is treated as 1.
        precision: autocast's dtype.
        shown: number of maps, from the first, whose logits are returned.
        map_weights: [M], factor on the summands of each map; by default 1.

    Returns:
        The loss, a scalar that can be differentiated once, and the logits [shown, H, W] without gradient.
    """
    maps_of_loss = (targets, covered, image_index, map_weights)
    return _DecodedLoss.apply(decoder, *maps_of_loss, terms, precision, shown, maps, *decoder.parameters())


class _DecodedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        decoder, targets, covered, image_index, map_weights, terms, precision, shown, maps, *parameters = inputs
        size = (targets.shape[1], targets.shape[2])
        total = full_precision(maps.new_zeros(()))
        shown_logits, map_gradients = [targets.new_zeros(0, *size, dtype=total.dtype)], []
        gradient_sums = [torch.zeros_like(parameter) for parameter in parameters]
        chunk_size = max(1, _PIXELS_AT_ONCE.get(maps.device.type, 2**18) // maps[:1].numel()) if len(maps) else 1
        for first in range(0, len(maps), chunk_size):
            chunk = slice(first, first + chunk_size)
            with torch.enable_grad():
                chunk_maps = maps[chunk].detach().requires_grad_()
                logits = decode(decoder, chunk_maps, size, precision)
                weights = covered[image_index[chunk]]
                if map_weights is not None:
                    weights = weights * map_weights[chunk, None, None]
                loss = mask_loss(logits[:, None], targets[chunk, None], weights, terms)
            map_gradient, *gradients = torch.autograd.grad(loss, [chunk_maps, *parameters])
            map_gradients.append(map_gradient)
            torch._foreach_add_(gradient_sums, gradients)
            total += loss.detach()
            if first < shown:
                shown_logits.append(logits.detach()[: shown - first])
        ctx.save_for_backward(torch.cat(map_gradients) if map_gradients else torch.zeros_like(maps), *gradient_sums)
        logits = torch.cat(shown_logits)
        ctx.mark_non_differentiable(logits)
        return total, logits

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor, _logits: Tensor) -> Any:
        return (*[None] * 8, *torch._foreach_mul(list(ctx.saved_tensors), scale))


def new_decoder(seed: int) -> Decoder:
    """Initialize a decoder from the seed without changing the global random state."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Decoder()
