"""Typed settings of every stage: one class per stage, one described field per setting.

The defaults are the paper's hyper-parameters. `params.yaml` lists every setting because DVC cannot see defaults in code.
A *runtime* setting changes where or how fast a stage runs, never its result, so it is not part of the stage's fingerprint.
"""

import json
import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

DEVICES = "auto, cpu, cuda, cuda:N, mps"
_BAD_SHARE = "Maximum fraction of unreadable samples; the stage stops above it."
_LABELLED_KIND = "Layout of the labelled set: folder (images/, labels/, classes.txt) or a benchmark's published layout."
_LabelledKind = Literal["folder", "coco-stuff", "ade20k", "pascal-context", "cityscapes", "voc"]
_DEVICE = f"Device: {DEVICES}; auto selects a CUDA GPU if available."


def _setting(default: Any, description: str, *, runtime: bool = False, **limits: Any) -> Any:
    return Field(default=default, description=description, json_schema_extra={"runtime": runtime}, **limits)


def device_name(name: str) -> str:
    """Validate the name of a device, whose availability is checked at its first use; raise ValueError for an unknown name."""
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", name):
        raise ValueError(f"unknown device {name!r}; allowed: {DEVICES}")
    return name


_Device = Annotated[str, AfterValidator(device_name)]


def _part(text: str) -> str:
    numbers = re.fullmatch(r"(\d+)/(\d+)", text)
    if text and not (numbers and 1 <= int(numbers[1]) <= int(numbers[2])):
        raise ValueError(f"part must be written i/n with 1 <= i <= n, such as 1/8 (found {text!r})")
    return text


_Part = Annotated[str, AfterValidator(_part)]


def _tags(text: str) -> str:
    try:
        found = json.loads(text or "{}")
    except ValueError:
        found = None
    if not (isinstance(found, dict) and all(isinstance(value, str) for value in found.values())):
        raise ValueError(f'must be a JSON object of texts, such as {{"team": "vision"}} (found {text!r})')
    return text


Quality = Literal["fast", "best"]
"""fast: one view of the whole image, as in the paper. best: `QUALITIES["best"]`, several times slower."""


class _Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    def _check_required(self, name: str, switch: str, *values: str) -> None:
        """Check that a setting is present for these values of `switch` and empty for all others."""
        found, selected = getattr(self, name), getattr(self, switch)
        if (selected in values) != bool(found):
            rule = f"{name} is required for {switch} {' or '.join(values)} and must be empty otherwise"
            raise ValueError(f"{rule} (found {name} {found!r}, {switch} {selected})")


def _numbers(value: Any) -> Any:
    """Split the text of a list of numbers, '1.25,1.5' or '[1.25, 1.5]', as it is written on the command line."""
    if not isinstance(value, str):
        return value
    return [word.strip() for word in value.strip().removeprefix("[").removesuffix("]").split(",") if word.strip()]


class Refinement(_Settings):
    """How class scores are refined; the defaults are the paper's single view."""

    scales: Annotated[list[Annotated[float, Field(ge=1, le=8)]], BeforeValidator(_numbers)] = _setting(
        [], "Mean over windows of the training's side: longest edges of the image in sides of a window. Empty: one whole view."
    )
    flip: bool = _setting(False, "Average with the scores of the mirrored image.")
    propagation: float = _setting(0.0, "Strength of the Laplacian propagation of scores; 0 disables it.", ge=0, le=1000)
    pamr_iterations: int = _setting(0, "Iterations of pixel-adaptive refinement (PAMR); 0 disables it.", ge=0, le=1000)
    segments: Literal["none", "felzenszwalb", "given"] = _setting(
        "none", "Mean score within segments: none, felzenszwalb, or given (masks_folder)."
    )
    score_grid: int = _setting(64, "Refined scores have this many cells along the image's shortest edge.", ge=8, le=1024)
    felzenszwalb_scale: float = _setting(200.0, "Felzenszwalb: larger values give larger segments.", gt=0)
    felzenszwalb_sigma: float = _setting(0.8, "Felzenszwalb: sigma of the Gaussian smoothing, in pixels.", ge=0)
    felzenszwalb_min_size: int = _setting(100, "Felzenszwalb: minimum segment size in pixels.", ge=1)

    @property
    def steps(self) -> list[str]:
        """The refinements in use, in the order in which they are applied; empty for the single view."""
        used = {
            "scales": bool(self.scales),
            "flip": self.flip,
            "propagation": self.propagation > 0,
            "pamr": self.pamr_iterations > 0,
            self.segments: self.segments != "none",
        }
        return [name for name, in_use in used.items() if in_use]


