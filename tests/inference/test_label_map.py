import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from pixelclip.inference.label_map import label_map


def resized(scores: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    return F.interpolate(scores, size=size, mode="bilinear", align_corners=False)


def check(scores: torch.Tensor, size: tuple[int, int]) -> None:
    """Check that every pixel has a class with the highest resized score; rounding may only decide ties."""
    labels, large = label_map(scores, size), resized(scores, size)
    assert labels.shape == (len(scores), *size)
    assert labels.dtype == torch.int64
    best = large.max(dim=1)
    torch.testing.assert_close(large.gather(1, labels[:, None])[:, 0], best.values, atol=1e-12, rtol=0)
    assert (labels != best.indices).double().mean() < 1e-3


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 3), st.integers(1, 9), st.integers(1, 6), st.integers(1, 6), st.integers(1, 40), st.integers(1, 40),
    st.integers(0, 99),
)  # fmt: skip
def test_labels_are_the_argmax_of_resized_scores(images, classes, height, width, rows, columns, seed):
    generator = torch.Generator().manual_seed(seed)
    check(torch.randn(images, classes, height, width, generator=generator, dtype=torch.float64), (rows, columns))


def test_smooth_scores_of_many_classes_give_the_argmax():
    generator = torch.Generator().manual_seed(0)
    scores = resized(torch.randn(2, 60, 5, 5, generator=generator, dtype=torch.float64), (32, 32))
    check(scores, (101, 203))


def test_first_class_wins_a_tie():
    scores = torch.rand(1, 2, 4, 4, generator=torch.Generator().manual_seed(1))
    twice = torch.cat([scores, scores], dim=1)
    assert torch.equal(label_map(twice, (33, 29)), label_map(scores, (33, 29)))
    assert not label_map(torch.zeros(1, 7, 3, 3), (10, 10)).any()


def test_class_that_wins_only_inside_a_cell_is_predicted():
    # The third class loses to another one at every corner, but wins in the middle.
    scores = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]], [[0.6, 0.6]]])[None].expand(1, 3, 1, 2)
    assert label_map(scores, (1, 12))[0, 0].unique(return_counts=False).tolist() == [0, 1, 2]


@pytest.mark.parametrize("size", [(64, 64), (3, 500), (500, 3)])
def test_single_class_covers_the_image(size):
    assert not label_map(torch.randn(1, 1, 8, 8), size).any()


class Largest(TorchDispatchMode):
    """Record the number of elements of the largest tensor created."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.parametrize("size", [(1, 200_000), (200_000, 1), (3, 70_000)])
def test_memory_for_a_strip_is_bounded_by_its_pixels(size):
    scores = torch.randn(1, 20, 64, 64, generator=torch.Generator().manual_seed(0))
    with Largest() as largest:
        labels = label_map(scores, size)
    assert torch.equal(labels, resized(scores, size).argmax(dim=1))
    assert largest.elements < 2 * size[0] * size[1]  # the first cell is 1.5 cells long; empty cells take no memory
