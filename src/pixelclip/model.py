"""PixelCLIP: student, moving-average teacher, learnable prompts and mask decoder (PixelCLIP, section 3).

B images, N masks in the batch, K concepts, C embedding width, h w feature grid, H W mask grid.
"""

import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pixelclip.backbone import Backbone
from pixelclip.clusters import merge_by_concept, pool_masks, sinkhorn
from pixelclip.text import Prompts, TextTower


class _DoubleConv(nn.Module):
    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.double_conv = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.GroupNorm(groups, channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.GroupNorm(groups, channels),
            nn.ReLU(),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.double_conv(x)


class Decoder(nn.Module):
    """Sharpens one similarity map at a time; used in training only."""

    def __init__(self) -> None:
        super().__init__()
        self.conv0 = nn.Conv2d(1, 64, 3, padding=1)
        self.up1 = nn.ConvTranspose2d(64, 64, 2, stride=2)
        self.conv1 = _DoubleConv(64, groups=4)
        self.up2 = nn.ConvTranspose2d(64, 32, 2, stride=2)
        self.conv2 = _DoubleConv(32, groups=2)
        self.proj = nn.Conv2d(32, 1, 3, padding=1)
        # Same numbers, about 1.6 times as fast on a CPU (docs/experiments.md).
        self.to(memory_format=torch.channels_last)

    def forward(self, maps: Tensor) -> Tensor:
        """Turns similarity maps [M, 1, h, w] into mask logits [M, 1, 4h, 4w]."""
        x = self.conv1(self.up1(self.conv0(maps)))
        return self.proj(self.conv2(self.up2(x)))


@dataclass(frozen=True)
class StepOutput:
    """What one forward pass gives: `loss` []; `concept_index` [N]; `assignment` [N, K]; `logits` [B, K, H, W]."""

    loss: Tensor
    concept_index: Tensor
    assignment: Tensor
    logits: Tensor


def mask_loss(logits: Tensor, targets: Tensor, covered: Tensor) -> Tensor:
    """Binary cross-entropy over all concepts at the covered pixels.

    Args:
        logits: [B, K, H, W].
        targets: [B, K, H, W], bool.
        covered: [B, H, W], bool: pixels inside at least one mask.

    Returns:
        A scalar; 0, with zero gradients, when no pixel is covered.
    """
    weight = covered[:, None].to(logits.dtype).expand_as(logits)
    total = F.binary_cross_entropy_with_logits(logits, targets.to(logits.dtype), weight=weight, reduction="sum")
    return total / (covered.sum() * logits.shape[1]).clamp_min(1)


class PixelCLIP(nn.Module):
    """The model in training.

    Args:
        student: image tower whose `trained_parameters` learn; all others are frozen here.
        text: frozen text tower.
        prompts: learnable concepts.
        decoder: mask decoder.
        assignment_scale: factor on cosines before the softmax of the assignment.
        sinkhorn_iterations: Sinkhorn-Knopp iterations.
    """

    def __init__(
        self,
        student: Backbone,
        text: TextTower,
        prompts: Prompts,
        decoder: Decoder,
        assignment_scale: float = 100.0,
        sinkhorn_iterations: int = 3,
    ) -> None:
        super().__init__()
        self.text = text.requires_grad_(False)
        self.teacher = copy.deepcopy(student).requires_grad_(False).eval()
        self.student = student.requires_grad_(False)
        for parameter in student.trained_parameters().values():
            parameter.requires_grad_(True)
        self.prompts = prompts
        self.decoder = decoder
        self.assignment_scale = assignment_scale
        self.sinkhorn_iterations = sinkhorn_iterations

    def train(self, mode: bool = True) -> "PixelCLIP":
        """Switches student and decoder; teacher and text tower stay in eval mode."""
        super().train(mode)
        self.teacher.eval()
        self.text.eval()
        return self

    def concepts(self) -> Tensor:
        """Returns the concepts [K, C], not normalised."""
        return self.prompts(self.text)

    @torch.no_grad()
    def assign(self, weak: Tensor, masks: Tensor, image_index: Tensor, concepts: Tensor) -> tuple[Tensor, Tensor]:
        """Assigns masks to concepts.

        Args:
            weak: [B, 3, side, side], normalised images for the teacher.
            masks: [N, H, W], bool.
            image_index: [N].
            concepts: [K, C].

        Returns:
            The concept of every mask [N], and the cosines [N, K] that it was chosen by.
        """
        features = pool_masks(self.teacher(weak), masks, image_index)
        cosines = features @ F.normalize(concepts, dim=-1).T
        return sinkhorn(self.assignment_scale * cosines, self.sinkhorn_iterations).argmax(dim=-1), cosines

    def predict_masks(self, images: Tensor, concepts: Tensor, size: tuple[int, int]) -> Tensor:
        """Mask logits [B, K, H, W] of every concept for images [B, 3, side, side]; `size` is (H, W)."""
        features = F.normalize(self.student(images), dim=1)
        maps = torch.einsum("bchw,kc->bkhw", features, F.normalize(concepts, dim=-1))
        logits = self.decoder(maps.flatten(0, 1)[:, None])  # [B * K, 1, 4h, 4w]
        logits = F.interpolate(logits, size=size, mode="bilinear", align_corners=False)
        return logits[:, 0].unflatten(0, maps.shape[:2])

    def forward(self, weak: Tensor, strong: Tensor, masks: Tensor, image_index: Tensor) -> StepOutput:
        """One training step's loss.

        Args:
            weak: [B, 3, side, side], normalised images for the teacher.
            strong: [B, 3, side, side], normalised images for the student.
            masks: [N, H, W], bool.
            image_index: [N], the image of each mask.
        """
        concepts = self.concepts()
        concept_index, cosines = self.assign(weak, masks, image_index, concepts)
        targets = merge_by_concept(masks, image_index, concept_index, len(weak), len(concepts))
        logits = self.predict_masks(strong, concepts, (masks.shape[1], masks.shape[2]))
        loss = mask_loss(logits, targets, targets.any(dim=1))
        return StepOutput(loss, concept_index, torch.softmax(self.assignment_scale * cosines, dim=-1), logits)

    @torch.no_grad()
    def update_teacher(self, momentum: float) -> None:
        """Moves the teacher towards the student; call it once after each optimizer step."""
        for old, new in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
            if new.requires_grad:
                old.lerp_(new, 1 - momentum)
