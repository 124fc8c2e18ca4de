"""Train the toy CLIP on painted scenes and their captions, never on a label map.

The recipe is CLIP's own (arXiv 2103.00020, section 2.3): a symmetric contrastive loss over a batch of image-caption
pairs.
"""

import json
import math
import tempfile
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from open_clip.model import CLIP
from open_clip.transformer import PatchDropout
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from pixelclip.models.checkpoint import CLIP_CONFIG, CLIP_WEIGHTS
from pixelclip.storage.files import write_atomically
from pixelclip.storage.progress import track
from pixelclip.toy_scenes.scenes import CLASSES, paint

MODEL_CONFIG: dict[str, Any] = {
    "embed_dim": 128,
    "vision_cfg": {"image_size": 96, "layers": 4, "width": 128, "head_width": 32, "patch_size": 12},
    "text_cfg": {"context_length": 24, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2},
}
PREPROCESS_CONFIG: dict[str, Any] = {
    "mean": list(OPENAI_DATASET_MEAN),
    "std": list(OPENAI_DATASET_STD),
    "interpolation": "bicubic",
    "resize_mode": "squash",
}
MAX_LOGIT_SCALE = math.log(100)  # CLIP's own bound
ROUNDS = (2_000, 1_400, 1_800, 2_000)
WEIGHT_DECAY = 0.1  # on matrices only
LABEL_SMOOTHING = 0.05  # captions of other scenes often fit too
PATCH_DROPOUT, WHOLE_IMAGES = 0.5, 0.3  # drop half the patches, except in the last 30 % of steps (FLIP; twice as fast)


def remake(out: Path) -> None:
    """Train the shipped weights again: four rounds, each on scenes of a new seed (an hour on 2 cores).

    The result is as good as the shipped weights but not bit-identical: their first round dropped no patches in the last 20 %
    of steps, not 30 %, and sums in bfloat16 depend on the machine.

    Args:
        out: Output folder.
    """
    with tempfile.TemporaryDirectory() as folder:
        rounds = [Path(folder, str(number)) for number in range(len(ROUNDS) - 1)] + [out]
        train_clip(rounds[0], seed=0, steps=ROUNDS[0])
        for seed, steps in enumerate(ROUNDS[1:], start=1):
            train_clip(rounds[seed], start=rounds[seed - 1], seed=seed, steps=steps, learning_rate=1e-3)


def train_clip(
    out: Path,
    *,
    start: Path | None = None,
    seed: int = 0,
    num_scenes: int = 12_000,
    steps: int = 2_000,
    batch_size: int = 128,
    learning_rate: float = 1.2e-3,
) -> dict[str, float]:
    """Train the toy CLIP on painted scenes and write it as an open_clip folder.

    Args:
        out: Folder for `open_clip_config.json` and `open_clip_model.safetensors` (float16, below 10 MB); open_clip
            loads it as `local-dir:FOLDER`. Each file is replaced atomically at the end.
        start: Folder of an earlier call whose weights to start from; default: random weights.
        seed: Seed of the scenes (see `scenes.paint`), weights, order and crops.
        num_scenes: Scenes in the training set, at least `batch_size`.
        steps: Optimizer steps.
        batch_size: Image-caption pairs per step.
        learning_rate: Peak of the one-cycle schedule.

    Returns:
        `loss` (mean of the last 50 steps) and `logit_scale`.

    Raises:
        ValueError: If `num_scenes` is less than `batch_size`, or `steps` less than 1.
    """
    if num_scenes < batch_size or steps < 1:
        raise ValueError(f"train_clip: num_scenes {num_scenes} (at least {batch_size}), steps {steps} (at least 1)")
    scenes = [paint(seed, index) for index in track(range(num_scenes), "painting", "scene")]
    images = torch.stack([torch.from_numpy(scene.image).permute(2, 0, 1) for scene in scenes])  # uint8 [N, 3, side, side]
    tokenizer = open_clip.SimpleTokenizer(context_length=MODEL_CONFIG["text_cfg"]["context_length"])
    captions = tokenizer([scene.caption for scene in scenes])  # [N, context length]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = CLIP(**MODEL_CONFIG)
        if start is not None:
            model.load_state_dict(load_file(start / CLIP_WEIGHTS))
        losses = _fit(model, images, captions, steps, batch_size, learning_rate)
    _fill_vocabulary(model, captions)
    weights = {name: tensor.detach().half().contiguous() for name, tensor in model.state_dict().items()}
    config = json.dumps({"model_cfg": MODEL_CONFIG, "preprocess_cfg": PREPROCESS_CONFIG}, indent=1)
    write_atomically(out / CLIP_WEIGHTS, save(weights))
    write_atomically(out / CLIP_CONFIG, config.encode())
    return {"loss": sum(losses[-50:]) / len(losses[-50:]), "logit_scale": model.logit_scale.exp().item()}


