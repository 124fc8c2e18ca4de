"""A SAM from its weights alone: which kind it is stands in the shapes (Kirillov et al., 2023)."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer
from torch import Tensor, nn

from pixelclip.weights import check_fit, check_tensors, named, read_weights

_EXPECTED = "the state dict of a Segment Anything model is expected (vit_h, vit_l, vit_b or of another size)"
_DECODER_HEADS = 8  # the same in every published kind, and in no shape


@dataclass(frozen=True)
class SamShape:
    """What builds a SAM: everything that its published kinds could differ in, read from the shapes of its tensors."""

    img_size: int
    patch_size: int
    embed_dim: int
    depth: int
    num_heads: int
    mlp_dim: int
    window_size: int  # in patches; 0: every block is global
    global_attn_indexes: tuple[int, ...]
    prompt_dim: int
    mask_in_chans: int
    decoder_depth: int
    decoder_mlp_dim: int
    num_multimask_outputs: int
    iou_head_depth: int
    iou_head_hidden_dim: int


def sam_shape(state: Mapping[str, Tensor]) -> SamShape:
    """Derives the settings of a SAM from its state dict; only shapes are read, so meta tensors will do.

    Raises:
        ValueError: a tensor that tells a setting is missing, or its shape belongs to no SAM.
    """

    def shape(name: str, dimensions: int) -> tuple[int, ...]:
        if name not in state:
            raise ValueError(f"{name} is missing; found: {named(state)}")
        found = tuple(state[name].shape)
        if len(found) != dimensions or 0 in found:
            raise ValueError(f"{name} has shape {list(found)}, {dimensions} dimensions are expected")
        return found

    def count(prefix: str) -> int:
        return len({name[len(prefix) :].split(".")[0] for name in state if name.startswith(prefix)})

    embed_dim, _, patch_size, _ = shape("image_encoder.patch_embed.proj.weight", 4)
    grid = shape("image_encoder.pos_embed", 4)[1]
    relative = [shape(f"image_encoder.blocks.{i}.attn.rel_pos_h", 2) for i in range(count("image_encoder.blocks."))]
    windows = [(length + 1) // 2 for length, _ in relative]
    head_dim = relative[0][1] if relative else embed_dim
    prompt_dim = shape("prompt_encoder.no_mask_embed.weight", 2)[1]
    if embed_dim % head_dim or prompt_dim % (2 * _DECODER_HEADS):
        raise ValueError(
            f"widths {embed_dim} and {prompt_dim} are found, multiples of {head_dim} and {2 * _DECODER_HEADS} are expected"
        )
    return SamShape(
        img_size=grid * patch_size,
        patch_size=patch_size,
        embed_dim=embed_dim,
        depth=len(relative),
        num_heads=embed_dim // head_dim,
        mlp_dim=shape("image_encoder.blocks.0.mlp.lin1.weight", 2)[0],
        window_size=min((window for window in windows if window != grid), default=0),
        global_attn_indexes=tuple(i for i, window in enumerate(windows) if window == grid),
        prompt_dim=prompt_dim,
        mask_in_chans=shape("prompt_encoder.mask_downscaling.3.weight", 4)[0],
        decoder_depth=count("mask_decoder.transformer.layers."),
        decoder_mlp_dim=shape("mask_decoder.transformer.layers.0.mlp.lin1.weight", 2)[0],
        num_multimask_outputs=shape("mask_decoder.mask_tokens.weight", 2)[0] - 1,
        iou_head_depth=count("mask_decoder.iou_prediction_head.layers."),
        iou_head_hidden_dim=shape("mask_decoder.iou_prediction_head.layers.0.weight", 2)[0],
    )


def build_sam(shape: SamShape) -> Sam:
    """A SAM with the normalisation of the published ones, its weights still on the meta device."""
    grid = shape.img_size // shape.patch_size
    with torch.device("meta"):
        encoder = ImageEncoderViT(
            img_size=shape.img_size,
            patch_size=shape.patch_size,
            embed_dim=shape.embed_dim,
            depth=shape.depth,
            num_heads=shape.num_heads,
            mlp_ratio=shape.mlp_dim / shape.embed_dim,
            out_chans=shape.prompt_dim,
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
            use_rel_pos=True,
            window_size=shape.window_size,
            global_attn_indexes=shape.global_attn_indexes,
        )
        prompts = PromptEncoder(
            embed_dim=shape.prompt_dim,
            image_embedding_size=(grid, grid),
            input_image_size=(shape.img_size, shape.img_size),
            mask_in_chans=shape.mask_in_chans,
        )
        decoder = MaskDecoder(
            transformer_dim=shape.prompt_dim,
            transformer=TwoWayTransformer(
                depth=shape.decoder_depth,
                embedding_dim=shape.prompt_dim,
                num_heads=_DECODER_HEADS,
                mlp_dim=shape.decoder_mlp_dim,
            ),
            num_multimask_outputs=shape.num_multimask_outputs,
            iou_head_depth=shape.iou_head_depth,
            iou_head_hidden_dim=shape.iou_head_hidden_dim,
        )
    return Sam(encoder, prompts, decoder)  # outside: mean and deviation are in no state dict, so they must be real


def load_sam(path: Path) -> Sam:
    """Loads a SAM of any size: in float32, on the CPU, for inference.

    Args:
        path: `.safetensors`, or a `.pth` as it is published; of the latter tensors alone are read, never code.

    Raises:
        ValueError: the file cannot be read, is no checkpoint, or is not a SAM's.
    """
    try:
        state = check_tensors(read_weights(path))
        sam = build_sam(sam_shape(state))
        check_fit(state, sam.state_dict())
    except ValueError as error:
        raise ValueError(f"{path}: {error}; {_EXPECTED}") from None
    sam.load_state_dict({name: tensor.float() for name, tensor in state.items()}, assign=True)
    return sam.eval().requires_grad_(False)
