"""Model folders and the `clip` setting: saving, loading, and errors that name the problem."""

import errno
import json
import pickle
import resource
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import open_clip
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from helpers import tiny
from pixelclip.models.checkpoint import backbone_of, build_clip, load_clip, load_model, save_model, write_tensors
from pixelclip.models.decoder import Decoder
from pixelclip.models.text import TEMPLATES, Prompts, TextTower


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory) -> Path:
    return tiny.clip_folder(tmp_path_factory.mktemp("clip"))


@pytest.fixture
def model_folder(clip_folder, tmp_path) -> Path:
    return tiny.model_folder(tmp_path / "model", clip_folder, change=0.1)


def change_config(folder: Path, **entries) -> None:
    config = json.loads((folder / "config.json").read_text()) | entries
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def test_loading_draws_no_random_weights_first(model_folder):
    before = torch.get_rng_state()
    load_model(model_folder)
    assert torch.equal(torch.get_rng_state(), before)


def test_save_then_load_is_bit_equal(clip_folder, tmp_path):
    clip = load_clip(str(clip_folder))
    words = torch.arange(6).reshape(3, 2)
    prompts, decoder = Prompts(TextTower(clip.model), words), Decoder()
    save_model(tmp_path, clip, prompts, decoder, side=40, residual="patch", origin={"spec": "x", "md5": "y"})
    (tmp_path / "provenance.json").write_text("{}")
    loaded = load_model(tmp_path)

    state = loaded.clip.model.state_dict()
    assert state.keys() == clip.model.state_dict().keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in clip.model.state_dict().items())
    assert torch.equal(loaded.prompts.tokens, prompts.tokens)
    written = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(written[f"decoder.{name}"], tensor) for name, tensor in decoder.state_dict().items())
    assert (loaded.side, loaded.residual, loaded.config["clip"]) == (40, "patch", {"spec": "x", "md5": "y"})
    assert (loaded.clip.mean, loaded.clip.std, loaded.clip.side) == (tiny.MEAN, tiny.STD, 32)

    # Activation and number of heads are not part of the weights, so also compare outputs.
    images, tokens = torch.rand(2, 3, 32, 32), open_clip.SimpleTokenizer()(["dog", "blue sky"])
    with torch.no_grad():
        assert torch.equal(loaded.clip.model.encode_image(images), clip.model.encode_image(images))
        assert torch.equal(loaded.clip.model.encode_text(tokens), clip.model.encode_text(tokens))
        assert torch.equal(loaded.prompts(TextTower(loaded.clip.model)), prompts(TextTower(clip.model)))
        assert backbone_of(loaded)(images).shape == (2, 64, 4, 4)


def test_loaded_concepts_use_the_templates_of_training(clip_folder, tmp_path):
    clip = load_clip(str(clip_folder))
    text = TextTower(clip.model)
    prompts = Prompts(text, torch.arange(6).reshape(3, 2), templates=TEMPLATES["ensemble"])
    origin = {"spec": "x", "md5": "y"}
    save_model(tmp_path, clip, prompts, Decoder(), side=40, residual="cls", origin=origin, templates="ensemble")
    (tmp_path / "provenance.json").write_text("{}")
    assert torch.equal(load_model(tmp_path).prompts(text), prompts(text))
    change_config(tmp_path, templates=None)  # as written before this setting existed
    assert torch.equal(load_model(tmp_path).prompts(text), Prompts(text, torch.arange(6).reshape(3, 2))(text))
    change_config(tmp_path, templates="all")
    with pytest.raises(ValueError, match=r"config\.json: templates: .*'single' or 'ensemble' \(found 'all'\)"):
        load_model(tmp_path)


