"""Segment images without weights by graph segmentation (Felzenszwalb and Huttenlocher, 2004)."""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pixelclip.config import MasksConfig
from pixelclip.data.annotations import annotate
from pixelclip.data.images import decode_image, to_rgb
from pixelclip.mask_generators import EncodedSample


def felzenszwalb(image: Image.Image, scale: float, sigma: float, min_size: int) -> NDArray[np.int64]:
    """Return the segment of every pixel [H, W], numbered from 0, by scikit-image's `felzenszwalb`."""
    from skimage.segmentation import felzenszwalb as segment

    return np.asarray(segment(np.asarray(to_rgb(image)), scale=scale, sigma=sigma, min_size=min_size))


def generate(sample: EncodedSample, config: MasksConfig) -> dict[str, Any]:
    """Return one mask per segment as an annotation document."""
    image = decode_image(sample.image)
    segments = felzenszwalb(image, config.felzenszwalb_scale, config.felzenszwalb_sigma, config.felzenszwalb_min_size)
    return annotate((segments == number for number in np.unique(segments)), image.size, sample.key)
