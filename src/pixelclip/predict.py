"""The Predictor: an image and class names in, a label map out (PixelCLIP, section 3.4).

B images, K classes, C embedding width, h w feature grid, H W image.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from pixelclip.backbone import Backbone
from pixelclip.checkpoint import Clip, Model, backbone_of, load_model
from pixelclip.class_names import check_names
from pixelclip.images import colour_labels, palette, to_rgb, turn_upright
from pixelclip.labels import label_map
from pixelclip.pixels import resized_square
from pixelclip.ranks import pick_device, pick_precision
from pixelclip.text import TEMPLATES, TextTower, classifier

_CLASSES_AT_ONCE = 16
_EPSILON = 1e-12  # of F.normalize
MAX_CLASSES = 65535  # what a 16-bit label map can hold
_LONGEST_EDGE = 16384  # of an overlay: beside a strip of a million pixels a legend would take gigabytes
_LEGEND_ENTRIES, _LEGEND_CHARACTERS = 100, 60


def class_scores(backbone: Backbone, images: Tensor, classes: Tensor, feature_grid: int = 64) -> Tensor:
    """Cosine of every location with every class.

    Args:
        backbone: dense features.
        images: [B, 3, H, W], normalised; sides that are no multiples of the patch are padded with their last pixels.
        classes: [K, C], unit length.
        feature_grid: side of the grid to which features are brought bilinearly first.

    Returns:
        [B, K, feature_grid, feature_grid].
    """
    features = _to_grid(*_see(backbone, images), feature_grid)
    return torch.einsum("bchw,kc->bkhw", F.normalize(features, dim=1), classes)


_Share = tuple[float, float]


def _see(backbone: Backbone, images: Tensor) -> tuple[Tensor, _Share]:
    """Dense features [B, C, h, w] of whole patches, and what share of their height and width is the image's own."""
    height, width = images.shape[2:]
    below, beside = (-edge % patch for edge, patch in zip((height, width), backbone.patch_size, strict=True))
    if below or beside:  # a tower leaves the rest of a patch out, and its features would be taken for those of the whole
        images = F.pad(images, (0, beside, 0, below), mode="replicate")
    return backbone(images), (height / (height + below), width / (width + beside))


def _to_grid(features: Tensor, share: _Share, grid: int) -> Tensor:
    """Features [B, C, h, w] of which a share is the image's, at a grid over the image, bilinearly: [B, C, grid, grid]."""
    if share == (1, 1):
        return F.interpolate(features, size=(grid, grid), mode="bilinear", align_corners=False)
    middle = (torch.arange(grid, device=features.device, dtype=features.dtype) + 0.5) * (2 / grid)
    rows, columns = torch.meshgrid(*(middle * part - 1 for part in share), indexing="ij")
    places = torch.stack([columns, rows], dim=-1).expand(len(features), -1, -1, -1)
    return F.grid_sample(features, places, mode="bilinear", padding_mode="border", align_corners=False)