def test_model_folder_contains_no_pickle(model_folder):
    assert {path.name for path in model_folder.iterdir()} == {"model.safetensors", "config.json", "provenance.json"}
    with safe_open(model_folder / "model.safetensors", framework="pt") as file:
        assert {name.split(".")[0] for name in file.keys()} == {"clip", "prompts", "decoder"}  # noqa: SIM118


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "provenance.json"])
def test_incomplete_folder_is_rejected_with_the_missing_file(model_folder, name):
    (model_folder / name).unlink()
    with pytest.raises(ValueError, match=rf"model: is not a complete model folder: {name} missing"):
        load_model(model_folder)


def test_missing_folder_is_rejected(tmp_path):
    with pytest.raises(ValueError, match="nowhere: no such model folder"):
        load_model(tmp_path / "nowhere")


def test_truncated_weights_are_rejected(model_folder):
    weights = model_folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=r"model\.safetensors: cannot be read as safetensors"):
        load_model(model_folder)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"format": 7}, r"config\.json: format: Input should be 1 \(found 7\)"),
        ({"side": None}, r"config\.json: entry 'side' is missing"),
        ({"model_cfg": {**tiny.CLIP_CONFIG, "embed_dim": 32}}, r"model\.safetensors: does not fit config\.json"),
        ({"model_cfg": {**tiny.CLIP_CONFIG, "vision_cfg": {"colour": 3}}}, r"config\.json: .*colour"),
    ],
    ids=["format", "entry", "width", "unknown"],
)
def test_config_that_does_not_fit_is_rejected(model_folder, entries, message):
    change_config(model_folder, **entries)
    with pytest.raises(ValueError, match=message):
        load_model(model_folder)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"model_cfg": []}, r"model_cfg: .* \(found \[\]\)"),
        ({"model_cfg": {**tiny.CLIP_CONFIG, "vision_cfg": 3}}, r"model_cfg\.vision_cfg: .* \(found 3\)"),
        (
            {"model_cfg": {**tiny.CLIP_CONFIG, "vision_cfg": {"patch_size": 0}}},
            r"model_cfg: open_clip cannot build a CLIP from it: .*",
        ),
        ({"side": 0}, r"side: .*greater than or equal to 1 \(found 0\)"),
        ({"side": "x"}, r"side: .*integer \(found 'x'\)"),
        ({"mean": [1]}, r"mean: .*at least 3 items.* \(found \[1\]\)"),
        ({"mean": ["a", "b", "c"]}, r"mean\.0: .*number \(found 'a'\)"),
        ({"std": [0, 0, 0]}, r"std\.0: .*greater than 0 \(found 0\)"),
        ({"residual": "foo"}, r"residual: .*'cls' or 'patch' \(found 'foo'\)"),
        ({"clip": {"md5": ""}}, r"entry 'clip\.spec' is missing"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_error_of_an_invalid_config_is_one_line_with_entry_and_allowed_values(model_folder, entries, message):
    change_config(model_folder, **entries)
    with pytest.raises(ValueError, match=rf"^\S+config\.json: {message}$"):
        load_model(model_folder)


def test_config_that_is_not_an_object_is_rejected(model_folder):
    (model_folder / "config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"config\.json: Input should be an object \(found \[\]\)$"):
        load_model(model_folder)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("clip.visual.proj", (64, 48), r"of a different shape: visual\.proj \[64, 48\] instead of \[64, 64\]"),
        ("prompts.tokens", (3, 2, 48), r"of a different shape: tokens \[3, 2, 48\] instead of \[3, 2, 32\]"),
        ("prompts.tokens", (3,), r"prompts\.tokens is \[3\] instead of \[concepts, tokens, 32\]"),
        ("prompts.tokens", (3, 90, 32), r"90 prompt tokens do not fit the context length 77 of this CLIP"),
        ("prompts.values", (3, 48), r"unexpected: tokens; of a different shape: values \[3, 48\] instead of \[3, 64\]"),
        ("clip.extra", (3,), r"unexpected: extra"),
    ],
)
def test_error_of_weights_that_do_not_fit_is_one_line(model_folder, name, shape, message):
    weights = model_folder / "model.safetensors"
    save_file(load_file(weights) | {name: torch.zeros(shape)}, weights)
    with pytest.raises(ValueError, match=rf"^\S+model\.safetensors: does not fit config\.json: {message}$"):
        load_model(model_folder)


