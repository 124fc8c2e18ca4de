"""SAM's automatic masks with `segment_anything.SamAutomaticMaskGenerator` and with `SamGenerator`."""

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from segment_anything import SamAutomaticMaskGenerator
from segment_anything.build_sam import _build_sam
from segment_anything.modeling import Sam
from segment_anything.utils.transforms import ResizeLongestSide
from torch import Tensor

from bench.case import Case
from pixelclip.mask_generators.sam import SamGenerator
from pixelclip.toy_scenes.scenes import paint

SIZE = (1000, 1500)
SETTINGS = {"points_per_side": 20, "pred_iou_thresh": 0.88, "stability_score_thresh": 0.9, "box_nms_thresh": 0.7}
PASSING = 0.15  # fraction of proposals above the threshold of predicted IoU, at 16 points (at all points, about a fifth)
RADII = (0.04, 0.07, 0.11)  # of the three masks of a point, as fractions of the longer side of the image
EMBEDDINGS = ("pos_embed", "point_embeddings", "not_a_point_embed", "no_mask_embed", "iou_token", "mask_tokens")
SMALL = {"embed_dim": 192, "depth": 4, "num_heads": 3, "global_attn_indexes": (3,)}
VIT_B = {"embed_dim": 768, "depth": 12, "num_heads": 12, "global_attn_indexes": (2, 5, 8, 11)}


def make(encoder: dict[str, Any] = SMALL, passing: float = PASSING) -> Case:
    """Create the comparison.

    Args:
        encoder: settings of SAM's image encoder.
        passing: fraction of the proposals whose predicted IoU passes the threshold.
    """
    image = picture()
    sam = local_sam(image, encoder, passing)
    theirs = SamAutomaticMaskGenerator(sam, **SETTINGS, output_mode="coco_rle")
    ours = SamGenerator(sam, **SETTINGS)
    width, depth = encoder["embed_dim"], encoder["depth"]
    return Case(
        what=f"SAM's masks of one image {SIZE[0]} x {SIZE[1]}: random weights, decoder as published, encoder of {depth} blocks "
        f"of width {width}, 20 x 20 points, float32",
        baseline=lambda: theirs.generate(image),
        ours=lambda: ours([image])[0],
        same=same,
        rounds=3,
    )


def picture() -> NDArray[np.uint8]:
    """Paint six scenes side by side: [H, W, 3]."""
    side = SIZE[0] // 2
    rows = [np.concatenate([paint(0, 3 * row + column, side).image for column in range(3)], axis=1) for row in range(2)]
    return np.concatenate(rows)


@torch.no_grad()
def local_sam(image: NDArray[np.uint8], encoder: dict[str, Any], passing: float) -> Sam:
    """Create a SAM with random weights whose masks are blobs around their point, as with trained weights.

    Image tokens near a point attend to it and receive a fixed message; the last bias of each hypernetwork is fitted to discs;
    the predicted IoU is shifted so that the fraction `passing` passes.
    """
    sam = _build_sam(**{f"encoder_{name}": value for name, value in encoder.items()}).requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for name, tensor in sam.state_dict().items():
        noise = torch.randn(tensor.shape, generator=generator)
        if tensor.ndim == 1:
            tensor.copy_(0.02 * noise + name.endswith("weight"))
        elif name.split(".")[1] in EMBEDDINGS:
            tensor.copy_(noise * (0.05 if "token" in name or "not_a" in name else 0.3))
        elif name.endswith("gaussian_matrix"):
            tensor.copy_(noise)
        else:
            tensor.copy_(noise * tensor[0].numel() ** -0.5)
    sam.image_encoder.neck[3].weight.mul_(0.3)  # position outweighs content
    layers = sam.mask_decoder.transformer.layers
    for layer in layers:
        layer.self_attn.k_proj.weight.copy_(10 * layer.self_attn.q_proj.weight)  # each token attends to itself
        layer.cross_attn_image_to_token.k_proj.weight.copy_(6 * layer.cross_attn_image_to_token.q_proj.weight)
        layer.norm3.weight.mul_(0.3)
    layers[0].norm4.weight.mul_(0.3)
    layers[0].cross_attn_image_to_token.out_proj.weight.mul_(0.1)
    _fit(sam, image, passing)
    return sam