QUALITIES: dict[Quality, Refinement] = {"fast": Refinement(), "best": Refinement(scales=[1.25, 1.75], pamr_iterations=20)}
"""The refinement of each quality; docs/experiments.md compares `best` with its alternatives."""
BEST = ".best"
"""Suffix of the name of a labelled set in the metrics of quality=best, and of a tower evaluated with it."""


class ToyConfig(_Settings):
    """Painted scenes (the default data)."""

    train_scenes: int = _setting(2000, "Training scenes, without labels.", ge=1)
    test_scenes: int = _setting(200, "Evaluation scenes, with labels and disjoint from the training scenes.", ge=1)
    side: int = _setting(128, "Side of a scene in pixels.", ge=32, le=512)
    seed: int = _setting(0, "Seed of the scenes.", ge=0)


class FetchDataConfig(_Settings):
    """Data of one revision of a DVC or git repository."""

    path: str = _setting("data/images", "Folder or file in the repository, tracked by DVC or git.", min_length=1)
    revision: str = _setting("HEAD", "Commit, tag or branch; only a full commit SHA is immutable.", min_length=1)


class ShardsConfig(_Settings):
    """Tar shards of images."""

    images_per_shard: int = _setting(1000, "Images per tar.", ge=1)
    shortest_edge: int = _setting(0, "Shrink to this shortest edge in pixels (paper: 750); 0 keeps the size.", ge=0, le=16384)
    jpeg_quality: int = _setting(95, "JPEG quality of re-encoded images.", ge=1, le=100)
    max_bad_share: float = _setting(0.05, _BAD_SHARE, runtime=True, ge=0, le=1)


