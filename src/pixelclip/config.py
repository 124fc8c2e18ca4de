"""Typed settings of every stage: one class a stage, one documented line a setting.

The defaults are the paper's (method.md, "Hyper-parameters"). `params.yaml` states every setting because DVC cannot see
defaults in code. A setting marked *runtime* changes where or how fast a stage runs, never what it makes: it is left out
of the stage's fingerprint.
"""

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

_Kind = TypeVar("_Kind", bound=BaseModel)
_STRICT = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, coerce_numbers_to_str=True)
_BAD_SHARE = "Largest share of unreadable samples; more stop the stage."
_WORKERS = "Worker processes; 0 works in this process."
_DEVICE = "Where to compute: auto (a GPU if there is one), cpu, cuda, cuda:1, ..."


def _setting(default: Any, description: str, *, runtime: bool = False, **limits: Any) -> Any:
    return Field(default=default, description=description, json_schema_extra={"runtime": runtime}, **limits)


class ToyConfig(BaseModel):
    """Painted scenes: the embedded default."""

    model_config = _STRICT
    train_scenes: int = _setting(2000, "Scenes without labels, to train on.", ge=1)
    test_scenes: int = _setting(200, "Scenes with labels, to evaluate on; never seen in training.", ge=1)
    side: int = _setting(128, "Side of a scene in pixels.", ge=32)
    seed: int = _setting(0, "Seed of the scenes.", ge=0)


class ShardsConfig(BaseModel):
    """Images into tar shards."""

    model_config = _STRICT
    images_per_shard: int = _setting(1000, "Images in one tar.", ge=1)
    shortest_edge: int = _setting(0, "Shrink to this shortest edge in pixels (the paper: 750); 0 keeps the size.", ge=0)
    jpeg_quality: int = _setting(95, "Quality of images that must be encoded anew.", ge=1, le=100)
    max_bad_share: float = _setting(0.05, _BAD_SHARE, ge=0, le=1)


class MasksConfig(BaseModel):
    """Masks without names, beside every image."""

    model_config = _STRICT
    generator: Literal["felzenszwalb", "given"] = _setting(
        "felzenszwalb", "felzenszwalb (graph segmentation, no weights) or given (SA-1B JSON beside the images)."
    )
    given_folder: str = _setting("", "Folder of KEY.json for generator given; empty: the JSON already in the shards.")
    felzenszwalb_scale: float = _setting(200.0, "Felzenszwalb: larger gives larger segments.", gt=0)
    felzenszwalb_sigma: float = _setting(0.8, "Felzenszwalb: Gaussian smoothing before, in pixels.", ge=0)
    felzenszwalb_min_size: int = _setting(100, "Felzenszwalb: smallest segment in pixels.", ge=1)
    max_masks: int = _setting(0, "Keep this many largest masks of an image; 0 keeps all.", ge=0)
    max_bad_share: float = _setting(0.05, _BAD_SHARE, ge=0, le=1)
    workers: int = _setting(2, _WORKERS, runtime=True, ge=0)


