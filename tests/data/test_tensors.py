"""Image tensors against plain arithmetic."""

import pytest
import torch
from PIL import Image

from helpers.fake_data import pixels
from pixelclip.data.tensors import normalise, resize_square, resized_square, to_tensor


def test_tensor_is_the_image_over_255() -> None:
    image = pixels(5, 7)
    tensor = to_tensor(Image.fromarray(image))
    assert tensor.shape == (3, 5, 7)
    assert tensor[2, 4, 6].item() == pytest.approx(image[4, 6, 2] / 255)
    assert torch.equal((tensor * 255).round().to(torch.uint8), torch.from_numpy(image).permute(2, 0, 1))


def test_normalise_is_inverted_by_mean_and_std() -> None:
    images = torch.rand(2, 3, 4, 5)
    mean, std = (0.1, 0.2, 0.3), (0.5, 2.0, 4.0)
    normal = normalise(images, mean, std)
    for channel in range(3):
        torch.testing.assert_close(normal[:, channel] * std[channel] + mean[channel], images[:, channel])


def test_resize_to_half_averages_pairs() -> None:
    images = torch.rand(1, 3, 8, 8)
    naive = (images[..., ::2, ::2] + images[..., 1::2, ::2] + images[..., ::2, 1::2] + images[..., 1::2, 1::2]) / 4
    torch.testing.assert_close(resize_square(images, 4), naive)
    assert resize_square(torch.rand(2, 3, 5, 9), 4).shape == (2, 3, 4, 4)


@pytest.mark.parametrize("size", [(5, 7), (40, 61), (1, 3), (200, 90)])
@pytest.mark.parametrize("side", [1, 8, 40])
def test_resized_square_equals_resize_of_the_whole_tensor(size: tuple[int, int], side: int) -> None:
    image = Image.fromarray(pixels(*size))
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.2, 0.3)
    expected = resize_square(normalise(to_tensor(image)[None], mean, std), side)
    torch.testing.assert_close(resized_square(image, side, mean, std), expected, atol=2e-5, rtol=0)