class MasksConfig(_Settings):
    """Class-agnostic masks of every image."""

    generator: Literal["felzenszwalb", "given", "sam", "dino", "labels", "model"] = _setting(
        "felzenszwalb",
        "felzenszwalb (graph segmentation, no weights), given (SA-1B JSON), sam (SAM, SAM 2 or 2.1, as the weights are), dino "
        "(k-means of patch tokens), labels (label maps without their classes), or model (regions of a trained PixelCLIP, for a "
        "second round).",
    )
    shortest_edge: int = _setting(
        0, "Shrink images and given masks to this shortest edge in pixels first (paper: 750); 0 keeps the size.", ge=0, le=16384
    )
    jpeg_quality: int = _setting(95, "JPEG quality of images that are shrunk or turned upright.", ge=1, le=100)
    given_folder: str = _setting("", "Generator given: folder of KEY.json; if empty, the JSON in the shards is used.")
    labels_folder: str = _setting("", "Generator labels: labelled set of the same images, matched by name; path or s3://.")
    labels_kind: _LabelledKind = _setting("folder", _LABELLED_KIND)
    labels_split: Literal["train", "val"] = _setting("train", "Generator labels: split of a benchmark; a folder has none.")
    labels_unit: Literal["class", "component"] = _setting(
        "class", "Generator labels: one mask per class, or one per connected component (8 neighbours) of a class."
    )
    felzenszwalb_scale: float = _setting(200.0, "Felzenszwalb: larger values give larger segments.", gt=0)
    felzenszwalb_sigma: float = _setting(0.8, "Felzenszwalb: sigma of the Gaussian smoothing, in pixels.", ge=0)
    felzenszwalb_min_size: int = _setting(100, "Felzenszwalb: minimum segment size in pixels.", ge=1)
    weights: str = _setting(
        "", "SAM, SAM 2, DINO: checkpoint (path, URL or s3://). Model: model folder (path or s3://) or models:/NAME@ALIAS."
    )
    sam_points_per_side: int = _setting(32, "SAM: points per side of the prompt grid; three masks per point.", ge=1, le=1024)
    sam_points_per_batch: int = _setting(256, "SAM: points decoded at once.", runtime=True, ge=1)
    sam_pred_iou_thresh: float = _setting(0.88, "SAM: minimum predicted IoU of a mask.", ge=0)
    sam_stability_score_thresh: float = _setting(0.95, "SAM: minimum stability score of a mask.", gt=0, le=1)
    sam_stability_score_offset: float = _setting(1.0, "SAM: threshold offset of the stability score, in logits.", gt=0)
    sam_box_nms_thresh: float = _setting(0.7, "SAM: box IoU threshold of non-maximum suppression.", ge=0, le=1)
    sam_crop_n_layers: int = _setting(0, "SAM: number of crop layers; layer i has 4**i crops.", ge=0, le=8)
    sam_crop_nms_thresh: float = _setting(0.7, "SAM: box IoU threshold of suppression between crops.", ge=0, le=1)
    sam_crop_overlap_ratio: float = _setting(512 / 1500, "SAM: overlap of crops as a fraction of the shorter side.", ge=0, lt=1)
    sam_crop_n_points_downscale_factor: int = _setting(1, "SAM: crop layer i has points_per_side / factor**i.", ge=1)
    sam_min_mask_region_area: int = _setting(0, "SAM: fill holes and remove islands of fewer pixels.", ge=0)
    sam_precision: Literal["auto", "float32", "bfloat16"] = _setting(
        "float32",
        "SAM: precision of the encoder. float32 gives the original's masks; auto is bfloat16 if the hardware supports it.",
    )
    dino_clusters: int = _setting(16, "DINO: k of the k-means over the patch tokens of an image.", ge=2)
    dino_side: int = _setting(
        640, "DINO: images are resized to a square of this side in pixels, a multiple of the patch size.", ge=16, le=4096
    )
    model_min_area: int = _setting(100, "Model: minimum area of a mask in pixels.", ge=1)
    seed: int = _setting(0, "Seed of DINO's k-means.", ge=0)
    max_masks: int = _setting(0, "Keep at most this many of an image's largest masks; 0 keeps all.", ge=0)
    max_bad_share: float = _setting(0.05, _BAD_SHARE, runtime=True, ge=0, le=1)
    part: _Part = _setting("", "i/n processes only the i-th of n parts of the shards; later stages read a folder of all parts.")
    workers: int = _setting(-1, "Worker processes; 0: main process, -1: one per CPU.", runtime=True, ge=-1, le=1024)
    batch_size: int = _setting(4, "SAM and DINO: images per batch; model: images read ahead.", runtime=True, ge=1)
    device: _Device = _setting("auto", _DEVICE, runtime=True)

    @model_validator(mode="after")
    def _fits(self) -> "MasksConfig":
        self._check_required("weights", "generator", "sam", "dino", "model")
        self._check_required("labels_folder", "generator", "labels")
        if self.given_folder and self.generator != "given":
            found = f"given_folder {self.given_folder!r}, generator {self.generator}"
            raise ValueError(f"given_folder must be empty unless generator is given (found {found})")
        return self


