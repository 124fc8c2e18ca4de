import pytest
import torch
import torch.nn.functional as F

from pixelclip.models.decoder import _PIXELS_AT_ONCE, Decoder, decode, decoded_loss, mask_loss

GRID = (13, 11)


@pytest.fixture
def decoder() -> Decoder:
    torch.manual_seed(0)
    return Decoder().double()


def inputs(maps: int = 7, images: int = 3) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(4)
    similarities = torch.randn(maps, 3, 4, generator=generator, dtype=torch.float64).requires_grad_()
    covered = torch.rand(images, *GRID, generator=generator) < 0.6
    owner = torch.randint(0, images, (maps,), generator=generator)
    targets = (torch.rand(maps, *GRID, generator=generator) < 0.3) & covered[owner]
    return similarities, targets, covered, owner


def test_fused_layers_equal_both_layers(decoder):
    maps = torch.randn(2, 1, 3, 5, dtype=torch.float64)
    torch.testing.assert_close(decoder._first(maps), decoder.up1(decoder.conv0(maps)))


@pytest.mark.parametrize("pixels", [1, 24, 36, 10**6])
def test_loss_and_gradients_do_not_depend_on_the_chunk_size(decoder, monkeypatch, pixels):
    monkeypatch.setitem(_PIXELS_AT_ONCE, "cpu", pixels)
    maps, targets, covered, owner = inputs()
    picked = covered[owner]
    logits = decode(decoder, maps, GRID)
    expected = F.binary_cross_entropy_with_logits(logits[picked], targets[picked].double())
    loss, shown = decoded_loss(decoder, maps, targets, covered, owner, picked.sum(), shown=3)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(shown, logits[:3])
    tensors = [maps, *decoder.parameters()]
    gradients = (torch.autograd.grad(2.5 * value, tensors) for value in (loss, expected))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_no_maps_give_zero_loss(decoder):
    maps, targets, covered, owner = inputs()
    loss, shown = decoded_loss(decoder, maps[:0], targets[:0], covered, owner[:0], torch.tensor(0), shown=2)
    loss.backward()
    assert loss.item() == 0
    assert shown.shape == (0, *GRID)
    assert not any(parameter.grad.any() for parameter in decoder.parameters())


def test_loss_is_divided_by_terms(decoder):
    maps, targets, covered, owner = inputs()
    loss, _ = decoded_loss(decoder, maps, targets, covered, owner, torch.tensor(1000))
    logits = decode(decoder, maps, GRID)
    torch.testing.assert_close(loss, mask_loss(logits[:, None], targets[:, None], covered[owner], torch.tensor(1000)))
