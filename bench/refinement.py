"""Cost of refinements at inference against passes of a ViT-B/16 at 320 px; PAMR and propagation on the demo's 19 classes."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from bench.case import Case
from bench.train_step import SIDE, random_clip
from pixelclip.config import QUALITIES, Quality
from pixelclip.inference.refinement.pamr import pamr
from pixelclip.inference.refinement.propagation import propagate
from pixelclip.inference.refinement.refine import View, photo_scores
from pixelclip.models.backbone import Backbone

_CLASSES, _WIDTH, _GRID = 19, 512, 64
_STRENGTH = 3.0  # of the propagation; docs/experiments.md


def make(step: str) -> Case:
    """Create the comparison of `pamr` or `propagation` with one pass, or of `quality=best` (`best`) with `quality=fast`."""
    generator = torch.Generator().manual_seed(0)
    backbone = Backbone(random_clip().visual).eval()
    if step == "best":
        return _qualities(backbone, F.normalize(torch.randn(_CLASSES, _WIDTH, generator=generator), dim=1))
    image = torch.rand(1, 3, SIDE, SIDE, generator=generator)
    scores, small = (torch.rand(1, number, _GRID, _GRID, generator=generator) for number in (_CLASSES, 3))
    iterations = QUALITIES["best"].pamr_iterations
    steps: dict[str, Callable[[], Tensor]] = {
        "pamr": lambda: pamr(scores, small, iterations),
        "propagation": lambda: propagate(scores, small, _STRENGTH),
    }
    what = f"{step} of {_CLASSES} classes, {_GRID} x {_GRID} cells; baseline: a pass of ViT-B/16, {SIDE} px"
    return Case(what, torch.no_grad()(lambda: backbone(image)), steps[step], _finite)


def _qualities(backbone: Backbone, classes: Tensor) -> Case:
    random = np.random.default_rng(0).integers(0, 256, (480, 480, 3), np.uint8)
    view = View(SIDE, SIDE, _GRID, 0, 0, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))

    def scores(quality: Quality) -> Tensor:
        return photo_scores(backbone, Image.fromarray(random), classes, view, QUALITIES[quality])

    what = f"quality=best of a square photo; baseline: fast, ViT-B/16, both {SIDE} px"
    return Case(what, lambda: scores("fast"), lambda: scores("best"), _finite)


def _finite(baseline: Tensor, ours: Any) -> str:
    assert baseline.isfinite().all() and ours.isfinite().all()
    return "different work"
