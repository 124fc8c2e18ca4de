"""Import checkpoints of the reference implementation; export plain open_clip weights."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import open_clip
import torch
from torch import Tensor

from pixelclip.config import ImportConfig
from pixelclip.models.backbone import Backbone, check_side
from pixelclip.models.checkpoint import (
    CLIP_CONFIG,
    CLIP_WEIGHTS,
    CONFIG,
    WEIGHTS,
    Clip,
    build_clip,
    load_model,
    load_prompts,
    read_clip_config,
    save_model,
    write_tensors,
)
from pixelclip.models.decoder import Decoder
from pixelclip.models.text import TextTower
from pixelclip.models.tokenizer import TOKENIZER_FILES
from pixelclip.models.uninitialised import Uninitialised
from pixelclip.models.weights import check_fit, check_tensors, read_weights
from pixelclip.settings import nearest
from pixelclip.storage.files import check_writable, write_atomically
from pixelclip.workflow.stage import Metrics, Stage, describe

# CLIPs of the paper, with open_clip's tag of their initial weights.
REFERENCE_CLIPS = {
    "ViT-B-16-quickgelu": "openai",
    "ViT-L-14-quickgelu": "openai",
    "ViT-L-14-336-quickgelu": "openai",
    "convnext_base_w_320": "laion_aesthetic_s13b_b82k",
    "convnext_large_d_320": "laion2b_s29b_b131k_ft_soup",
}
_CLIP, _PROMPTS, _HEAD = "sem_seg_head.predictor.clip_model.", "sem_seg_head.predictor.prompt_tokens", "head."
_OPENAI_EXTRAS = {f"{_CLIP}{name}" for name in ("input_resolution", "context_length", "vocab_size")}


def split_reference(document: Any) -> tuple[dict[str, Tensor], Tensor, dict[str, Tensor]]:
    """Split a checkpoint of the reference implementation into its modules.

    Args:
        document: content of its `.pth`.

    Returns:
        State dict of the CLIP under open_clip's names, prompt tokens [K, L, D], state dict of the decoder.

    Raises:
        ValueError: the document is not a checkpoint of the reference implementation.
    """
    nested = isinstance(document, dict) and isinstance(document.get("model"), dict)
    state = check_tensors(document["model"] if nested else document)
    clip = {name.removeprefix(_CLIP): t for name, t in state.items() if name.startswith(_CLIP) and name not in _OPENAI_EXTRAS}
    head = {name.removeprefix(_HEAD): t for name, t in state.items() if name.startswith(_HEAD)}
    if not clip or _PROMPTS not in state or not head:
        raise ValueError(f"entries {_CLIP}*, {_PROMPTS} and {_HEAD}* are required, found {', '.join(sorted(state)[:3])}, ...")
    return clip, state[_PROMPTS], head


def identify_clip(clip: Mapping[str, Tensor]) -> str:
    """Return the name in `REFERENCE_CLIPS` of the CLIP with these tensor names and shapes.

    Raises:
        ValueError: no CLIP matches.
    """
    for name in REFERENCE_CLIPS:
        with torch.device("meta"), Uninitialised():
            expected = build_clip(open_clip.get_model_config(name)).state_dict()
        if {key: tensor.shape for key, tensor in expected.items()} == {key: tensor.shape for key, tensor in clip.items()}:
            return name
    raise ValueError(f"its CLIP is not among {', '.join(REFERENCE_CLIPS)}; set --clip")


def run(checkpoint: Path, out: Path, config: ImportConfig) -> Metrics:
    """Convert a `.pth` of the reference implementation to a model folder, without detectron2 or code from the file.

    Args:
        checkpoint: `.pth` file.
        out: model folder to create.
        config: settings.

    Returns:
        `import/concepts`.

    Raises:
        ValueError: the file is not a reference checkpoint, its CLIP is not `config.clip`, or the side does not fit.
    """
    if not checkpoint.is_file():
        raise ValueError(f"{checkpoint}: no such file")
    stage = Stage("import", out, {"reference": describe(checkpoint)}, config)
    if stage.finished:
        return stage.reuse()
    try:
        weights, tokens, head = split_reference(read_weights(checkpoint))
        spec, cfg, mean, std = _find_clip(config.clip or identify_clip(weights))
        with Uninitialised():
            model, decoder = build_clip(cfg), Decoder()
        for module, state in ((model, weights), (decoder, head)):
            check_fit(state, module.state_dict())
            module.load_state_dict(state)
        prompts = load_prompts({"tokens": tokens}, TextTower(model))
    except ValueError as error:
        raise ValueError(f"{checkpoint}: {error}; expected a checkpoint of the reference implementation") from None
    side = _side(config.side, Backbone(model.visual))
    with stage:
        clip, origin = Clip(model, cfg, mean, std), {"spec": spec, "md5": ""}
        save_model(stage.folder, clip, prompts, decoder, side=side, residual="cls", origin=origin)
        return stage.finish({"import/concepts": float(len(tokens))}, files=[WEIGHTS, CONFIG])


def _side(chosen: int, backbone: Backbone) -> int:
    """Return the chosen side in pixels, or the paper's for this type of tower, rounded to whole patches."""
    if chosen:
        check_side("import.side", chosen, backbone)
        return chosen
    patch = max(backbone.patch_size)
    return max(1, round((640 if backbone.is_convnext else 320) / patch)) * patch