def _fit(sam: Sam, image: NDArray[np.uint8], passing: float) -> None:
    """Fit message, hypernetworks and predicted IoU of `local_sam` at 16 points of the image."""
    decoder, side = sam.mask_decoder, sam.image_encoder.img_size
    resized = ResizeLongestSide(side).apply_image(image)
    embedding = sam.image_encoder(sam.preprocess(torch.as_tensor(resized).permute(2, 0, 1))[None])
    ticks = (torch.arange(4) + 0.5) / 4
    points = torch.cartesian_prod(ticks * resized.shape[1], ticks * resized.shape[0])
    labels = torch.ones(len(points), 1, dtype=torch.int)
    sparse, dense = sam.prompt_encoder(points=(points[:, None], labels), boxes=None, masks=None)
    seen: dict[str, Tensor] = {}

    def decode() -> Tensor:
        positions = sam.prompt_encoder.get_dense_pe()
        return decoder(embedding, positions, sparse, dense, multimask_output=True)[1]

    telling = decoder.transformer.layers[1].cross_attn_image_to_token
    hooks = [
        telling.register_forward_hook(lambda module, _, named, output: seen.update(named), with_kwargs=True),
        decoder.output_upscaling.register_forward_hook(lambda module, inputs, output: seen.update(features=output)),
    ]
    decode()
    # Image tokens attend to the point only near it, and receive a message that no other token sends.
    message = 5 * torch.randn(len(telling.v_proj.bias), generator=torch.Generator().manual_seed(1))
    telling.q_proj.bias.add_(1)
    for side_of, linear, change in (("v", telling.v_proj, message), ("k", telling.k_proj, torch.full_like(message, -3.0))):
        point, others = seen[side_of][:, 5], seen[side_of][:, [0, 1, 2, 3, 4, 6]].mean(dim=1)
        difference = (point - others).mean(dim=0)
        direction = difference / difference.square().sum()  # its product is larger by 1 at the point's token than at the others
        linear.weight.add_(torch.outer(change, direction))
        linear.bias.sub_(change * (others @ direction).mean())
    decode()
    features = seen["features"].flatten(2)  # [16, 32, 65536]
    axis = (torch.arange(seen["features"].shape[2]) + 0.5) * side / seen["features"].shape[2]
    away = torch.hypot(axis - points[:, :1, None], axis[:, None] - points[:, 1:, None]).flatten(1)
    shown = (axis < resized.shape[0])[:, None].expand(-1, len(axis)).flatten()
    weighted = features * ((0.02 + torch.exp(-away / 100)) * shown)[:, None]  # otherwise far pixels outweigh near ones
    gram = torch.einsum("pcx,pdx->cd", weighted, features)
    gram += 1e-7 * gram.trace() * torch.eye(len(gram))
    for radius, network in zip(RADII, decoder.output_hypernetworks_mlps[1:], strict=True):
        disc = 400 * torch.tanh((radius * side - away) / 40)
        network.layers[-1].bias.copy_(torch.linalg.solve(gram, torch.einsum("pcx,px->c", weighted, disc)))
    head = decoder.iou_prediction_head.layers[-1]
    spread = 0.08 / decode().std(dim=0)
    head.weight[1:].mul_(spread[:, None])
    head.bias[1:].mul_(spread)
    head.bias[1:].add_(0.88 - decode().quantile(1 - passing, dim=0))
    for hook in hooks:
        hook.remove()


def same(theirs: list[dict[str, Any]], ours: list[dict[str, Any]]) -> str:
    """Check that all masks have the same order and equal pixels."""
    assert len(theirs) == len(ours) > 20, f"{len(theirs)} and {len(ours)} masks"
    for one, other in zip(theirs, ours, strict=True):
        assert one["segmentation"] == other["segmentation"], f"mask {other['id']} differs"
        assert one["bbox"] == other["bbox"] and one["point_coords"] == other["point_coords"]
        for name in ("predicted_iou", "stability_score"):
            assert math.isclose(one[name], other[name], rel_tol=1e-5), f"{name} of mask {other['id']} differs"
    return f"{len(ours)} masks, entry for entry"
