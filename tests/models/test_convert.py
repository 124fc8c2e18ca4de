"""Import of reference checkpoints, written with the reference's key names, and export to open_clip."""

import json
from pathlib import Path

import open_clip
import pytest
import torch
from safetensors.torch import load_file

from helpers import tiny
from helpers.reference_inference import checkpoint as reference_checkpoint
from pixelclip.config import ImportConfig
from pixelclip.models import convert
from pixelclip.models.backbone import Backbone
from pixelclip.models.checkpoint import backbone_of, build_clip, load_model
from pixelclip.models.decoder import Decoder
from pixelclip.models.text import Prompts, TextTower


@pytest.fixture(params=["vit", "convnext"])
def kind(request) -> str:
    return request.param


@pytest.fixture
def checkpoint(kind, tmp_path) -> Path:
    generator = torch.Generator().manual_seed(5)
    document = reference_checkpoint(
        tiny.clip_of(kind).state_dict(), torch.randn(6, 4, 32, generator=generator), Decoder().state_dict()
    )
    torch.save(document, tmp_path / "released.pth")
    return tmp_path / "released.pth"


def config_folder(folder: Path, kind: str) -> str:
    return str(tiny.clip_config(folder, tiny.CLIP_CONFIGS[kind]))


def test_imported_checkpoint_computes_like_the_reference_model(checkpoint, kind, tmp_path):
    document = torch.load(checkpoint, weights_only=False)["model"]
    config = ImportConfig(clip=config_folder(tmp_path / "clip", kind))
    assert convert.run(checkpoint, tmp_path / "model", config) == {"import/concepts": 6.0}
    model = load_model(tmp_path / "model")
    assert model.side == (320 if kind == "vit" else 640)  # multiples of the patches of 8 and 32
    clip = tiny.clip_of(kind)
    x = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(backbone_of(model)(x), Backbone(clip.visual.eval())(x))
        text = TextTower(clip)
        expected = Prompts(text, torch.zeros(6, 4, dtype=torch.long))
        expected.tokens.copy_(document["sem_seg_head.predictor.prompt_tokens"])
        assert torch.equal(model.prompts(TextTower(model.clip.model)), expected(text))
    decoder = load_file(tmp_path / "model" / "model.safetensors")
    assert torch.equal(decoder["decoder.conv2.double_conv.3.weight"], document["head.conv2.double_conv.3.weight"])


@pytest.mark.parametrize("name", list(convert.REFERENCE_CLIPS))
def test_clips_of_the_paper_are_identified_by_their_shapes(name):
    with torch.device("meta"):
        clip = build_clip(open_clip.get_model_config(name)).state_dict()
        width = clip["token_embedding.weight"].shape[1]
        document = reference_checkpoint(clip, torch.empty(64, 4, width), Decoder().state_dict())
    document["model"]["sem_seg_head.predictor.clip_model.input_resolution"] = torch.tensor(224)
    weights, tokens, head = convert.split_reference(document)
    assert convert.identify_clip(weights) == name
    assert tokens.shape == (64, 4, width)
    assert head.keys() == Decoder().state_dict().keys()


def test_unknown_clip_must_be_set(checkpoint, tmp_path):
    with pytest.raises(ValueError, match=r"released\.pth: its CLIP is not among ViT-B-16-quickgelu.*--clip"):
        convert.run(checkpoint, tmp_path / "model", ImportConfig())
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d["model"].pop("sem_seg_head.predictor.prompt_tokens"), "entries sem_seg_head.predictor.clip_model"),
        (lambda d: d["model"].pop("sem_seg_head.predictor.clip_model.logit_scale"), "missing: logit_scale"),
        (lambda d: d["model"].pop("head.proj.bias"), "missing: proj.bias"),
        (
            lambda d: d["model"].update({"head.proj.bias": torch.zeros(2)}),
            r"shape: proj.bias \[2\] instead of \[1\]",
        ),
        (
            lambda d: d["model"].update({"sem_seg_head.predictor.prompt_tokens": torch.zeros(6, 4, 31)}),
            r"shape: tokens \[6, 4, 31\] instead of \[6, 4, 32\]",
        ),
        (lambda d: d.update(model=[1]), "found entries that are not tensors"),
    ],
)
def test_other_checkpoint_is_rejected_with_its_content(change, message, tmp_path):
    document = reference_checkpoint(tiny.clip_state(), torch.zeros(6, 4, 32), Decoder().state_dict())
    change(document)
    torch.save(document, tmp_path / "other.pth")
    config = ImportConfig(clip=config_folder(tmp_path / "clip", "vit"))
    with pytest.raises(ValueError, match=rf"other\.pth: .*{message}"):
        convert.run(tmp_path / "other.pth", tmp_path / "model", config)
    assert not (tmp_path / "model").exists()


