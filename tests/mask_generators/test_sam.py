"""SAM's masks equal the original's, also in batches; every model size loads, other checkpoints are rejected."""

import importlib.util
import pickle
import sys
from inspect import signature
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pycocotools import mask as rle
from safetensors.torch import save_file
from scipy import ndimage
from segment_anything import SamAutomaticMaskGenerator, sam_model_registry
from segment_anything.modeling import Sam

import pixelclip.mask_generators.sam
import pixelclip.mask_generators.sam_encoder
from helpers import random_sam
from helpers.fake_data import pixels
from helpers.random_sam import ALL, LOOSE, SETTINGS, best_ious
from pixelclip.mask_generators.sam import SamGenerator, encode_masks, remove_small_regions
from pixelclip.mask_generators.sam_checkpoint import build_sam, load_sam
from pixelclip.mask_generators.sam_encoder import ImageEncoder

plain, sam = random_sam.plain, random_sam.sam


# Random weights give masks all over the image. Discs around the point make them local, as with trained weights: features
# contain the pixel's position, and their product with each hypernetwork is its proximity to the point.


@pytest.fixture(scope="module")
def images() -> list[np.ndarray]:
    return [pixels(96, 160, 0), pixels(150, 90, 1), pixels(128, 128, 2)]


@pytest.fixture
def cv2(monkeypatch):
    """Replace the only OpenCV function that the original calls, if OpenCV is not installed."""

    def components(mask, connectivity):
        regions, number = ndimage.label(mask, np.ones((3, 3)))
        return number + 1, regions, np.bincount(regions.ravel(), minlength=number + 1)[:, None], None

    if importlib.util.find_spec("cv2") is None:
        monkeypatch.setitem(sys.modules, "cv2", SimpleNamespace(connectedComponentsWithStats=components))


def as_written(entries: list[dict]) -> list[dict]:
    """Convert the original's entries to ids and float boxes as written here."""
    floats = [{name: [float(v) for v in entry[name]] for name in ("bbox", "crop_box")} for entry in entries]
    return [entry | {"id": i} | boxes for i, (entry, boxes) in enumerate(zip(entries, floats, strict=True))]


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_masks_equal_the_originals(sam, images, settings, cv2):
    original = SamAutomaticMaskGenerator(sam, **settings, output_mode="coco_rle")
    ours = SamGenerator(sam, **settings)
    count = 0
    for image in images:
        (found,) = ours([image])
        assert found == as_written(original.generate(image))
        count += len(found)
    assert count > 20


def test_defaults_equal_the_originals():
    ours, theirs = (signature(kind).parameters for kind in (SamGenerator, SamAutomaticMaskGenerator))
    same = ours.keys() - {"sam", "points_per_batch", "precision"}
    assert {name: ours[name].default for name in same} == {name: theirs[name].default for name in same}
    assert theirs.keys() - ours.keys() == {"model", "point_grids", "output_mode"}


def test_batch_agrees_with_single_images(sam, images):
    generator, other = (SamGenerator(sam, **SETTINGS["crops"] | {"points_per_batch": points}) for points in (256, 20))
    for together, (alone,) in zip(generator(images), (other([image]) for image in images), strict=True):
        assert abs(len(together) - len(alone)) <= 0.02 * len(alone)
        assert best_ious(together, alone).mean() > 0.98
        assert best_ious(alone, together).mean() > 0.98
    assert generator([]) == []


@pytest.mark.parametrize("limit", [1, 40_000, 2**40], ids=["a row of patches", "some windows", "everything"])
def test_encoder_equals_the_original(plain, images, monkeypatch, limit):
    monkeypatch.setattr(pixelclip.mask_generators.sam_encoder, "_CPU_BYTES", limit)
    seen = torch.stack([plain.preprocess(torch.rand(3, *size) * 255) for size in ((128, 128), (128, 70), (33, 128))])
    theirs = plain.image_encoder(seen)
    ours = ImageEncoder(plain.image_encoder)(seen)
    assert theirs.std() > 0.1
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_attention_of_both_devices_agrees():
    query, key, value = torch.randn(3, 6, 20, 8, generator=torch.Generator().manual_seed(0))
    by_row, by_column = query.new_empty(6, 4, 5, 4).normal_(), query.new_empty(6, 4, 5, 5).normal_()
    some = (query, key, value, by_row, by_column)
    torch.testing.assert_close(
        pixelclip.mask_generators.sam_encoder._on_gpu(*some), pixelclip.mask_generators.sam_encoder._on_cpu(*some)
    )