class TrainConfig(BaseModel):
    """PixelCLIP training."""

    model_config = _STRICT
    clip: str = _setting(
        "ViT-B-16-quickgelu:openai",
        "The CLIP to start from: toy, an open_clip folder, NAME:PRETRAINED, or NAME:FILE.",
        min_length=1,
    )
    residual: Literal["cls", "patch"] = _setting(
        "cls", "Residual of the last block's value path: cls (the reference) or patch (MaskCLIP)."
    )
    side: int = _setting(320, "Side in pixels of what the CLIP sees.", ge=16)
    shortest_edge: int = _setting(1024, "Weak view: shortest edge after the resize, in pixels.", ge=16)
    longest_edge: int = _setting(1333, "Weak view: no edge is longer than this after the resize.", ge=16)
    crop: int = _setting(640, "Weak view: side of the random crop, in pixels.", ge=16)
    color_jitter: bool = _setting(True, "Weak view: SSD colour jitter.")
    flip: bool = _setting(True, "Weak view: horizontal flip half of the time.")
    strong_view: bool = _setting(True, "Student sees jitter, grey, blur and CutOut on top of the weak view.")
    cutout_min: float = _setting(0.1, "CutOut: smallest side as a share of the view's.", ge=0, le=1)
    cutout_max: float = _setting(0.5, "CutOut: largest side as a share of the view's; 0 switches it off.", ge=0, le=1)
    mask_grid: int = _setting(256, "Side of the grid on which masks are pooled and predicted.", ge=16)
    steps: int = _setting(10_000, "Optimizer steps.", ge=1)
    batch_size: int = _setting(48, "Images in one optimizer step, over all processes.", ge=1)
    accumulate: int = _setting(1, "Pieces in which a process takes its images of a step, to save memory.", runtime=True, ge=1)
    precision: Literal["auto", "float32", "tf32", "bfloat16"] = _setting(
        "auto", "Of towers and decoder; auto is bfloat16 where the device is fast at it, else float32."
    )
    clustering: bool = _setting(True, "Masks of one concept share a target; false makes every mask its own (an ablation).")
    concept_kind: Literal["prompts", "fixed_prompts", "vectors", "names"] = _setting(
        "prompts",
        "Concepts are learnable prompts, prompts of random words that stay, free vectors without the text tower, or names.",
    )
    concept_names: str = _setting("", "Kind names: a file of class names, one a line, or 'dog|puppy,grass'; else empty.")
    concepts: int = _setting(64, "K: number of concepts (kind names: as many as there are names).", ge=2)
    prompt_tokens: int = _setting(4, "L: learnable tokens of a concept's prompt.", ge=1, le=64)
    assignment_scale: float = _setting(100.0, "Factor on cosines before the softmax of the assignment.", gt=0)
    sinkhorn_iterations: int = _setting(3, "Sinkhorn-Knopp iterations.", ge=1)
    teacher_momentum: float = _setting(0.999, "Momentum of the teacher's moving average.", ge=0, lt=1)
    learning_rate_backbone: float = _setting(2e-6, "Learning rate of the image tower.", gt=0)
    learning_rate_prompts: float = _setting(2e-3, "Learning rate of the prompt tokens (the paper's text says 2e-5).", gt=0)
    learning_rate_decoder: float = _setting(2e-4, "Learning rate of the decoder.", gt=0)
    final_learning_rate_share: float = _setting(0.5, "The cosine ends at this share of every learning rate.", ge=0, le=1)
    weight_decay: float = _setting(1e-4, "AdamW's decay; norms and embeddings have none.", ge=0)
    gradient_clip: float = _setting(0.01, "Largest global L2 norm of the gradient.", gt=0)
    seed: int = _setting(0, "Seed of the prompts, the decoder, the order and the views.", ge=0)
    max_bad_share: float = _setting(0.05, _BAD_SHARE, ge=0, le=1)
    device: str = _setting("auto", _DEVICE, runtime=True)
    workers: int = _setting(4, "Loader processes; 0 loads in this process.", runtime=True, ge=0)
    log_every: int = _setting(10, "Steps between two points of a curve.", runtime=True, ge=1)
    checkpoint_every: int = _setting(500, "Steps between two checkpoints.", runtime=True, ge=1)
    picture_every: int = _setting(1000, "Steps between two pictures of masks and concepts; 0 makes none.", runtime=True, ge=0)

    @model_validator(mode="after")
    def _ordered(self) -> "TrainConfig":
        if self.cutout_min > self.cutout_max > 0:
            raise ValueError(f"cutout_min {self.cutout_min} is larger than cutout_max {self.cutout_max}")
        if self.shortest_edge > self.longest_edge:
            raise ValueError(f"shortest_edge {self.shortest_edge} is larger than longest_edge {self.longest_edge}")
        if (self.concept_kind == "names") != bool(self.concept_names):
            raise ValueError(f"concept_kind {self.concept_kind} with concept_names {self.concept_names!r}: they go together")
        return self


class EvaluateConfig(BaseModel):
    """The model and its CLIP on one labelled set."""

    model_config = _STRICT
    name: str = _setting("", "Name of the labelled set in the metrics; empty: its folder's name.", pattern=r"^[\w.-]*$")
    clip: str = _setting("", "The CLIP to compare with; empty: the one that the model was trained from.")
    side: int = _setting(0, "Side in pixels of what the CLIP sees; 0: as in training.", ge=0)
    feature_grid: int = _setting(64, "Features are brought to this grid before they are classified.", ge=1)
    templates: Literal["ensemble", "single"] = _setting("ensemble", "The paper's 8 templates, or only its last one.")
    batch_size: int = _setting(8, "Images in one forward pass.", runtime=True, ge=1)
    pictures: int = _setting(8, "Example pictures in the report.", runtime=True, ge=0)
    max_bad_share: float = _setting(0.0, _BAD_SHARE, ge=0, le=1)
    device: str = _setting("auto", _DEVICE, runtime=True)


class RegisterConfig(BaseModel):
    """The gate in front of the MLflow registry."""

    model_config = _STRICT
    name: str = _setting("pixelclip", "Name of the registered model.", pattern=r"^[^/:.%\"']+$")
    min_gain: float = _setting(1.0, "Least gain over CLIP, in points of mIoU, of a champion.")


class ImportConfig(BaseModel):
    """A checkpoint of the reference implementation; not a stage of the pipeline."""

    model_config = _STRICT
    clip: str = _setting("", "open_clip's name of its CLIP, or a folder with open_clip_config.json; empty: told by its shapes.")
    side: int = _setting(0, "Side in pixels of what the CLIP sees; 0: 320 for a ViT, 640 for a ConvNeXt.", ge=0)


Config = ToyConfig | ShardsConfig | MasksConfig | TrainConfig | EvaluateConfig | RegisterConfig
STAGES: dict[str, type[BaseModel]] = {
    "toy": ToyConfig,
    "shards": ShardsConfig,
    "masks": MasksConfig,
    "train": TrainConfig,
    "evaluate": EvaluateConfig,
    "register": RegisterConfig,
}