def slide_scores(
    backbone: Backbone,
    image: Tensor,
    classes: Tensor,
    crop: int,
    stride: int,
    feature_grid: int = 64,
    windows_at_once: int = 8,
) -> Iterator[Tensor]:
    """Cosines averaged over overlapping windows, a few classes at a time.

    A window is scored as `class_scores` scores an image, at its own size; its scores are brought to its pixels bilinearly,
    and a pixel takes the mean over the windows that cover it. Windows stand every `stride` pixels, the last ones flush with
    the border; an image smaller than `crop` on a side has one window on that side.

    For all classes at once only [windows, K, h, w] at the backbone's own places is held (for patches of 16 pixels a 28th of
    the scores at full size when `crop` is three strides), scores of the image's size for a few classes.

    Args:
        backbone: dense features.
        image: [1, 3, H, W], normalised.
        classes: [K, C], unit length.
        crop: side of a window in pixels.
        stride: pixels from one window to the next, at most `crop`.
        feature_grid: see `class_scores`; each window's.
        windows_at_once: windows in one forward pass.

    Yields:
        [1, k, H, W] for consecutive classes; all of them together have K.

    Raises:
        ValueError: windows would leave gaps.
    """
    if not 0 < stride <= crop:
        raise ValueError(f"windows of {crop} pixels every {stride} pixels leave gaps: 0 < stride <= crop is needed")
    height, width = min(crop, image.shape[2]), min(crop, image.shape[3])
    corners = [(y, x) for y in _starts(image.shape[2], height, stride) for x in _starts(image.shape[3], width, stride)]
    windows = [(..., slice(y, y + height), slice(x, x + width)) for y, x in corners]
    found: list[Tensor] = []
    norms: list[Tensor] = []
    share = (1.0, 1.0)
    for first in range(0, len(windows), windows_at_once):
        features, share = _see(backbone, torch.cat([image[window] for window in windows[first : first + windows_at_once]]))
        found.append(torch.einsum("bchw,kc->bkhw", features, classes))
        features = _to_grid(features, share, feature_grid)
        norms += features.norm(dim=1, keepdim=True).clamp_min(_EPSILON).split(1)
    products = torch.cat(found)
    del found  # or it would be held twice
    times_covered = image.new_zeros(image.shape[2:])
    for window in windows:
        times_covered[window] += 1
    for some in products.split(_CLASSES_AT_ONCE, dim=1):
        total = image.new_zeros(1, some.shape[1], *image.shape[2:])
        for window, product, norm in zip(windows, some.split(1), norms, strict=True):
            # Interpolation commutes with the product, so that the features at the grid need not be held.
            total[window] += resize_scores(_to_grid(product, share, feature_grid) / norm, (height, width))
        yield total / times_covered


def _starts(length: int, window: int, stride: int) -> list[int]:
    return [*range(0, length - window, stride), length - window]


def resize_shortest(image: Tensor, side: int) -> Tensor:
    """Resizes [B, 3, H, W] to a shortest edge of `side` pixels, bilinearly and without antialiasing, as `squash` does."""
    height, width = (max(side, round(edge * side / min(image.shape[2:]))) for edge in image.shape[2:])
    return F.interpolate(image, size=(height, width), mode="bilinear", align_corners=False)


def resize_scores(scores: Tensor, size: tuple[int, int]) -> Tensor:
    """Brings scores [B, K, h, w] to the image bilinearly: [B, K, H, W]."""
    return F.interpolate(scores, size=size, mode="bilinear", align_corners=False)


def best_class(parts: Iterable[Tensor], size: tuple[int, int]) -> Tensor:
    """The best class of every pixel [B, H, W], int64, of scores [B, k, h, w] that come as parts of consecutive classes.

    Scores at full size are never held for more than one part; a tie goes to the first class.
    """
    best = labels = None
    start = 0
    for part in parts:
        top, index = resize_scores(part, size).max(dim=1)
        if best is None or labels is None:
            best, labels = top, index
        else:
            better = top > best
            best, labels = torch.where(better, top, best), torch.where(better, index + start, labels)
        start += part.shape[1]
    assert labels is not None
    return labels


@dataclass(frozen=True)
class Prediction:
    """`labels` [H, W] index into `classes`; `scores` [K, h, w], cosines on the feature grid."""

    labels: NDArray[np.uint16]
    scores: NDArray[np.float32]
    classes: list[str]


