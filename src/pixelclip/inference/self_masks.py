"""Masks by a trained PixelCLIP itself, for a second round of training: its refined segmentation into its own concepts.

K concepts, C embedding width, H W image.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image

from pixelclip.config import QUALITIES, MasksConfig
from pixelclip.data.annotations import annotate
from pixelclip.distributed import pick_precision
from pixelclip.inference.label_map import label_map
from pixelclip.inference.predictor import Predictor
from pixelclip.inference.refinement.refine import photo_scores
from pixelclip.mask_generators import Generate
from pixelclip.models.checkpoint import load_model


def load_generator(weights: Path, config: MasksConfig) -> Generate:
    """Load a trained model on the configured device; its masks are the connected regions of the best concepts, `quality=best`.

    Args:
        weights: model folder.
        config: settings.

    Raises:
        ValueError: as `load_model` and `pick_device`.
    """
    model = load_model(weights)
    predictor = Predictor(model, config.device)
    pick_precision("float32", predictor.device)  # earlier work in this process may have enabled TF32
    with torch.inference_mode():
        concepts = F.normalize(model.prompts.to(predictor.device)(predictor.text), dim=1)  # [K, C]

    def generate(batch: list[tuple[str, Image.Image]]) -> Iterator[dict[str, Any]]:
        for key, image in batch:
            scores = photo_scores(predictor.backbone, image, concepts, predictor.view, QUALITIES["best"])
            labels = label_map(scores, (image.height, image.width))[0].cpu().numpy()
            yield annotate(regions(labels, config.model_min_area), image.size, key)

    return generate


def regions(labels: NDArray[np.integer], min_area: int) -> Iterator[NDArray[np.bool_]]:
    """Yield the connected regions (8 neighbours) of equal labels [H, W] with at least `min_area` pixels, each [H, W]."""
    from skimage.measure import label

    numbered = label(labels, background=-1, connectivity=2)  # from 1
    areas = np.bincount(numbered.ravel())
    return (numbered == number for number in np.flatnonzero(areas) if areas[number] >= min_area)
