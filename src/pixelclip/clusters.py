"""Online clustering of masks into concepts, on tensors alone (PixelCLIP, section 3.2).

B images, N masks in the batch, K concepts, C embedding width, h w feature grid, H W mask grid.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from pixelclip.backbone import full_precision

_MASKS_AT_ONCE = 128


def pool_masks(features: Tensor, masks: Tensor, image_index: Tensor, counts: Sequence[int] | None = None) -> Tensor:
    """Averages bilinearly upsampled features inside each mask.

    Averaging is linear, so instead of upsampling features to [B, C, H, W] each mask is pulled back to the feature grid
    through the transposed bilinear map.

    Args:
        features: [B, C, h, w], not normalised.
        masks: [N, H, W], bool.
        image_index: [N], the image that each mask belongs to.
        counts: how many masks each of the B images has, where they stand image by image; without it a GPU must be asked,
            and waited for.

    Returns:
        [N, C], unit length; zero for an empty mask.
    """
    height, width = masks.shape[1:]
    rows = _upsampling(features.shape[2], height, features)  # [H, h]
    columns = _upsampling(features.shape[3], width, features)  # [W, w]
    # A mask as numbers has four times its bytes or more, so never all of them at once.
    weights = torch.cat([(rows.T @ (some.to(features.dtype) @ columns)).flatten(1) for some in masks.split(_MASKS_AT_ONCE)])
    order = None
    if counts is None:
        order = image_index.argsort(stable=True)
        counts, weights = image_index.bincount(minlength=len(features)).tolist(), weights[order]
    places = features.flatten(2).transpose(1, 2)  # [B, h * w, C]
    pooled = torch.cat([mine @ image for mine, image in zip(weights.split(list(counts)), places, strict=True)])
    if order is not None:
        pooled = torch.empty_like(pooled).index_copy_(0, order, pooled)
    return F.normalize(pooled, dim=-1)


def _upsampling(small: int, large: int, like: Tensor) -> Tensor:
    """The matrix [large, small] of one-dimensional bilinear interpolation (`align_corners=False`)."""
    identity = torch.eye(small, dtype=like.dtype, device=like.device)[None]
    return F.interpolate(identity, size=large, mode="linear", align_corners=False)[0].T


@torch.no_grad()
def sinkhorn(logits: Tensor, iterations: int = 3) -> Tensor:
    """Soft assignment of masks to concepts with equally used concepts (Sinkhorn-Knopp, as in SwAV).

    Args:
        logits: [N, K], scaled similarities; N may be 0.
        iterations: how often concepts, then masks, are normalised.

    Returns:
        [N, K]; every row sums to 1.
    """
    assignment = torch.softmax(full_precision(logits), dim=-1)
    count, concepts = assignment.shape
    assignment = assignment / assignment.sum()
    # A concept that no mask is near may underflow to a sum of zero; it stays unused instead of making NaN.
    tiny = torch.finfo(assignment.dtype).tiny
    for _ in range(iterations):
        assignment = assignment / (assignment.sum(dim=0, keepdim=True).clamp_min(tiny) * concepts)
        assignment = assignment / (assignment.sum(dim=1, keepdim=True).clamp_min(tiny) * count)
    return assignment * count


def merge_by_concept(masks: Tensor, image_index: Tensor, concept_index: Tensor, num_images: int, num_concepts: int) -> Tensor:
    """Unites the masks of one image that belong to one concept.

    Args:
        masks: [N, H, W], bool.
        image_index: [N], the image of each mask.
        concept_index: [N], the concept of each mask.
        num_images: B.
        num_concepts: K.

    Returns:
        [B, K, H, W], bool; concepts may overlap.
    """
    size = masks.shape[1:]
    # Counted, since the order in which a GPU would overwrite is a matter of chance.
    counted = torch.zeros(num_images * num_concepts, *size, dtype=torch.int16, device=masks.device)
    counted.index_add_(0, image_index * num_concepts + concept_index, masks.to(torch.int16))
    return (counted > 0).unflatten(0, (num_images, num_concepts))