class TrainConfig(_Settings):
    """PixelCLIP training."""

    clip: str = _setting(
        "ViT-B-16-quickgelu:openai",
        "CLIP to start from: toy, an open_clip folder, NAME:PRETRAINED, or NAME:FILE (path, URL or s3://).",
        min_length=1,
    )
    residual: Literal["cls", "patch"] = _setting("cls", "Residual of the last block: cls (reference) or patch (MaskCLIP).")
    side: int = _setting(320, "Side of CLIP's input in pixels, a multiple of the patch size.", ge=16, le=4096)
    shortest_edge: int = _setting(1024, "Weak view: shortest edge after the resize, in pixels.", ge=16, le=16384)
    longest_edge: int = _setting(1333, "Weak view: longest edge after the resize, in pixels.", ge=16, le=16384)
    crop: int = _setting(640, "Weak view: side of the random crop, in pixels.", ge=16, le=16384)
    shards_at_once: int = _setting(
        0, "Number of shards shuffled together; 0 shuffles all. The cache needs room for twice as many s3:// shards.", ge=0
    )
    color_jitter: bool = _setting(True, "Weak view: SSD colour jitter.")
    flip: bool = _setting(True, "Weak view: horizontal flip with probability 0.5.")
    strong_view: bool = _setting(True, "Student's view: jitter, grayscale, blur and CutOut on top of the weak view.")
    cutout_min: float = _setting(0.1, "CutOut: minimum side as a fraction of the view's side.", ge=0, le=1)
    cutout_max: float = _setting(0.5, "CutOut: maximum side as a fraction of the view's side; 0 disables it.", ge=0, le=1)
    mask_grid: int = _setting(256, "Side of the grid on which masks are pooled and predicted.", ge=16, le=4096)
    steps: int = _setting(10_000, "Optimizer steps.", ge=1)
    batch_size: int = _setting(48, "Images per optimizer step, over all processes.", ge=1)
    accumulate: int = _setting(1, "Micro-batches per step and process, to save memory.", runtime=True, ge=1)
    dino: str = _setting("", "DINO checkpoint that generates masks during training; if empty, the shards' masks are used.")
    dino_clusters: int = _setting(16, "DINO: k of the k-means over the patch tokens of a view.", ge=2)
    dino_side: int = _setting(
        640, "DINO: side in pixels at which it sees the weak view's crop, a multiple of the patch size.", ge=16, le=4096
    )
    precision: Literal["auto", "float32", "tf32", "bfloat16"] = _setting(
        "auto", "Precision of towers and decoder; auto is bfloat16 if the hardware supports it, else float32."
    )
    clustering: bool = _setting(True, "Masks of one concept share a target; false gives every mask its own target (ablation).")
    concept_kind: Literal["prompts", "fixed_prompts", "vectors", "names"] = _setting(
        "prompts",
        "Concepts: learnable prompts, fixed prompts of random words, vectors without the text tower, or class names.",
    )
    concept_names: str = _setting("", "Kind names: a file with one class name per line, or 'dog|puppy,grass'; empty otherwise.")
    concept_init: Literal["random", "data"] = _setting(
        "random",
        "First words of the prompts: random vocabulary entries (paper), or data: the words that describe the masks best, one "
        "per prompt.",
    )
    concept_init_images: int = _setting(256, "concept_init data: number of images whose masks are described.", ge=1)
    concepts: int = _setting(64, "K: number of concepts (kind names: number of names).", ge=2)
    prompt_tokens: int = _setting(4, "L: learnable tokens per prompt.", ge=1, le=64)
    decoded_concepts: int = _setting(
        0,
        "Concepts decoded per image: those with a mask, then a random sample of the others, weighted up; 0: all (paper).",
        ge=0,
    )
    templates: Literal["single", "ensemble"] = _setting(
        "single", "Concepts of prompts and names: the last of the paper's 8 templates, or the mean over all of them."
    )
    assignment_scale: float = _setting(100.0, "Factor on the cosines before the softmax of the assignment.", gt=0)
    sinkhorn_iterations: int = _setting(3, "Sinkhorn-Knopp iterations.", ge=1)
    teacher_momentum: float = _setting(0.999, "Momentum of the teacher's exponential moving average.", ge=0, lt=1)
    learning_rate_backbone: float = _setting(2e-6, "Learning rate of the image tower.", gt=0)
    learning_rate_prompts: float = _setting(2e-3, "Learning rate of the prompt tokens (paper's text: 2e-5).", gt=0)
    learning_rate_decoder: float = _setting(2e-4, "Learning rate of the decoder.", gt=0)
    final_learning_rate_share: float = _setting(
        0.5, "Final learning rate as a fraction of the initial one (cosine schedule).", ge=0, le=1
    )
    backbone_warmup: int = _setting(
        0,
        "Steps over which the image tower's learning rate rises linearly, so that the decoder first learns that high "
        "similarities mean a mask; 0 as in the paper.",
        ge=0,
    )
    weight_decay: float = _setting(1e-4, "Weight decay of AdamW, except on norms and embeddings.", ge=0)
    gradient_clip: float = _setting(0.01, "Clip the gradient to this global L2 norm.", gt=0)
    seed: int = _setting(0, "Seed of prompts, decoder, sample order and views.", ge=0)
    max_bad_share: float = _setting(0.05, _BAD_SHARE, runtime=True, ge=0, le=1)
    device: _Device = _setting("auto", _DEVICE, runtime=True)
    workers: int = _setting(-1, "Loader processes; 0: main process, -1: one per CPU, up to 4.", runtime=True, ge=-1, le=1024)
    log_every: int = _setting(10, "Steps between logged metrics.", runtime=True, ge=1)
    checkpoint_every: int = _setting(500, "Steps between checkpoints.", runtime=True, ge=1)
    checkpoint_minutes: float = _setting(
        10.0, "Minutes after which a checkpoint is written even before checkpoint_every; 0 disables it.", runtime=True, ge=0
    )
    run_name: str = _setting("", "Name of the run in MLflow; if empty, data, masks, CLIP, steps and a short id.", runtime=True)
    run_tags: Annotated[str, AfterValidator(_tags)] = _setting(
        "", 'Tags of the run in MLflow, a JSON object of texts: {"team": "vision"}.', runtime=True
    )
    evaluate_every: int = _setting(0, "Steps between evaluations on evaluate_on; 0 disables them.", runtime=True, ge=0)
    evaluate_on: str = _setting(
        "", "Small labelled set for evaluate_every, FOLDER or KIND:FOLDER; it selects the model in OUT/best.", runtime=True
    )
    picture_every: int = _setting(1000, "Steps between pictures of masks and concepts; 0 disables them.", runtime=True, ge=0)

    @model_validator(mode="after")
    def _ordered(self) -> "TrainConfig":
        if self.cutout_min > self.cutout_max > 0:
            raise ValueError(f"cutout_min {self.cutout_min} is larger than cutout_max {self.cutout_max}")
        if self.shortest_edge > self.longest_edge:
            raise ValueError(f"shortest_edge {self.shortest_edge} is larger than longest_edge {self.longest_edge}")
        self._check_required("concept_names", "concept_kind", "names")
        if bool(self.evaluate_every) != bool(self.evaluate_on):
            found = f"evaluate_every {self.evaluate_every}, evaluate_on {self.evaluate_on!r}"
            raise ValueError(f"evaluate_every and evaluate_on need each other (found {found})")
        if self.concept_init == "data" and self.concept_kind not in ("prompts", "fixed_prompts"):
            found = f"concept_kind {self.concept_kind}"
            raise ValueError(
                f"concept_init data chooses words, so concept_kind must be prompts or fixed_prompts (found {found})"
            )
        if self.concept_kind == "vectors" and self.templates != "single":
            raise ValueError(f"templates must be single for concept_kind vectors, which has no text (found {self.templates})")
        return self


