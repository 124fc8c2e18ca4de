"""Load the weights of a CLIP from the files that people have: OpenAI's archives, state dicts of any wrapper and precision."""

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import open_clip
from open_clip.convert import convert_state_dict
from open_clip.model import convert_to_custom_text_state_dict, resize_pos_embed, resize_text_pos_embed
from torch import Tensor, nn

from pixelclip.models.hub import cached_or_online
from pixelclip.models.weights import check_fit, check_tensors, named, read_weights, without_wrappers
from pixelclip.workflow.failures import first_line

_OPENAI_EXTRAS = ("input_resolution", "context_length", "vocab_size")
"""Sizes that OpenAI's files contain as tensors."""
_QUICK = "-quickgelu"


def load_file(name: str, path: Path) -> nn.Module:
    """Build the CLIP that open_clip knows by a name, with the weights of a file.

    Position embeddings of a different grid are resized, and OpenAI's weights under a name without QuickGELU are loaded; both
    print a line.

    Raises:
        ValueError: the file cannot be read, is no CLIP's, lacks the text tower, or belongs to a different architecture.
    """
    try:
        state, from_openai = _read(path)
        with _no_logging():  # of random weights, which the file's replace
            model = open_clip.create_model(name)
        state = convert_state_dict(model, state)
        if not any(key.startswith("visual.") for key in state):
            raise ValueError(f"contains {named(state)}; expected a CLIP's state dict (visual.*, ...)")
        if all(key.startswith("visual.") for key in state):
            raise ValueError("contains only the image tower (visual.*); a CLIP's text tower is needed, too")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if from_openai and not name.endswith(_QUICK) and f"{name}{_QUICK}" in open_clip.list_models():
        print(f"warning: {path} has OpenAI's weights, which need QuickGELU; use {name}{_QUICK}:{path}", flush=True)
    state = _as_open_clip(state, model)
    for key, resize in (("visual.positional_embedding", resize_pos_embed), ("positional_embedding", resize_text_pos_embed)):
        _resize(state, model, key, resize, path)
    try:
        check_fit(state, model.state_dict())
    except ValueError as error:
        raise ValueError(f"{path} does not fit {name}: {error}") from None
    model.load_state_dict(state)
    return model


def _read(path: Path) -> tuple[dict[str, Tensor], bool]:
    """Return the named tensors of a file, and whether OpenAI published them."""
    content = read_weights(path)
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = dict(content["state_dict"])
    state = without_wrappers(check_tensors(content))
    extras = [state.pop(name, None) for name in _OPENAI_EXTRAS]
    return state, any(extra is not None for extra in extras)


def _as_open_clip(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Rename and reshape tensors as open_clip does."""
    if "positional_embedding" in state and not hasattr(model, "positional_embedding"):
        state = convert_to_custom_text_state_dict(state)
    scale: Any = model.logit_scale
    if "logit_scale" in state:
        state["logit_scale"] = state["logit_scale"].reshape(scale.shape)
    state.pop("text.transformer.embeddings.position_ids", None)
    return state


def _resize(state: dict[str, Tensor], model: nn.Module, key: str, resize: Callable[[Any, Any], None], path: Path) -> None:
    """Resize a position embedding to the model's number of positions by open_clip's interpolation."""
    found, expected = state.get(key), model.state_dict().get(key)
    if found is None or expected is None or len(found) == len(expected) or found.shape[1:] != expected.shape[1:]:
        return
    if key.startswith("visual.") and math.isqrt(len(found) - 1) ** 2 != len(found) - 1:
        return  # not a class token and a square grid
    state[key] = found.float()
    resize(state, model)
    print(f"{path}: {key} is resized from {len(found)} to {len(expected)} positions, the size of this CLIP", flush=True)


def statistics_of(name: str) -> dict[str, Any]:
    """Return mean and standard deviation of the images of all weights that open_clip knows by a name; empty if they differ."""
    configs = [open_clip.get_pretrained_cfg(name, tag) for tag in open_clip.list_pretrained_tags_by_model(name)]
    found = {(tuple(config["mean"]), tuple(config["std"])) for config in configs if config.get("mean") and config.get("std")}
    return dict(zip(("mean", "std"), found.pop(), strict=True)) if len(found) == 1 else {}


def download(name: str, tag: str) -> nn.Module:
    """Build a CLIP with the pretrained weights that open_clip knows by a tag; downloaded once.

    Raises:
        ValueError: the weights are not on this machine and cannot be downloaded.
    """
    on_hub = bool(open_clip.get_pretrained_cfg(name, tag).get("hf_hub"))
    with cached_or_online(on_hub) as unreachable, _no_logging():
        try:
            return open_clip.create_model(name, pretrained=tag, require_pretrained=True)
        except (RuntimeError, OSError) as error:
            raise ValueError(
                f"the weights are not on this machine and cannot be downloaded ({unreachable or first_line(error)}); "
                f"use {name}:FILE with a path, a URL or s3://"
            ) from None


@contextmanager
def _no_logging() -> Iterator[None]:
    """Suppress open_clip's log lines; what matters is in the exception."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)
