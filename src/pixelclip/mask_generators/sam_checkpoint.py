"""Build and load a SAM of any size or a SAM 2, with settings inferred from names and shapes (Kirillov et al., 2023)."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer
from torch import Tensor, nn

from pixelclip.mask_generators.sam2 import Sam2, is_sam2, used_tensors
from pixelclip.mask_generators.sam2_encoder import SIZES, find_size
from pixelclip.models.weights import check_fit, check_tensors, named, read_weights, without_wrappers

_EXPECTED = (
    "expected the state dict of a Segment Anything model (SAM: vit_h, vit_l, vit_b or another size; "
    "SAM 2 or 2.1: tiny, small, base_plus or large)"
)
_DECODER_HEADS = 8  # the same in every published model; no shape depends on it


def build_sam(state: Mapping[str, Tensor]) -> Sam:
    """Build a SAM with the shapes of a state dict, on the meta device.

    The state dict may also be on the meta device. Pixel mean and deviation are the published values.

    Raises:
        ValueError: a tensor that determines a setting is missing, or its shape does not fit a SAM.
    """

    def shape(name: str, dimensions: int) -> tuple[int, ...]:
        if name not in state:
            raise ValueError(f"{name} is missing; found: {named(state)}")
        size = tuple(state[name].shape)
        if len(size) != dimensions or 0 in size:
            raise ValueError(f"{name} has shape {list(size)}, expected {dimensions} dimensions")
        return size

    def count(prefix: str) -> int:
        return len({name[len(prefix) :].split(".")[0] for name in state if name.startswith(prefix)})

    embed_dim, _, patch_size, _ = shape("image_encoder.patch_embed.proj.weight", 4)
    grid = shape("image_encoder.pos_embed", 4)[1]
    relative = [shape(f"image_encoder.blocks.{i}.attn.rel_pos_h", 2) for i in range(count("image_encoder.blocks."))]
    windows = [(length + 1) // 2 for length, _ in relative]  # in patches; as large as the grid in a global block
    head_dim = relative[0][1] if relative else embed_dim
    prompt_dim = shape("prompt_encoder.no_mask_embed.weight", 2)[1]
    if embed_dim % head_dim or prompt_dim % (2 * _DECODER_HEADS):
        raise ValueError(
            f"found widths {embed_dim} and {prompt_dim}, expected multiples of {head_dim} and {2 * _DECODER_HEADS}"
        )
    with torch.device("meta"):
        encoder = ImageEncoderViT(
            img_size=grid * patch_size,
            patch_size=patch_size,
            embed_dim=embed_dim,
            depth=len(relative),
            num_heads=embed_dim // head_dim,
            mlp_ratio=shape("image_encoder.blocks.0.mlp.lin1.weight", 2)[0] / embed_dim,
            out_chans=prompt_dim,
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
            use_rel_pos=True,
            window_size=min((window for window in windows if window != grid), default=0),
            global_attn_indexes=tuple(i for i, window in enumerate(windows) if window == grid),
        )
        prompts = PromptEncoder(
            embed_dim=prompt_dim,
            image_embedding_size=(grid, grid),
            input_image_size=(grid * patch_size, grid * patch_size),
            mask_in_chans=shape("prompt_encoder.mask_downscaling.3.weight", 4)[0],
        )
        decoder = MaskDecoder(
            transformer_dim=prompt_dim,
            transformer=TwoWayTransformer(
                depth=count("mask_decoder.transformer.layers."),
                embedding_dim=prompt_dim,
                num_heads=_DECODER_HEADS,
                mlp_dim=shape("mask_decoder.transformer.layers.0.mlp.lin1.weight", 2)[0],
            ),
            num_multimask_outputs=shape("mask_decoder.mask_tokens.weight", 2)[0] - 1,
            iou_head_depth=count("mask_decoder.iou_prediction_head.layers."),
            iou_head_hidden_dim=shape("mask_decoder.iou_prediction_head.layers.0.weight", 2)[0],
        )
    return Sam(encoder, prompts, decoder)  # not on meta: pixel mean and deviation are in no state dict


def build_sam2(state: dict[str, Tensor]) -> Sam2:
    """Build a SAM 2 or 2.1 of the size of a state dict, on the meta device.

    Raises:
        ValueError: its trunk is none of the published sizes.
    """
    with torch.device("meta"):
        return Sam2(SIZES[find_size(state)])


def load_sam(path: Path) -> Sam | Sam2:
    """Load a SAM of any size or a SAM 2 or 2.1 in float32 on the CPU, frozen and in eval mode.

    Args:
        path: `.safetensors`, or a published `.pth` or `.pt`, of which only tensors are loaded. SAM 2 is recognised by the names
            of its tensors; they may be in a dictionary `model`, as published, and those for videos are not used.

    Raises:
        ValueError: the file cannot be read or is not a checkpoint of SAM, SAM 2 or 2.1.
    """
    try:
        content = read_weights(path)
        published = isinstance(content, dict) and content.keys() == {"model"} and isinstance(content["model"], dict)
        state = without_wrappers(check_tensors(content["model"] if published else content))
        if is_sam2(state):
            sam: Sam | Sam2 = build_sam2(state)
            state = used_tensors(state)
        else:
            sam = build_sam(state)
        check_fit(state, sam.state_dict())
    except ValueError as error:
        raise ValueError(f"{path}: {error}; {_EXPECTED}") from None
    sam.load_state_dict({name: tensor.float() for name, tensor in state.items()}, assign=True)
    return sam.eval().requires_grad_(False)