def test_missing_tensor_is_named(model_folder):
    weights = model_folder / "model.safetensors"
    tensors = load_file(weights)
    del tensors["clip.visual.proj"]
    save_file(tensors, weights)
    with pytest.raises(ValueError, match=r"(?s)model\.safetensors: does not fit config\.json.*visual\.proj"):
        load_model(model_folder)


def test_build_clip_does_not_modify_its_config():
    before = json.dumps(tiny.CLIP_CONFIG)
    build_clip({**tiny.CLIP_CONFIG, "custom_text": False})
    assert json.dumps(tiny.CLIP_CONFIG) == before


def test_shipped_clip_loads():
    clip = load_clip("toy")
    assert clip.side == 96
    assert clip.mean == open_clip.OPENAI_DATASET_MEAN


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("ViT-B-61:openai", r"CLIP 'ViT-B-61:openai': .*did you mean 'ViT-B-16'"),
        ("ViT-B-16", r"CLIP 'ViT-B-16': weights are missing: use ViT-B-16:PRETRAINED or ViT-B-16:FILE"),
        (
            "ViT-B-16:opanai",
            r"opanai': no such file or pretrained weights: opanai; pretrained weights are openai, la",
        ),
        ("coca_base:nope", r"CLIP 'coca_base:nope': .*; open_clip has none for this CLIP, use coca_base:FILE$"),
        ("/no/such/folder", r"CLIP '/no/such/folder': no such folder or CLIP"),
    ],
)
def test_unknown_clip_is_rejected_with_alternatives(spec, message, caplog):
    with pytest.raises(ValueError, match=message):
        load_clip(spec)
    assert not caplog.records


def test_clip_folder_without_config_is_rejected(tmp_path):
    tiny.clip_folder(tmp_path)
    (tmp_path / "open_clip_config.json").unlink()
    with pytest.raises(ValueError, match=r"open_clip_config\.json: no such file"):
        load_clip(str(tmp_path))


def test_clip_folder_without_weights_is_rejected(tmp_path):
    tiny.clip_folder(tmp_path)
    (tmp_path / "open_clip_model.safetensors").unlink()
    with pytest.raises(ValueError, match=str(tmp_path)):
        load_clip(str(tmp_path))


@pytest.mark.parametrize("content", ["{}", '{"model_cfg": {"embed_dim": 4}}', "[]", '{"model_cfg": {"colour": 4}}'])
def test_clip_folder_with_an_unusable_config_is_rejected(tmp_path, content):
    tiny.clip_folder(tmp_path)
    (tmp_path / "open_clip_config.json").write_text(content)
    with pytest.raises(ValueError, match=str(tmp_path)):
        load_clip(str(tmp_path))


@pytest.fixture
def registered(monkeypatch) -> str:
    """Register a small CLIP under a name in open_clip."""
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny-pixelclip", tiny.CLIP_CONFIG)
    return "tiny-pixelclip"


def test_clip_loads_from_name_and_file(registered, tmp_path):
    save_file(tiny.clip_state(), tmp_path / "w.safetensors")
    clip = load_clip(f"{registered}:{tmp_path / 'w.safetensors'}")
    state = clip.model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in tiny.clip_state().items())
    again = build_clip(clip.model_cfg)
    again.load_state_dict(state)
    images = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(again.eval().encode_image(images), clip.model.encode_image(images))


def test_file_that_does_not_fit_the_named_clip_is_rejected(registered, tmp_path):
    save_file({"visual.proj": torch.zeros(3, 3)}, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=r"w\.safetensors"):
        load_clip(f"{registered}:{tmp_path / 'w.safetensors'}")


