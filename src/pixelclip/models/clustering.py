"""Online clustering of masks into concepts (PixelCLIP, section 3.2).

B images, N masks in the batch, K concepts, C embedding width, h w feature grid, H W mask grid.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from pixelclip.models.backbone import full_precision

_MASKS_AT_ONCE = 128


def pool_masks(features: Tensor, masks: Tensor, image_index: Tensor, counts: Sequence[int] | None = None) -> Tensor:
    """Pool features inside each mask: the mean of the bilinearly upsampled features.

    The mean is linear, so instead of upsampling features to [B, C, H, W], each mask is mapped to the feature grid by the
    transposed bilinear interpolation.

    Args:
        features: [B, C, h, w], not normalised.
        masks: [N, H, W], bool.
        image_index: [N], image of each mask.
        counts: number of masks of each image, if masks are sorted by image; by default it is read from the device, which
            synchronizes with a GPU.

    Returns:
        [N, C] of unit length; zero for an empty mask.
    """
    height, width = masks.shape[1:]
    rows = _upsampling(features.shape[2], height, features)  # [H, h]
    columns = _upsampling(features.shape[3], width, features)  # [W, w]
    # Floats take at least four times the memory of the masks, so only some masks are converted at once.
    weights = torch.cat([(rows.T @ (chunk.to(features.dtype) @ columns)).flatten(1) for chunk in masks.split(_MASKS_AT_ONCE)])
    order = None
    if counts is None:
        order = image_index.argsort(stable=True)
        counts, weights = image_index.bincount(minlength=len(features)).tolist(), weights[order]
    pixels = features.flatten(2).transpose(1, 2)  # [B, h * w, C]
    pooled = torch.cat([chunk @ image for chunk, image in zip(weights.split(list(counts)), pixels, strict=True)])
    if order is not None:
        pooled = torch.empty_like(pooled).index_copy_(0, order, pooled)
    return F.normalize(pooled, dim=-1)


def _upsampling(small: int, large: int, like: Tensor) -> Tensor:
    """Return the matrix [large, small] of one-dimensional linear interpolation (`align_corners=False`)."""
    identity = torch.eye(small, dtype=like.dtype, device=like.device)[None]
    return F.interpolate(identity, size=large, mode="linear", align_corners=False)[0].T


@torch.no_grad()
def sinkhorn(logits: Tensor, iterations: int = 3) -> Tensor:
    """Softly assign masks to concepts so that all concepts are used equally (Sinkhorn-Knopp, as in SwAV).

    Args:
        logits: [N, K], scaled similarities; N may be 0.
        iterations: number of normalisations of concepts, then masks.

    Returns:
        [N, K]; every row sums to 1.
    """
    assignment = torch.softmax(full_precision(logits), dim=-1)
    count, concepts = assignment.shape
    assignment = assignment / assignment.sum()
    # The sum of a concept far from every mask may underflow to zero; clamping keeps it unused instead of NaN.
    tiny = torch.finfo(assignment.dtype).tiny
    for _ in range(iterations):
        assignment = assignment / (assignment.sum(dim=0, keepdim=True).clamp_min(tiny) * concepts)
        assignment = assignment / (assignment.sum(dim=1, keepdim=True).clamp_min(tiny) * count)
    return assignment * count


def merge_by_concept(masks: Tensor, image_index: Tensor, concept_index: Tensor, num_images: int, num_concepts: int) -> Tensor:
    """Merge the masks of each image that belong to the same concept.

    Args:
        masks: [N, H, W], bool.
        image_index: [N], image of each mask.
        concept_index: [N], concept of each mask.
        num_images: B.
        num_concepts: K.

    Returns:
        [B, K, H, W], bool; concepts may overlap.
    """
    size = masks.shape[1:]
    # Masks are added, not written: the order of duplicate writes is not deterministic on a GPU.
    counts = torch.zeros(num_images * num_concepts, *size, dtype=torch.int16, device=masks.device)
    counts.index_add_(0, image_index * num_concepts + concept_index, masks.to(torch.int16))
    return (counts > 0).unflatten(0, (num_images, num_concepts))


def sample_concepts(present: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Choose `count` concepts of each image: those with a mask, then a random sample of the others.

    A sum over all concepts equals in expectation the weighted sum over the chosen ones (unless more than `count` concepts have
    a mask, of which then a random sample is chosen). The sizes do not depend on the values, so nothing synchronizes with a GPU.

    Args:
        present: [B, K], bool, concepts with a mask.
        count: at most K.

    Returns:
        Concepts [B, count], and weights [B, count]: the number of concepts with (or without) a mask over the number chosen.
    """
    order = present + torch.rand(present.shape, device=present.device)  # [0, 1) without a mask, [1, 2) with one
    chosen = order.topk(count, dim=1).indices
    with_mask = present.gather(1, chosen)
    weights = torch.zeros(chosen.shape, device=present.device)
    for selected, population in ((with_mask, present), (~with_mask, ~present)):
        share = population.sum(dim=1, keepdim=True) / selected.sum(dim=1, keepdim=True).clamp_min(1)
        weights = torch.where(selected, share, weights)
    return chosen, weights
