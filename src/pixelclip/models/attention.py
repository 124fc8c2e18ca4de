"""Run a transformer block of open_clip without the copies of `nn.MultiheadAttention`."""

from typing import Any

import torch.nn.functional as F
from open_clip.transformer import ResidualAttentionBlock
from torch import Tensor


def run_block(block: Any, x: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return `block(x, attn_mask=mask)`, with queries, keys and values from one product over contiguous rows.

    `nn.MultiheadAttention` transposes positions to the front, and a linear layer on that view can become P products with a
    copy of the weight each: in bfloat16 on a CPU this took 30 times as long as the product itself (docs/experiments.md).

    Args:
        block: a block of `open_clip.transformer.Transformer`; classes other than `ResidualAttentionBlock` are simply called.
        x: [B, P, D]: B rows, P positions, D width (E heads below).
        mask: [P, P], added to the attention logits.

    Returns:
        [B, P, D].
    """
    if type(block) is not ResidualAttentionBlock or hasattr(block, "ln_1_kv"):
        return block(x, attn_mask=mask)
    attention = block.attn
    projected = F.linear(block.ln_1(x), attention.in_proj_weight, attention.in_proj_bias)
    query, key, value = projected.unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)  # each [B, E, P, D / E]
    attended = F.scaled_dot_product_attention(query, key, value, None if mask is None else mask.to(query.dtype))
    x = x + block.ls_1(attention.out_proj(attended.transpose(1, 2).flatten(2)))
    return x + block.ls_2(block.mlp(block.ln_2(x)))
