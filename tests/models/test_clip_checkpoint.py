"""CLIP weights in the containers, precisions and under the names in which people have them."""

import pickle
import socket
import time
import warnings
import zipfile
from pathlib import Path

import open_clip
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from helpers import random_sam, tiny
from pixelclip.mask_generators.sam_checkpoint import load_sam
from pixelclip.models.checkpoint import load_clip
from pixelclip.models.torchscript import read_torchscript
from pixelclip.models.weights import read_weights

NAME = "tiny-pixelclip"
EXTRAS = {"input_resolution": torch.tensor(32), "context_length": torch.tensor(77), "vocab_size": torch.tensor(49408)}


@pytest.fixture(autouse=True)
def registered(monkeypatch) -> None:
    """Register a small CLIP in open_clip, with and without QuickGELU."""
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, NAME, tiny.CLIP_CONFIG)
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, f"{NAME}-quickgelu", tiny.CLIP_CONFIG | {"quick_gelu": True})


class Root(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def save_script(state: dict[str, torch.Tensor], path: Path) -> None:
    """Save tensors as OpenAI does: a scripted module whose parameters and buffers have their names."""
    root = Root()
    for name, tensor in state.items():
        *parents, leaf = name.split(".")
        module: nn.Module = root
        for parent in parents:
            if not hasattr(module, parent):
                module.add_module(parent, nn.Module())
            module = getattr(module, parent)
        if tensor.is_floating_point():
            module.register_parameter(leaf, nn.Parameter(tensor.clone()))
        else:
            module.register_buffer(leaf, tensor.clone())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated
        torch.jit.save(torch.jit.script(root), path)


def assert_loaded(spec: str, expected: dict[str, torch.Tensor]) -> None:
    state = load_clip(spec).model.state_dict()
    for name, tensor in expected.items():
        assert torch.equal(state[name], tensor.float()), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_torchscript_tensors_equal_those_that_torch_loads(tmp_path, dtype):
    state = {name: tensor.to(dtype) for name, tensor in tiny.clip_state().items()}
    state["visual.proj"] = state["visual.proj"].t()  # not contiguous
    save_script(state | EXTRAS, tmp_path / "clip.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = torch.jit.load(tmp_path / "clip.pt").state_dict()
    found = read_torchscript(tmp_path / "clip.pt")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) and found[name].dtype == expected[name].dtype for name in expected)


def test_openai_archive_loads_and_its_state_dict_too(tmp_path, capsys):
    state = {name: tensor.half() for name, tensor in tiny.clip_state().items()}
    save_script(state | EXTRAS, tmp_path / "ViT.pt")
    torch.save(state | EXTRAS, tmp_path / "state.pt")
    for file in ("ViT.pt", "state.pt"):
        assert_loaded(f"{NAME}-quickgelu:{tmp_path / file}", state)
        assert capsys.readouterr().out == ""
        assert_loaded(f"{NAME}:{tmp_path / file}", state)
        assert f"use {NAME}-quickgelu:{tmp_path / file}" in capsys.readouterr().out


def test_archive_that_refers_to_other_code_is_rejected(tmp_path):
    class Trap:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "sprung",))

    with zipfile.ZipFile(tmp_path / "trap.pt", "w") as archive:
        archive.writestr("trap/constants.pkl", pickle.dumps((), protocol=2))
        archive.writestr("trap/data.pkl", pickle.dumps(Trap(), protocol=2))
        archive.writestr("trap/version", "3\n")
    with pytest.raises(ValueError, match=r"would execute .*, which is not allowed"):
        read_weights(tmp_path / "trap.pt")
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_wrappers_are_removed(tmp_path, prefix):
    state = {f"{prefix}{name}": tensor for name, tensor in tiny.clip_state().items()}
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "wrapped.pt")
    assert_loaded(f"{NAME}:{tmp_path / 'wrapped.pt'}", tiny.clip_state())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_converted(tmp_path, dtype):
    state = {name: tensor.to(dtype) for name, tensor in tiny.clip_state().items()}
    save_file(state, tmp_path / "half.safetensors")
    assert_loaded(f"{NAME}:{tmp_path / 'half.safetensors'}", state)


def test_image_tower_alone_is_rejected(tmp_path):
    save_file({name: t for name, t in tiny.clip_state().items() if name.startswith("visual.")}, tmp_path / "v.safetensors")
    with pytest.raises(ValueError, match=r"v\.safetensors: contains only the image tower"):
        load_clip(f"{NAME}:{tmp_path / 'v.safetensors'}")


def test_position_grid_is_resized_and_reported(tmp_path, capsys):
    state = tiny.clip_state()
    positions, width = state["visual.positional_embedding"].shape
    grid = torch.arange(36.0)[:, None].expand(36, width)
    state["visual.positional_embedding"] = torch.cat([torch.full((1, width), -1.0), grid])
    save_file(state, tmp_path / "grid.safetensors")
    loaded = load_clip(f"{NAME}:{tmp_path / 'grid.safetensors'}").model.visual.positional_embedding
    side = int((positions - 1) ** 0.5)
    resized = nn.functional.interpolate(
        grid.T.reshape(1, width, 6, 6), size=side, mode="bicubic", antialias=True, align_corners=False
    )
    assert torch.equal(loaded[0], torch.full((width,), -1.0))
    torch.testing.assert_close(loaded[1:], resized[0].flatten(1).T)
    assert f"visual.positional_embedding is resized from 37 to {positions} positions" in capsys.readouterr().out


def test_sam_with_a_wrapper_loads(tmp_path):
    state = random_sam.make_sam().state_dict()
    torch.save({f"module.{name}": tensor for name, tensor in state.items()}, tmp_path / "sam.pth")
    assert all(torch.equal(tensor, state[name]) for name, tensor in load_sam(tmp_path / "sam.pth").state_dict().items())


def test_unreachable_hub_fails_without_retries_and_names_the_way_out(monkeypatch, tmp_path):
    def fail(*_: object, **__: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail(f"waits {seconds} s before a retry"))
    with pytest.raises(ValueError, match=r"cannot be reached: no route to host.*; use ViT-B-16-quickgelu:FILE with") as caught:
        load_clip("ViT-B-16-quickgelu:openai")
    assert len(str(caught.value).splitlines()) == 1
