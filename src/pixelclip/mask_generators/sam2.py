"""SAM 2 and 2.1 for single images: what they need of the published checkpoints (Ravi et al., 2024)."""

import torch
from segment_anything.modeling import PromptEncoder
from torch import Tensor, nn

from pixelclip.mask_generators.sam2_decoder import Sam2MaskDecoder
from pixelclip.mask_generators.sam2_encoder import HieraSize, Sam2Encoder

_STRIDE = 16  # of the embedding, in pixels
_MASK_CHANNELS = 16  # of prompts by masks, which are not used here

# Parts of the published models that single images without prompts by masks do not need. SAM 2.1 added `obj_ptr_tpos_proj` and
# `no_obj_embed_spatial`; its other tensors have the same names and shapes.
_UNUSED = {
    "memory_attention",
    "memory_encoder",
    "mask_downsample",
    "maskmem_tpos_enc",
    "no_mem_pos_enc",
    "no_obj_embed_spatial",
    "no_obj_ptr",
    "obj_ptr_proj",
    "obj_ptr_tpos_proj",
}
_UNUSED_HEAD = "sam_mask_decoder.pred_obj_score_head."


class Sam2(nn.Module):
    """SAM 2 or 2.1 without memory; modules have the names of the published checkpoints.

    Args:
        size: of the encoder's trunk.
        width: of the embedding.
        side: of the encoder's square input in pixels. No tensor's shape depends on it.
    """

    mask_threshold = 0.0

    def __init__(self, size: HieraSize, width: int = 256, side: int = 1024) -> None:
        super().__init__()
        self.side = side
        grid = (side // _STRIDE, side // _STRIDE)
        self.image_encoder = Sam2Encoder(size, width)
        self.sam_prompt_encoder = PromptEncoder(width, grid, (side, side), _MASK_CHANNELS)
        self.sam_mask_decoder = Sam2MaskDecoder(width)
        self.no_mem_embed = nn.Parameter(torch.zeros(1, 1, width))

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.no_mem_embed.device


def is_sam2(state: dict[str, Tensor]) -> bool:
    """Return whether a state dict has SAM 2's names."""
    return any(name.startswith(("image_encoder.trunk.", "sam_mask_decoder.")) for name in state)


def used_tensors(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Remove the tensors for videos from a state dict of SAM 2."""
    return {n: t for n, t in state.items() if n.partition(".")[0] not in _UNUSED and not n.startswith(_UNUSED_HEAD)}
