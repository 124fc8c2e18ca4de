"""Averaged views against a loop over cells and windows in float64."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from pixelclip.config import QUALITIES
from pixelclip.data.tensors import normalise, to_tensor
from pixelclip.inference.refinement.views import spread_windows, view_scores, window_scores

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)


class Patches(nn.Module):
    """Features that depend on the content of a patch and on its position in the window."""

    def __init__(self, width=6, patch=4):
        super().__init__()
        torch.manual_seed(0)
        self.convolution = nn.Conv2d(3, width, patch, patch).double()

    def forward(self, images):
        features = self.convolution(images)
        return features + torch.linspace(0, 1, features.shape[3], dtype=features.dtype)


def naive(backbone, pixels, classes, side, tops, lefts, size):
    height, width = pixels.shape[2:]
    scores = np.zeros((len(classes), *size))
    for row in range(size[0]):
        for column in range(size[1]):
            y, x = (row + 0.5) * height / size[0], (column + 0.5) * width / size[1]
            found = []
            for top in tops:
                for left in lefts:
                    if top <= y < top + side and left <= x < left + side:
                        features = backbone(pixels[..., top : top + side, left : left + side])
                        at = torch.tensor([[[[2 * (x - left) / side - 1, 2 * (y - top) / side - 1]]]], dtype=torch.float64)
                        here = F.grid_sample(features, at, padding_mode="border", align_corners=False)[0, :, 0, 0]
                        found.append((classes @ here / here.norm()).detach().numpy())
            scores[:, row, column] = np.mean(found, axis=0)
    return scores


def example(size=(16, 24), classes=3):
    random = torch.Generator().manual_seed(5)
    pixels = torch.rand(1, 3, *size, generator=random, dtype=torch.float64)
    return Patches(), pixels, F.normalize(torch.randn(classes, 6, generator=random, dtype=torch.float64), dim=1)


@pytest.mark.parametrize("grid", [(5, 7), (16, 20), (1, 1)])
def test_windows_same_as_a_loop(grid):
    backbone, pixels, classes = example()
    scores = window_scores(backbone, pixels, classes, 8, grid)
    expected = naive(backbone, pixels, classes, 8, [0, 4, 8], [0, 5, 11, 16], grid)
    np.testing.assert_allclose(scores[0].numpy(), expected, rtol=0, atol=1e-12)


def test_windows_that_do_not_divide_the_image():
    backbone, pixels, classes = example((11, 17))
    scores = window_scores(backbone, pixels, classes, 8, (9, 9))
    np.testing.assert_allclose(
        scores[0].numpy(), naive(backbone, pixels, classes, 8, [0, 3], [0, 4, 9], (9, 9)), rtol=0, atol=1e-12
    )


def test_windows_are_as_few_as_overlap_by_a_quarter():
    for length in range(8, 60):
        starts = spread_windows(length, 8)
        gaps = np.diff(starts)
        assert starts[0] == 0 and starts[-1] == length - 8
        assert (gaps <= 6.5).all() and (len(gaps) == 0 or gaps.max() - gaps.min() <= 1)  # whole pixels
        assert (len(starts) - 2) * 6 < length - 8  # one window fewer would overlap less
    assert [len(spread_windows(length, 320)) for length in (320, 321, 400, 560, 561, 640)] == [1, 2, 2, 2, 3, 3]


def test_flip_is_the_mean_with_the_mirrored_image():
    backbone, pixels, classes = example((11, 17))
    plain, mirrored = (window_scores(backbone, image, classes, 8, (6, 9)) for image in (pixels, pixels.flip(3)))
    both = window_scores(backbone, pixels, classes, 8, (6, 9), flip=True)
    torch.testing.assert_close(both, 0.5 * (plain + mirrored.flip(3)))


def photo(size=(30, 20)):
    return Image.fromarray(np.random.default_rng(6).integers(0, 256, (size[1], size[0], 3), np.uint8))


def test_scales_are_averaged():
    backbone, _, classes = example()
    image = photo()
    expected = []
    for size in ((8, 8), (18, 12)):  # the shortest edge is at least a window
        resized = image.resize(size, Image.Resampling.BILINEAR)
        pixels = normalise(to_tensor(resized)[None].double(), MEAN, STD)
        expected.append(window_scores(backbone, pixels, classes, 8, (5, 6)))
    backbone.convolution = backbone.convolution.float()
    scores = view_scores(backbone, image, classes.float(), 8, (5, 6), (1.0, 2.25), False, MEAN, STD)
    torch.testing.assert_close(scores.double(), sum(expected) / 2, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("size", "windows"), [((40, 40), 8), ((40, 30), 6), ((40, 20), 4), ((40, 1), 4)])
def test_best_scales_need_at_most_eight_windows(size, windows):
    """A side of 10 makes a photo of 17.5 pixels, as 378 one of 661.5: rounded up, it would need a third row."""
    backbone, _, classes = example()
    seen = []
    backbone.forward = lambda images: seen.append(len(images)) or images[:, :1].expand(-1, 6, -1, -1)[..., ::5, ::5] + 1
    view_scores(backbone, photo(size), classes.float(), 10, (5, 6), QUALITIES["best"].scales, False, MEAN, STD)
    assert sum(seen) == windows


def test_long_photo_and_smallest_photo_have_scores_everywhere():
    backbone, _, classes = example()
    backbone.convolution = backbone.convolution.float()
    for size in ((300, 3), (1, 1), (2, 90)):
        scores = view_scores(backbone, photo(size), classes.float(), 8, (5, 6), (1.0, 1.3), True, MEAN, STD)
        assert scores.isfinite().all()
