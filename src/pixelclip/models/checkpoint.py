"""Load a CLIP; save and load a PixelCLIP model as a folder of safetensors and JSON, without pickles.

A model folder contains `model.safetensors` (the CLIP under `clip.` with open_clip's names, `prompts.tokens`, `decoder.*`),
`config.json` and `provenance.json`; with SigLIP's tokenizer also its files.
"""

import json
import logging
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import open_clip
import torch
from open_clip.transformer import QuickGELU
from pydantic import BaseModel, Field
from safetensors import SafetensorError
from safetensors.torch import load_file as load_tensors
from safetensors.torch import save_file
from torch import Tensor, nn

from pixelclip.models.backbone import Backbone, Residual
from pixelclip.models.clip_checkpoint import download, load_file, statistics_of
from pixelclip.models.clip_sources import clip_folder
from pixelclip.models.compiler import without_compiler
from pixelclip.models.text import TEMPLATES, Prompts, TextTower, Vectors
from pixelclip.models.tokenizer import TOKENIZER_FILES, FileTokenizer, load_tokenizer
from pixelclip.models.uninitialised import Uninitialised
from pixelclip.models.weights import check_fit
from pixelclip.settings import nearest
from pixelclip.storage.files import digest, no_such, read_json, write_json
from pixelclip.workflow.failures import first_line
from pixelclip.workflow.stage import PROVENANCE, describe

WEIGHTS, CONFIG = "model.safetensors", "config.json"
CLIP_WEIGHTS, CLIP_CONFIG = "open_clip_model.safetensors", "open_clip_config.json"
"""Files of an open_clip folder."""
_FORMAT = 1
TemplateSet = Literal["single", "ensemble"]
_CLIP_ARGUMENTS = ("embed_dim", "vision_cfg", "text_cfg", "quick_gelu", "init_logit_bias", "nonscalar_logit_scale")
MAX_MESSAGE = 300
"""Characters of an error message of open_clip or torch."""


@dataclass(frozen=True)
class Clip:
    """A CLIP: open_clip model, the config to rebuild it, mean and standard deviation of its images (RGB, 0 to 1), tokenizer."""

    model: open_clip.CLIP | open_clip.CustomTextCLIP
    model_cfg: dict[str, Any]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    tokenizer: FileTokenizer | None = None

    def text_tower(self) -> TextTower:
        """Return the text tower with its tokenizer; raise ValueError if it is not supported."""
        return TextTower(self.model, self.tokenizer)

    @property
    def side(self) -> int:
        """Side in pixels of the images in CLIP's training."""
        size = self.model_cfg["vision_cfg"].get("image_size", 224)
        return int(size if isinstance(size, int) else size[0])


@dataclass(frozen=True)
class Model:
    """A loaded model: CLIP with the trained image tower, image side in pixels, prompts, content of config.json."""

    clip: Clip
    side: int
    residual: Residual
    prompts: Prompts | Vectors
    config: dict[str, Any]


