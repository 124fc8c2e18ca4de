"""Random masks for mask classification."""

import numpy as np

from pixelclip.data.annotations import annotate

HEIGHT, WIDTH, NUM_CLASSES, WIDE = 23, 31, 5, 8


def some_masks(count: int = 9, seed: int = 0) -> np.ndarray:
    """Create overlapping boxes and spots [N, H, W], all of different sizes."""
    random = np.random.default_rng(seed)
    masks = np.zeros((count, HEIGHT, WIDTH), bool)
    for index, mask in enumerate(masks):
        y, x = random.integers(0, HEIGHT - 6), random.integers(0, WIDTH - 6)
        mask[y : y + random.integers(2, 12), x : x + random.integers(2, 12)] = True
        mask[0, :index] = True
    return masks


def entries(masks: np.ndarray) -> list:
    return annotate(masks, (WIDTH, HEIGHT), "key")["annotations"]