class _Trap:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_pickle_is_never_executed(registered, tmp_path):
    torch.save({"state_dict": _Trap(tmp_path / "sprung")}, tmp_path / "w.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(_Trap(tmp_path / "sprung"), protocol=2))
    for name in ("w.pt", "plain.pt"):
        with pytest.raises(ValueError, match=name):
            load_clip(f"{registered}:{tmp_path / name}")
    assert not (tmp_path / "sprung").exists()


def test_weights_of_a_different_model_or_size_are_rejected(tmp_path):
    torch.save({"image_encoder.pos_embed": torch.zeros(1), "mask_decoder.x": torch.zeros(1)}, tmp_path / "sam.pth")
    with pytest.raises(ValueError, match=r"sam\.pth: contains image_encoder\.pos_embed, mask_decoder\.x; expected a CLIP's"):
        load_clip(f"ViT-B-32:{tmp_path / 'sam.pth'}")
    small = tmp_path / "small.safetensors"
    save_file(tiny.clip_state(), small)
    with pytest.raises(
        ValueError, match=r"small\.safetensors does not fit ViT-B-32: missing: .*of a different shape"
    ) as caught:
        load_clip(f"ViT-B-32:{small}")
    assert len(str(caught.value)) < 700


def test_weights_are_downloaded_from_a_url(tmp_path, monkeypatch):
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "tiny-downloaded.json").write_text(json.dumps(tiny.CLIP_CONFIG))
    open_clip.add_model_config(tmp_path / "configs")
    save_file(tiny.clip_state(), tmp_path / "weights.safetensors")
    monkeypatch.setenv("PIXELCLIP_CACHE", str(tmp_path / "cache"))
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
    monkeypatch.setattr(SimpleHTTPRequestHandler, "log_message", lambda *_: None)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        loaded = load_clip(f"tiny-downloaded:http://127.0.0.1:{server.server_port}/weights.safetensors")
        server.shutdown()
    for name, tensor in tiny.clip_state().items():
        assert torch.equal(loaded.model.state_dict()[name], tensor), name


def test_write_error_names_the_file(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(OSError, match="File too large") as error:
            write_tensors(tmp_path / "model.safetensors", {"a": torch.zeros(1000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (error.value.errno, error.value.filename) == (errno.EFBIG, str(tmp_path / "model.safetensors"))
    with pytest.raises(FileNotFoundError, match=r"nowhere/model\.safetensors"):
        write_tensors(tmp_path / "nowhere" / "model.safetensors", {"a": torch.zeros(1)})


@pytest.mark.parametrize(
    ("section", "entry", "value"),
    [("vision_cfg", "layers", 10**5), ("text_cfg", "layers", 10**5), ("vision_cfg", "width", 10**5)],
)
@pytest.mark.timeout(20)
def test_config_of_a_much_larger_model_is_rejected_before_it_is_built(model_folder, section, entry, value):
    config = {**tiny.CLIP_CONFIG, section: {**tiny.CLIP_CONFIG[section], entry: value}}
    change_config(model_folder, model_cfg=config)
    with pytest.raises(ValueError, match=rf"config\.json: model_cfg\.{section}\.layers 100000|does not fit config\.json"):
        load_model(model_folder)


def test_model_that_changed_after_its_training_is_an_error(model_folder):
    weights, config = model_folder / "model.safetensors", model_folder / "config.json"
    for file, old in ((weights, weights.read_bytes()), (config, config.read_bytes())):
        changed = bytearray(old)
        changed[-100 if file is weights else old.index(b"0.4")] ^= 1
        file.write_bytes(changed)
        with pytest.raises(
            ValueError, match=r"model: model\.safetensors or config\.json changed after stage train wrote it: .*MD5"
        ):
            load_model(model_folder)
        file.write_bytes(old)
    load_model(model_folder)
