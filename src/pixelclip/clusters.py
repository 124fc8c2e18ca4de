"""Online clustering of masks into concepts, on tensors alone (PixelCLIP, section 3.2).

B images, N masks in the batch, K concepts, C embedding width, h w feature grid, H W mask grid.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def full_precision(x: Tensor) -> Tensor:
    """What autocast left in a short type, in float32; float64 stays."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def pool_masks(features: Tensor, masks: Tensor, image_index: Tensor) -> Tensor:
    """Averages bilinearly upsampled features inside each mask.

    Averaging is linear, so instead of upsampling features to [B, C, H, W] each mask is pulled back to the feature grid
    through the transposed bilinear map.

    Args:
        features: [B, C, h, w], not normalised.
        masks: [N, H, W], bool.
        image_index: [N], the image that each mask belongs to.

    Returns:
        [N, C], unit length; zero for an empty mask.
    """
    height, width = masks.shape[1:]
    rows = _upsampling(features.shape[2], height, features)  # [H, h]
    columns = _upsampling(features.shape[3], width, features)  # [W, w]
    weights = rows.T @ (masks.to(features.dtype) @ columns)  # [N, h, w]
    pooled = features.new_zeros(len(masks), features.shape[1])
    for image in range(len(features)):
        chosen = image_index == image
        pooled[chosen] = weights[chosen].flatten(1) @ features[image].flatten(1).T
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
    targets = masks.new_zeros(num_images, num_concepts, *masks.shape[1:])
    for mask, image, concept in zip(masks, image_index.tolist(), concept_index.tolist(), strict=True):
        targets[image, concept] |= mask
    return targets
