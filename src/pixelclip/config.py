"""Typed settings of every stage: one class a stage, one documented line a setting.

The defaults are the paper's (method.md, "Hyper-parameters"). `params.yaml` states every setting because DVC cannot see
defaults in code. A setting marked *runtime* changes where, how fast or how far a stage runs, never what it makes: it is
left out of the stage's fingerprint.
"""

import difflib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

_Kind = TypeVar("_Kind", bound=BaseModel)
_STRICT = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, coerce_numbers_to_str=True)
_BAD_SHARE = "Largest share of unreadable samples; more stop the stage."
_WORKERS = "Worker processes; 0 works in this process."
_DEVICE = "Where to compute: auto (a GPU if there is one), cpu, cuda, cuda:1, ..."


def _setting(default: Any, description: str, *, runtime: bool = False, **limits: Any) -> Any:
    return Field(default=default, description=description, json_schema_extra={"runtime": runtime}, **limits)


def device_name(name: str) -> str:
    """Returns the name of a device as it is; whether there is such a one is for those to find out who compute there.

    Raises:
        ValueError: it is the name of no kind of device that stages compute on.
    """
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", name):
        raise ValueError(f"device {name!r} is none of auto, cpu, cuda, cuda:N, mps")
    return name


_Device = Annotated[str, AfterValidator(device_name)]


class ToyConfig(BaseModel):
    """Painted scenes: the embedded default."""

    model_config = _STRICT
    train_scenes: int = _setting(2000, "Scenes without labels, to train on.", ge=1)
    test_scenes: int = _setting(200, "Scenes with labels, to evaluate on; never seen in training.", ge=1)
    side: int = _setting(128, "Side of a scene in pixels.", ge=32, le=4096)
    seed: int = _setting(0, "Seed of the scenes.", ge=0)


class FetchDataConfig(BaseModel):
    """Data out of a DVC or git repository, as of one revision."""

    model_config = _STRICT
    path: str = _setting("data/images", "Folder or file in the repository, tracked by DVC or by git.", min_length=1)
    revision: str = _setting("HEAD", "Commit, tag or branch; only a full commit SHA is the same for ever.", min_length=1)


class ShardsConfig(BaseModel):
    """Images into tar shards."""

    model_config = _STRICT
    images_per_shard: int = _setting(1000, "Images in one tar.", ge=1)
    shortest_edge: int = _setting(
        0, "Shrink to this shortest edge in pixels (the paper: 750); 0 keeps the size.", ge=0, le=16384
    )
    jpeg_quality: int = _setting(95, "Quality of images that must be encoded anew.", ge=1, le=100)
    max_bad_share: float = _setting(0.05, _BAD_SHARE, runtime=True, ge=0, le=1)