def _find_clip(name: str) -> tuple[str, dict[str, Any], Any, Any]:
    """Return spec, config, mean and std of a CLIP of open_clip, or of a folder with `open_clip_config.json`."""
    if Path(name).is_dir():
        document = read_clip_config(Path(name))
        preprocess = document.get("preprocess_cfg") or {}
        mean, std = preprocess.get("mean"), preprocess.get("std")
        return name, document["model_cfg"], mean or open_clip.OPENAI_DATASET_MEAN, std or open_clip.OPENAI_DATASET_STD
    if name not in open_clip.list_models():
        raise ValueError(f"no CLIP {name!r} in open_clip{nearest(name, open_clip.list_models())}")
    spec = f"{name}:{REFERENCE_CLIPS.get(name, '')}"  # without a tag, evaluate asks for the weights in an error
    return spec, dict(open_clip.get_model_config(name)), open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD


def export(model: Path, out: Path) -> None:
    """Export a model's CLIP, with the trained image tower, as plain open_clip weights.

    `open_clip.create_model("local-dir:OUT")` loads the folder; `open_clip.create_model(NAME, pretrained="OUT/..safetensors")`
    loads the weights alone. Concepts and decoder are omitted, because inference does not use them.

    Args:
        model: model folder.
        out: folder for `open_clip_config.json` and `open_clip_model.safetensors`, which must not exist yet.

    Raises:
        ValueError: `model` is not a model folder, or `out` already contains an export.
    """
    check_writable(out / CLIP_WEIGHTS)
    loaded = load_model(model)
    if existing := [name for name in (CLIP_CONFIG, CLIP_WEIGHTS, *TOKENIZER_FILES) if (out / name).exists()]:
        raise ValueError(f"{out}: {existing[0]} already exists; remove it or choose another folder")
    state = {name: tensor.contiguous() for name, tensor in loaded.clip.model.state_dict().items()}
    write_tensors(out / CLIP_WEIGHTS, state, metadata={"format": "pt"})
    size = loaded.clip.model_cfg["vision_cfg"].get("image_size")
    preprocess = {"size": size, "mean": loaded.clip.mean, "std": loaded.clip.std, "resize_mode": "squash"}
    config = json.dumps({"model_cfg": loaded.clip.model_cfg, "preprocess_cfg": preprocess}, indent=1)
    write_atomically(out / CLIP_CONFIG, config + "\n")
    if loaded.clip.tokenizer:
        loaded.clip.tokenizer.save(out)
