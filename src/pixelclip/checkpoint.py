"""Checkpoints: load a CLIP; save and load a PixelCLIP as a folder of safetensors and JSON, never a pickle.

A model folder holds `model.safetensors` (the CLIP under `clip.` with open_clip's names, `prompts.tokens`, `decoder.*`),
`config.json` and `provenance.json`.
"""

import json
import logging
import os
import pickle
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import open_clip
import torch
from open_clip.transformer import QuickGELU
from pydantic import BaseModel, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pixelclip.backbone import Backbone, Residual
from pixelclip.clip_sources import clip_folder
from pixelclip.config import nearest
from pixelclip.stage import PROVENANCE
from pixelclip.storage import read_json, write_json
from pixelclip.text import Prompts, TextTower, Vectors
from pixelclip.weights import check_fit, check_tensors, named, read_weights

WEIGHTS, CONFIG = "model.safetensors", "config.json"
CLIP_WEIGHTS, CLIP_CONFIG = "open_clip_model.safetensors", "open_clip_config.json"
"""What a folder of open_clip holds."""
_FORMAT = 1
_LONGEST = 300  # characters of somebody else's message


@dataclass(frozen=True)
class Clip:
    """A CLIP: the open_clip model, what rebuilds it, and how its images are normalised (0..1 RGB)."""

    model: open_clip.CLIP
    model_cfg: dict[str, Any]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    @property
    def side(self) -> int:
        """The side in pixels that the CLIP was trained at."""
        size = self.model_cfg["vision_cfg"].get("image_size", 224)
        return int(size if isinstance(size, int) else size[0])


@dataclass(frozen=True)
class Model:
    """A loaded PixelCLIP: its CLIP with the trained image tower, the side it sees, its prompts, its config.json."""

    clip: Clip
    side: int
    residual: Residual
    prompts: Prompts | Vectors
    config: dict[str, Any]


def load_clip(spec: str) -> Clip:
    """Loads a CLIP in float32 on the CPU.

    Args:
        spec: `toy` (the shipped one), a folder with `open_clip_config.json` and weights, `NAME:PRETRAINED` of open_clip
            (downloads once), or `NAME:FILE` with a path, a URL or `s3://`.

    Raises:
        ValueError: nothing of that name, or the weights do not fit.
    """
    folder = clip_folder(spec)
    if folder is None or not folder.is_dir():
        _check_name(spec, folder)
    try:
        if folder is not None and folder.is_dir():
            cfg = read_json(folder / CLIP_CONFIG)
            model_cfg, preprocess = cfg["model_cfg"], cfg.get("preprocess_cfg", {})
            model = open_clip.create_model(f"local-dir:{folder}", require_pretrained=True)
        else:
            name, _, weights = spec.partition(":")
            model = open_clip.create_model(name, pretrained=str(folder or weights), require_pretrained=True)
            model_cfg, preprocess = dict(open_clip.get_model_config(name)), getattr(model.visual, "preprocess_cfg", {})
            model_cfg["quick_gelu"] = any(isinstance(part, QuickGELU) for part in model.modules())
    except KeyError as error:
        raise ValueError(f"CLIP {spec!r}: {folder}/{CLIP_CONFIG} has no entry {error}") from None
    except pickle.UnpicklingError:  # torch's own words here advise to execute the pickle
        raise ValueError(f"CLIP {spec!r}: the file is no plain state dict; a pickle with anything else is not opened") from None
    except (TypeError, ValueError, RuntimeError, OSError, AssertionError, SafetensorError) as error:
        raise ValueError(f"CLIP {spec!r}: {_reason(error, folder)}") from None
    mean = tuple(preprocess.get("mean", open_clip.OPENAI_DATASET_MEAN))
    std = tuple(preprocess.get("std", open_clip.OPENAI_DATASET_STD))
    return Clip(model.float().eval(), model_cfg, mean, std)


