"""The reference implementation's inference, written literally from its description, without pixelclip.

One image at a time: resize of the bytes, squash, dense features, scores of all classes at full size.
K classes, C embedding width, H W image.
"""

from argparse import Namespace
from typing import Any

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from helpers import reference

TEMPLATES = (
    *("itap of a {}.", "a bad photo of the {}.", "a origami {}.", "a photo of the large {}.", "a {} in a video game."),
    *("art of the {}.", "a photo of the small {}.", "A photo of a {} in the scene"),
)


def checkpoint(clip: dict[str, Any], tokens: Any, head: dict[str, Any]) -> dict[str, Any]:
    """Return a checkpoint as detectron2 writes it: the reference's names, plus the entries of its trainer."""
    model = {f"sem_seg_head.predictor.clip_model.{name}": tensor for name, tensor in clip.items()}
    model["sem_seg_head.predictor.prompt_tokens"] = tokens
    model |= {f"teacher_encoder.{name}": tensor + 1 for name, tensor in clip.items() if name.startswith("visual.")}
    model |= {f"head.{name}": tensor for name, tensor in head.items()}
    return {"model": model, "iteration": 9999, "best": np.float64(0.5), "args": Namespace(lr=2e-4)}


def resized(image: Image.Image, shortest: int = 640, longest: int = 2560) -> Image.Image:
    """Resize RGB bytes to a shortest edge, with a limit on the longest edge, by Pillow's antialiased bilinear filter."""
    width, height = image.size
    if height < width:
        new_height, new_width = float(shortest), width * (shortest / height)
    else:
        new_height, new_width = height * (shortest / width), float(shortest)
    if max(new_height, new_width) > longest:
        shrink = longest / max(new_height, new_width)
        new_height, new_width = new_height * shrink, new_width * shrink
    return image.resize((int(new_width + 0.5), int(new_height + 0.5)), Image.Resampling.BILINEAR)


def class_features(clip: nn.Module, names: list[str]) -> Tensor:
    """Return the classifier [K, C] of class names without synonyms, from open_clip's own text encoder."""
    rows, tokenizer = [], open_clip.SimpleTokenizer()
    for name in names:
        tokens = tokenizer([template.replace("{}", name) for template in TEMPLATES])
        rows.append(F.normalize(F.normalize(clip.encode_text(tokens), dim=-1).mean(dim=0), dim=-1))
    return torch.stack(rows)


@torch.no_grad()
def scores(clip: nn.Module, image: Image.Image, names: list[str], side: int, mean: Any, std: Any) -> Tensor:
    """Return the scores [K, H, W] of an RGB image, with `mean` and `std` in 0..1."""
    pixels = torch.from_numpy(np.array(resized(image))).permute(2, 0, 1).float()
    pixels = (pixels - 255 * torch.tensor(mean)[:, None, None]) / (255 * torch.tensor(std)[:, None, None])
    squashed = F.interpolate(pixels[None], size=(side, side), mode="bilinear", align_corners=False)
    convnext = hasattr(clip.visual, "trunk")
    dense = (reference.dense_convnext if convnext else reference.dense_vit)(clip.visual, squashed)
    dense = F.normalize(F.interpolate(dense, size=(64, 64), mode="bilinear"), dim=1)
    small = torch.einsum("bchw,kc->bkhw", dense, class_features(clip, names))
    return F.interpolate(small, size=image.size[::-1], mode="bilinear", align_corners=False)[0]


def assert_same_but_ties(labels: NDArray[Any], expected: Tensor, tolerance: float = 1e-5) -> None:
    """Compare a label map with scores [K, H, W]: another label than the best one must score equally, up to rounding."""
    assert labels.shape == expected.shape[1:]
    chosen = expected.gather(0, torch.from_numpy(labels.astype(np.int64))[None])[0]
    gap = expected.max(dim=0).values - chosen
    assert float(gap.max()) < tolerance, f"{float((gap > tolerance).float().mean()):.2%} of the pixels differ"