def test_bfloat16_masks_agree_with_float32(sam, images):
    exact, short = (SamGenerator(sam, **LOOSE, precision=precision)(images) for precision in (None, torch.bfloat16))
    assert exact != short
    for found, others in zip(short, exact, strict=True):
        for best in (best_ious(found, others), best_ious(others, found)):  # masks near a threshold may be missing
            assert np.median(best) > 0.98 and best.mean() > 0.9


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (9, 1), (40, 60)])
def test_encode_masks_equals_pycocotools(size):
    generator = torch.Generator().manual_seed(0)
    masks = torch.rand(6, *size, generator=generator) < torch.tensor([0.0, 0.05, 0.5, 0.95, 1.0, 0.5])[:, None, None]
    masks[5] = masks[5].sort(dim=0).values  # few runs
    assert encode_masks(masks) == rle.encode(np.asfortranarray(masks.permute(1, 2, 0).numpy().astype(np.uint8)))
    assert encode_masks(masks[:0]) == []


def test_masks_do_not_depend_on_chunk_size(sam, images, monkeypatch):
    generator = SamGenerator(sam, **SETTINGS["crops"])
    whole = generator(images[:1])
    monkeypatch.setattr(pixelclip.mask_generators.sam, "_CHUNK_PIXELS", 7 * 160 * 128)
    assert generator(images[:1]) == whole


def test_images_without_masks_and_slivers_yield_empty_lists(sam, images):
    assert SamGenerator(sam, points_per_side=4, pred_iou_thresh=1e9, crop_n_layers=1)(images[:1]) == [[]]
    sliver, dot = np.zeros((1, 2000, 3), np.uint8), np.zeros((1, 1, 3), np.uint8)
    found = SamGenerator(sam, **SETTINGS["crops"])([sliver, images[0], dot])
    assert found[0] == [] and found[1] and len(found) == 3


def test_settings_without_points_are_rejected(sam):
    with pytest.raises(ValueError, match="points_per_side 3 leaves no points in crop layer 2"):
        SamGenerator(sam, points_per_side=3, crop_n_layers=2, crop_n_points_downscale_factor=2)


def test_small_holes_and_islands_are_removed():
    mask = np.zeros((12, 12), bool)
    mask[1:8, 1:8] = True
    mask[3, 3] = mask[5, 4:7] = False  # holes of 1 and 3 pixels
    mask[10, 10] = mask[11, 11] = True  # an island of 2 pixels connected at a corner
    assert not remove_small_regions(mask, 1)[1]
    filled, changed = remove_small_regions(mask, 3)
    expected = mask.copy()
    expected[3, 3] = True
    expected[10:, 10:] = False
    assert changed and np.array_equal(filled, expected)
    expected[5, 4:7] = True
    assert np.array_equal(remove_small_regions(mask, 50)[0], expected)  # all islands are small: the largest is kept
    full, changed = remove_small_regions(np.zeros((3, 3), bool), 10)
    assert changed and full.all()


@pytest.mark.parametrize("kind", ["vit_b", "vit_l", "vit_h"])
def test_settings_of_published_models_are_derived_from_their_shapes(kind):
    with torch.device("meta"):
        published = sam_model_registry[kind]()
    built = build_sam(published.state_dict())
    assert built.image_encoder.img_size == published.image_encoder.img_size
    assert torch.equal(built.pixel_mean, Sam(None, None, None).pixel_mean)
    assert {n: t.shape for n, t in built.state_dict().items()} == {n: t.shape for n, t in published.state_dict().items()}
    assert str(built) == str(published)  # epsilons, activations, strides
    for ours, theirs in zip(built.modules(), published.modules(), strict=True):
        names = {
            "num_heads",
            "scale",
            "window_size",
            "use_rel_pos",
            "skip_first_layer_pe",
            "eps",
            "internal_dim",
            "image_embedding_size",
        }
        assert {n: vars(ours)[n] for n in names & vars(ours).keys()} == {
            n: vars(theirs)[n] for n in names & vars(theirs).keys()
        }


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_saved_checkpoint_loads(plain, images, tmp_path, suffix, dtype):
    state = {name: tensor.to(dtype) for name, tensor in plain.state_dict().items()}
    path = tmp_path / f"sam{suffix}"
    (torch.save if suffix == ".pth" else save_file)(state, path)
    loaded = load_sam(path)
    tensors = loaded.state_dict()
    assert tensors.keys() == state.keys()
    assert all(torch.equal(tensors[name], tensor.float()) for name, tensor in state.items())
    assert not loaded.training and not any(parameter.requires_grad for parameter in loaded.parameters())
    assert {(t.dtype, t.device.type) for t in [*loaded.parameters(), *loaded.buffers()]} == {(torch.float32, "cpu")}
    if dtype == torch.float32:
        some = ALL | {"stability_score_thresh": 0.3}
        (found,) = SamGenerator(loaded, **some)(images[:1])
        assert found and [found] == SamGenerator(plain, **some)(images[:1])


