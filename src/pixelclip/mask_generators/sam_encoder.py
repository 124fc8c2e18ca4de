"""SAM's image encoder with attention computed in chunks (Kirillov et al., 2023).

B images or windows, H W patches of each, N = H W, G heads, C width of a head, M = B G.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from segment_anything.modeling import ImageEncoderViT
from segment_anything.modeling.image_encoder import get_rel_pos, window_partition, window_unpartition
from torch import Tensor

# Bytes of the attention logits computed at once on a CPU, so that they fit its cache. All logits of a global block take 768 MiB
# per image at the published size; the original keeps three such tensors (logits, with positions, weights).
_CPU_BYTES = 2**21


class ImageEncoder:
    """Compute the features of `segment_anything`'s encoder; bit-identical in float32 on a CPU.

    Args:
        encoder: encoder with relative positions, on its device.
        precision: autocast dtype of the blocks; None for float32.
    """

    def __init__(self, encoder: ImageEncoderViT, precision: torch.dtype | None = None) -> None:
        self.encoder, self.precision = encoder, precision
        self._positions = [self._tables(block) for block in encoder.blocks]

    def _tables(self, block: Any) -> tuple[Tensor, Tensor]:
        """Gather a block's relative position tables, [H, H, C] and [W, W, C]; the indexing synchronises with a GPU."""
        grid = self.encoder.img_size // self.encoder.patch_embed.proj.kernel_size[0]
        side = block.window_size or grid
        return get_rel_pos(side, side, block.attn.rel_pos_h), get_rel_pos(side, side, block.attn.rel_pos_w)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Encode images [B, 3, S, S] from `Sam.preprocess` as features [B, C', S / patch, S / patch], float32."""
        encoder = self.encoder
        with torch.autocast(images.device.type, self.precision, enabled=self.precision is not None):
            x = encoder.patch_embed(images)
            if encoder.pos_embed is not None:
                x = x + encoder.pos_embed
            for block, positions in zip(encoder.blocks, self._positions, strict=True):
                x = _run_block(block, x, positions)
        return encoder.neck(x.float().permute(0, 3, 1, 2))


def _run_block(block: Any, x: Tensor, positions: tuple[Tensor, Tensor]) -> Tensor:
    """Apply a block to x [B, H, W, D]."""
    size = x.shape[1:3]
    attend = partial(_attend, block.attn, positions=positions)
    if block.window_size > 0:
        windows, padded = window_partition(block.norm1(x), block.window_size)
        x = x + window_unpartition(attend(windows), block.window_size, padded, size)
    else:
        x = x + attend(block.norm1(x))
    return x + block.mlp(block.norm2(x))


def _attend(attention: Any, x: Tensor, positions: tuple[Tensor, Tensor]) -> Tensor:
    """Apply attention with decomposed relative positions to x [B, H, W, D]."""
    batch, height, width, _ = x.shape
    parts = attention.qkv(x).reshape(batch, height * width, 3, attention.num_heads, -1).permute(2, 0, 3, 1, 4)
    query, key, value = parts.reshape(3, batch * attention.num_heads, height * width, -1).unbind(0)  # each [M, N, C]
    rows, columns = (table.to(query.dtype) for table in positions)
    grid = query.unflatten(1, (height, width))
    by_row = torch.einsum("mhwc,hkc->mhwk", grid, rows)
    by_column = torch.einsum("mhwc,wkc->mhwk", grid, columns)
    attended = (_on_gpu if x.is_cuda else _on_cpu)(query, key, value, by_row, by_column)
    attended = attended.view(batch, attention.num_heads, height, width, -1).permute(0, 2, 3, 1, 4)
    return attention.proj(attended.reshape(batch, height, width, -1))


def _on_cpu(query: Tensor, key: Tensor, value: Tensor, by_row: Tensor, by_column: Tensor) -> Tensor:
    """Compute attention [M, N, C] a few rows at a time; `by_row`, `by_column` [M, H, W, H or W] add to the logits."""
    attended = torch.empty_like(query)
    query = query * query.shape[2] ** -0.5
    (height, width), count = by_row.shape[1:3], key.shape[1]
    at_once = max(1, _CPU_BYTES // (count * count * query.itemsize))
    step = max(1, _CPU_BYTES // (width * count * query.itemsize))
    for first in range(0, len(query), at_once):
        some = slice(first, first + at_once)
        for top in range(0, height, step):
            band, patches = slice(top, top + step), slice(top * width, (top + step) * width)
            logits = query[some, patches] @ key[some].transpose(1, 2)
            placed = logits.view(len(logits), -1, width, height, width)
            placed.add_(by_row[some, band, :, :, None]).add_(by_column[some, band, :, None, :])
            torch.bmm(logits.softmax(dim=-1), value[some], out=attended[some, patches])
    return attended


def _on_gpu(query: Tensor, key: Tensor, value: Tensor, by_row: Tensor, by_column: Tensor) -> Tensor:
    """Compute `_on_cpu` with a fused kernel; the position terms are its attention mask."""
    placed = (by_row[..., None] + by_column[..., None, :]).flatten(3).flatten(1, 2)  # [M, N, N]
    return F.scaled_dot_product_attention(query[None], key[None], value[None], placed[None])[0]
