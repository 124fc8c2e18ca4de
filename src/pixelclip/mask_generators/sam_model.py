"""What automatic mask generation needs of a model: embeddings of crops, prompts of points, logits at full size.

H W size of a crop in pixels, h w size of the decoder's output, N masks, P points.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from segment_anything.modeling import Sam
from segment_anything.utils.transforms import ResizeLongestSide
from torch import Tensor

from pixelclip.data.tensors import IMAGENET_MEAN, IMAGENET_STD, normalise
from pixelclip.mask_generators.sam2 import Sam2
from pixelclip.mask_generators.sam2_decoder import Sam2PointDecoder
from pixelclip.mask_generators.sam_decoder import PointDecoder
from pixelclip.mask_generators.sam_encoder import ImageEncoder


class SamModel:
    """SAM: crops are resized to a longest side and padded to a square.

    Args:
        sam: model on its device.
        precision: autocast dtype of the image encoder; None for float32.

    Attributes:
        side: side of the encoder's square input in pixels.
    """

    def __init__(self, sam: Sam, precision: torch.dtype | None = None) -> None:
        self.sam, self.side = sam, sam.image_encoder.img_size
        self._resize = ResizeLongestSide(self.side)
        self._encoder = ImageEncoder(sam.image_encoder, precision)

    def is_usable(self, size: tuple[int, int]) -> bool:
        """Return False for a crop [H, W] too thin for one pixel at the encoder's size."""
        return min(size) > 0 and min(self._shown(size)) > 0

    def decoders(self, crops: Sequence[NDArray[np.uint8]]) -> Iterator[PointDecoder]:
        """Encode crops, RGB [H, W, 3], together and yield the decoder of each."""
        resized = [torch.as_tensor(self._resize.apply_image(crop), device=self.sam.device) for crop in crops]
        images = torch.stack([self.sam.preprocess(pixels.permute(2, 0, 1)) for pixels in resized])
        for embedding in self._encoder(images):
            yield PointDecoder(self.sam.prompt_encoder, self.sam.mask_decoder, embedding)

    def prompts(self, points: NDArray[np.float64], size: tuple[int, int]) -> Tensor:
        """Convert points [P, 2], x y in a crop [H, W], to the encoder's input."""
        return torch.as_tensor(self._resize.apply_coords(points, size), device=self.sam.device)

    def upscale(self, logits: Tensor, size: tuple[int, int]) -> Tensor:
        """Upscale logits [N, h, w] to a crop: [N, H, W]."""
        masks: Tensor = self.sam.postprocess_masks(logits[:, None], self._shown(size), size)
        return masks[:, 0]

    def _shown(self, size: tuple[int, int]) -> tuple[int, int]:
        """Return the size of a crop [H, W] in the encoder's input, without padding."""
        shown: tuple[int, int] = self._resize.get_preprocess_shape(*size, self.side)
        return shown


class Sam2Model:
    """SAM 2 or 2.1: crops are resized to a square, ignoring their aspect. Arguments and methods are those of `SamModel`."""

    def __init__(self, sam: Sam2, precision: torch.dtype | None = None) -> None:
        self.sam, self.side, self.precision = sam, sam.side, precision

    def is_usable(self, size: tuple[int, int]) -> bool:
        """Return False for a crop [H, W] without pixels."""
        return min(size) > 0

    def decoders(self, crops: Sequence[NDArray[np.uint8]]) -> Iterator[PointDecoder]:
        """Encode crops, RGB [H, W, 3], together and yield the decoder of each."""
        images = torch.cat([self._resized(crop) for crop in crops])
        prompts, decoder = self.sam.sam_prompt_encoder, self.sam.sam_mask_decoder
        quarter, half, embeddings = self.sam.image_encoder(images, self.precision)
        # The published model adds this to the features of an image without earlier frames.
        embeddings = embeddings + self.sam.no_mem_embed.view(1, -1, 1, 1)
        for embedding, *fine in zip(embeddings, decoder.conv_s0(quarter), decoder.conv_s1(half), strict=True):
            yield Sam2PointDecoder(prompts, decoder, embedding, (fine[0], fine[1]))

    def prompts(self, points: NDArray[np.float64], size: tuple[int, int]) -> Tensor:
        """Convert points [P, 2], x y in a crop [H, W], to the encoder's input."""
        height, width = size
        inside = torch.as_tensor(points, dtype=torch.float32, device=self.sam.device)
        return inside / inside.new_tensor([width, height]) * self.side

    def upscale(self, logits: Tensor, size: tuple[int, int]) -> Tensor:
        """Upscale logits [N, h, w] to a crop: [N, H, W]."""
        return F.interpolate(logits[:, None], size, mode="bilinear", align_corners=False)[:, 0]

    def _resized(self, crop: NDArray[np.uint8]) -> Tensor:
        pixels = torch.tensor(crop, device=self.sam.device).permute(2, 0, 1)[None].float() / 255
        # The original resizes with torchvision, which antialiases.
        square = F.interpolate(pixels, (self.side, self.side), mode="bilinear", align_corners=False, antialias=True)
        return normalise(square, IMAGENET_MEAN, IMAGENET_STD)


def mask_model(sam: Sam | Sam2, precision: torch.dtype | None = None) -> SamModel | Sam2Model:
    """Return the adapter of a model on its device."""
    return Sam2Model(sam, precision) if isinstance(sam, Sam2) else SamModel(sam, precision)