class MasksConfig(BaseModel):
    """Masks without names, beside every image."""

    model_config = _STRICT
    generator: Literal["felzenszwalb", "given", "sam", "dino"] = _setting(
        "felzenszwalb",
        "felzenszwalb (graph segmentation, no weights), given (SA-1B JSON beside the images), sam, or dino (k-means).",
    )
    shortest_edge: int = _setting(
        0, "Shrink images and given masks to this edge in pixels first (the paper: 750).", ge=0, le=16384
    )
    jpeg_quality: int = _setting(95, "Quality of images that were shrunk.", ge=1, le=100)
    given_folder: str = _setting("", "Folder of KEY.json for generator given; empty: the JSON already in the shards.")
    felzenszwalb_scale: float = _setting(200.0, "Felzenszwalb: larger gives larger segments.", gt=0)
    felzenszwalb_sigma: float = _setting(0.8, "Felzenszwalb: Gaussian smoothing before, in pixels.", ge=0)
    felzenszwalb_min_size: int = _setting(100, "Felzenszwalb: smallest segment in pixels.", ge=1)
    weights: str = _setting("", "SAM's or DINO's checkpoint: a .pth or .safetensors by path, URL or s3://.")
    sam_points_per_side: int = _setting(32, "SAM: the square of it asks for three masks each.", ge=1, le=1024)
    sam_points_per_batch: int = _setting(256, "SAM: points decoded at once.", runtime=True, ge=1)
    sam_pred_iou_thresh: float = _setting(0.88, "SAM: least predicted IoU of a mask.", ge=0)
    sam_stability_score_thresh: float = _setting(0.95, "SAM: least stability of a mask.", gt=0, le=1)
    sam_stability_score_offset: float = _setting(1.0, "SAM: how far the stability score moves the threshold, in logits.", gt=0)
    sam_box_nms_thresh: float = _setting(0.7, "SAM: largest IoU of two masks' boxes.", ge=0, le=1)
    sam_crop_n_layers: int = _setting(0, "SAM: layer i repeats everything on 4**i crops.", ge=0, le=8)
    sam_crop_nms_thresh: float = _setting(0.7, "SAM: largest IoU of boxes from different crops.", ge=0, le=1)
    sam_crop_overlap_ratio: float = _setting(512 / 1500, "SAM: overlap of crops, as a share of the shorter side.", ge=0, lt=1)
    sam_crop_n_points_downscale_factor: int = _setting(1, "SAM: layer i has points_per_side / this**i.", ge=1)
    sam_min_mask_region_area: int = _setting(0, "SAM: remove holes and islands of fewer pixels.", ge=0)
    sam_precision: Literal["auto", "float32", "bfloat16"] = _setting(
        "float32",
        "SAM: of the image encoder. In float32 the masks are the original's; auto is bfloat16 where the device is fast at it.",
    )
    dino_clusters: int = _setting(16, "DINO: k of the k-means over an image's patch tokens.", ge=2)
    dino_side: int = _setting(
        320, "DINO: side in pixels to which images are resized_square, a multiple of the patch.", ge=16, le=4096
    )
    seed: int = _setting(0, "Seed of DINO's k-means.", ge=0)
    max_masks: int = _setting(0, "Keep this many largest masks of an image; 0 keeps all.", ge=0)
    max_bad_share: float = _setting(0.05, _BAD_SHARE, runtime=True, ge=0, le=1)
    part: str = _setting("", "i/n makes the i-th of n parts of the shards only; the folder of all n parts is valid input.")
    workers: int = _setting(2, _WORKERS, runtime=True, ge=0, le=1024)
    batch_size: int = _setting(4, "SAM and DINO: images on the device at once.", runtime=True, ge=1)
    device: _Device = _setting("auto", _DEVICE, runtime=True)

    @model_validator(mode="after")
    def _fits(self) -> "MasksConfig":
        if (self.generator in ("sam", "dino")) != bool(self.weights):
            raise ValueError(f"generator {self.generator} with weights {self.weights!r}: sam and dino need them, others do not")
        if self.given_folder and self.generator != "given":
            raise ValueError(
                f"given_folder {self.given_folder!r} with generator {self.generator}: only generator given reads it"
            )
        if self.part:
            number, slash, count = self.part.partition("/")
            if not (slash and number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
                raise ValueError(f"part {self.part!r} must be written i/n with 1 <= i <= n, as 1/8")
        return self


class TrainConfig(BaseModel):
    """PixelCLIP training."""

    model_config = _STRICT
    clip: str = _setting(
        "ViT-B-16-quickgelu:openai",
        "The CLIP to start from: toy, an open_clip folder, NAME:PRETRAINED, or NAME:FILE (path, URL or s3://).",
        min_length=1,
    )
    residual: Literal["cls", "patch"] = _setting(
        "cls", "Residual of the last block's value path: cls (the reference) or patch (MaskCLIP)."
    )
    side: int = _setting(320, "Side in pixels of what the CLIP sees, whole patches.", ge=16, le=4096)
    shortest_edge: int = _setting(1024, "Weak view: shortest edge after the resize, in pixels.", ge=16, le=16384)
    longest_edge: int = _setting(1333, "Weak view: no edge is longer than this after the resize.", ge=16, le=16384)
    crop: int = _setting(640, "Weak view: side of the random crop, in pixels.", ge=16, le=16384)
    shards_at_once: int = _setting(
        0, "Shards whose samples are mixed with each other, 0 all; of s3:// ones the cache should hold twice as many.", ge=0
    )
    color_jitter: bool = _setting(True, "Weak view: SSD colour jitter.")
    flip: bool = _setting(True, "Weak view: horizontal flip half of the time.")
    strong_view: bool = _setting(True, "Student sees jitter, grey, blur and CutOut on top of the weak view.")
    cutout_min: float = _setting(0.1, "CutOut: smallest side as a share of the view's.", ge=0, le=1)
    cutout_max: float = _setting(0.5, "CutOut: largest side as a share of the view's; 0 switches it off.", ge=0, le=1)
    mask_grid: int = _setting(256, "Side of the grid on which masks are pooled and predicted.", ge=16, le=4096)
    steps: int = _setting(10_000, "Optimizer steps.", ge=1)
    batch_size: int = _setting(48, "Images in one optimizer step, over all processes.", ge=1)
    accumulate: int = _setting(1, "Pieces in which a process takes its images of a step, to save memory.", runtime=True, ge=1)
    dino: str = _setting("", "A DINO's checkpoint: masks come from it while training, not from the shards; else empty.")
    dino_clusters: int = _setting(16, "DINO: k of the k-means over a view's patch tokens.", ge=2)
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
    max_bad_share: float = _setting(0.05, _BAD_SHARE, runtime=True, ge=0, le=1)
    device: _Device = _setting("auto", _DEVICE, runtime=True)
    workers: int = _setting(4, "Loader processes; 0 loads in this process.", runtime=True, ge=0, le=1024)
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
    kind: Literal["folder", "coco-stuff", "ade20k", "pascal-context", "cityscapes", "voc"] = _setting(
        "folder", "Layout of the labelled set: a folder with images/, labels/ and classes.txt, or a benchmark as published."
    )
    name: str = _setting(
        "", "Name of the labelled set in the metrics; empty: its folder's name, or the kind.", pattern=r"^[\w.-]*$"
    )
    clip: str = _setting("", "The CLIP to compare with, by its own text tower; empty: the one that the model was trained from.")
    protocol: Literal["whole", "slide", "masks"] = _setting(
        "whole", "whole (the paper's: one squashed view), slide (windows), or masks (zero-shot mask classification)."
    )
    side: int = _setting(
        0, "Whole and masks: side in pixels of what the CLIP sees, whole patches; 0: as in training.", ge=0, le=4096
    )
    feature_grid: int = _setting(
        64, "Whole and slide: features of a view are brought to this grid, then classified.", ge=1, le=4096
    )
    slide_side: int = _setting(
        0, "Slide: the shortest edge is resized to this many pixels first; 0 keeps the size.", ge=0, le=16384
    )
    crop: int = _setting(336, "Slide: side of a window in pixels.", ge=1, le=16384)
    stride: int = _setting(112, "Slide: pixels from one window to the next.", ge=1, le=16384)
    masks: Literal["truth", "felzenszwalb", "given"] = _setting(
        "truth", "Masks: truth (one a class of the label map), felzenszwalb, or given (of any generator)."
    )
    masks_folder: str = _setting("", "Masks given: folder of SA-1B's NAME.json for images NAME.*, or Shards with masks.")
    felzenszwalb_scale: float = _setting(200.0, "Felzenszwalb: larger gives larger segments.", gt=0)
    felzenszwalb_sigma: float = _setting(0.8, "Felzenszwalb: Gaussian smoothing before, in pixels.", ge=0)
    felzenszwalb_min_size: int = _setting(100, "Felzenszwalb: smallest segment in pixels.", ge=1)
    templates: Literal["ensemble", "single"] = _setting("ensemble", "The paper's 8 templates, or only its last one.")
    precision: Literal["auto", "float32", "tf32", "bfloat16"] = _setting(
        "float32", "Of the image towers; auto is bfloat16 where the device is fast at it. Others than float32 round by device."
    )
    batch_size: int = _setting(8, "Images (slide: windows) in one forward pass.", runtime=True, ge=1)
    pictures: int = _setting(8, "Example pictures in the report.", runtime=True, ge=0)
    max_bad_share: float = _setting(0.0, _BAD_SHARE, runtime=True, ge=0, le=1)
    device: _Device = _setting("auto", _DEVICE, runtime=True)
    checkpoint_every: int = _setting(200, "Images between two checkpoints of the counts.", runtime=True, ge=1)

    @model_validator(mode="after")
    def _fits(self) -> "EvaluateConfig":
        if self.stride > self.crop:
            raise ValueError(f"stride {self.stride} is larger than crop {self.crop}: windows would leave gaps")
        if (self.masks == "given") != bool(self.masks_folder):
            raise ValueError(f"masks {self.masks} with masks_folder {self.masks_folder!r}: given needs it, others do not")
        return self


class EvaluateClipConfig(EvaluateConfig):
    """CLIP alone on one labelled set: what sections evaluate and train come to; it has no section of its own.

    Name, clip and side are never empty here, and pictures are what it makes: label maps that reports show.
    """

    name: str = _setting("", "Name of the labelled set in the metrics.")
    residual: Literal["cls", "patch"] = _setting("cls", "As in training.")
    pictures: int = _setting(8, "Pictures whose label maps are kept.", ge=0)


class RegisterConfig(BaseModel):
    """The gate in front of the MLflow registry."""

    model_config = _STRICT
    name: str = _setting("pixelclip", "Name of the registered model.", pattern=r"^[^/:.%\"']+$")
    min_gain: float = _setting(1.0, "Least gain over CLIP, in points of mIoU, of a champion.")


class ImportConfig(BaseModel):
    """A checkpoint of the reference implementation; not a stage of the pipeline."""

    model_config = _STRICT
    clip: str = _setting("", "open_clip's name of its CLIP, or a folder with open_clip_config.json; empty: told by its shapes.")
    side: int = _setting(
        0,
        "Side in pixels of what the CLIP sees; 0: the multiple of its patch next to 320 (ViT), 640 (ConvNeXt).",
        ge=0,
        le=4096,
    )


Config = ToyConfig | ShardsConfig | MasksConfig | TrainConfig | EvaluateConfig | RegisterConfig
STAGES: dict[str, type[BaseModel]] = {
    "toy": ToyConfig,
    "fetch_data": FetchDataConfig,
    "shards": ShardsConfig,
    "masks": MasksConfig,
    "train": TrainConfig,
    "evaluate": EvaluateConfig,
    "register": RegisterConfig,
}
SETTINGS: dict[str, type[BaseModel]] = {**STAGES, "evaluate_clip": EvaluateClipConfig}
"""Of the stages without a section of their own, too."""


def nearest(word: str, allowed: Iterable[str]) -> str:
    """Returns `, did you mean X?` for the allowed word closest to `word`, or an empty string."""
    close = difflib.get_close_matches(word, list(allowed), n=1, cutoff=0.5)
    return f", did you mean {close[0]!r}?" if close else ""


def build(kind: type[_Kind], values: Mapping[str, Any], source: str, sources: Mapping[str, str] | None = None) -> _Kind:
    """Makes the settings of one stage.

    Args:
        kind: the stage's class.
        values: its settings; the others have their defaults.
        source: where they stand, for errors.
        sources: where those stand that do not stand there.

    Raises:
        ValueError: one line a fault: where it was found, what was found, what is allowed, the nearest name.
    """
    elsewhere = sources or {}
    lines = [
        f"{elsewhere.get(name, source)}: {name}: must be a number (found {values[name]!r})"  # pydantic takes true for 1
        for name, field in kind.model_fields.items()
        if field.annotation in (int, float) and isinstance(values.get(name), bool)
    ]
    try:
        made = kind.model_validate(dict(values))
        if not lines:
            return made
    except ValidationError as error:
        for fault in error.errors():
            name = ".".join(str(part) for part in fault["loc"])
            where = elsewhere.get(name, source) if name else ", ".join(dict.fromkeys([source, *elsewhere.values()]))
            if fault["type"] == "extra_forbidden":
                hint = nearest(name, kind.model_fields) or f"; the settings are {', '.join(kind.model_fields)}"
                lines.append(f"{where}: unknown setting {name!r}{hint}")
            else:
                said = fault["msg"].removeprefix("Value error, ")
                lines.append(f"{where}: {name}: {said} (found {fault['input']!r})" if name else f"{where}: {said}")
    raise ValueError("\n".join(lines))


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
    sources: dict[str, str] = {}
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
            if params is not None:
                sources[name] = f"command line: {stage}"
    return build(STAGES[stage], values, f"{source}: {stage}", sources)


def load_all(params: Path | None, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of every stage; every override must name its stage.

    Raises:
        ValueError: as `load`, and for an override without a stage.
    """
    for key in overrides:
        if "." not in key:
            raise ValueError(f"setting {key!r} must be written STAGE.SETTING; the stages are {', '.join(STAGES)}")
    return {stage: load(stage, params, overrides) for stage in STAGES}


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice in one mapping: YAML would drop the first one without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} stands there twice", key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> Any:
    """What a YAML file holds.

    Raises:
        ValueError: it cannot be read, is no YAML, or says a key twice; one line with the place.
    """
    try:
        return yaml.load(path.read_text(), _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        raise ValueError(f"{path}: cannot be read as YAML: {error.problem or error.context}{place}") from None
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        said = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise ValueError(f"{path}: cannot be read as YAML: {said}") from None


def _read_params(params: Path) -> dict[str, dict[str, Any]]:
    document = read_yaml(params) or {}
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
