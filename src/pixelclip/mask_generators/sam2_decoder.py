"""SAM 2's mask decoder for many points of one image (Ravi et al., 2024, section 4).

P points, S = h w image tokens, C embedding width.
"""

import torch
from segment_anything.modeling import MaskDecoder, PromptEncoder, TwoWayTransformer
from segment_anything.modeling.mask_decoder import MLP
from torch import Tensor, nn

from pixelclip.mask_generators.sam_decoder import PointDecoder

_LAYERS, _HEADS, _MLP_WIDTH, _IOU_WIDTH, _MASKS = 2, 8, 2048, 256, 3  # the same in every published model


class Sam2MaskDecoder(MaskDecoder):  # type: ignore[misc]  # segment_anything has no types
    """Weights of SAM 2's decoder: SAM's, a token for the object's presence, and projections of the encoder's finer features.

    Modules have the names that published checkpoints use below `sam_mask_decoder.`.
    """

    def __init__(self, width: int) -> None:
        transformer = TwoWayTransformer(depth=_LAYERS, embedding_dim=width, num_heads=_HEADS, mlp_dim=_MLP_WIDTH)
        for layer in transformer.layers:
            layer.mlp = MLP(width, _MLP_WIDTH, width, 2)  # the same function as SAM's, but its tensors have other names
        super().__init__(
            transformer_dim=width,
            transformer=transformer,
            num_multimask_outputs=_MASKS,
            iou_head_hidden_dim=_IOU_WIDTH,
        )
        self.iou_prediction_head.sigmoid_output = True
        self.obj_score_token = nn.Embedding(1, width)
        self.conv_s0 = nn.Conv2d(width, width // 8, kernel_size=1)
        self.conv_s1 = nn.Conv2d(width, width // 4, kernel_size=1)


class Sam2PointDecoder(PointDecoder):
    """Decode points of one image.

    Args:
        prompts: prompt encoder.
        decoder: mask decoder.
        embedding: [C, h, w] of the image.
        fine: features of the image from `conv_s0` [C / 8, 4h, 4w] and `conv_s1` [C / 4, 2h, 2w].
    """

    def __init__(
        self, prompts: PromptEncoder, decoder: Sam2MaskDecoder, embedding: Tensor, fine: tuple[Tensor, Tensor]
    ) -> None:
        super().__init__(prompts, decoder, embedding)
        self.fine = fine

    def _fixed_tokens(self) -> Tensor:
        # The original puts the object token first. Attention does not depend on the order of tokens, so that those of IoU and
        # masks can keep SAM's places.
        return torch.cat([super()._fixed_tokens(), self.decoder.obj_score_token.weight])

    def _pixel_features(self, keys: Tensor) -> Tensor:
        enlarge, norm, activate, enlarge_again, activate_again = self.decoder.output_upscaling
        quarter, half = self.fine
        features = activate(norm(enlarge(keys.transpose(1, 2).unflatten(2, self.grid)) + half))
        return activate_again(enlarge_again(features) + quarter)
