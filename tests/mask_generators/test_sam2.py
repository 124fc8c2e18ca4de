"""SAM 2's features and masks equal the original's; every published size loads, other checkpoints are rejected.

The files tests/golden/sam2_*.npz were computed by sam2 1.1.0 with the weights and images of helpers/random_sam2.py.
"""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as rle
from safetensors.torch import save_file

from helpers.random_sam2 import REDUCED, SETTINGS, SIDE, WIDTH, fill, images, make_sam2, photos
from pixelclip.config import MasksConfig
from pixelclip.mask_generators import sam_checkpoint
from pixelclip.mask_generators.sam import SamGenerator, load_generator
from pixelclip.mask_generators.sam2 import Sam2, used_tensors
from pixelclip.mask_generators.sam2_encoder import SIZES, Sam2Encoder, find_size
from pixelclip.mask_generators.sam_checkpoint import build_sam2, load_sam
from pixelclip.mask_generators.sam_model import Sam2Model

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture(scope="module")
def sam2() -> Sam2:
    return make_sam2()


def test_features_equal_the_originals():
    features = fill(Sam2Encoder(REDUCED, WIDTH))(images())
    with np.load(GOLDEN / "sam2_encoder.npz") as golden:
        for stride, ours in zip((4, 8, 16), features, strict=True):
            theirs = torch.from_numpy(golden[f"stride_{stride}"])
            # Rounding: features of both in float32 differ from those in float64 by 1e-5 standard deviations.
            torch.testing.assert_close(ours[:1], theirs, atol=3e-5 * theirs.std().item(), rtol=0)


@pytest.mark.parametrize("name", SIZES)
def test_size_is_found_from_shapes(name):
    with torch.device("meta"):
        state = Sam2Encoder(SIZES[name]).state_dict()
    assert find_size({f"image_encoder.{tensor}": value for tensor, value in state.items()}) == name


def test_other_sizes_are_rejected():
    with torch.device("meta"):
        state = Sam2Encoder(REDUCED).state_dict()
    with pytest.raises(ValueError, match=r"found a trunk of width 8 with 8 blocks, expected one of tiny \(96, 12\), small"):
        find_size({f"image_encoder.{tensor}": value for tensor, value in state.items()})
    with pytest.raises(ValueError, match="found a trunk of width 0 with 0 blocks"):
        find_size({})


def test_logits_and_predicted_iou_equal_the_originals(sam2):
    photo = photos()[1]
    with np.load(GOLDEN / "sam2_masks.npz") as golden, torch.no_grad():
        model = Sam2Model(sam2)
        (decoder,) = model.decoders([photo])
        prompts = model.prompts(golden["points"].astype(np.float64), photo.shape[:2])
        ((logits, quality, number),) = decoder(prompts, 64, 0.0)
        assert number.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
        theirs = torch.from_numpy(golden["logits"]).flatten(0, 1)
        assert theirs.std() > 3
        torch.testing.assert_close(logits, theirs, atol=3e-5 * theirs.std().item(), rtol=0)
        torch.testing.assert_close(quality, torch.from_numpy(golden["iou"]).flatten(), atol=1e-5, rtol=0)
        full = model.upscale(logits[:3], photo.shape[:2])[:, ::10, ::10]
        torch.testing.assert_close(full, torch.from_numpy(golden["full"])[0], atol=3e-5 * theirs.std().item(), rtol=0)


@pytest.mark.parametrize("name", SETTINGS)
def test_masks_equal_the_originals(sam2, name):
    found = SamGenerator(sam2, **SETTINGS[name])(photos())
    with np.load(GOLDEN / "sam2_masks.npz") as golden:
        for index, (entries, photo) in enumerate(zip(found, photos(), strict=True)):
            rows, counts = golden[f"{name}_{index}_rows"], str(golden[f"{name}_{index}_counts"]).split()
            assert len(entries) == len(rows) > 0
            theirs = [{"size": list(photo.shape[:2]), "counts": count.encode()} for count in counts]
            ours = [entry["segmentation"] for entry in entries]
            assert np.diag(rle.iou(ours, theirs, [0] * len(theirs))).min() > 0.999
            columns = ("predicted_iou", "stability_score")
            np.testing.assert_allclose([[entry[name] for name in columns] for entry in entries], rows[:, :2], atol=1e-3)
            boxes = [[*entry["bbox"], *entry["point_coords"][0], *entry["crop_box"]] for entry in entries]
            np.testing.assert_allclose(boxes, rows[:, 2:12], atol=1)


def test_batch_agrees_with_single_images(sam2):
    generator = SamGenerator(sam2, **SETTINGS["all"], crop_n_layers=1, crop_nms_thresh=1.0)
    for together, (alone,) in zip(generator(photos()), (generator([photo]) for photo in photos()), strict=True):
        assert len(together) == len(alone) > 9
        ours, others = ([entry["segmentation"] for entry in entries] for entries in (together, alone))
        assert np.median(rle.iou(ours, others, [0] * len(others)).max(axis=1)) > 0.99


def test_slivers_are_masked(sam2):
    sliver, dot = np.zeros((1, 2000, 3), np.uint8), np.zeros((1, 1, 3), np.uint8)
    assert len(SamGenerator(sam2, **SETTINGS["all"], crop_n_layers=1)([sliver, dot])) == 2


def published(name: str) -> dict[str, torch.Tensor]:
    """Tensors on the meta device with the names and shapes of a published model."""
    with np.load(GOLDEN / "sam2_names.npz") as golden:
        lines = [line.split() for line in str(golden[name]).splitlines()]
    return {tensor: torch.empty([int(length) for length in shape], device="meta") for tensor, *shape in lines}


