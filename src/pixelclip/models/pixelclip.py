"""PixelCLIP: student, moving-average teacher, learnable prompts and mask decoder (PixelCLIP, section 3).

B images, N masks in the batch, K concepts, C embedding width, h w feature grid, H W mask grid.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pixelclip.data.dataset import Batch
from pixelclip.distributed import SINGLE_PROCESS, ProcessGroup
from pixelclip.models.backbone import Backbone
from pixelclip.models.clustering import merge_by_concept, pool_masks, sample_concepts, sinkhorn
from pixelclip.models.decoder import Decoder, decoded_loss
from pixelclip.models.text import Prompts, TextTower, Vectors


@dataclass(frozen=True)
class StepOutput:
    """Result of one training step.

    Attributes:
        loss: [].
        concept_index: [N], concept of each mask.
        assignment: [N, K], softmax of the scaled cosines before Sinkhorn.
        logits: [S, K, H, W] of the first S images of this process's first micro-batch with masks; empty without clustering.
        shown_index: concept of each mask in that micro-batch.
    """

    loss: Tensor
    concept_index: Tensor
    assignment: Tensor
    logits: Tensor
    shown_index: Tensor

    def concepts_used(self) -> int:
        """Return the number of concepts that have a mask."""
        return int(self.concept_index.unique().numel())


class PixelCLIP(nn.Module):
    """PixelCLIP in training.

    Args:
        student: image tower; only its `trained_parameters` are trainable.
        text: frozen text tower.
        prompts: module that maps the text tower to concepts [K, C].
        decoder: mask decoder.
        assignment_scale: factor on the cosines before the softmax of the assignment.
        sinkhorn_iterations: number of Sinkhorn-Knopp iterations.
        clustering: merge the masks of a concept to one target; False makes each mask a target (an ablation that collapses).
        precision: autocast's dtype in the decoder; `Backbone` has its own.
        decoded_concepts: number of concepts decoded per image, see `sample_concepts`; 0 decodes all.
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
        decoded_concepts: int = 0,
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
        self.decoded_concepts = decoded_concepts

    def train(self, mode: bool = True) -> "PixelCLIP":
        """Set the mode of student and decoder; teacher and text tower stay in eval mode."""
        super().train(mode)
        self.teacher.eval()
        self.text.eval()
        return self

    def learning(self) -> list[nn.Parameter]:
        """Return the trainable parameters."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def concepts(self) -> Tensor:
        """Return the concepts [K, C], not normalised."""
        return self.prompts(self.text)

    def mask_features(self, weak: Tensor, masks: Tensor, image_index: Tensor, counts: Sequence[int] | None = None) -> Tensor:
        """Pool the teacher's features inside each mask.

        Args:
            weak: [B, 3, side, side], normalised images for the teacher.
            masks: [N, H, W], bool.
            image_index: [N], image of each mask.
            counts: see `pool_masks`.

        Returns:
            [N, C] of unit length.
        """
        with torch.inference_mode():
            pooled = pool_masks(self.teacher(weak), masks, image_index, counts)
        return pooled.clone()  # an inference tensor cannot be part of a loss

    @torch.no_grad()
    def assign(
        self, mask_features: Tensor, concepts: Tensor, group: ProcessGroup = SINGLE_PROCESS
    ) -> tuple[Tensor, Tensor, slice]:
        """Assign masks to concepts by Sinkhorn over the masks of all ranks.

        Args:
            mask_features: [N, C] of this rank's masks.
            concepts: [K, C].
            group: the participating processes.

        Returns:
            Concepts [N] and cosines [N, K] of the masks of all ranks, and the slice of this rank's masks.
        """
        cosines, local = group.all_gather(mask_features @ F.normalize(concepts, dim=-1).T)
        chosen = sinkhorn(self.assignment_scale * cosines, self.sinkhorn_iterations).argmax(dim=-1)
        return chosen, cosines, local

    def loss(
        self,
        batch: Batch,
        covered: Tensor,
        mask_features: Tensor,
        concepts: Tensor,
        concept_index: Tensor,
        terms: Tensor,
        shown: int = 0,
    ) -> tuple[Tensor, Tensor]:
        """Compute the student's loss on a batch whose masks are assigned to concepts.

        Args:
            batch: B images and their N masks; only the strong view is used.
            covered: [B, H, W], bool, pixels inside at least one mask.
            mask_features: [N, C], used without clustering.
            concepts: [K, C].
            concept_index: [N].
            terms: [], see `decoded_loss`.
            shown: number of images, from the first, whose logits are returned.

        Returns:
            The loss, and logits [shown, K, H, W], empty without clustering.
        """
        features = F.normalize(self.student(batch.strong), dim=1)
        num_images, num_concepts = len(batch.strong), len(concepts)
        images = torch.arange(num_images, device=features.device)
        if not self.clustering:
            maps = torch.einsum("nchw,nc->nhw", features[batch.image_index], mask_features)
            loss, _ = decoded_loss(self.decoder, maps, batch.masks, covered, batch.image_index, terms, self.precision)
            return loss, features.new_zeros(0, num_concepts, *covered.shape[1:])
        maps = torch.einsum("bchw,kc->bkhw", features, F.normalize(concepts, dim=-1))
        targets = merge_by_concept(batch.masks, batch.image_index, concept_index, num_images, num_concepts)
        chosen = weights = None
        if 0 < self.decoded_concepts < num_concepts:
            present = torch.zeros(maps.shape[:2], dtype=torch.bool, device=maps.device)
            present[batch.image_index, concept_index] = True
            chosen, weights = sample_concepts(present, self.decoded_concepts)
            maps, targets, weights = maps[images[:, None], chosen], targets[images[:, None], chosen], weights.flatten()
        decoded = maps.shape[1]
        loss, logits = decoded_loss(
            self.decoder,
            maps.flatten(0, 1),
            targets.flatten(0, 1),
            covered,
            images.repeat_interleave(decoded),
            terms,
            self.precision,
            shown * decoded,
            weights,
        )
        logits = logits.unflatten(0, (-1, decoded))
        if chosen is not None:  # the other concepts have no logits
            whole = logits.new_full((len(logits), num_concepts, *logits.shape[2:]), -torch.inf)
            logits = whole.scatter(1, chosen[: len(logits), :, None, None].expand_as(logits), logits)
        return loss, logits

    def count_terms(self, batch: Batch, covered: Tensor, num_concepts: int) -> Tensor:
        """Return the number of loss terms in a batch (covered pixels x concepts): []; `covered` is [B, H, W]."""
        area = covered.flatten(1).sum(dim=1)
        return area.sum() * num_concepts if self.clustering else area[batch.image_index].sum()

    def accumulate(self, micro_batches: Sequence[Batch], group: ProcessGroup = SINGLE_PROCESS, shown: int = 0) -> StepOutput:
        """Compute loss and gradients of one optimizer step over all micro-batches and processes.

        All masks are assigned together, before the first student forward pass, and each micro-batch's loss is divided by the
        terms of the whole batch, so the gradients, which are added to `.grad`, equal those of one large batch. Nothing here
        synchronizes with a GPU: the processes exchange mask counts between CPUs.

        Args:
            micro_batches: this rank's images, split to fit its memory; micro-batches without images or masks are allowed.
            group: the participating processes.
            shown: number of images of the first micro-batch whose logits are returned.

        Returns:
            The loss of the whole batch, concepts and assignment of the masks of all ranks, logits.
        """
        micro_batches = [micro_batch for micro_batch in micro_batches if len(micro_batch.masks)]
        concepts = self.concepts()  # one pass through the text tower for all micro-batches
        fixed = concepts.detach().requires_grad_(concepts.requires_grad)
        with torch.no_grad():
            features = [
                self.mask_features(micro_batch.weak, micro_batch.masks, micro_batch.image_index, micro_batch.counts)
                for micro_batch in micro_batches
            ]
            covered = [_covered(micro_batch) for micro_batch in micro_batches]
            counts = [self.count_terms(*pair, len(fixed)) for pair in zip(micro_batches, covered, strict=True)]
            terms = group.all_reduce(torch.stack([*counts, torch.zeros_like(fixed[0, 0], dtype=torch.long)]).sum())
        all_index, cosines, local = self.assign(torch.cat([*features, fixed.detach()[:0]]), fixed, group)
        concept_index = all_index[local]
        loss, logits = fixed.new_zeros(()), fixed.new_zeros(0)
        indices = concept_index.split([len(feature) for feature in features])
        for number, (micro_batch, pixels, feature, index) in enumerate(
            zip(micro_batches, covered, features, indices, strict=True)
        ):
            num_shown = min(shown, len(micro_batch.strong)) if number == 0 else 0
            summand, shown_logits = self.loss(micro_batch, pixels, feature, fixed, index, terms, num_shown)
            summand.backward()
            loss, logits = loss + summand.detach(), shown_logits if number == 0 else logits
        if fixed.grad is not None:
            concepts.backward(fixed.grad)
        group.all_reduce_gradients(self.learning())
        softmax = torch.softmax(self.assignment_scale * cosines, dim=-1)
        shown_index = concept_index[: len(features[0]) if features else 0]
        return StepOutput(group.all_reduce(loss), all_index, softmax, logits, shown_index)

    @torch.no_grad()
    def update_teacher(self, momentum: float) -> None:
        """Update the teacher as moving average of the student, once after each optimizer step."""
        pairs = zip(self.teacher.parameters(), self.student.parameters(), strict=True)
        averages, values = zip(*((average, value) for average, value in pairs if value.requires_grad), strict=True)
        torch._foreach_lerp_(averages, values, 1 - momentum)


def _covered(batch: Batch) -> Tensor:
    """Return the pixels inside at least one mask: [B, H, W], bool."""
    one_concept = torch.zeros_like(batch.image_index)
    return merge_by_concept(batch.masks, batch.image_index, one_concept, len(batch.strong), 1)[:, 0]
