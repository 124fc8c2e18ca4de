"""PAMR against a loop over cells and neighbours in float64."""

import math

import numpy as np
import pytest
import torch

from pixelclip.inference.refinement.pamr import affinities, pamr


def naive(scores, image, iterations, dilations):
    """Refine scores [K, h, w] with an image [3, h, w] on the same grid, one cell at a time."""
    _, height, width = scores.shape
    around = [(y, x) for y in (-1, 0, 1) for x in (-1, 0, 1) if (y, x) != (0, 0)]

    def cell(y, x):
        return min(max(y, 0), height - 1), min(max(x, 0), width - 1)

    for _ in range(iterations):
        refined = np.zeros_like(scores)
        for y in range(height):
            for x in range(width):
                neighbours = [cell(y + d * a, x + d * b) for d in dilations for a, b in around]
                kernel = []
                for row, column in neighbours:
                    per_channel = []
                    for channel in image:
                        values = [channel[n] for n in neighbours] + [channel[y, x]] * len(dilations)
                        spread = np.std(values, ddof=1)
                        per_channel.append(-abs(channel[row, column] - channel[y, x]) / (1e-8 + 0.1 * spread))
                    kernel.append(sum(per_channel) / 3)
                weights = [math.exp(k - max(kernel)) for k in kernel]
                for weight, (row, column) in zip(weights, neighbours, strict=True):
                    refined[:, y, x] += weight / sum(weights) * scores[:, row, column]
        scores = refined
    return scores


def example(dtype=torch.float64, batch=2, classes=3, size=(7, 10)):
    random = torch.Generator().manual_seed(0)
    scores = torch.rand(batch, classes, *size, generator=random, dtype=torch.float64)
    images = torch.rand(batch, 3, *size, generator=random, dtype=torch.float64)
    return scores.to(dtype), images.to(dtype)


@pytest.mark.parametrize(("iterations", "dilations"), [(1, (1,)), (2, (1, 2)), (1, (3, 12))])
def test_same_as_a_loop_over_cells(iterations, dilations):
    scores, images = example()
    refined = pamr(scores, images, iterations, dilations)
    for index in range(2):
        expected = naive(scores[index].numpy(), images[index].numpy(), iterations, dilations)
        np.testing.assert_allclose(refined[index].numpy(), expected, rtol=0, atol=1e-12)


def test_batch_and_chunks_equal_single():
    scores, images = example(torch.float32, classes=5)
    refined = pamr(scores, images)
    single = torch.cat([pamr(scores[i : i + 1], images[i : i + 1], classes_at_once=2) for i in range(2)])
    torch.testing.assert_close(refined, single, rtol=0, atol=1e-6)


def test_constants_stay_and_weights_sum_to_one():
    _, images = example(torch.float32)
    torch.testing.assert_close(affinities(images).sum(dim=1), torch.ones(2, 7, 10))
    constant = torch.full((2, 1, 7, 10), 0.3)
    torch.testing.assert_close(pamr(constant, images), constant)
    flat = torch.zeros(2, 3, 7, 10)
    torch.testing.assert_close(pamr(constant, flat), constant)


def test_normalisation_of_the_image_does_not_matter():
    scores, images = example()
    scale, shift = torch.tensor([4.0, 2.0, 5.0]).view(3, 1, 1), torch.tensor([-1.0, 2.0, 0.5]).view(3, 1, 1)
    torch.testing.assert_close(pamr(scores, images), pamr(scores, images * scale + shift), rtol=0, atol=1e-6)


def test_edges_of_the_image_become_edges_of_the_scores():
    """A blurred boundary moves to the boundary of the colours."""
    image = torch.zeros(1, 3, 12, 12)
    image[..., 6:] = 1
    ramp = torch.linspace(1, 0, 12).expand(1, 1, 12, 12)
    refined = pamr(ramp, image, 30)[0, 0, 6]
    assert refined[5] - refined[6] > 4 * (ramp[0, 0, 6, 5] - ramp[0, 0, 6, 6])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_costs_its_own_rounding_only(dtype):
    scores, images = example(torch.float32)
    refined = pamr(scores.to(dtype), images)
    assert refined.dtype == dtype
    # Scores are in 0..1 and averaged in float32: one rounding at the start and one at the end.
    torch.testing.assert_close(refined.float(), pamr(scores, images), rtol=0, atol=2 * torch.finfo(dtype).eps)


def test_image_is_resized_to_the_grid():
    scores, images = example(torch.float32)
    larger = images.repeat_interleave(4, dim=2).repeat_interleave(4, dim=3)
    assert pamr(scores, larger).shape == scores.shape


def test_unusable_input_is_rejected():
    scores, images = example()
    with pytest.raises(ValueError, match="2 score maps, but 1 images"):
        pamr(scores, images[:1])
    with pytest.raises(ValueError, match="found iterations -1"):
        pamr(scores, images, -1)
    assert pamr(scores, images, 0) is scores
