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
from pixelclip.clusters import merge_by_concept, pool_masks, sinkhorn
from pixelclip.dataset import Batch
from pixelclip.decoder import Decoder, decoded_loss
from pixelclip.ranks import SINGLE_PROCESS, ProcessGroup
from pixelclip.text import Prompts, TextTower, Vectors


@dataclass(frozen=True)
class StepOutput:
    """What one step gives.

    Attributes:
        loss: [].
        concept_index: [N], the concept of each mask.
        assignment: [N, K], softmax of the scaled cosines, before Sinkhorn.
        logits: [S, K, H, W] of the first S images of this process's first micro_batch with masks, as many as were asked for.
        shown_index: the concept of each mask of that micro_batch.
    """

    loss: Tensor
    concept_index: Tensor
    assignment: Tensor
    logits: Tensor
    shown_index: Tensor

    def concepts_used(self) -> int:
        """How many concepts have a mask."""
        return int(self.concept_index.unique().numel())


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
        precision: autocast of the decoder; a tower has its own.
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

    def mask_features(self, weak: Tensor, masks: Tensor, image_index: Tensor, counts: Sequence[int] | None = None) -> Tensor:
        """The teacher's features of every mask.

        Args:
            weak: [B, 3, side, side], normalised images for the teacher.
            masks: [N, H, W], bool.
            image_index: [N], the image of each mask.
            counts: see `pool_masks`.

        Returns:
            [N, C], unit length.
        """
        with torch.inference_mode():
            pooled = pool_masks(self.teacher(weak), masks, image_index, counts)
        return pooled.clone()  # a tensor of inference cannot take part in a loss

    @torch.no_grad()
    def assign(
        self, mask_features: Tensor, concepts: Tensor, group: ProcessGroup = SINGLE_PROCESS
    ) -> tuple[Tensor, Tensor, slice]:
        """Assigns masks to concepts, with Sinkhorn over the masks of all ranks.

        Args:
            mask_features: [N, C], this rank's.
            concepts: [K, C].
            group: the processes that take part.

        Returns:
            Of the masks of all ranks the concept [N], the cosines [N, K] that it was chosen by, and which are this rank's.
        """
        cosines, mine = group.all_gather(mask_features @ F.normalize(concepts, dim=-1).T)
        chosen = sinkhorn(self.assignment_scale * cosines, self.sinkhorn_iterations).argmax(dim=-1)
        return chosen, cosines, mine

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
        """The student's loss on a batch whose masks have their concepts.

        Args:
            batch: B images and their N masks; of its views only the strong one is seen.
            covered: [B, H, W], bool: pixels inside at least one mask.
            mask_features: [N, C], used when clustering is off.
            concepts: [K, C].
            concept_index: [N].
            terms: [], see `decoded_loss`.
            shown: of how many images, from the first on, the logits are wanted.

        Returns:
            The loss, and the logits [shown, K, H, W] (without clustering K is the largest number of masks of an image).
        """
        features = F.normalize(self.student(batch.strong), dim=1)
        num_images, num_concepts = len(batch.strong), len(concepts)
        images = torch.arange(num_images, device=features.device)
        if self.clustering:
            maps = torch.einsum("bchw,kc->bkhw", features, F.normalize(concepts, dim=-1)).flatten(0, 1)
            targets = merge_by_concept(batch.masks, batch.image_index, concept_index, num_images, num_concepts).flatten(0, 1)
            owner, places = images.repeat_interleave(num_concepts), shown * num_concepts
        else:
            maps = torch.einsum("nchw,nc->nhw", features[batch.image_index], mask_features)
            targets, owner, places = batch.masks, batch.image_index, int((batch.image_index < shown).sum()) if shown else 0
        loss, logits = decoded_loss(self.decoder, maps, targets, covered, owner, terms, self.precision, places)
        if self.clustering or not shown:
            return loss, logits.unflatten(0, (-1, num_concepts)) if self.clustering else logits[:, None]
        place = _place_in_image(owner[:places])
        nothing = logits.new_full((shown, int(place.max()) + 1 if places else 1, *targets.shape[1:]), -100.0)
        return loss, nothing.index_put((owner[:places], place), logits)

    def count_terms(self, batch: Batch, covered: Tensor, num_concepts: int) -> Tensor:
        """How many pixels times concepts the loss of a batch averages over: []; `covered` is [B, H, W]."""
        area = covered.flatten(1).sum(dim=1)
        return area.sum() * num_concepts if self.clustering else area[batch.image_index].sum()

    def accumulate(self, micro_batches: Sequence[Batch], group: ProcessGroup = SINGLE_PROCESS, shown: int = 0) -> StepOutput:
        """Compute loss and gradients of one optimizer step over all micro-batches and processes.

        All masks are assigned to concepts together, before the first student forward pass, and each micro-batch's loss is
        divided by the number of terms of the whole batch, so the gradients equal those of one large batch. Adds to `.grad`.
        Nothing here synchronizes with a GPU: mask counts are exchanged between the CPUs of the processes.

        Args:
            micro_batches: this rank's images, in parts that fit its memory; parts without images or masks are allowed.
            group: the processes that take part.
            shown: of how many images of the first micro_batch the logits are wanted.

        Returns:
            The loss of the whole batch; concepts and assignment of all ranks' masks; logits.
        """
        micro_batches = [micro_batch for micro_batch in micro_batches if len(micro_batch.masks)]
        concepts = self.concepts()  # through the text tower once, for all micro_batches
        fixed = concepts.detach().requires_grad_(concepts.requires_grad)
        with torch.no_grad():
            features = [
                self.mask_features(micro_batch.weak, micro_batch.masks, micro_batch.image_index, micro_batch.counts)
                for micro_batch in micro_batches
            ]
            covered = [_covered(micro_batch) for micro_batch in micro_batches]
            counted = [self.count_terms(*each, len(fixed)) for each in zip(micro_batches, covered, strict=True)]
            terms = group.all_reduce(torch.stack([*counted, torch.zeros_like(fixed[0, 0], dtype=torch.long)]).sum())
        everybodys, cosines, mine = self.assign(torch.cat([*features, fixed.detach()[:0]]), fixed, group)
        concept_index = everybodys[mine]
        loss, logits = fixed.new_zeros(()), fixed.new_zeros(0)
        of_pieces = concept_index.split([len(feature) for feature in features])
        for number, (micro_batch, pixels, feature, index) in enumerate(
            zip(micro_batches, covered, features, of_pieces, strict=True)
        ):
            wanted = min(shown, len(micro_batch.strong)) if number == 0 else 0
            part, found = self.loss(micro_batch, pixels, feature, fixed, index, terms, wanted)
            part.backward()
            loss, logits = loss + part.detach(), found if number == 0 else logits
        if fixed.grad is not None:
            concepts.backward(fixed.grad)
        group.all_reduce_gradients(self.learning())
        softmax = torch.softmax(self.assignment_scale * cosines, dim=-1)
        shown_index = concept_index[: len(features[0]) if features else 0]
        return StepOutput(group.all_reduce(loss), everybodys, softmax, logits, shown_index)

    @torch.no_grad()
    def update_teacher(self, momentum: float) -> None:
        """Moves the teacher towards the student; call it once after each optimizer step."""
        both = zip(self.teacher.parameters(), self.student.parameters(), strict=True)
        old, new = zip(*((mean, learned) for mean, learned in both if learned.requires_grad), strict=True)
        torch._foreach_lerp_(old, new, 1 - momentum)


def _covered(batch: Batch) -> Tensor:
    """Pixels inside at least one mask: [B, H, W], bool."""
    nobody = torch.zeros_like(batch.image_index)
    return merge_by_concept(batch.masks, batch.image_index, nobody, len(batch.strong), 1)[:, 0]


def _place_in_image(image_index: Tensor) -> Tensor:
    """The how manieth of its image each mask is: [N] -> [N]."""
    same = image_index[:, None] == image_index
    return same.tril(-1).sum(dim=1)