class Predictor:
    """Segments images into classes named freely.

    Args:
        model: a loaded model.
        device: auto, cpu, cuda, ...
        feature_grid: see `class_scores`.
    """

    def __init__(self, model: Model, device: str = "auto", feature_grid: int = 64) -> None:
        self.device = pick_device(device)
        self.clip: Clip = model.clip
        self.side = model.side
        self.feature_grid = feature_grid
        self.backbone = backbone_of(model).to(self.device).eval()
        self.text = TextTower(model.clip.model).to(self.device).eval()
        self._classifiers: dict[tuple[str, ...], Tensor] = {}

    @classmethod
    def load(cls, folder: Path, device: str = "auto") -> "Predictor":
        """Loads a model folder; raises ValueError as `load_model` and `pick_device`."""
        return cls(load_model(folder), device)

    @torch.no_grad()
    def __call__(self, image: Image.Image, classes: Sequence[str]) -> Prediction:
        """Segments one image of any size.

        Args:
            image: any mode; turned upright by its EXIF orientation.
            classes: at least one name; "a, b" are synonyms of one class.

        Raises:
            ValueError: an unusable list of classes.
        """
        pick_precision("float32", self.device)  # what ran before in this process may have left TF32 on
        names = check_names(classes)
        if len(names) > MAX_CLASSES:
            raise ValueError(f"classes: at most {MAX_CLASSES} names, found {len(names)}")
        known = self._classifiers  # threads that ask for other classes replace it
        if tuple(names) not in known:
            self._classifiers = known = {tuple(names): classifier(self.text, names, TEMPLATES["ensemble"])}
        upright = turn_upright(image)
        pixels = resized_square(upright, self.side, self.clip.mean, self.clip.std, self.device)
        scores = class_scores(self.backbone, pixels, known[tuple(names)], self.feature_grid)
        labels = label_map(scores, (upright.height, upright.width))[0]
        return Prediction(labels.cpu().numpy().astype(np.uint16), scores[0].cpu().numpy(), names)


def label_image(labels: NDArray[np.uint16]) -> Image.Image:
    """A label map as an image: 8 bit where the values allow it, else 16 bit."""
    return Image.fromarray(labels.astype(np.uint8) if labels.max(initial=0) < 256 else labels)


def overlay(image: Image.Image, prediction: Prediction, opacity: float = 0.55) -> Image.Image:
    """The image under its label colours, with a legend of the classes that occur, largest first.

    For people: an edge beyond 16,384 pixels is shrunk to that, the legend has 100 classes at most, of names 60 characters.
    """
    photo = np.asarray(to_rgb(turn_upright(image)), dtype=np.float32)
    colours = colour_labels(prediction.labels, len(prediction.classes)).astype(np.float32)
    picture = Image.fromarray(np.round(photo * (1 - opacity) + colours * opacity).astype(np.uint8))
    picture.thumbnail((_LONGEST_EDGE, _LONGEST_EDGE))
    counts = np.bincount(prediction.labels.ravel(), minlength=len(prediction.classes))
    present = [int(i) for i in np.argsort(-counts, kind="stable") if counts[i]]
    entries = [(i, f"{_cut(prediction.classes[i])}  {100 * counts[i] / counts.sum():.0f} %") for i in present[:_LEGEND_ENTRIES]]
    return _with_legend(picture, entries, palette(len(prediction.classes)))


def _cut(name: str) -> str:
    return name if len(name) <= _LEGEND_CHARACTERS else f"{name[: _LEGEND_CHARACTERS - 1]}…"


def _with_legend(picture: Image.Image, entries: list[tuple[int, str]], colours: NDArray[np.uint8]) -> Image.Image:
    size = max(12, min(picture.height // 18, 40))
    font = ImageFont.load_default(size)
    row, column = round(size * 1.6), round(max(font.getlength(text) for _, text in entries)) + 3 * size
    columns = max(1, picture.width // column)
    rows = -(-len(entries) // columns)
    canvas = Image.new("RGB", (max(picture.width, column), picture.height + rows * row + size // 2), "white")
    canvas.paste(picture, (0, 0))
    draw = ImageDraw.Draw(canvas)
    for position, (index, text) in enumerate(entries):
        left = (position % columns) * column + size // 2
        top = picture.height + size // 2 + (position // columns) * row
        draw.rectangle((left, top, left + size, top + size), fill=tuple(int(v) for v in colours[index]))
        draw.text((left + size * 1.5, top - size * 0.1), text, fill="black", font=font)
    return canvas
