"""SAM 2's image encoder: a Hiera trunk and a feature pyramid (Ryali et al., 2023; Ravi et al., 2024, section 4).

B images, S their side in pixels, H W size of a feature map, D width of a block, G heads. Modules have the names that published
checkpoints use below `image_encoder.`.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from segment_anything.modeling.image_encoder import window_partition, window_unpartition
from torch import Tensor, nn


@dataclass(frozen=True)
class HieraSize:
    """Settings of a trunk; each stage after the first halves the map and doubles width and heads."""

    width: int  # of the first stage
    heads: int  # of the first stage
    stages: tuple[int, ...]  # blocks of each stage
    global_blocks: tuple[int, ...]  # indices of the blocks that attend to the whole map
    windows: tuple[int, ...] = (8, 4, 14, 7)  # side of the attention windows of each stage
    background: int = 7  # side of the position embedding that is interpolated to the map


# SAM 2 and SAM 2.1. No tensor's shape depends on the global blocks or on the windows of the later stages.
SIZES = {
    "tiny": HieraSize(96, 1, (1, 2, 7, 2), (5, 7, 9)),
    "small": HieraSize(96, 1, (1, 2, 11, 2), (7, 10, 13)),
    "base_plus": HieraSize(112, 2, (2, 3, 16, 3), (12, 16, 20), background=14),
    "large": HieraSize(144, 2, (2, 6, 36, 4), (23, 33, 43), windows=(8, 4, 16, 8)),
}


def find_size(state: Mapping[str, Tensor]) -> str:
    """Find the name of the published size that a state dict of SAM 2 has.

    Raises:
        ValueError: the trunk is none of the published sizes.
    """
    prefix = "image_encoder.trunk."
    patches = state.get(f"{prefix}patch_embed.proj.weight")
    width = patches.shape[0] if patches is not None and patches.ndim else 0
    depth = len({name[len(prefix) :].split(".")[1] for name in state if name.startswith(f"{prefix}blocks.")})
    for name, size in SIZES.items():
        if (width, depth) == (size.width, sum(size.stages)):
            return name
    allowed = ", ".join(f"{name} ({size.width}, {sum(size.stages)})" for name, size in SIZES.items())
    raise ValueError(f"found a trunk of width {width} with {depth} blocks, expected one of {allowed}")


class _Attention(nn.Module):
    def __init__(self, width: int, out: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * out), nn.Linear(out, out)

    def forward(self, x: Tensor, halve: bool) -> Tensor:
        """Attend within x [B, H, W, D]; with `halve` the queries, and so the result, have half its height and width."""
        query, key, value = self.qkv(x).chunk(3, dim=-1)
        if halve:
            query = _halve(query)
        heads = [part.flatten(1, 2).unflatten(2, (self.heads, -1)).transpose(1, 2) for part in (query, key, value)]
        attended = F.scaled_dot_product_attention(*heads).transpose(1, 2)  # [B, H W, G, D / G]
        return self.proj(attended.reshape(query.shape))


class _MLP(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(width, 4 * width), nn.Linear(4 * width, width)])

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[1](F.gelu(self.layers[0](x)))


class _Block(nn.Module):
    """A block; one with another output width is the first of its stage and halves the map."""

    def __init__(self, width: int, out: int, heads: int, window: int) -> None:
        super().__init__()
        self.window, self.halves = window, width != out
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(out, eps=1e-6)
        self.attn, self.mlp = _Attention(width, out, heads), _MLP(out)
        if self.halves:
            self.proj = nn.Linear(width, out)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block to x [B, H, W, D]."""
        normed = self.norm1(x)
        shortcut = _halve(self.proj(normed)) if self.halves else x
        if self.window:
            windows, padded = window_partition(normed, self.window)
            shrink = 2 if self.halves else 1
            size = (padded[0] // shrink, padded[1] // shrink)
            attended = window_unpartition(self.attn(windows, self.halves), self.window // shrink, size, shortcut.shape[1:3])
        else:
            attended = self.attn(normed, self.halves)
        x = shortcut + attended
        return x + self.mlp(self.norm2(x))


def _halve(x: Tensor) -> Tensor:
    """Take the maximum of each 2 x 2 square of x [B, H, W, D]."""
    return F.max_pool2d(x.permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1)


class _Trunk(nn.Module):
    def __init__(self, size: HieraSize) -> None:
        super().__init__()
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, size.width, kernel_size=7, stride=4, padding=3)})
        self.pos_embed = nn.Parameter(torch.zeros(1, size.width, size.background, size.background))
        self.pos_embed_window = nn.Parameter(torch.zeros(1, size.width, size.windows[0], size.windows[0]))
        self.blocks = nn.ModuleList()
        self.ends: list[int] = []  # index of the last block of each stage
        width = size.width
        for stage, count in enumerate(size.stages):
            for place in range(count):
                out, index = size.width * 2**stage, len(self.blocks)
                # The first block of a stage still sees the previous stage's map, and has its window.
                window = size.windows[stage - 1 if stage and not place else stage]
                window = 0 if index in size.global_blocks else window
                self.blocks.append(_Block(width, out, size.heads * 2**stage, window))
                width = out
            self.ends.append(len(self.blocks) - 1)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Compute the last feature map [B, D, H, W] of every stage."""
        x = self.patch_embed["proj"](images)
        tiles = [side // window for side, window in zip(x.shape[2:], self.pos_embed_window.shape[2:], strict=True)]
        x = x + F.interpolate(self.pos_embed, x.shape[2:], mode="bicubic") + self.pos_embed_window.tile(tiles)
        x, found = x.permute(0, 2, 3, 1), []
        for index, block in enumerate(self.blocks):
            x = block(x)
            if index in self.ends:
                found.append(x.permute(0, 3, 1, 2))
        return found


class Sam2Encoder(nn.Module):
    """Encode images as SAM 2 does, without its memory of earlier frames.

    Args:
        size: of the trunk.
        width: of the resulting features.
    """

    def __init__(self, size: HieraSize, width: int = 256) -> None:
        super().__init__()
        widths = [size.width * 2**stage for stage in reversed(range(len(size.stages)))]
        levels = (nn.ModuleDict({"conv": nn.Conv2d(wide, width, kernel_size=1)}) for wide in widths)
        self.trunk, self.neck = _Trunk(size), nn.ModuleDict({"convs": nn.ModuleList(levels)})

    def forward(self, images: Tensor, precision: torch.dtype | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Encode normalised images [B, 3, S, S].

        Args:
            images: on the device of the encoder.
            precision: autocast dtype of the trunk; None for float32.

        Returns:
            Features [B, width, S / n, S / n], float32, for n = 4, 8 and 16. Only those of the last include the coarser stage.
        """
        with torch.autocast(images.device.type, precision, enabled=precision is not None):
            maps = self.trunk(images)
        convs = [conv for level in self.neck["convs"].children() for conv in level.children()]
        coarse, *others = [conv(x.float()) for conv, x in zip(convs, reversed(maps), strict=True)]
        embedding = others[0] + F.interpolate(coarse, scale_factor=2.0, mode="nearest")
        return others[2], others[1], embedding