def test_pickle_with_code_is_rejected_without_running_it(tmp_path):
    class Trap:
        def __reduce__(self):
            return Path.touch, (tmp_path / "executed",)

    torch.save({"model": {"head.x": torch.zeros(1)}, "trap": Trap()}, tmp_path / "trap.pth")
    with pytest.raises(ValueError, match=r"trap\.pth: would execute .*, which is not allowed"):
        convert.run(tmp_path / "trap.pth", tmp_path / "model", ImportConfig())
    assert not (tmp_path / "executed").exists()


def test_truncated_file_is_rejected(checkpoint, tmp_path):
    checkpoint.write_bytes(checkpoint.read_bytes()[:-500])
    with pytest.raises(ValueError, match=r"released\.pth: .*(truncated|not a checkpoint)"):
        convert.run(checkpoint, tmp_path / "model", ImportConfig())


def test_exported_clip_computes_the_same_features_in_open_clip(checkpoint, kind, tmp_path):
    convert.run(checkpoint, tmp_path / "model", ImportConfig(clip=config_folder(tmp_path / "clip", kind)))
    model = load_model(tmp_path / "model")
    convert.export(tmp_path / "model", tmp_path / "exported")
    exported = open_clip.create_model(f"local-dir:{tmp_path / 'exported'}", require_pretrained=True).eval()
    size = tiny.CLIP_CONFIGS[kind]["vision_cfg"]["image_size"]
    x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(2))
    words = open_clip.SimpleTokenizer()(["a dog", "grass"])
    with torch.no_grad():
        assert torch.equal(exported.encode_image(x), model.clip.model.encode_image(x))
        assert torch.equal(exported.encode_text(words), model.clip.model.encode_text(words))
    with pytest.raises(ValueError, match=r"open_clip_config\.json already exists"):
        convert.export(tmp_path / "model", tmp_path / "exported")


def test_exported_weights_load_into_a_named_architecture(checkpoint, kind, tmp_path):
    """The user passes the architecture's name, and the file as `pretrained`."""
    convert.run(checkpoint, tmp_path / "model", ImportConfig(clip=config_folder(tmp_path / "clip", kind)))
    convert.export(tmp_path / "model", tmp_path / "exported")
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / f"tiny-{kind}.json").write_text(json.dumps(tiny.CLIP_CONFIGS[kind]))
    open_clip.add_model_config(tmp_path / "configs")
    weights = str(tmp_path / "exported" / "open_clip_model.safetensors")
    loaded = open_clip.create_model(f"tiny-{kind}", pretrained=weights, require_pretrained=True)
    state = loaded.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in tiny.clip_of(kind).state_dict().items())


@pytest.mark.parametrize(("patch", "side"), [(14, 322), (16, 320), (32, 320), (12, 324)])
def test_side_of_an_imported_vit_is_a_multiple_of_the_patch(tmp_path, patch, side):
    vision = tiny.CLIP_CONFIG["vision_cfg"] | {"patch_size": patch, "image_size": 2 * patch}
    config = tiny.CLIP_CONFIG | {"vision_cfg": vision}
    clip = str(tiny.clip_config(tmp_path / "clip", config))
    state = build_clip(config).state_dict()
    torch.save(reference_checkpoint(state, torch.zeros(6, 4, 32), Decoder().state_dict()), tmp_path / "released.pth")
    convert.run(tmp_path / "released.pth", tmp_path / "model", ImportConfig(clip=clip))
    assert load_model(tmp_path / "model").side == side
    message = rf"import\.side {side + 1} is not a multiple of the patch size \({patch}\); nearest valid: {side}, {side + patch}"
    with pytest.raises(ValueError, match=message):
        convert.run(tmp_path / "released.pth", tmp_path / "other", ImportConfig(clip=clip, side=side + 1))
    assert not (tmp_path / "other").exists()