def _fit(model: CLIP, images: Tensor, captions: Tensor, steps: int, batch_size: int, learning_rate: float) -> list[float]:
    """Train in place; return the loss of every step."""
    matrices = [p for name, p in model.named_parameters() if p.ndim >= 2 and "embedding" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim < 2 or "embedding" in name]
    groups: list[dict[str, Any]] = [{"params": matrices}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.98), weight_decay=WEIGHT_DECAY, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.1)
    target = torch.arange(batch_size)
    losses: list[float] = []
    order = torch.empty(0, dtype=torch.long)
    model.visual.patch_dropout = PatchDropout(PATCH_DROPOUT)
    model.train()
    for step in (progress := track(range(steps), "training CLIP", "step")):
        if step == round(steps * (1 - WHOLE_IMAGES)):
            model.visual.patch_dropout = nn.Identity()
        if len(order) < batch_size:
            order = torch.randperm(len(images))
        chosen, order = order[:batch_size], order[batch_size:]
        # For heads and sequences this small, plain attention in bfloat16 is by far the fastest on a CPU.
        with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            image_features = model.encode_image(_crop(images[chosen]), normalize=True)
            text_features = model.encode_text(captions[chosen], normalize=True)
        logits = model.logit_scale.exp() * image_features.float() @ text_features.float().T  # [B, B]
        both = torch.cat([logits, logits.T])
        loss = F.cross_entropy(both, target.repeat(2), label_smoothing=LABEL_SMOOTHING)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=MAX_LOGIT_SCALE)
        losses.append(loss.item())
        progress.show(loss=f"{losses[-1]:.3f}")
    return losses


def _crop(images: Tensor) -> Tensor:
    """Crop 60 to 100 % of the side at random, mirror half of the crops; uint8 scenes -> normalised [B, 3, side, side]."""
    number, side = len(images), MODEL_CONFIG["vision_cfg"]["image_size"]
    zoom = torch.empty(number).uniform_(0.6, 1.0)
    shift = (1 - zoom)[:, None] * torch.empty(number, 2).uniform_(-1, 1)
    mirror = torch.randint(0, 2, (number,)) * 2 - 1
    affine = torch.zeros(number, 2, 3)
    affine[:, 0, 0], affine[:, 1, 1], affine[:, :, 2] = zoom * mirror, zoom, shift
    grid = F.affine_grid(affine, [number, 3, side, side], align_corners=False)
    crops = F.grid_sample(images.float() / 255, grid, padding_mode="reflection", align_corners=False)
    mean, std = (torch.tensor(PREPROCESS_CONFIG[key])[:, None, None] for key in ("mean", "std"))
    return (crops - mean) / std


@torch.no_grad()
def _fill_vocabulary(model: CLIP, captions: Tensor) -> None:
    """Give every token that no caption uses the embedding of a word of a class name, drawn uniformly.

    PixelCLIP initialises its prompts from random entries of the vocabulary. Nearly all of a real CLIP's 49,408 entries
    denote something visible. Here 57 are trained, half of them function words; without this the others would keep their
    random initial values (docs/experiments.md shows the effect).
    """
    weight = model.token_embedding.weight
    special = torch.tensor([0, len(weight) - 2, len(weight) - 1])  # padding, start and end of text
    unused = torch.ones(len(weight), dtype=torch.bool)
    unused[captions.unique()] = unused[special] = False
    tokenizer = open_clip.SimpleTokenizer()
    words = torch.tensor(sorted({token for name in CLASSES for token in tokenizer.encode(name)}))
    drawn = torch.randint(0, len(words), (len(weight),), generator=torch.Generator().manual_seed(0))
    weight[unused] = weight[words[drawn[unused]]]