def _check_name(spec: str, file: Path | None) -> None:
    """Raises ValueError where open_clip knows no such name or no such weights; itself it would log a raw line first."""
    name, _, weights = spec.partition(":")
    if name not in open_clip.list_models():
        raise ValueError(f"CLIP {spec!r}: no folder and no CLIP of that name{nearest(name, open_clip.list_models())}")
    if not weights:
        raise ValueError(f"CLIP {spec!r}: weights are missing: write {name}:PRETRAINED or {name}:FILE")
    if file is None and not open_clip.get_pretrained_cfg(name, weights):
        tags = open_clip.list_pretrained_tags_by_model(name)
        known = f"the pretrained ones are {', '.join(tags)}" if tags else f"open_clip has none pretrained, write {name}:FILE"
        raise ValueError(f"CLIP {spec!r}: no file {weights} and no weights of that name; {known}")


def _reason(error: Exception, file: Path | None) -> str:
    """Why a CLIP could not be loaded; of a file with other weights, what they are instead of hundreds of missing names."""
    try:
        state = check_tensors(read_weights(file)) if file is not None and file.is_file() else {}
    except ValueError:
        state = {}
    if state and not any(name.startswith(("visual.", "module.visual.")) for name in state):
        return f"{file} holds {named(state)}; a CLIP's state dict is expected (visual.*, ...)"
    if "TorchScript" in str(error):  # torch's own words advise to open it unsafely
        return f"{file} is a TorchScript archive, as OpenAI publishes them; write NAME:openai, or give a state dict"
    lines = str(error).strip().splitlines() or [type(error).__name__]
    size = f"; {file} is of a CLIP of another size" if state else ""
    return " ".join(line.strip() for line in lines[:3])[:_LONGEST] + size


def save_model(
    folder: Path, clip: Clip, prompts: nn.Module, decoder: nn.Module, *, side: int, residual: Residual, origin: dict[str, Any]
) -> None:
    """Writes `model.safetensors` and `config.json` (the provenance is the Stage's).

    Args:
        folder: where to.
        clip: the CLIP with the trained image tower in place.
        prompts: the concepts.
        decoder: the mask decoder (kept for further training; inference does not use it).
        side: side in pixels of what the CLIP saw in training.
        residual: see `Backbone`.
        origin: which CLIP it was: `{"spec": ..., "md5": ...}`.
    """
    tensors = {f"clip.{name}": tensor for name, tensor in clip.model.state_dict().items()}
    tensors |= {f"prompts.{name}": tensor for name, tensor in prompts.state_dict().items()}
    tensors |= {f"decoder.{name}": tensor for name, tensor in decoder.state_dict().items()}
    # A state dict may name one tensor twice; safetensors wants each to own its memory.
    write_tensors(folder / WEIGHTS, {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()})
    (folder / WEIGHTS).chmod(0o644)  # safetensors leaves it readable by its owner alone
    write_json(
        folder / CONFIG,
        {
            "format": _FORMAT,
            "model_cfg": clip.model_cfg,
            "mean": clip.mean,
            "std": clip.std,
            "side": side,
            "residual": residual,
            "clip": origin,
        },
    )


def load_model(folder: Path) -> Model:
    """Loads a model folder, in float32 on the CPU.

    Raises:
        ValueError: the folder is incomplete, of another format, or its weights do not fit its config.
    """
    missing = [name for name in (WEIGHTS, CONFIG, PROVENANCE) if not (folder / name).is_file()]
    if missing:
        raise ValueError(
            f"{folder}: is not a complete model folder, {', '.join(missing)} missing; "
            f"it must hold {WEIGHTS}, {CONFIG} and {PROVENANCE}"
        )
    config = read_config(folder)
    cfg, mean, std = config["model_cfg"], tuple(config["mean"]), tuple(config["std"])
    tensors = read_tensors(folder / WEIGHTS)
    try:
        model = build_clip(cfg)
    except Exception as error:  # of values that fit nothing open_clip raises nearly anything
        reason = f"entry {error} is missing" if isinstance(error, KeyError) else str(error).partition("\n")[0]
        raise ValueError(f"{folder / CONFIG}: model_cfg: open_clip makes no CLIP of it: {reason}") from None
    weights = _below(tensors, "clip.")
    try:
        check_fit(weights, model.state_dict())
        model.load_state_dict(weights)  # before the prompts, which embed their fixed words
        prompts = _concepts_of(_below(tensors, "prompts."), TextTower(model))
    except ValueError as error:
        raise ValueError(f"{folder / WEIGHTS}: does not fit {CONFIG}: {error}") from None
    return Model(Clip(model.eval(), cfg, mean, std), config["side"], config["residual"], prompts.requires_grad_(False), config)