@pytest.mark.parametrize("version", ["sam2", "sam2.1"])
@pytest.mark.parametrize("size", SIZES)
def test_every_tensor_of_published_models_is_used_or_for_videos(version, size):
    state = published(f"{version}_{size}")
    needed = build_sam2(state).state_dict()
    assert {name: tensor.shape for name, tensor in needed.items()}.items() <= {n: t.shape for n, t in state.items()}.items()
    unused = {name.split(".")[0] for name in state.keys() - needed.keys()} - {"sam_mask_decoder"}
    assert {name for name in state.keys() - needed.keys() if name.startswith("sam_mask_decoder")} == {
        f"sam_mask_decoder.pred_obj_score_head.layers.{layer}.{kind}" for layer in range(3) for kind in ("weight", "bias")
    }
    video = {"memory_attention", "memory_encoder", "mask_downsample", "maskmem_tpos_enc", "no_mem_pos_enc", "no_obj_ptr"}
    assert unused == video | {"obj_ptr_proj"} | (
        {"obj_ptr_tpos_proj", "no_obj_embed_spatial"} if version == "sam2.1" else set()
    )
    assert used_tensors(state).keys() == needed.keys()


@pytest.fixture
def reduced(monkeypatch):
    """Let the reduced model be read from files."""
    monkeypatch.setitem(SIZES, "reduced", REDUCED)
    monkeypatch.setattr(sam_checkpoint, "Sam2", partial(Sam2, width=WIDTH, side=SIDE))


VIDEO = {"memory_attention.norm.weight": torch.ones(3), "no_obj_embed_spatial": torch.ones(1, 2)}


@pytest.mark.parametrize("kind", ["published", "plain", "safetensors"])
def test_saved_checkpoint_loads(sam2, reduced, tmp_path, kind):
    state = {name: tensor.half() for name, tensor in sam2.state_dict().items()} | VIDEO
    path = tmp_path / ("sam2.safetensors" if kind == "safetensors" else "sam2.pt")
    if kind == "safetensors":
        save_file(state, path)
    else:
        torch.save({"model": state} if kind == "published" else state, path)
    loaded = load_sam(path)
    tensors = loaded.state_dict()
    assert tensors.keys() == sam2.state_dict().keys()
    assert all(torch.equal(tensor, state[name].float()) for name, tensor in tensors.items())
    assert not loaded.training and not any(parameter.requires_grad for parameter in loaded.parameters())
    assert {(tensor.dtype, tensor.device.type) for tensor in tensors.values()} == {(torch.float32, "cpu")}


def test_generator_sam_recognises_the_checkpoint(sam2, reduced, tmp_path):
    torch.save({"model": dict(sam2.state_dict()) | VIDEO}, tmp_path / "sam2.pt")
    settings = {f"sam_{name}": value for name, value in SETTINGS["thresholds"].items()}
    config = MasksConfig(generator="sam", weights=str(tmp_path / "sam2.pt"), device="cpu", **settings)
    documents = [*load_generator(tmp_path / "sam2.pt", config)([("key", Image.fromarray(photo)) for photo in photos()])]
    found = SamGenerator(sam2, **SETTINGS["thresholds"])(photos())
    assert [document["annotations"] for document in documents] == found
    assert all(found)


def test_bfloat16_masks_agree_with_float32(sam2):
    exact, short = (
        SamGenerator(sam2, **SETTINGS["all"], precision=precision)(photos()) for precision in (None, torch.bfloat16)
    )
    assert exact != short
    for found, others in zip(short, exact, strict=True):
        assert len(found) == len(others)
        ours, theirs = ([entry["segmentation"] for entry in entries] for entries in (found, others))
        assert np.median(rle.iou(ours, theirs, [0] * len(theirs)).max(axis=1)) > 0.9


PATCH, TOKEN = "image_encoder.trunk.patch_embed.proj.weight", "sam_mask_decoder.obj_score_token.weight"
WRONG = {
    "gap": (lambda s: {n: t for n, t in s.items() if n != TOKEN}, f": missing: {TOKEN};"),
    "more": (lambda s: s | {"memory_attention2.weight": torch.ones(1)}, ": unexpected: memory_attention2.weight;"),
    "head": (lambda s: s | {"sam_mask_decoder.hf.weight": torch.ones(1)}, ": unexpected: sam_mask_decoder.hf.weight;"),
    "shape": (lambda s: s | {TOKEN: torch.ones(3)}, rf"of a different shape: {TOKEN} \[3\] instead of \[1, 16\]"),
    "size": (lambda s: s | {PATCH: torch.ones(7, 3, 7, 7)}, "found a trunk of width 7 with 8 blocks, expected one of tiny"),
    "no trunk": (lambda s: {TOKEN: s[TOKEN]}, "found a trunk of width 0 with 0 blocks"),
}


@pytest.mark.parametrize(("change", "reason"), WRONG.values(), ids=WRONG)
def test_other_weights_are_rejected(sam2, reduced, tmp_path, change, reason):
    path = tmp_path / "sam2.pt"
    torch.save({"model": change(dict(sam2.state_dict()))}, path)
    with pytest.raises(ValueError, match=reason) as raised:
        load_sam(path)
    message = str(raised.value)
    assert message.startswith(f"{path}: ") and "SAM 2 or 2.1: tiny, small, base_plus or large" in message
