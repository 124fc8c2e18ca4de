"""SAM's mask decoder for many points of one image: shared terms are computed once, logits only of accepted masks.

P points, T tokens per point, S = h w image tokens, C embedding width, G heads. Results are bit-identical to those of
`segment_anything.modeling.MaskDecoder`, with the same sums and products in the same order.
"""

import math
from collections.abc import Iterator

import torch
from segment_anything.modeling import MaskDecoder, PromptEncoder
from segment_anything.modeling.transformer import Attention, TwoWayAttentionBlock
from torch import Tensor

# Bytes of the image tokens decoded at once on a CPU, so that they fit its cache; allocating larger chunks takes longer than
# computing them. At the published size this is 4 points; products of fewer or an odd number of points differ in the last bits.
_CPU_BYTES = 2**24


class PointDecoder:
    """Decode points of one image.

    Args:
        prompts: prompt encoder.
        decoder: mask decoder.
        embedding: [C, h, w] of the image.
    """

    def __init__(self, prompts: PromptEncoder, decoder: MaskDecoder, embedding: Tensor) -> None:
        self.prompts, self.decoder = prompts, decoder
        self.grid = embedding.shape[1:]
        nothing = self.prompts.no_mask_embed.weight.reshape(1, -1, 1, 1)
        self.keys = (embedding[None] + nothing).flatten(2).transpose(1, 2)  # [1, S, C]
        self.position = self.prompts.get_dense_pe().flatten(2).transpose(1, 2)
        with_position = self.keys + self.position
        first = self.decoder.transformer.layers[0]
        self.first_keys = _heads(first.cross_attn_token_to_image, first.cross_attn_token_to_image.k_proj(with_position))
        self.first_values = _heads(first.cross_attn_token_to_image, first.cross_attn_token_to_image.v_proj(self.keys))
        self.first_queries = _heads(first.cross_attn_image_to_token, first.cross_attn_image_to_token.q_proj(with_position))

    def __call__(self, points: Tensor, at_once: int, threshold: float) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Decode points and yield the masks whose predicted IoU exceeds a threshold.

        Args:
            points: [P, 2], x y in the encoder's input; each point is a separate prompt.
            at_once: maximum number of points decoded at once; a CPU's cache may reduce it.
            threshold: exclusive; 0 keeps all.

        Yields:
            For a chunk of points: logits [N, 4h, 4w], predicted IoU [N] and index of the point [N] of each mask.
        """
        step = at_once if points.is_cuda else min(at_once, max(4, _CPU_BYTES // self.keys.nbytes))
        for first in range(0, len(points), step):
            tokens, keys = self._attend(points[first : first + step])
            quality = self.decoder.iou_prediction_head(tokens[:, 0])[:, 1:]
            good = quality > threshold if threshold > 0 else torch.ones_like(quality, dtype=torch.bool)
            some = good.any(dim=1).nonzero()[:, 0]
            if len(some):
                # Compute all weights, and at least two points: other sizes change the last bits.
                drawn = some.expand(2) if len(some) == 1 else some
                logits = self._draw(self._weights(tokens)[drawn], keys[drawn])[: len(some)]
                yield logits[good[some]], quality[good], good.nonzero()[:, 0] + first

    def _attend(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Run the transformer; return tokens [P, T, C] and image tokens [P, S, C]."""
        labels = torch.ones(len(points), 1, dtype=torch.int, device=points.device)
        sparse = self.prompts._embed_points(points[:, None], labels, pad=True)
        start = torch.cat([self._fixed_tokens().expand(len(points), -1, -1), sparse], dim=1)
        transformer = self.decoder.transformer
        first, *others = transformer.layers
        tokens = self._tokens(first, start, start, self.first_keys, self.first_values)
        keys = self._keys(first, self.keys, self.first_queries, tokens, start)
        for layer in others:
            cross, back = layer.cross_attn_token_to_image, layer.cross_attn_image_to_token
            with_position = keys + self.position
            tokens = self._tokens(
                layer, tokens, start, _heads(cross, cross.k_proj(with_position)), _heads(cross, cross.v_proj(keys))
            )
            keys = self._keys(layer, keys, _heads(back, back.q_proj(with_position)), tokens, start)
        last = transformer.final_attn_token_to_image
        attended = _attention(
            last,
            _heads(last, last.q_proj(tokens + start)),
            _heads(last, last.k_proj(keys + self.position)),
            _heads(last, last.v_proj(keys)),
        )
        return transformer.norm_final_attn(tokens + attended), keys

    def _fixed_tokens(self) -> Tensor:
        """Return the tokens that do not depend on the point: of the predicted IoU, then of the four masks."""
        return torch.cat([self.decoder.iou_token.weight, self.decoder.mask_tokens.weight])

    @staticmethod
    def _tokens(layer: TwoWayAttentionBlock, tokens: Tensor, start: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Update the tokens in one block; keys and values come from the image."""
        if layer.skip_first_layer_pe:
            tokens = layer.self_attn(q=tokens, k=tokens, v=tokens)
        else:
            with_position = tokens + start
            tokens = tokens + layer.self_attn(q=with_position, k=with_position, v=tokens)
        tokens = layer.norm1(tokens)
        cross = layer.cross_attn_token_to_image
        tokens = layer.norm2(tokens + _attention(cross, _heads(cross, cross.q_proj(tokens + start)), keys, values))
        return layer.norm3(tokens + layer.mlp(tokens))

    @staticmethod
    def _keys(layer: TwoWayAttentionBlock, keys: Tensor, queries: Tensor, tokens: Tensor, start: Tensor) -> Tensor:
        """Update the image tokens in one block, with their precomputed queries."""
        back = layer.cross_attn_image_to_token
        attended = _attention(back, queries, _heads(back, back.k_proj(tokens + start)), _heads(back, back.v_proj(tokens)))
        return layer.norm4(attended.add_(keys))

    def _weights(self, tokens: Tensor) -> Tensor:
        """Compute the weights of each mask on pixel features, [P, 4, C / 8]; the first mask is unused."""
        networks = self.decoder.output_hypernetworks_mlps
        return torch.stack([network(tokens[:, 1 + i]) for i, network in enumerate(networks)], dim=1)

    def _draw(self, weights: Tensor, keys: Tensor) -> Tensor:
        """Compute logits [P, 3, 4h, 4w]."""
        features = self._pixel_features(keys)
        return (weights @ features.flatten(2)).unflatten(2, features.shape[2:])[:, 1:]

    def _pixel_features(self, keys: Tensor) -> Tensor:
        """Upscale image tokens [P, S, C] to pixel features [P, C / 8, 4h, 4w]."""
        features: Tensor = self.decoder.output_upscaling(keys.transpose(1, 2).unflatten(2, self.grid))
        return features


def _heads(attention: Attention, x: Tensor) -> Tensor:
    """Split [P, N, C] into heads: [P, G, N, C / G]."""
    return x.unflatten(2, (attention.num_heads, -1)).transpose(1, 2)


def _attention(attention: Attention, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Compute attention of projected inputs, and its output projection."""
    scores = (queries @ keys.transpose(2, 3)).div_(math.sqrt(queries.shape[3]))
    return attention.out_proj((scores.softmax(dim=-1) @ values).transpose(1, 2).flatten(2))