def assert_rejected(path: Path, reason: str) -> None:
    with pytest.raises(ValueError, match=reason) as raised:
        load_sam(path)
    message = str(raised.value)
    assert message.startswith(f"{path}: ") and "expected the state dict of a Segment Anything model" in message
    assert "\n" not in message and "weights_only" not in message


def without(state: dict, *names: str) -> dict:
    return {name: tensor for name, tensor in state.items() if name not in names}


PATCH, NECK = "image_encoder.patch_embed.proj.weight", "image_encoder.neck.0.weight"
TOKENS = "mask_decoder.iou_token.weight"
WRONG = {
    "CLIP": (lambda s: {"visual.conv1.weight": torch.zeros(2, 3, 4, 4)}, "is missing; found: visual.conv1.weight;"),
    "DINO": (lambda s: {"cls_token": torch.ones(1), "pos_embed": torch.ones(1)}, "found: cls_token, pos_embed;"),
    "nothing": (lambda s: {}, "is missing; found: nothing;"),
    "no encoder": (lambda s: without(s, PATCH), rf"{PATCH} is missing; found: .*, .* and 170 more;"),
    "gap": (lambda s: without(s, NECK, TOKENS), f"missing: {NECK}, {TOKENS};"),
    "more": (
        lambda s: s | {"mask_decoder.hf_token.weight": torch.zeros(1, 32)},
        ": unexpected: mask_decoder.hf_token.weight;",
    ),
    "shape": (
        lambda s: s | {NECK: torch.zeros(3)},
        rf"of a different shape: {NECK} \[3\] instead of \[32, 32, 1, 1\]",
    ),
    "rank": (lambda s: s | {PATCH: torch.zeros(3)}, rf"{PATCH} has shape \[3\], expected 4 dimensions"),
    "heads": (lambda s: s | {"image_encoder.blocks.0.attn.rel_pos_h": torch.zeros(7, 5)}, "multiples of 5"),
}


@pytest.mark.parametrize(("change", "reason"), WRONG.values(), ids=WRONG)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_other_weights_are_rejected(plain, tmp_path, change, reason, suffix):
    path = tmp_path / f"sam{suffix}"
    (torch.save if suffix == ".pth" else save_file)(change(dict(plain.state_dict())), path)
    assert_rejected(path, reason)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_file_that_is_not_a_checkpoint_is_rejected(plain, tmp_path, suffix):
    path = tmp_path / f"sam{suffix}"
    assert_rejected(path, "no such file")
    (torch.save if suffix == ".pth" else save_file)(dict(plain.state_dict()), path)
    data = path.read_bytes()
    for content in (data[: len(data) // 2], data[:50], b"", b"GIF89a" * 9, bytes(range(256)), b"\x80\x02}q\x00."):
        path.write_bytes(content)
        assert_rejected(path, "truncated, or not a checkpoint|: not a checkpoint")


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ([torch.zeros(1)], ": expected named tensors, found a list"),
        ({"model": {"a": torch.zeros(1)}, "epoch": 3}, r"found entries that are not tensors \(model, epoch\)"),
    ],
)
def test_pth_with_other_content_is_rejected(tmp_path, value, reason):
    torch.save(value, tmp_path / "sam.pth")
    assert_rejected(tmp_path / "sam.pth", reason)


class _Trap:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("write", [lambda value, path: path.write_bytes(pickle.dumps(value, protocol=2)), torch.save])
def test_pickle_is_never_executed(tmp_path, write):
    write({"trap": _Trap(tmp_path / "sprung")}, tmp_path / "sam.pth")
    assert_rejected(tmp_path / "sam.pth", ": would execute .*, which is not allowed")
    assert not (tmp_path / "sprung").exists()
    write({"trap": _Trap(tmp_path / "sprung")}, tmp_path / "sam.safetensors")
    assert_rejected(tmp_path / "sam.safetensors", "truncated, or not a checkpoint")
    assert not (tmp_path / "sprung").exists()