def nearest(word: str, allowed: Iterable[str]) -> str:
    """Returns `, did you mean X?` for the allowed word closest to `word`, or an empty string."""
    close = difflib.get_close_matches(word, list(allowed), n=1, cutoff=0.5)
    return f", did you mean {close[0]!r}?" if close else ""


def build(kind: type[_Kind], values: Mapping[str, Any], source: str) -> _Kind:
    """Makes the settings of one stage.

    Raises:
        ValueError: one line a fault: where it was found, what was found, what is allowed, the nearest name.
    """
    try:
        return kind.model_validate(dict(values))
    except ValidationError as error:
        lines = []
        for fault in error.errors():
            name = ".".join(str(part) for part in fault["loc"])
            if fault["type"] == "extra_forbidden":
                hint = nearest(name, kind.model_fields) or f"; the settings are {', '.join(kind.model_fields)}"
                lines.append(f"{source}: unknown setting {name!r}{hint}")
            else:
                said = fault["msg"].removeprefix("Value error, ")
                lines.append(f"{source}: {name}: {said} (found {fault['input']!r})" if name else f"{source}: {said}")
        raise ValueError("\n".join(lines)) from None


def load(stage: str, params: Path | None = None, overrides: Mapping[str, Any] | None = None) -> Any:
    """Settings of `stage`: defaults, then the stage's section of `params`, then `overrides`.

    Args:
        stage: a key of `STAGES`.
        params: a YAML file with one section a stage; other stages' sections are checked too.
        overrides: `setting: value` or `stage.setting: value`; those of other stages are ignored here.

    Raises:
        ValueError: an unknown section or setting, or a value that is not allowed.
    """
    values: dict[str, Any] = {}
    source = "settings"
    if params is not None:
        source = str(params)
        sections = _read_params(params)
        for name, found in sections.items():
            build(STAGES[name], found, f"{source}: {name}")
        values.update(sections.get(stage, {}))
    for key, value in (overrides or {}).items():
        section, _, name = key.rpartition(".")
        if section and section not in STAGES:
            raise ValueError(f"unknown stage {section!r} in setting {key!r}{nearest(section, STAGES)}")
        if section in ("", stage):
            values[name] = value
    return build(STAGES[stage], values, f"{source}: {stage}")


def load_all(params: Path | None, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of every stage; every override must name its stage.

    Raises:
        ValueError: as `load`, and for an override without a stage.
    """
    for key in overrides:
        if "." not in key:
            raise ValueError(f"setting {key!r} must be written STAGE.SETTING; the stages are {', '.join(STAGES)}")
    return {stage: load(stage, params, overrides) for stage in STAGES}


def _read_params(params: Path) -> dict[str, dict[str, Any]]:
    try:
        document: Any = yaml.safe_load(params.read_text()) or {}
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{params}: cannot be read as YAML: {error}") from None
    if not isinstance(document, dict):
        raise ValueError(f"{params}: must hold one section a stage, found {type(document).__name__}")
    for name, section in document.items():
        if name not in STAGES:
            raise ValueError(f"{params}: unknown section {name!r}{nearest(str(name), STAGES)}")
        if not isinstance(section, dict | None):
            raise ValueError(f"{params}: section {name!r} must hold settings, found {section!r}")
    return {name: section or {} for name, section in document.items()}


def parse_overrides(pairs: Iterable[str]) -> dict[str, Any]:
    """Turns `["steps=10", "train.clip=toy"]` into `{"steps": 10, "train.clip": "toy"}` (values are YAML scalars).

    Raises:
        ValueError: an entry without `=`, or a value that is no YAML.
    """
    values = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or not key:
            raise ValueError(f"a setting is written NAME=VALUE, found {pair!r}")
        try:
            values[key.strip()] = yaml.safe_load(text) if text else ""
        except yaml.YAMLError:
            raise ValueError(f"setting {pair!r}: the value is no YAML; put it in quotes") from None
    return values


def lasting(config: BaseModel) -> dict[str, Any]:
    """The settings that decide what a stage makes: all but the runtime ones."""
    runtime = {name for name, field in type(config).model_fields.items() if _is_runtime(field.json_schema_extra)}
    return config.model_dump(exclude=runtime)


def _is_runtime(extra: Any) -> bool:
    return bool(extra and extra.get("runtime"))


def as_table() -> str:
    """Every setting as Markdown: one table a stage."""
    lines = []
    for stage, kind in STAGES.items():
        lines += [f"## {stage}", "", (kind.__doc__ or "").strip(), "", "| setting | default | what it does |", "|---|---|---|"]
        for name, field in kind.model_fields.items():
            note = " *Runtime.*" if _is_runtime(field.json_schema_extra) else ""
            lines.append(f"| `{name}` | `{field.default!r}` | {field.description}{note} |")
        lines.append("")
    return "\n".join(lines)
