"""Views against torchvision's transforms and Pillow's full decoding; crops, masks and flips are tested in test_dataset.py."""

import colorsys
import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as TF
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from helpers.fake_data import annotation, encoded, pixels, write_tar
from helpers.samples import FULL, PLAIN, blobs, in_runs
from pixelclip.data import views
from pixelclip.data.dataset import MaskedImages


@given(turn=st.floats(-0.5, 0.5), seed=st.integers(0, 999), levels=st.sampled_from([2, 4, 256]))
def test_hue_shift_equals_torchvision(turn: float, seed: int, levels: int) -> None:
    """With few levels there are grey pixels and ties for the highest channel."""
    random = torch.Generator().manual_seed(seed)
    image = torch.randint(0, levels, (3, 9, 9), generator=random) / (levels - 1)
    torch.testing.assert_close(views._shift_hue(image, turn), TF.adjust_hue(image, turn), atol=1e-5, rtol=0)


def test_contrast_and_saturation_equal_torchvision() -> None:
    image = torch.rand(3, 9, 12)
    torch.testing.assert_close(views._grey(image), TF.rgb_to_grayscale(image), atol=1e-6, rtol=0)
    for weight in (0.5, 0.9, 1.5):
        grey = views._grey(image)
        torch.testing.assert_close(views._mix(image, grey, weight), TF.adjust_saturation(image, weight), atol=1e-6, rtol=0)
        torch.testing.assert_close(views._mix(image, grey.mean(), weight), TF.adjust_contrast(image, weight), atol=1e-6, rtol=0)