def load_clip(spec: str) -> Clip:
    """Load a CLIP in float32 on the CPU.

    Args:
        spec: `toy` (shipped with the package), a folder with `open_clip_config.json` and weights, `NAME:PRETRAINED` of
            open_clip (downloaded once), or `NAME:FILE` with a path, a URL or `s3://`.

    Raises:
        ValueError: the name is unknown, or the weights do not fit.
    """
    folder = clip_folder(spec)
    if folder is None or not folder.is_dir():
        check_name(spec, folder)
    try:
        if folder is not None and folder.is_dir():
            cfg = read_clip_config(folder)
            model_cfg, preprocess = cfg["model_cfg"], cfg.get("preprocess_cfg") or {}
            model = open_clip.create_model(f"local-dir:{folder}", require_pretrained=True)
        else:
            name, _, weights = spec.partition(":")
            model = load_file(name, folder) if folder else download(name, weights)
            model_cfg, preprocess = dict(open_clip.get_model_config(name)), getattr(model.visual, "preprocess_cfg", {})
            if folder:
                preprocess = statistics_of(name) or preprocess
                folder = folder.parent if (folder.parent / TOKENIZER_FILES[0]).is_file() else None
            model_cfg["quick_gelu"] = any(isinstance(part, QuickGELU) for part in model.modules())
        tokenizer = load_tokenizer(model_cfg["text_cfg"], folder)
    except (TypeError, ValueError, RuntimeError, OSError, AssertionError, SafetensorError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(f"CLIP {spec!r}: {' '.join(line.strip() for line in lines[:3])[:MAX_MESSAGE]}") from None
    mean = tuple(preprocess.get("mean") or open_clip.OPENAI_DATASET_MEAN)
    std = tuple(preprocess.get("std") or open_clip.OPENAI_DATASET_STD)
    return Clip(model.float().eval(), model_cfg, mean, std, tokenizer)


def check_name(spec: str, file: Path | None) -> None:
    """Raise ValueError if open_clip has no such name or weights; open_clip itself would log a line first."""
    name, _, weights = spec.partition(":")
    if name not in open_clip.list_models():
        raise ValueError(f"CLIP {spec!r}: no such folder or CLIP{nearest(name, open_clip.list_models())}")
    if not weights:
        raise ValueError(f"CLIP {spec!r}: weights are missing: use {name}:PRETRAINED or {name}:FILE")
    if file is None and not open_clip.get_pretrained_cfg(name, weights):
        tags = open_clip.list_pretrained_tags_by_model(name)
        known = f"pretrained weights are {', '.join(tags)}" if tags else f"open_clip has none for this CLIP, use {name}:FILE"
        raise ValueError(f"CLIP {spec!r}: no such file or pretrained weights: {weights}; {known}")


def save_model(
    folder: Path,
    clip: Clip,
    prompts: nn.Module,
    decoder: nn.Module,
    *,
    side: int,
    residual: Residual,
    origin: dict[str, Any],
    templates: TemplateSet = "single",
) -> None:
    """Write `model.safetensors` and `config.json`; `Stage` writes the provenance.

    Args:
        folder: model folder.
        clip: CLIP with the trained image tower.
        prompts: concepts.
        decoder: mask decoder (saved for further training; unused in inference).
        side: side in pixels of the images in training.
        residual: see `Backbone`.
        origin: the initial CLIP, `{"spec": ..., "md5": ...}`.
        templates: templates of the concepts, a key of `TEMPLATES`.
    """
    tensors = {
        # A state dict may contain a tensor under two names; safetensors rejects tensors that share memory.
        f"{part}.{name}": tensor.detach().cpu().contiguous().clone()
        for part, module in (("clip", clip.model), ("prompts", prompts), ("decoder", decoder))
        for name, tensor in module.state_dict().items()
    }
    write_tensors(folder / WEIGHTS, tensors)
    config = {"format": _FORMAT, "model_cfg": clip.model_cfg, "mean": clip.mean, "std": clip.std}
    write_json(folder / CONFIG, config | {"side": side, "residual": residual, "clip": origin, "templates": templates})
    if clip.tokenizer:
        clip.tokenizer.save(folder)


def load_model(folder: Path) -> Model:
    """Load a model folder in float32 on the CPU.

    Raises:
        ValueError: the folder is incomplete, its format is unsupported, its weights do not fit its config, or its files are not
            those that its provenance records.
    """
    if not folder.exists():
        raise ValueError(no_such(folder, "model folder"))
    missing = [name for name in (WEIGHTS, CONFIG, PROVENANCE) if not (folder / name).is_file()]
    if missing:
        raise ValueError(
            f"{folder}: is not a complete model folder: {', '.join(missing)} missing; "
            f"it must contain {WEIGHTS}, {CONFIG} and {PROVENANCE}"
        )
    config = read_config(folder)
    cfg, mean, std = config["model_cfg"], tuple(config["mean"]), tuple(config["std"])
    tensors = read_tensors(folder / WEIGHTS)
    weights = _with_prefix(tensors, "clip.")
    for section in ("vision_cfg", "text_cfg"):
        if isinstance(layers := cfg[section].get("layers"), int) and layers > len(weights):  # would be built for hours
            raise ValueError(f"{folder / CONFIG}: model_cfg.{section}.layers {layers}: {WEIGHTS} has {len(weights)} tensors")
    try:
        # On the meta device nothing is allocated before the shapes are known to fit.
        with torch.device("meta"), without_compiler(), Uninitialised():
            expected = build_clip(cfg).state_dict()
    except Exception as error:  # open_clip raises all types of exceptions for invalid values
        reason = f"entry {error} is missing" if isinstance(error, KeyError) else first_line(error)
        raise ValueError(f"{folder / CONFIG}: model_cfg: open_clip cannot build a CLIP from it: {reason}") from None
    tokenizer = load_tokenizer(cfg["text_cfg"], folder)
    try:
        check_fit(weights, expected)
        with Uninitialised():
            model = build_clip(cfg)
        model.load_state_dict(weights)  # before the prompts, whose fixed words it embeds
        clip = Clip(model.eval(), cfg, mean, std, tokenizer)
        prompts = load_prompts(_with_prefix(tensors, "prompts."), clip.text_tower(), config["templates"])
    except ValueError as error:
        raise ValueError(f"{folder / WEIGHTS}: does not fit {CONFIG}: {error}") from None
    _check_unchanged(folder)
    return Model(clip, config["side"], config["residual"], prompts.requires_grad_(False), config)


def _check_unchanged(folder: Path) -> None:
    """Compare the files of a model with the MD5 in its provenance, since safetensors has no checksum."""
    names = [name for name in (WEIGHTS, CONFIG, *TOKENIZER_FILES) if (folder / name).is_file()]
    recorded = describe(folder)
    if "provenance" in recorded and (found := digest(folder, [folder / name for name in names])["md5"]) != recorded["md5"]:
        raise ValueError(
            f"{folder}: {' or '.join(names)} changed after stage {recorded['provenance']['stage']} wrote it: "
            f"{PROVENANCE} records MD5 {recorded['md5']}, found {found}; copy or fetch the model again"
        )


def read_config(folder: Path) -> dict[str, Any]:
    """Read and validate the `config.json` of a model folder.

    Raises:
        ValueError: the file is missing or not JSON, its format is unsupported, or an entry is invalid.
    """
    config = read_json(folder / CONFIG, _Config)
    return config | {"templates": config.get("templates", "single")}


class _ModelConfig(BaseModel):
    embed_dim: int = Field(ge=1)
    vision_cfg: dict[str, Any]
    text_cfg: dict[str, Any]


class _Origin(BaseModel):
    spec: str
    md5: str


_Three = Annotated[list[Annotated[float, Field(allow_inf_nan=False)]], Field(min_length=3, max_length=3)]
_ThreePositive = Annotated[list[Annotated[float, Field(gt=0, allow_inf_nan=False)]], Field(min_length=3, max_length=3)]


class _Preprocess(BaseModel):
    mean: _Three | None = None
    std: _ThreePositive | None = None


class _ClipConfig(BaseModel):
    model_cfg: _ModelConfig
    preprocess_cfg: _Preprocess | None = None


def read_clip_config(folder: Path) -> dict[str, Any]:
    """Read the `open_clip_config.json` of an open_clip folder; raise ValueError if it is missing or damaged."""
    return dict(read_json(folder / CLIP_CONFIG, _ClipConfig))


class _Config(BaseModel):
    """Schema of `config.json`; open_clip validates the contents of `vision_cfg` and `text_cfg`."""

    format: Literal[1]
    model_cfg: _ModelConfig
    mean: _Three
    std: _ThreePositive
    side: int = Field(ge=1)
    residual: Residual
    clip: _Origin
    templates: TemplateSet = "single"  # older models have no such entry


def load_prompts(state: dict[str, Tensor], text: TextTower, templates: TemplateSet = "single") -> Prompts | Vectors:
    """Build the concepts of a state dict; raise ValueError if it does not fit the text tower."""
    if "values" in state:
        check_fit(state, {"values": torch.empty(len(state["values"]), text.embed_dim, device="meta")})
        return Vectors(state["values"], learn=False)
    if "tokens" not in state:
        raise ValueError("neither prompts.tokens nor prompts.values found")
    if state["tokens"].ndim != 3:
        raise ValueError(f"prompts.tokens is {list(state['tokens'].shape)} instead of [concepts, tokens, {text.width}]")
    prompts = Prompts(text, torch.zeros(state["tokens"].shape[:2], dtype=torch.long), templates=TEMPLATES[templates])
    check_fit(state, prompts.state_dict())
    prompts.load_state_dict(state)
    return prompts


def build_clip(model_cfg: dict[str, Any]) -> open_clip.CLIP | open_clip.CustomTextCLIP:
    """Build an open_clip CLIP with random weights from its config, without logging or download."""
    cfg = {key: value for key, value in model_cfg.items() if key in _CLIP_ARGUMENTS}
    cfg = json.loads(json.dumps(cfg))
    if "timm_model_name" in cfg["vision_cfg"]:
        cfg["vision_cfg"]["timm_model_pretrained"] = False
    return (open_clip.CustomTextCLIP if model_cfg.get("custom_text") else open_clip.CLIP)(**cfg)


def backbone_of(model: Model) -> Backbone:
    """Return the backbone for dense features of a model."""
    return Backbone(model.clip.model.visual, model.residual)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file.

    Raises:
        ValueError: the file is missing, truncated or not a safetensors file.
    """
    try:
        return load_tensors(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: cannot be read as safetensors: {error}") from None


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file atomically.

    Raises:
        OSError: the file cannot be written; safetensors' own error does not name the file.
    """
    temporary = path.with_name(f".{path.name}.partial")
    try:
        save_file(tensors, temporary, metadata=metadata)
    except SafetensorError as error:
        if number := re.search(r"\(os error (\d+)\)", str(error)):
            code = int(number[1])
            raise OSError(code, os.strerror(code), str(path)) from None
        raise
    with temporary.open("rb+") as file:
        os.fsync(file.fileno())
    temporary.chmod(0o644)  # safetensors lets only the owner read it
    temporary.replace(path)


def _with_prefix(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


# open_clip warns about resizing and defaults on every load; real problems raise an error instead.
logging.getLogger("open_clip").setLevel(logging.ERROR)
# It logs to the root logger, too, of which KFP's executor shows every message.
logging.getLogger().addFilter(lambda entry: entry.levelno >= logging.ERROR or "open_clip" not in Path(entry.pathname).parts)
