"""Resized position embeddings against closed forms."""

import torch

from pixelclip.models.positions import resize_position


def test_native_grid_is_unchanged_and_prefix_is_kept():
    position = torch.randn(2 + 12, 5)
    assert resize_position(position, (3, 4), (3, 4), 2) is position
    assert torch.equal(resize_position(position, (3, 4), (5, 2), 2)[:2], position[:2])


def test_doubling_uses_the_cubic_kernel_of_the_reference():
    """Weights of Keys' kernel with a = -0.75 at distances 1.25, 0.25, 0.75 and 1.75."""

    def keys(x: float, a: float = -0.75) -> float:
        if x <= 1:
            return (a + 2) * x**3 - (a + 3) * x**2 + 1
        return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a

    line = torch.randn(8, dtype=torch.float64)
    resized = resize_position(line[:, None], (1, 8), (1, 16), 0)[:, 0]
    expected = sum(keys(distance) * line[2 + offset] for offset, distance in enumerate((1.25, 0.25, 0.75, 1.75)))
    torch.testing.assert_close(resized[7], expected)  # its centre is a quarter of a cell after cell 3's
