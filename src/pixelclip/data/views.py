"""Draw a training sample: weak and strong view of a random crop, and its masks on the grid (PixelCLIP, section 3).

N masks, H W mask grid, which is square. The colour transforms do not use torchvision: its import costs every worker several
seconds, and here its strong jitter takes 2.4 times as long (docs/experiments.md).
"""

import copy
import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from pixelclip.data.rle import RunMasks
from pixelclip.data.tensors import normalise, to_tensor


@dataclass(frozen=True)
class Views:
    """Parameters of the views; lengths in pixels, see the settings of the same names; `dino_side` 0 without DINO."""

    side: int
    mask_grid: int
    shortest_edge: int
    longest_edge: int
    crop: int
    color_jitter: bool
    flip: bool
    strong_view: bool
    cutout_min: float
    cutout_max: float
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    dino_side: int = 0


@dataclass(frozen=True)
class TrainingSample:
    """`weak`, `strong` [3, side, side], normalised; `packed` masks, see `unpack`; `position` in the sample stream.

    `crop` [3, dino_side, dino_side], uint8, is the weak view for DINO, if it is used.
    """

    weak: Tensor
    strong: Tensor
    packed: Tensor
    position: int = -1
    crop: Tensor | None = None

    @property
    def masks(self) -> Tensor:
        """Masks [N, H, W], bool."""
        return unpack(self.packed)


def unpack(packed: Tensor) -> Tensor:
    """Unpack masks with 8 rows per byte, the first in the lowest bit: uint8 [N, ceil(H / 8), W] -> bool [N, H, W], H = W."""
    rows = torch.arange(8, dtype=torch.uint8, device=packed.device)[:, None]
    inside = (packed[:, :, None] >> rows) & 1
    return inside.flatten(1, 2)[:, : packed.shape[-1]].view(torch.bool).contiguous()


def draw(image: Image.Image, masks: RunMasks, views: Views, generator: np.random.Generator, shrunk: int = 1) -> TrainingSample:
    """Draw a random crop of one image as weak and strong view, with its masks.

    The resize to `shortest_edge` and the crop are a single resampling. The paper's blur is in pixels of the crop, so it is
    scaled to the side.

    Args:
        image: RGB.
        masks: masks at the full size of the image.
        views: sizes and switches.
        generator: the only source of randomness.
        shrunk: factor by which `image` is smaller than its full size, see `shrink_factor`.
    """
    size = masks.size[::-1]
    width, height = _crop_size(size, views)
    left, top = generator.uniform(0, size[0] - width), generator.uniform(0, size[1] - height)
    box = (left / shrunk, top / shrunk, (left + width) / shrunk, (top + height) / shrunk)

    def resample(side: int, generator: np.random.Generator) -> Tensor:
        pixels = to_tensor(image.resize((side, side), Image.Resampling.BILINEAR, box=box)).contiguous()
        return _ssd_jitter(pixels, generator) if views.color_jitter else pixels

    large = resample(views.dino_side, copy.deepcopy(generator)) if views.dino_side else None  # with the weak view's colours
    pixels = resample(views.side, generator)
    grid = (np.arange(views.mask_grid) + 0.5) / views.mask_grid
    rows = np.minimum((top + grid * height).astype(np.int64), size[1] - 1)
    columns = np.minimum((left + grid * width).astype(np.int64), size[0] - 1)
    if views.flip and generator.random() < 0.5:
        pixels, columns = pixels.flip(-1), columns[::-1]
        large = None if large is None else large.flip(-1)
    packed = masks.sample_packed(rows, columns)  # [N, ceil(H / 8), W]
    strong = pixels
    if views.strong_view:
        strong = _strong_jitter(pixels, generator, blur_scale=views.side / max(width, height) * _scale(size, views))
        strong, packed = _cut_out(strong, packed, views, generator)
    return TrainingSample(
        normalise(pixels, views.mean, views.std),
        normalise(strong, views.mean, views.std),
        torch.from_numpy(packed[_more_than_one(packed)]),
        crop=None if large is None else (large * 255).round_().byte(),
    )


def shrink_factor(size: tuple[int, int], views: Views) -> int:
    """Return the maximum factor for decoding an image of (width, height) such that crops are not smaller than the views."""
    limit = min(_crop_size(size, views)) / max(views.side, views.dino_side)
    return max([1] + [factor for factor in (2, 4, 8) if factor <= limit])


