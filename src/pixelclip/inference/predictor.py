"""Predictor: segment an image into named classes (PixelCLIP, section 3.4).

B images, K classes, C embedding width, h w feature grid, H W image.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pixelclip.config import QUALITIES, Quality
from pixelclip.data.class_names import check_names
from pixelclip.data.images import turn_upright
from pixelclip.distributed import pick_device, pick_precision
from pixelclip.inference.label_map import label_map
from pixelclip.inference.prediction import Prediction, inference_settings
from pixelclip.inference.prediction import label_image as label_image  # the code of models registered before imports it here
from pixelclip.inference.prediction import overlay as overlay
from pixelclip.inference.refinement.refine import View, photo_scores
from pixelclip.models.checkpoint import Clip, Model, backbone_of, load_clip, load_model
from pixelclip.models.clip_sources import check_trained_from, clip_folder
from pixelclip.models.text import TEMPLATES, classifier
from pixelclip.workflow.stage import describe

MAX_CLASSES = 65535  # of a 16-bit label map


class Predictor:
    """Segment images into arbitrary named classes.

    Args:
        model: a loaded model.
        device: auto, cpu, cuda, cuda:N or mps.
        feature_grid: see `class_scores`.
        shortest_edge, longest_edge: first resize of an image in pixels, see `resize_shortest_edge`; by default the reference's.
        side, window: sides in pixels of the single view and of windows; 0 as in training.
    """

    def __init__(
        self,
        model: Model,
        device: str = "auto",
        feature_grid: int = 64,
        shortest_edge: int = 640,
        longest_edge: int = 2560,
        side: int = 0,
        window: int = 0,
    ) -> None:
        self.device = pick_device(device)
        self.clip: Clip = model.clip
        self.side = side or model.side
        normalisation = tuple(model.clip.mean), tuple(model.clip.std)
        self.view = View(self.side, window or model.side, feature_grid, shortest_edge, longest_edge, *normalisation)
        self.backbone = backbone_of(model).to(self.device).eval()
        self.text = model.clip.text_tower().to(self.device).eval()
        self._classifiers: dict[tuple[str, ...], Tensor] = {}

    @classmethod
    def load(cls, folder: Path, device: str = "auto", original_clip: bool = False) -> "Predictor":
        """Load a model folder; a registered model sees images of the size of its evaluation.

        Args:
            folder: model folder.
            device: see `Predictor`.
            original_clip: load the CLIP that the model was trained from instead, for comparison.

        Raises:
            ValueError: as `load_model` and `pick_device`, `inference.json` is damaged, or the CLIP is not the model's.
        """
        config, model = inference_settings(folder), load_model(folder)
        if original_clip:
            model = replace(model, clip=_original_clip(folder, **model.config["clip"]))
        sizes = config.model_dump(include={"shortest_edge", "longest_edge", "side", "window"})
        return cls(model, device, **sizes)

    @torch.no_grad()
    def __call__(self, image: Image.Image, classes: Sequence[str], quality: Quality = "fast") -> Prediction:
        """Segment one image of any size.

        Args:
            image: any mode; rotated according to its EXIF orientation.
            classes: at least one name; "a, b" lists synonyms of one class.
            quality: see `Quality`.

        Raises:
            ValueError: invalid class names or quality.
        """
        if quality not in get_args(Quality):
            raise ValueError(f"quality must be {' or '.join(get_args(Quality))} (found {quality!r})")
        pick_precision("float32", self.device)  # earlier work in this process may have enabled TF32
        names = check_names(classes)
        if len(names) > MAX_CLASSES:
            raise ValueError(f"classes: at most {MAX_CLASSES} names are allowed, found {len(names)}")
        cached = self._classifiers  # another thread may replace it
        if tuple(names) not in cached:
            self._classifiers = cached = {tuple(names): classifier(self.text, names, TEMPLATES["ensemble"])}
        upright = turn_upright(image)
        scores = photo_scores(self.backbone, upright, cached[tuple(names)], self.view, QUALITIES[quality])
        labels = label_map(scores, (upright.height, upright.width))[0]
        return Prediction(labels.cpu().numpy().astype(np.uint16), scores[0].cpu().numpy(), names)


def _original_clip(folder: Path, spec: str, md5: str | None) -> Clip:
    if weights := clip_folder(spec):
        check_trained_from(spec, describe(weights)["md5"], folder, md5)
    return load_clip(spec)