def read_config(folder: Path) -> dict[str, Any]:
    """The `config.json` of a model folder, checked.

    Raises:
        ValueError: missing, no JSON, of another format, or an entry that no model has; one line.
    """
    path = folder / CONFIG
    config = read_json(path)
    if not isinstance(config, dict):
        raise ValueError(f"{path}: must hold a model's settings, found {type(config).__name__}")
    if config.get("format") != _FORMAT:
        raise ValueError(f"{path}: format {config.get('format')!r} found, {_FORMAT} is what this version reads")
    try:
        _Config.model_validate(config)
    except ValidationError as error:
        fault = error.errors()[0]  # the first says enough: such a file is not edited but damaged
        name = ".".join(str(part) for part in fault["loc"])
        if fault["type"] == "missing":
            raise ValueError(f"{path}: entry {name!r} is missing") from None
        raise ValueError(f"{path}: {name}: {fault['msg']} (found {fault['input']!r})") from None
    return config


class _ModelConfig(BaseModel):
    embed_dim: int = Field(ge=1)
    vision_cfg: dict[str, Any]
    text_cfg: dict[str, Any]


class _Origin(BaseModel):
    spec: str
    md5: str


_Three = Annotated[list[Annotated[float, Field(allow_inf_nan=False)]], Field(min_length=3, max_length=3)]
_ThreePositive = Annotated[list[Annotated[float, Field(gt=0, allow_inf_nan=False)]], Field(min_length=3, max_length=3)]


class _Config(BaseModel, strict=True):
    """What `save_model` writes; the insides of `vision_cfg` and `text_cfg` are open_clip's to judge."""

    model_cfg: _ModelConfig
    mean: _Three
    std: _ThreePositive
    side: int = Field(ge=1)
    residual: Residual
    clip: _Origin


def _concepts_of(state: dict[str, Tensor], text: TextTower) -> Prompts | Vectors:
    if "values" in state:
        check_fit(state, {"values": torch.empty(len(state["values"]), text.embed_dim, device="meta")})
        return Vectors(state["values"], learn=False)
    if "tokens" not in state:
        raise ValueError("it holds neither prompts.tokens nor prompts.values")
    if state["tokens"].ndim != 3:
        raise ValueError(f"prompts.tokens is {list(state['tokens'].shape)} instead of [concepts, tokens, {text.width}]")
    prompts = Prompts(text, torch.zeros(state["tokens"].shape[:2], dtype=torch.long))
    check_fit(state, prompts.state_dict())
    prompts.load_state_dict(state)
    return prompts


def build_clip(model_cfg: dict[str, Any]) -> open_clip.CLIP:
    """An open_clip CLIP with random weights from its config; quiet and without a download."""
    cfg = {key: value for key, value in model_cfg.items() if key in ("embed_dim", "vision_cfg", "text_cfg", "quick_gelu")}
    cfg = json.loads(json.dumps(cfg))
    if "timm_model_name" in cfg["vision_cfg"]:
        cfg["vision_cfg"]["timm_model_pretrained"] = False
    return open_clip.CLIP(**cfg)


def backbone_of(model: Model) -> Backbone:
    """The image tower as dense features."""
    return Backbone(model.clip.model.visual, model.residual)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Reads a safetensors file.

    Raises:
        ValueError: the file is missing, truncated or no safetensors file.
    """
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: cannot be read as safetensors: {error}") from None


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Writes a safetensors file.

    Raises:
        OSError: the disk refuses it, as any other file; safetensors' own error names neither the file nor the reason apart.
    """
    try:
        save_file(tensors, path, metadata=metadata)
    except SafetensorError as error:
        if number := re.search(r"\(os error (\d+)\)", str(error)):
            code = int(number[1])
            raise OSError(code, os.strerror(code), str(path)) from None
        raise


def _below(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


# open_clip warns on every load that it resizes or picks defaults; what matters here raises instead.
logging.getLogger("open_clip").setLevel(logging.ERROR)
