"""PixelCLIP: student, moving-average teacher, learnable prompts and mask decoder (PixelCLIP, section 3).

B images, N masks in the batch, K concepts, C embedding width, h w feature grid, H W mask grid.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pixelclip.backbone import Backbone
from pixelclip.clusters import full_precision, merge_by_concept, pool_masks, sinkhorn
from pixelclip.dataset import Batch
from pixelclip.ranks import ALONE, Ranks
from pixelclip.text import Prompts, TextTower, Vectors


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
    """What one forward pass gives.

    Attributes:
        loss: [].
        concept_index: [N], the concept of each mask.
        assignment: [N, K], softmax of the scaled cosines, before Sinkhorn.
        logits: [B, K, H, W]; in several pieces or processes those of this process's first piece.
        shown_index: the concept of each mask of the images that `logits` is of.
    """

    loss: Tensor
    concept_index: Tensor
    assignment: Tensor
    logits: Tensor
    shown_index: Tensor


def mask_loss(logits: Tensor, targets: Tensor, covered: Tensor, terms: Tensor | None = None) -> Tensor:
    """Binary cross-entropy over all concepts at the covered pixels.

    Args:
        logits: [B, K, H, W].
        targets: [B, K, H, W], bool.
        covered: [B, H, W], bool: pixels inside at least one mask.
        terms: [], what the sum is divided by when these images are only a part of the batch; else their own number.

    Returns:
        A scalar; 0, with zero gradients, when no pixel is covered.
    """
    weight = covered[:, None].to(logits.dtype).expand_as(logits)
    total = F.binary_cross_entropy_with_logits(logits, targets.to(logits.dtype), weight=weight, reduction="sum")
    return total / (covered.sum() * logits.shape[1] if terms is None else terms).clamp_min(1)


class PixelCLIP(nn.Module):
    """The model in training.

    Args:
        student: image tower whose `trained_parameters` learn; all others are frozen here.
        text: frozen text tower.
        prompts: concepts, learnable or not: called with the text tower they give [K, C].
        decoder: mask decoder.
        assignment_scale: factor on cosines before the softmax of the assignment.
        sinkhorn_iterations: Sinkhorn-Knopp iterations.
        clustering: False makes every mask its own target instead of its concept's (an ablation that collapses).
        precision: autocast of towers and decoder; None computes in the parameters' own type.
    """

    def __init__(
        self,
        student: Backbone,
        text: TextTower,
        prompts: Prompts | Vectors,
        decoder: Decoder,
        assignment_scale: float = 100.0,
        sinkhorn_iterations: int = 3,
        clustering: bool = True,
        precision: torch.dtype | None = None,
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
        self.clustering = clustering
        self.precision = precision

    def train(self, mode: bool = True) -> "PixelCLIP":
        """Switches student and decoder; teacher and text tower stay in eval mode."""
        super().train(mode)
        self.teacher.eval()
        self.text.eval()
        return self

    def learning(self) -> list[nn.Parameter]:
        """All parameters that learn."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def concepts(self) -> Tensor:
        """Returns the concepts [K, C], not normalised."""
        return self.prompts(self.text)

    @torch.no_grad()
    def mask_features(self, weak: Tensor, masks: Tensor, image_index: Tensor) -> Tensor:
        """The teacher's features of every mask.

        Args:
            weak: [B, 3, side, side], normalised images for the teacher.
            masks: [N, H, W], bool.
            image_index: [N], the image of each mask.

        Returns:
            [N, C], unit length.
        """
        with self._autocast(weak):
            features = self.teacher(weak)
        return pool_masks(full_precision(features), masks, image_index)

    @torch.no_grad()
    def assign(self, mask_features: Tensor, concepts: Tensor, ranks: Ranks = ALONE) -> tuple[Tensor, Tensor]:
        """Assigns masks to concepts, with Sinkhorn over the masks of all ranks.

        Args:
            mask_features: [N, C], this rank's.
            concepts: [K, C].
            ranks: who takes part.

        Returns:
            The concept of every one of this rank's masks [N], and the cosines [N, K] that it was chosen by.
        """
        cosines = mask_features @ F.normalize(concepts, dim=-1).T
        everybodys, mine = ranks.gather(cosines)
        chosen = sinkhorn(self.assignment_scale * everybodys, self.sinkhorn_iterations).argmax(dim=-1)
        return chosen[mine], cosines

    def predict_masks(self, images: Tensor, concepts: Tensor, size: tuple[int, int]) -> Tensor:
        """Mask logits [B, K, H, W] of concepts [K, C] for images [B, 3, side, side]; `size` is (H, W)."""
        maps = torch.einsum("bchw,kc->bkhw", self._student_features(images), F.normalize(concepts, dim=-1))
        return self._decode(maps.flatten(0, 1), size).unflatten(0, maps.shape[:2])

    def loss(
        self, batch: Batch, mask_features: Tensor, concepts: Tensor, concept_index: Tensor, terms: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The student's loss on a batch whose masks have their concepts.

        Args:
            batch: B images and their N masks; of its views only the strong one is seen.
            mask_features: [N, C], used when clustering is off.
            concepts: [K, C].
            concept_index: [N].
            terms: see `mask_loss`.

        Returns:
            The loss, and the logits [B, K, H, W] (without clustering K is the largest number of masks of an image).
        """
        size = (batch.masks.shape[1], batch.masks.shape[2])
        covered = _covered(batch)
        if self.clustering:
            targets = merge_by_concept(batch.masks, batch.image_index, concept_index, len(batch.strong), len(concepts))
            logits = self.predict_masks(batch.strong, concepts, size)
            return mask_loss(logits, targets, covered, terms), logits
        maps = torch.einsum("nchw,nc->nhw", self._student_features(batch.strong)[batch.image_index], mask_features)
        own = self._decode(maps, size)  # [N, H, W]
        place = _place_in_image(batch.image_index)
        nothing = own.new_full((len(batch.strong), int(place.max()) + 1 if len(place) else 1, *size), -100.0)
        logits = nothing.index_put((batch.image_index, place), own)
        return mask_loss(own[:, None], batch.masks[:, None], covered[batch.image_index], terms), logits

    def count_terms(self, batch: Batch, num_concepts: int) -> Tensor:
        """How many pixels times concepts the loss of a batch averages over: []."""
        area = _covered(batch).flatten(1).sum(dim=1)
        return area.sum() * num_concepts if self.clustering else area[batch.image_index].sum()

    def forward(self, weak: Tensor, strong: Tensor, masks: Tensor, image_index: Tensor) -> StepOutput:
        """One training step's loss, in one piece and one process.

        Args:
            weak: [B, 3, side, side], normalised images for the teacher.
            strong: [B, 3, side, side], normalised images for the student.
            masks: [N, H, W], bool.
            image_index: [N], the image of each mask.
        """
        concepts = self.concepts()
        features = self.mask_features(weak, masks, image_index)
        concept_index, cosines = self.assign(features, concepts)
        batch = Batch(weak, strong, masks, image_index, [])
        loss, logits = self.loss(batch, features, concepts, concept_index)
        assignment = torch.softmax(self.assignment_scale * cosines, dim=-1)
        return StepOutput(loss, concept_index, assignment, logits, concept_index)

    def accumulate(self, pieces: Sequence[Batch], ranks: Ranks = ALONE) -> StepOutput:
        """Loss and gradients of one optimizer step whose images are spread over pieces and ranks.

        All masks are assigned together before the first piece is learned from, and every piece's loss is divided by what
        all of them average over, so that the gradients are those of one large batch. Adds to `.grad`.

        Args:
            pieces: this rank's images, in parts that fit its memory; parts without images or masks are allowed.
            ranks: who takes part.

        Returns:
            The loss of the whole batch; concepts and assignment of all ranks' masks; the logits of the first piece.
        """
        pieces = [piece for piece in pieces if len(piece.masks)]
        with torch.no_grad():
            fixed = self.concepts()
            features = [self.mask_features(piece.weak, piece.masks, piece.image_index) for piece in pieces]
            terms = torch.stack([self.count_terms(piece, len(fixed)) for piece in pieces] + [fixed.new_zeros(())]).sum()
        concept_index, cosines = self.assign(torch.cat([*features, fixed[:0]]), fixed, ranks)
        terms, loss, logits = ranks.sum(terms), fixed.new_zeros(()), fixed.new_zeros(0)
        for number, (piece, feature, index) in enumerate(
            zip(pieces, features, concept_index.split([len(feature) for feature in features]), strict=True)
        ):
            part, found = self.loss(piece, feature, self.concepts(), index, terms)
            part.backward()
            loss, logits = loss + part.detach(), found.detach() if number == 0 else logits
        ranks.sum_gradients(self.learning())
        softmax = torch.softmax(self.assignment_scale * ranks.gather(cosines)[0], dim=-1)
        shown = concept_index[: len(features[0]) if features else 0]
        return StepOutput(ranks.sum(loss), ranks.gather(concept_index)[0], softmax, logits, shown)

    @torch.no_grad()
    def update_teacher(self, momentum: float) -> None:
        """Moves the teacher towards the student; call it once after each optimizer step."""
        for old, new in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
            if new.requires_grad:
                old.lerp_(new, 1 - momentum)

    def _student_features(self, images: Tensor) -> Tensor:
        with self._autocast(images):
            features = self.student(images)
        return F.normalize(full_precision(features), dim=1)

    def _decode(self, maps: Tensor, size: tuple[int, int]) -> Tensor:
        """Similarity maps [M, h, w] -> mask logits [M, H, W]."""
        with self._autocast(maps):
            logits = self.decoder(maps[:, None])  # [M, 1, 4h, 4w]
        return F.interpolate(full_precision(logits), size=size, mode="bilinear", align_corners=False)[:, 0]

    def _autocast(self, like: Tensor) -> torch.autocast:
        return torch.autocast(like.device.type, self.precision, enabled=self.precision is not None)


def _covered(batch: Batch) -> Tensor:
    """Pixels inside at least one mask: [B, H, W], bool."""
    nobody = torch.zeros_like(batch.image_index)
    return merge_by_concept(batch.masks, batch.image_index, nobody, len(batch.strong), 1)[:, 0]


def _place_in_image(image_index: Tensor) -> Tensor:
    """The how manieth of its image each mask is: [N] -> [N]."""
    same = image_index[:, None] == image_index
    return same.tril(-1).sum(dim=1)