class EvaluateConfig(Refinement):
    """Evaluation of the model and its CLIP on one labelled set."""

    kind: _LabelledKind = _setting("folder", _LABELLED_KIND)
    name: str = _setting(
        "", "Name of the labelled set in the metrics; if empty, the folder's name or the kind.", pattern=r"^[\w.-]*$"
    )
    names: str = _setting(
        "reference",
        "Class names of a benchmark: reference (the paper's lists), readable (with synonyms), or a file, one name per line. "
        "A folder has its classes.txt, which only a file replaces.",
        min_length=1,
    )
    clip: str = _setting("", "CLIP to compare with, using its own text tower; if empty, the model's original CLIP.")
    protocol: Literal["whole", "slide", "masks"] = _setting(
        "whole", "whole (paper: one view resized to a square), slide (windows), or masks (zero-shot mask classification)."
    )
    side: int = _setting(
        0, "Whole and masks: side of CLIP's input in pixels, a multiple of the patch size; 0 as in training.", ge=0, le=4096
    )
    shortest_edge: int = _setting(
        640,
        "Whole: first resize images to this shortest edge in pixels, with antialiasing; 0 disables it.",
        ge=0,
        le=16384,
    )
    longest_edge: int = _setting(
        2560, "Whole: maximum longest edge after that resize, in pixels; 0 for no limit.", ge=0, le=65535
    )
    feature_grid: int = _setting(64, "Whole and slide: features are resized to this grid before classification.", ge=1, le=4096)
    slide_side: int = _setting(0, "Slide: resize to this shortest edge in pixels; 0 keeps the size.", ge=0, le=16384)
    crop: int = _setting(336, "Slide: side of a window in pixels.", ge=1, le=16384)
    stride: int = _setting(112, "Slide: stride of the windows in pixels.", ge=1, le=16384)
    window: int = _setting(
        0, "Scales: side of a window in pixels, a multiple of the patch size; 0 as in training.", ge=0, le=4096
    )
    best: bool = _setting(False, "Also evaluate quality=best, as NAME.best.")
    masks: Literal["truth", "felzenszwalb", "given"] = _setting(
        "truth", "Protocol masks: truth (one mask per class), felzenszwalb, or given."
    )
    masks_folder: str = _setting("", "Masks given: folder of SA-1B JSON (NAME.json for NAME.*), or shards with masks.")
    templates: Literal["ensemble", "single"] = _setting(
        "ensemble", "All 8 prompt templates of the paper, or only its last one."
    )
    precision: Literal["auto", "float32", "tf32", "bfloat16"] = _setting(
        "float32",
        "Precision of the image towers; auto is bfloat16 if the hardware supports it. Only float32 gives comparable metrics.",
    )
    batch_size: int = _setting(8, "Images (slide: windows) per forward pass.", runtime=True, ge=1)
    pictures: int = _setting(8, "Example pictures in the report.", runtime=True, ge=0)
    max_bad_share: float = _setting(0.0, _BAD_SHARE, runtime=True, ge=0, le=1)
    device: _Device = _setting("auto", _DEVICE, runtime=True)
    checkpoint_every: int = _setting(200, "Images between checkpoints of the confusion matrix.", runtime=True, ge=1)

    @model_validator(mode="after")
    def _fits(self) -> "EvaluateConfig":
        if self.stride > self.crop:
            raise ValueError(f"stride {self.stride} is larger than crop {self.crop}: windows would leave gaps")
        if self.shortest_edge > self.longest_edge > 0:
            raise ValueError(f"shortest_edge {self.shortest_edge} is larger than longest_edge {self.longest_edge}")
        if ("given" in (self.masks, self.segments)) != bool(self.masks_folder):
            found = f"masks_folder {self.masks_folder!r}, masks {self.masks}, segments {self.segments}"
            raise ValueError(
                f"masks_folder is required for masks or segments given and must be empty otherwise (found {found})"
            )
        if (self.steps or self.best) and self.protocol != "whole":
            named = ", ".join([*self.steps, *(["best"] if self.best else [])])
            raise ValueError(f"refinements and best need protocol whole (found protocol {self.protocol} with {named})")
        if self.steps and self.best:
            raise ValueError(f"best is a refinement of its own; set it without others (found {', '.join(self.steps)})")
        return self

    @property
    def reads_masks(self) -> bool:
        """Whether the evaluation reads the masks in `masks_folder`: for mask classification, or as segments."""
        return (self.protocol == "masks" and self.masks == "given") or self.segments == "given"


