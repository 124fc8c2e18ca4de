"""SAM 2's image encoder equals the published implementation's; the size is found from a checkpoint's shapes."""

from pathlib import Path

import numpy as np
import pytest
import torch

from helpers.random_sam2 import REDUCED, WIDTH, fill, images
from pixelclip.mask_generators.sam2_encoder import SIZES, Sam2Encoder, find_size

GOLDEN = Path(__file__).parents[1] / "golden"


def test_features_equal_the_originals():
    """The golden features were computed by sam2 1.1.0, with the same weights and images."""
    features = fill(Sam2Encoder(REDUCED, WIDTH))(images())
    with np.load(GOLDEN / "sam2_encoder.npz") as golden:
        for stride, ours in zip((4, 8, 16), features, strict=True):
            theirs = torch.from_numpy(golden[f"stride_{stride}"])
            # Rounding: features of both in float32 differ from those in float64 by 1e-5 standard deviations.
            torch.testing.assert_close(ours[:1], theirs, atol=3e-5 * theirs.std().item(), rtol=0)


@pytest.mark.parametrize("name", SIZES)
def test_size_is_found_from_shapes(name):
    with torch.device("meta"):
        state = Sam2Encoder(SIZES[name]).state_dict()
    assert find_size({f"image_encoder.{tensor}": value for tensor, value in state.items()}) == name


def test_other_sizes_are_rejected():
    with torch.device("meta"):
        state = Sam2Encoder(REDUCED).state_dict()
    with pytest.raises(ValueError, match=r"found a trunk of width 8 with 8 blocks, expected one of tiny \(96, 12\), small"):
        find_size({f"image_encoder.{tensor}": value for tensor, value in state.items()})
    with pytest.raises(ValueError, match="found a trunk of width 0 with 0 blocks"):
        find_size({})
