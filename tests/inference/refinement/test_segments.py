"""Votes within segments against loops over cells."""

import numpy as np
import pytest
import torch

from pixelclip.inference.refinement.segments import OUTSIDE, segments_on_grid, vote, vote_masks


def example(dtype=torch.float64):
    random = torch.Generator().manual_seed(3)
    scores = torch.rand(2, 3, 5, 8, generator=random, dtype=torch.float64)
    return scores.to(dtype), torch.randint(OUTSIDE, 4, (2, 5, 8), generator=random)


def test_partition_same_as_a_loop():
    scores, segments = example()
    expected = scores.numpy().copy()
    for image in range(2):
        for number in range(4):
            cells = segments[image].numpy() == number
            for row in range(3):
                expected[image, row][cells] = scores[image, row].numpy()[cells].mean()
    voted = vote(scores, segments)
    np.testing.assert_allclose(voted.numpy(), expected, rtol=0, atol=1e-14)
    torch.testing.assert_close(voted[1:], vote(scores[1:], segments[1:]))


def test_masks_same_as_a_loop():
    """Masks overlap, one is empty, and some cells are in none."""
    scores, _ = example()
    masks = torch.rand(4, 5, 8, generator=torch.Generator().manual_seed(4)) < 0.4
    masks[2] = False
    masks[:, 0, :2] = False
    expected = scores[0].numpy().copy()
    for y in range(5):
        for x in range(8):
            containing = [mask.numpy() for mask in masks if mask[y, x]]
            if containing:
                expected[:, y, x] = np.mean([scores[0].numpy()[:, mask].mean(axis=1) for mask in containing], axis=0)
    np.testing.assert_allclose(vote_masks(scores[:1], masks)[0].numpy(), expected, rtol=0, atol=1e-14)


def test_masks_of_a_partition_equal_the_partition():
    scores, segments = example()
    masks = torch.stack([segments[0] == number for number in range(4)])
    torch.testing.assert_close(vote_masks(scores[:1], masks), vote(scores[:1], segments[:1]))
    torch.testing.assert_close(vote_masks(scores[:1], masks[:0]), scores[:1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_costs_its_own_rounding_only(dtype):
    scores, segments = example(torch.float32)
    voted = vote(scores.to(dtype), segments)
    assert voted.dtype == dtype
    torch.testing.assert_close(voted.float(), vote(scores, segments), rtol=0, atol=2 * torch.finfo(dtype).eps)


def test_partition_is_sampled_at_the_centres_of_cells():
    segments = np.arange(24).reshape(4, 6)
    assert segments_on_grid(segments, (2, 3)).tolist() == [[[7, 9, 11], [19, 21, 23]]]
    assert segments_on_grid(segments, (4, 6))[0].tolist() == segments.tolist()


def test_unusable_input_is_rejected():
    scores, segments = example()
    with pytest.raises(ValueError, match="do not fit"):
        vote(scores, segments[:, :4])
    with pytest.raises(ValueError, match="found -2"):
        vote(scores, segments - 1)
    with pytest.raises(ValueError, match="do not fit"):
        vote_masks(scores, segments[:1] == 0)