class EvaluateClipConfig(EvaluateConfig):
    """Evaluation of CLIP alone on one labelled set, derived from sections evaluate and train.

    Name, clip and side are never empty. `pictures` affects the output here, so it is not a runtime setting.
    """

    name: str = _setting("", "Name of the labelled set in the metrics.")
    residual: Literal["cls", "patch"] = _setting("cls", "Residual of the last block, as in training.")
    pictures: int = _setting(8, "Pictures whose label maps are kept for reports.", ge=0)


class RegisterConfig(_Settings):
    """The promotion gate of the MLflow registry."""

    name: str = _setting("pixelclip", "Name of the registered model.", pattern=r"^[^/:.%\"']+$")
    min_gain: float = _setting(1.0, "Minimum mIoU gain of a champion over CLIP, in points.")
    licence: str = _setting("", "Licence of the weights, for the model card.")
    data_licence: str = _setting("", "Licence of the training images, for the model card.")


class ImportConfig(_Settings):
    """Import of a checkpoint of the reference implementation; not a stage."""

    clip: str = _setting("", "open_clip's name of its CLIP, or a folder with open_clip_config.json; detected if empty.")
    side: int = _setting(0, "Side in pixels; 0: multiple of the patch size nearest 320 (ViT), 640 (ConvNeXt).", ge=0, le=4096)


class PredictConfig(_Settings):
    """Segmentation of many images; not a stage of the pipeline."""

    classes: list[str] = _setting(..., "Class names, with commas between synonyms.")
    quality: Quality = _setting("fast", "fast (one view, as in the paper) or best (refined, several times slower).")
    overlays: bool = _setting(True, "Also write every image blended with the colours of its classes.")
    label_studio: bool = _setting(False, "Also write tasks for Label Studio.")
    part: _Part = _setting("", "i/n: only the i-th of n parts of the images or shards; see `merge`.")
    max_bad_share: float = _setting(0.05, _BAD_SHARE, runtime=True, ge=0, le=1)
    device: _Device = _setting("auto", _DEVICE, runtime=True)


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
"""Like `STAGES`, plus `evaluate_clip`, which has no section in params.yaml."""


def runtime_settings(kind: type[BaseModel]) -> set[str]:
    """Return the names of the settings that change where or how fast a stage runs, never its result."""
    return {name for name, field in kind.model_fields.items() if field.json_schema_extra == {"runtime": True}}


def lasting(config: BaseModel) -> dict[str, Any]:
    """Return the settings that determine the result of a stage: all except runtime settings."""
    return config.model_dump(exclude=runtime_settings(type(config)))
