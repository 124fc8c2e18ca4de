"""A training step at the paper's sizes, with optimizer and EMA, and the literal step of tests/helpers/reference.py."""

import copy
import sys
from functools import partial
from pathlib import Path
from typing import Any

import open_clip
import torch
from torch import Tensor, nn

from bench.case import Case
from pixelclip.config import TrainConfig
from pixelclip.data.dataset import Batch
from pixelclip.models.backbone import Backbone
from pixelclip.models.concepts import new_concepts
from pixelclip.models.decoder import new_decoder
from pixelclip.models.optimizer import make_optimizer
from pixelclip.models.pixelclip import PixelCLIP
from pixelclip.models.text import TextTower

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from helpers import reference

SIDE, GRID, CONCEPTS, IMAGES, MASKS = 320, 256, 64, 2, 40
SETTINGS = TrainConfig(concepts=CONCEPTS)


def random_clip(name: str = "ViT-B-16-quickgelu") -> nn.Module:
    """Create a CLIP of a published shape with random weights."""
    torch.manual_seed(0)
    return open_clip.create_model(name, pretrained=None).eval()


def blobs(generator: torch.Generator, number: int, grid: int = GRID) -> Tensor:
    """Draw overlapping ellipses with the spread of sizes of SA-1B: [number, grid, grid], bool."""
    y, x = torch.meshgrid(torch.arange(grid), torch.arange(grid), indexing="ij")
    centre = torch.rand(number, 2, generator=generator) * grid
    radius = grid * (0.02 + 0.3 * torch.rand(number, 2, generator=generator) ** 3)
    inside = ((y - centre[:, 0, None, None]) / radius[:, 0, None, None]) ** 2
    return inside + ((x - centre[:, 1, None, None]) / radius[:, 1, None, None]) ** 2 < 1


def batch_of(images: int, masks: int, side: int = SIDE) -> Batch:
    """Create a batch of noise with masks."""
    generator = torch.Generator().manual_seed(1)
    weak, strong = torch.randn(2, images, 3, side, side, generator=generator)
    index = torch.arange(images).repeat_interleave(masks)
    return Batch(weak, strong, blobs(generator, images * masks), index, [])


def model_of(clip: nn.Module, precision: torch.dtype | None = None, settings: TrainConfig = SETTINGS) -> PixelCLIP:
    """Create a PixelCLIP model before its first step, from a copy of `clip`."""
    clip = copy.deepcopy(clip)
    text = TextTower(clip)
    concepts, decoder = new_concepts(text, settings), new_decoder(settings.seed)
    return PixelCLIP(Backbone(clip.visual, precision=precision), text, concepts, decoder, precision=precision).train()


def our_step(model: PixelCLIP, optimizer: torch.optim.Optimizer, batch: Batch) -> dict[str, Any]:
    """Run one step as `train` does."""
    optimizer.zero_grad(set_to_none=True)
    output = model.accumulate([batch])
    norm = nn.utils.clip_grad_norm_(model.learning(), SETTINGS.gradient_clip)
    optimizer.step()
    model.update_teacher(SETTINGS.teacher_momentum)
    return {"loss": float(output.loss), "norm": float(norm)}


def literal_step(model: PixelCLIP, clip: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch) -> dict[str, Any]:
    """Run one step of tests/helpers/reference.py with the parameters of `model`."""
    optimizer.zero_grad(set_to_none=True)
    with torch.no_grad():
        teacher = reference.dense_vit(model.teacher.visual, batch.weak)
    found = reference.step(
        reference.dense_vit(model.student.visual, batch.strong),
        teacher,
        reference.concepts(clip, model.text.tokenizer, model.prompts.tokens),
        dict(model.decoder.named_parameters()),
        [batch.masks[batch.image_index == image] for image in range(len(batch.strong))],
        SETTINGS.assignment_scale,
        SETTINGS.sinkhorn_iterations,
    )
    found.loss.backward()
    norm = nn.utils.clip_grad_norm_(model.learning(), SETTINGS.gradient_clip)
    optimizer.step()
    with torch.no_grad():
        for old, new in zip(model.teacher.parameters(), model.student.parameters(), strict=True):
            old.copy_(SETTINGS.teacher_momentum * old + (1 - SETTINGS.teacher_momentum) * new)
    return {"loss": float(found.loss.detach()), "norm": float(norm)}


def same(theirs: dict[str, Any], ours: dict[str, Any], tolerance: float = 1e-4) -> str:
    """Compare loss and gradient norm of the first step."""
    difference = max(abs(theirs[key] / ours[key] - 1) for key in ("loss", "norm"))
    assert difference < tolerance, (theirs, ours)
    return f"loss and gradient norm within {difference:.0e}"


def make(precision: torch.dtype | None = None, tolerance: float = 1e-4) -> Case:
    """Create the comparison, with pixelclip in float32 or under autocast."""
    clip = random_clip()
    literal, ours = model_of(clip), model_of(clip, precision)
    batch = batch_of(IMAGES, MASKS)
    return Case(
        what=f"ViT-B/16, {IMAGES} images of {SIDE} px, {MASKS} masks each, K {CONCEPTS}, grid {GRID}, ours in "
        + ("float32" if precision is None else str(precision).removeprefix("torch.")),
        baseline=partial(literal_step, literal, clip, make_optimizer(literal, SETTINGS), batch),
        ours=partial(our_step, ours, make_optimizer(ours, SETTINGS), batch),
        same=partial(same, tolerance=tolerance),
        rounds=3,
    )