def detectrons_jitter(pixel: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Apply PointRend's ColorAugSSDTransform to one pixel, without its rounding to bytes."""

    def sometimes(change: Callable[[], np.ndarray]) -> None:
        nonlocal pixel
        if generator.random() < 0.5:
            pixel = np.clip(change(), 0, 255)

    def in_hsv(change: Callable[[float, float], tuple[float, float]]) -> np.ndarray:
        hue, saturation, value = colorsys.rgb_to_hsv(*pixel / 255)
        hue, saturation = change(hue * 180, saturation * 255)
        return 255 * np.array(colorsys.hsv_to_rgb(hue % 180 / 180, min(saturation, 255) / 255, value))

    contrast_first = generator.random() < 0.5
    sometimes(lambda: pixel + generator.uniform(-32, 32))
    if contrast_first:
        sometimes(lambda: pixel * generator.uniform(0.5, 1.5))
    sometimes(lambda: in_hsv(lambda hue, saturation: (hue, saturation * generator.uniform(0.5, 1.5))))
    sometimes(lambda: in_hsv(lambda hue, saturation: (hue + generator.integers(-18, 19), saturation)))
    if not contrast_first:
        sometimes(lambda: pixel * generator.uniform(0.5, 1.5))
    return pixel


@given(seed=st.integers(0, 10**6), levels=st.sampled_from([2, 5, 256]))
def test_ssd_jitter_equals_detectron2(seed: int, levels: int) -> None:
    image = torch.randint(0, levels, (3, 4, 5), generator=torch.Generator().manual_seed(seed)) / (levels - 1)
    found = views._ssd_jitter(image, np.random.default_rng(seed))
    for row, column in np.ndindex(4, 5):
        pixel = image[:, row, column].double().numpy() * 255
        expected = detectrons_jitter(pixel, np.random.default_rng(seed)) / 255
        np.testing.assert_allclose(found[:, row, column].numpy(), expected, atol=1e-5)


@pytest.mark.parametrize(("radius", "sigma"), [(1, 0.05), (2, 0.6), (7, 2.0)])
def test_blur_equals_torchvision(radius: int, sigma: float) -> None:
    image = torch.rand(3, 15, 20)
    expected = TF.gaussian_blur(image, [2 * radius + 1] * 2, [sigma] * 2)
    torch.testing.assert_close(views._blur(image, radius, sigma), expected, atol=1e-6, rtol=0)


@given(grid=st.integers(1, 21), number=st.integers(0, 4), share=st.sampled_from([0.0, 0.02, 0.5]), seed=st.integers(0, 999))
def test_packed_masks_are_unpacked_and_counted(grid: int, number: int, share: float, seed: int) -> None:
    masks = np.random.default_rng(seed).random((number, grid, grid)) < share
    packed = np.packbits(masks, axis=1, bitorder="little")
    assert np.array_equal(views.unpack(torch.from_numpy(packed)).numpy(), masks)
    assert np.array_equal(views._more_than_one(packed), [mask.sum() > 1 for mask in masks])


@pytest.mark.parametrize("grid", [13, 32, 53])
def test_flip_and_cutout_of_packed_masks_equal_those_of_unpacked_masks(grid: int) -> None:
    """Repeat the method step by step on unpacked masks with the same random numbers."""
    masks = blobs(61, 47, count=7)
    masks[3] = False
    drawn = replace(PLAIN, side=grid, mask_grid=grid, flip=True, strong_view=True)
    flips = []
    for seed in range(8):
        image = Image.new("RGB", (47, 61), (180, 190, 200))
        sample = views.draw(image, in_runs(masks), drawn, np.random.default_rng(seed))
        same = np.random.default_rng(seed)
        crop = 32 * 47 / 64
        left, top = same.uniform(0, 47 - crop), same.uniform(0, 61 - crop)
        centres = (np.arange(grid) + 0.5) / grid * crop
        whole = masks[:, (top + centres).astype(int)][:, :, (left + centres).astype(int)]
        flips.append(same.random() < 0.5)
        seen = (whole[..., ::-1] if flips[-1] else whole) & ~(sample.strong == 0).all(0).numpy()
        assert np.array_equal(sample.masks.numpy(), [mask for mask in seen if mask.sum() > 1])
    assert len(set(flips)) == 2


@given(
    size=st.tuples(st.integers(16, 3000), st.integers(16, 3000)),
    side=st.integers(16, 700),
    crop=st.integers(16, 900),
    edges=st.tuples(st.integers(16, 1500), st.integers(0, 500)),
)
def test_crop_is_never_decoded_smaller_than_its_view(size, side, crop, edges):
    drawn = replace(PLAIN, side=side, crop=crop, shortest_edge=edges[0], longest_edge=sum(edges))
    scale = min(edges[0] / min(size), sum(edges) / max(size))
    shorter = min(crop / scale, *size)
    factor = views.shrink_factor(size, drawn)
    assert factor == 1 or shorter / factor >= side
    assert factor == 8 or shorter / (2 * factor) < side


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_view_of_a_large_image_is_close_to_that_of_its_full_decoding(tmp_path: Path, kind: str) -> None:
    """The crop of this smooth picture is four times the side; a file that is not a JPEG is decoded at full size."""
    rows, columns = np.mgrid[:301, :403]
    picture = np.stack([columns * 255 / 403, rows * 255 / 301, 128 + 100 * np.sin(columns / 30)], axis=-1).astype(np.uint8)
    masks = blobs(301, 403)
    tar = write_tar(tmp_path / "0.tar", {"a.jpg": encoded(picture, kind), "a.json": annotation(masks)})
    dataset = MaskedImages([tar], replace(PLAIN, shortest_edge=301, longest_edge=403, crop=130), seed=0)
    assert views.shrink_factor((403, 301), dataset.views) == 4
    image, runs = dataset.read(0)
    assert image.size == (403, 301)
    for position in range(5):
        found = dataset[position]
        full = views.draw(image, runs, dataset.views, np.random.default_rng([0, 2, position]))
        assert torch.equal(found.masks, full.masks)
        assert (found.weak - full.weak).abs().mean() < 1.5 / 255
        assert torch.equal(found.weak, full.weak) is (kind == "PNG")


def test_view_of_a_small_image_equals_that_of_its_full_decoding(tmp_path: Path) -> None:
    """Repeat with Pillow and numpy: decode, crop and resize in one step, flip, normalise."""
    data = encoded(pixels(64, 80), quality=90)
    tar = write_tar(tmp_path / "0.tar", {"a.jpg": data, "a.json": annotation(blobs(64, 80))})
    drawn = replace(FULL, color_jitter=False, strong_view=False, crop=40)
    dataset = MaskedImages([tar], drawn, seed=5)
    for position in range(6):
        same = np.random.default_rng([5, 2, position])
        left, top = same.uniform(0, 40), same.uniform(0, 24)
        image = Image.open(io.BytesIO(data)).resize((32, 32), Image.Resampling.BILINEAR, (left, top, left + 40, top + 40))
        image = np.asarray(image, np.float32)[:, :: -1 if same.random() < 0.5 else 1].transpose(2, 0, 1) / 255
        mean, std = (np.array(values, np.float32).reshape(3, 1, 1) for values in (drawn.mean, drawn.std))
        assert np.array_equal(dataset[position].weak.numpy(), (image - mean) / std)


SEEDS = 2000


def strength(drawn: np.ndarray, still: float, low: float, high: float) -> float:
    """Return the fraction of draws that differ from `still`; assert that they fill the range from `low` to `high`."""
    moved = drawn[np.abs(drawn - still) > 1e-3]
    margin = 0.03 * (high - low)
    assert low - 1e-3 <= moved.min() <= low + margin
    assert high - margin <= moved.max() <= high + 1e-3
    return len(moved) / len(drawn)


def turned(pixel: np.ndarray, degrees: float) -> float:
    """Return the hue of an RGB pixel relative to another, in degrees."""
    return (colorsys.rgb_to_hsv(*pixel)[0] * 360 - degrees + 180) % 360 - 180


def test_weak_jitter_has_the_ranges_and_probabilities_of_the_method() -> None:
    """Use two greys and a colour that no draw clips."""
    image = torch.tensor([[0.4, 0.4, 0.4], [0.5, 0.5, 0.5], [0.5, 0.4, 0.4]]).T[:, None].contiguous()  # [3, 1, 3 pixels]
    found = []
    for seed in range(SEEDS):
        dark, light, red = views._ssd_jitter(image, np.random.default_rng(seed))[:, 0].double().numpy().T
        contrast = (light - dark).mean() / 0.1
        found.append((light.mean() / contrast - 0.5, contrast, (red.max() - red.min()) / contrast / 0.1, turned(red, 0)))
    brightness, contrast, saturation, hue = np.array(found).T
    assert strength(brightness, 0, -32 / 255, 32 / 255) == pytest.approx(0.5, abs=0.04)
    assert strength(contrast, 1, 0.5, 1.5) == pytest.approx(0.5, abs=0.04)
    assert strength(saturation, 1, 0.5, 1.5) == pytest.approx(0.5, abs=0.04)
    assert strength(hue, 0, -36, 36) == pytest.approx(0.5, abs=0.04)


def test_strong_jitter_has_the_ranges_and_probabilities_of_the_method() -> None:
    """Use the same draws on two greys and on one colour that no draw clips."""
    greys = torch.tensor([0.4, 0.5]).expand(3, 1, 2)
    colour = torch.tensor([0.45, 0.4, 0.4]).view(3, 1, 1)
    found, grey = [], 0
    for seed in range(SEEDS):
        dark, light = (
            views._strong_jitter(greys, np.random.default_rng(seed), blur_scale=1.0)[:, 0].double().mean(dim=0).tolist()
        )
        red = views._strong_jitter(colour, np.random.default_rng(seed), blur_scale=1.0)[:, 0, 0].double().numpy()
        brightness = (dark + light) / 0.9
        contrast = (light - dark) / 0.1 / brightness
        if red.max() - red.min() < 1e-6:
            grey += 1
        else:
            found.append((brightness, contrast, (red.max() - red.min()) / 0.05 / brightness / contrast, turned(red, 0)))
    assert grey / SEEDS == pytest.approx(0.2, abs=0.03)
    brightness, contrast, saturation, hue = np.array(found).T
    for drawn in (brightness, contrast, saturation):
        assert strength(drawn, 1, 0.5, 1.5) == pytest.approx(0.8, abs=0.03)
    assert strength(hue, 0, -90, 90) == pytest.approx(0.8, abs=0.03)


def width(image: torch.Tensor) -> float:
    """Return the standard deviation of a blurred point along the columns."""
    profile = image.double().sum(dim=(0, 1)).numpy()
    profile = profile - profile[0]
    places = np.arange(len(profile))
    mean = (profile * places).sum() / profile.sum()
    return float(np.sqrt(max((profile * (places - mean) ** 2).sum() / profile.sum(), 0)))


def test_blur_has_the_widths_and_probability_of_the_method() -> None:
    point = torch.zeros(3, 3, 33)
    point[:, 1, 16] = 0.5
    point = torch.nn.functional.pad(point, [0, 0, 15, 15])
    found = np.array([width(views._strong_jitter(point, np.random.default_rng(seed), 1.0)) for seed in range(600)])
    blurred = found[found > 0.2]  # narrower blurs stay within the pixel
    assert len(blurred) / len(found) == pytest.approx(0.5 * 1.8 / 1.9, abs=0.05)
    assert 1.8 < blurred.max() < 2.0
    assert blurred.min() < 0.4


@pytest.mark.parametrize(
    ("size", "edge", "crop", "scale"), [(64, 64, 64, 1.0), (128, 64, 64, 1.0), (64, 128, 128, 0.5), (64, 32, 32, 2.0)]
)
def test_blur_width_is_in_pixels_of_the_methods_crop(size: int, edge: int, crop: int, scale: float) -> None:
    """With a crop of the whole image only the method's resize and the side scale the blur of a point."""
    picture = np.zeros((size, size, 3), np.uint8)
    picture[size // 2 : size // 2 + size // 64, size // 2 : size // 2 + size // 64] = 150
    drawn = replace(PLAIN, side=64, shortest_edge=edge, crop=crop, strong_view=True, cutout_min=0.0, cutout_max=0.0)
    masks = in_runs(blobs(size, size))
    compared = 0
    for seed in range(40):
        sample = views.draw(Image.fromarray(picture), masks, drawn, np.random.default_rng(seed))
        point = torch.zeros(3, 64, 64)
        point[:, 32, 32] = 150 / 255
        generator = np.random.default_rng(seed)
        generator.uniform(size=2)  # position of the crop
        expected = width(views._strong_jitter(point, generator, 1.0))
        if 0.8 < expected < 1.6:  # neither within one pixel nor cut off by the edges
            found = np.sqrt(max(width(sample.strong) ** 2 - width(sample.weak) ** 2, 0))
            assert found == pytest.approx(scale * expected, rel=0.2), seed  # narrow blurs are coarsely sampled
            compared += 1
    assert compared > 3


@pytest.mark.parametrize("seed", range(6))
def test_dinos_crop_shows_the_weak_view_at_its_own_side(seed: int) -> None:
    """Same crop, colours and flip; asking for it changes nothing else."""
    image, masks = Image.fromarray(pixels(60, 90, seed)), in_runs(blobs(2, 60, 90, seed))
    jittered = replace(FULL, color_jitter=True, flip=True)

    def sample(side: int, dino_side: int) -> views.TrainingSample:
        parameters = replace(jittered, side=side, dino_side=dino_side)
        return views.draw(image, masks, parameters, np.random.default_rng(seed))

    small, without = sample(FULL.side, 2 * FULL.side), sample(FULL.side, 0)
    assert without.crop is None
    for name in ("weak", "strong", "packed"):
        assert torch.equal(getattr(small, name), getattr(without, name)), name
    weak = sample(2 * FULL.side, 0).weak
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (FULL.mean, FULL.std))
    assert small.crop is not None and small.crop.dtype == torch.uint8
    torch.testing.assert_close(small.crop / 255, weak * std + mean, atol=0.501 / 255, rtol=0)


def test_images_are_decoded_large_enough_for_dino() -> None:
    parameters = replace(PLAIN, shortest_edge=1024, longest_edge=1333, crop=640, side=320)
    assert views.shrink_factor((2048, 2048), parameters) == 4  # crops of 1,280 pixels
    assert views.shrink_factor((2048, 2048), replace(parameters, dino_side=640)) == 2
