"""Propagation against a dense solve in float64, with the weights of a loop over pairs of cells."""

import numpy as np
import pytest
import torch

from pixelclip.inference.refinement.propagation import propagate


def dense(scores, image, strength, temperature):
    """Solve for scores [K, h, w] with a dense matrix whose entries are computed pair by pair."""
    classes, height, width = scores.shape
    cells = [(y, x) for y in range(height) for x in range(width)]
    exponent = np.exp(scores / temperature - (scores / temperature).max(axis=0))
    shares = exponent / exponent.sum(axis=0)
    pairs = [(a, b) for a in cells for b in cells if a < b and max(abs(a[0] - b[0]), abs(a[1] - b[1])) == 1]
    contrast = {(a, b): sum((channel[a] - channel[b]) ** 2 for channel in image) for a, b in pairs}
    variance = np.mean([*contrast.values()])
    matrix = np.eye(len(cells))
    for a, b in pairs:
        similarity = sum(np.sqrt(share[a] * share[b]) for share in shares)
        weight = strength * np.exp(-contrast[a, b] / (2 * variance)) * similarity
        i, j = cells.index(a), cells.index(b)
        matrix[[i, j], [i, j]] += weight
        matrix[[i, j], [j, i]] -= weight
    return np.linalg.solve(matrix, scores.reshape(classes, -1).T).T.reshape(scores.shape)


def example(dtype=torch.float64, classes=4, size=(6, 9)):
    random = torch.Generator().manual_seed(1)
    scores = 0.05 * torch.rand(2, classes, *size, generator=random, dtype=torch.float64)
    images = torch.rand(2, 3, *size, generator=random, dtype=torch.float64)
    return scores.to(dtype), images.to(dtype)


@pytest.mark.parametrize("strength", [0.3, 3.0, 10.0])
def test_same_as_a_dense_solve(strength):
    scores, images = example()
    smooth = propagate(scores, images, strength, iterations=60)
    for index in range(2):
        expected = dense(scores[index].numpy(), images[index].numpy(), strength, 0.01)
        np.testing.assert_allclose(smooth[index].numpy(), expected, rtol=0, atol=1e-12)


def test_few_iterations_are_close_to_the_solution_on_a_grid_of_64():
    random = torch.Generator().manual_seed(2)
    images = torch.rand(1, 3, 64, 64, generator=random)
    scores = torch.rand(1, 3, 64, 64, generator=random)
    error = (propagate(scores, images, 10.0) - propagate(scores, images, 10.0, iterations=300)).abs().max()
    assert error < 2e-3


def test_batch_and_chunks_equal_single():
    scores, images = example(torch.float32)
    smooth = propagate(scores, images, 2.0)
    single = torch.cat([propagate(scores[i : i + 1], images[i : i + 1], 2.0, classes_at_once=3) for i in range(2)])
    torch.testing.assert_close(smooth, single, rtol=0, atol=1e-6)


def test_constants_and_means_stay():
    scores, images = example()
    constant = torch.full_like(scores, 0.2)
    torch.testing.assert_close(propagate(constant, images, 5.0), constant)
    flat = torch.zeros_like(images)
    for image in (images, flat):
        torch.testing.assert_close(propagate(scores, image, 5.0, 60).mean(dim=(2, 3)), scores.mean(dim=(2, 3)))


def test_cells_of_different_classes_exchange_nothing():
    scores = torch.zeros(1, 2, 4, 4, dtype=torch.float64)
    scores[:, 0, :, :2] = 1
    scores[:, 1, :, 2:] = 1
    images = torch.zeros(1, 3, 4, 4, dtype=torch.float64)
    torch.testing.assert_close(propagate(scores, images, 10.0), scores)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_close(dtype):
    scores, images = example(torch.float32)
    smooth = propagate(scores.to(dtype), images, 2.0)
    assert smooth.dtype == dtype
    # Scores are at most 0.05; rounding also changes the distributions of classes, by a temperature of 0.01.
    torch.testing.assert_close(smooth.float(), propagate(scores, images, 2.0), rtol=0, atol=0.2 * torch.finfo(dtype).eps)


def test_unusable_input_is_rejected():
    scores, images = example()
    with pytest.raises(ValueError, match="2 score maps, but 1 images"):
        propagate(scores, images[:1], 1.0)
    with pytest.raises(ValueError, match="found -1"):
        propagate(scores, images, -1)
    assert propagate(scores, images, 0) is scores