def _more_than_one(packed: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Select the masks with more than one pixel: [N]."""
    flat = packed.reshape(len(packed), packed.shape[1] * packed.shape[2])
    return ((flat != 0).sum(axis=1) > 1) | (flat & (flat - 1)).any(axis=1)


def _scale(size: tuple[int, int], views: Views) -> float:
    """Return the ratio of the original size to the paper's resized size."""
    return 1 / min(views.shortest_edge / min(size), views.longest_edge / max(size))


def _crop_size(size: tuple[int, int], views: Views) -> tuple[float, float]:
    crop = views.crop * _scale(size, views)
    return min(crop, size[0]), min(crop, size[1])


def _ssd_jitter(pixels: Tensor, generator: np.random.Generator) -> Tensor:
    """Apply SSD's colour jitter as in detectron2: brightness, contrast, saturation, hue, each with p 0.5 and clipped."""

    def coin() -> bool:
        return bool(generator.random() < 0.5)

    def contrast(x: Tensor) -> Tensor:
        return (x * generator.uniform(0.5, 1.5)).clamp_(0, 1) if coin() else x

    contrast_first = coin()
    if coin():
        pixels = (pixels + generator.uniform(-32, 32) / 255).clamp_(0, 1)
    if contrast_first:
        pixels = contrast(pixels)
    if coin():
        pixels = _saturate(pixels, generator.uniform(0.5, 1.5))
    if coin():
        pixels = _shift_hue(pixels, generator.integers(-18, 18, endpoint=True) / 180)  # OpenCV's hue has 180 steps
    return pixels if contrast_first else contrast(pixels)


def _strong_jitter(pixels: Tensor, generator: np.random.Generator, blur_scale: float) -> Tensor:
    """Apply ColorJitter(.5, .5, .5, .25) p .8, greyscale p .2, Gaussian blur with sigma U(.1, 2) p .5."""
    if generator.random() < 0.8:
        brightness, contrast, saturation = (float(v) for v in generator.uniform(0.5, 1.5, 3))
        hue = generator.uniform(-0.25, 0.25)
        for index in generator.permutation(4):
            if index == 0:
                pixels = (pixels * brightness).clamp_(0, 1)
            elif index == 1:
                pixels = _mix(pixels, _grey(pixels).mean(), contrast)
            elif index == 2:
                pixels = _mix(pixels, _grey(pixels), saturation)
            else:
                pixels = _shift_hue(pixels, hue)
    if generator.random() < 0.2:
        pixels = _grey(pixels).expand(pixels.shape)
    if generator.random() < 0.5:
        sigma = generator.uniform(0.1, 2.0) * blur_scale
        radius = min(max(1, math.ceil(3 * sigma)), (min(pixels.shape[1:]) - 1) // 2)
        pixels = _blur(pixels, radius, max(sigma, 0.05))
    return pixels


def _grey(pixels: Tensor) -> Tensor:
    """Compute the luma of RGB: [1, H, W]."""
    red, green, blue = pixels[:, None]
    return (red * 0.2989).add_(green, alpha=0.587).add_(blue, alpha=0.114)


def _mix(pixels: Tensor, other: Tensor, weight: float) -> Tensor:
    """Blend two images; weights above 1 extrapolate away from `other`."""
    return (pixels * weight).add_(other, alpha=1 - weight).clamp_(0, 1)


def _saturate(pixels: Tensor, factor: float) -> Tensor:
    """Multiply the saturation of HSV, clipped at 1; hue and value are kept."""
    value = pixels.amax(dim=0)
    chroma = value - pixels.amin(dim=0)  # saturation times value
    removed = (value - pixels).mul_((value / chroma.clamp_min(1e-9)).clamp_(max=factor))
    return (value - removed).clamp_min_(0)  # rounding may give values below 0


def _shift_hue(pixels: Tensor, shift: float) -> Tensor:
    """Shift the hue of RGB [3, H, W] in 0..1 by a fraction of the circle: torchvision's `adjust_hue` with fewer passes."""
    red, green, blue = pixels
    highest, lowest = pixels.amax(dim=0), pixels.amin(dim=0)
    chroma = highest - lowest
    side = torch.where(
        highest == red,
        green - blue,
        torch.where(highest == green, (blue - red).add_(chroma, alpha=2), (red - green).add_(chroma, alpha=4)),
    )
    hue = side.div_(chroma.clamp_min(1e-9)).add_(6 * shift).remainder_(6)  # in sides of the hexagon; arbitrary for grey
    shifted = torch.empty_like(pixels)
    for channel, (centre, sign) in enumerate(((3, 1), (2, -1), (4, -1))):
        torch.sub(hue, centre, out=shifted[channel]).abs_().mul_(sign).add_(0.5 - 1.5 * sign).clamp_(0, 1)
    return shifted.mul_(chroma).add_(lowest)


def _blur(pixels: Tensor, radius: int, sigma: float) -> Tensor:
    """Apply a Gaussian blur with reflected edges to [3, H, W]: torchvision's `gaussian_blur`.

    Separable, as sums of shifted images: a single-channel convolution takes three times as long on a CPU.
    """
    weights = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    pixels = F.pad(pixels[None], [radius] * 4, mode="reflect")[0]
    for dim in (1, 2):
        length = pixels.shape[dim] - 2 * radius
        blurred = torch.zeros_like(pixels.narrow(dim, 0, length))
        for first, weight in enumerate((weights / weights.sum()).tolist()):
            blurred.add_(pixels.narrow(dim, first, length), alpha=weight)
        pixels = blurred
    return pixels


def _cut_out(
    pixels: Tensor, packed: NDArray[np.uint8], views: Views, generator: np.random.Generator
) -> tuple[Tensor, NDArray[np.uint8]]:
    """Erase a random rectangle from the image and the masks."""
    if views.cutout_max == 0:
        return pixels, packed
    height, width = generator.uniform(views.cutout_min, views.cutout_max, 2)
    top, left = generator.uniform(0, 1 - height), generator.uniform(0, 1 - width)

    def inside(side: int) -> tuple[slice, slice]:
        return slice(round(top * side), round((top + height) * side)), slice(round(left * side), round((left + width) * side))

    pixels = pixels.clone()
    pixels[(slice(None), *inside(views.side))] = 0
    kept = np.ones((views.mask_grid, views.mask_grid), bool)
    kept[inside(views.mask_grid)] = False
    return pixels, packed & np.packbits(kept, axis=0, bitorder="little")
