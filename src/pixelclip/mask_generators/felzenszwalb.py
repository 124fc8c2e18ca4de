"""Segment images without weights by graph segmentation (Felzenszwalb and Huttenlocher, 2004)."""

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pixelclip.data.images import to_rgb


def felzenszwalb(image: Image.Image, scale: float, sigma: float, min_size: int) -> NDArray[np.int64]:
    """Return the segment of every pixel [H, W], counted from 0, by scikit-image's `felzenszwalb`."""
    from skimage.segmentation import felzenszwalb as segment

    return np.asarray(segment(np.asarray(to_rgb(image)), scale=scale, sigma=sigma, min_size=min_size))
