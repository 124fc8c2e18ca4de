"""STAGE train: masked shards and a CLIP -> a PixelCLIP, the whole loop in one function (PixelCLIP, section 3; method.md).

B images, N masks, K concepts, C embedding width.
"""

import math
import os
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from pixelclip.backbone import Backbone, check_side
from pixelclip.checkpoint import CONFIG, WEIGHTS, Clip, clip_folder, load_clip, read_tensors, save_model
from pixelclip.config import TrainConfig
from pixelclip.dataset import MaskedImages, Views, load_batches
from pixelclip.model import Decoder, PixelCLIP
from pixelclip.pictures import gallery, training_picture
from pixelclip.predict import pick_device
from pixelclip.shards import BadSamples, describe_shards, list_shards
from pixelclip.stage import Metrics, Stage, describe
from pixelclip.text import Prompts, TextTower
from pixelclip.tracking import Run

_STATE = "state.safetensors"
_MASKLESS_SHARE = 0.5
"""More steps than this without any mask mean that the masks are unusable."""


def run(masks: Path, out: Path, config: TrainConfig) -> Metrics:
    """Trains a PixelCLIP; an interrupted training continues to the very same losses.

    Args:
        masks: Shards with masks.
        out: model folder to make: weights, config, provenance, curves, pictures, gallery.
        config: settings.

    Returns:
        `train/loss` and `train/concepts_used` of the last step, `train/bad_samples`, `train/maskless_batches`, ...

    Raises:
        ValueError: unusable input or settings, MLflow unreachable at the start, a loss that is not finite.
    """
    shards = list_shards(masks)
    device = pick_device(config.device)
    weights = clip_folder(config.clip)
    stage = Stage("train", out, {"masks": describe_shards(masks)} | ({"clip": describe(weights)} if weights else {}), config)
    if stage.finished:
        return stage.reuse()
    with stage:
        clip = load_clip(config.clip)
        dataset = MaskedImages(shards, _views(config, clip), config.seed)
        tracked = Run.start(stage.folder, name=out.name, provenance=stage.provenance())
        try:
            metrics = _train(stage, clip, dataset, config, device, tracked)
        except BaseException:
            tracked.finish("FAILED")
            raise
        tracked.values(metrics)
        tracked.finish()
        (stage.folder / _STATE).unlink(missing_ok=True)
        return stage.finish(metrics, files=[WEIGHTS, CONFIG])


def _train(stage: Stage, clip: Clip, dataset: MaskedImages, config: TrainConfig, device: torch.device, tracked: Run) -> Metrics:
    # Model. The prompts' and the decoder's first values hang on the seed alone.
    text = TextTower(clip.model)
    generator = torch.Generator().manual_seed(config.seed)
    words = torch.randint(0, text.tokenizer.sot_token_id, (config.concepts, config.prompt_tokens), generator=generator)
    model = PixelCLIP(
        Backbone(clip.model.visual, config.residual),
        text,
        Prompts(text, words),
        new_decoder(config.seed),
        config.assignment_scale,
        config.sinkhorn_iterations,
    )
    check_side("train.side", config.side, model.student)
    model = model.to(device).train()
    optimizer = make_optimizer(model, config)
    first_rates = [group["lr"] for group in optimizer.param_groups]
    start = load_state(stage.folder / _STATE, model, optimizer)

    # Data.
    bad = BadSamples("train", config.max_bad_share, found=list(dataset.bad))
    bad.check(len(dataset) + len(bad.found))
    if dataset.without_masks:
        print(f"train: {dataset.without_masks} samples have no masks and are left out", flush=True)
    loader = load_batches(dataset, config.batch_size, start, config.steps, config.workers, pin=device.type == "cuda")
    bar = tqdm(loader, desc="train", unit="step", initial=start, total=config.steps)

    loss, concepts_used, maskless, seen, since = 0.0, 0, 0, 0, time.monotonic()
    for step, batch in enumerate(bar, start=start):
        # Bad samples: named, counted, and too many of them stop the training.
        bad.found += batch.bad
        if batch.bad:
            bad.stop_if_too_many(max(len(dataset), (step - start + 1) * config.batch_size))
        if len(batch.masks) == 0:
            maskless += 1
            if maskless > max(10, _MASKLESS_SHARE * (step - start + 1)):
                raise ValueError(
                    f"step {step + 1}: {maskless} batches had no mask at all; look at the masks or raise train.crop"
                )
            continue
        batch = batch.to(device)

        # Schedule.
        for group, rate in zip(optimizer.param_groups, first_rates, strict=True):
            group["lr"] = rate * cosine_share(step, config.steps, config.final_learning_rate_share)

        # Forward, loss, backward, clip.
        output = model(batch.weak, batch.strong, batch.masks, batch.image_index)
        optimizer.zero_grad(set_to_none=True)
        output.loss.backward()
        norm = nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], config.gradient_clip)
        loss, gradient_norm = output.loss.item(), norm.item()
        if not (math.isfinite(loss) and math.isfinite(gradient_norm)):
            raise ValueError(
                f"step {step + 1}: loss {loss}, gradient norm {gradient_norm}: training stops before a weight is changed; "
                "lower the learning rates (train.learning_rate_*) or look at the images and masks"
            )

        # Step, teacher.
        optimizer.step()
        model.update_teacher(config.teacher_momentum)

        # Log.
        concepts_used = int(output.concept_index.unique().numel())
        seen += len(batch.weak)
        if (step + 1) % config.log_every == 0 or step + 1 == config.steps:
            speed, seen, since = seen / (time.monotonic() - since), 0, time.monotonic()
            bar.set_postfix(loss=f"{loss:.4f}", images_s=f"{speed:.1f}", refresh=False)
            entropy = -(output.assignment * output.assignment.clamp_min(1e-12).log()).sum(dim=-1).mean().item()
            rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
            tracked.log(
                {
                    "train/loss": loss,
                    "train/gradient_norm": gradient_norm,
                    "train/concepts_used": concepts_used,
                    "train/assignment_entropy": entropy,
                    "train/images_per_second": speed,
                    **{f"train/learning_rate_{name}": rate for name, rate in rates.items() if not name.endswith("_no_decay")},
                },
                step + 1,
            )
        if config.picture_every and ((step + 1) % config.picture_every == 0 or step == 0):
            picture = stage.folder / "pictures" / f"step-{step + 1:06d}.jpg"
            picture.parent.mkdir(exist_ok=True)
            training_picture(batch, output, clip.mean, clip.std).save(picture, quality=85)
            tracked.artifact(picture, "pictures")

        # Checkpoint.
        if (step + 1) % config.checkpoint_every == 0 and step + 1 < config.steps:
            save_state(stage.folder / _STATE, model, optimizer, step + 1)

    bad.check(max(len(dataset), (config.steps - start) * config.batch_size))
    origin = {"spec": config.clip, "md5": stage.inputs.get("clip", {}).get("md5", "")}
    model = model.cpu()  # the student's tower is clip.model.visual itself
    save_model(stage.folder, clip, model.prompts, model.decoder, side=config.side, residual=config.residual, origin=origin)
    gallery(model.eval(), dataset, stage.folder, torch.device("cpu"))
    return {
        "train/loss": loss,
        "train/concepts_used": float(concepts_used),
        "train/steps": float(config.steps),
        "train/bad_samples": float(len(bad.found)),
        "train/maskless_batches": float(maskless),
    }


def _views(config: TrainConfig, clip: Clip) -> Views:
    return Views(
        side=config.side,
        mask_grid=config.mask_grid,
        shortest_edge=config.shortest_edge,
        longest_edge=config.longest_edge,
        crop=config.crop,
        color_jitter=config.color_jitter,
        flip=config.flip,
        strong_view=config.strong_view,
        cutout_min=config.cutout_min,
        cutout_max=config.cutout_max,
        mean=clip.mean,
        std=clip.std,
    )


def new_decoder(seed: int) -> Decoder:
    """A decoder whose first values hang on the seed alone; the global random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Decoder()


def cosine_share(step: int, steps: int, final: float) -> float:
    """The share of the first learning rate at a step: a cosine from 1 to `final`."""
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * step / steps))


def make_optimizer(model: PixelCLIP, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW over image tower, prompts and decoder; norms and embeddings are not decayed."""
    backbone = model.student.trained_parameters()
    norms = {id(p) for part in model.decoder.modules() if isinstance(part, nn.GroupNorm) for p in part.parameters()}
    groups: dict[str, tuple[float, float, list[nn.Parameter]]] = {
        "backbone": (config.learning_rate_backbone, config.weight_decay, []),
        "backbone_no_decay": (config.learning_rate_backbone, 0.0, []),
        "prompts": (config.learning_rate_prompts, 0.0, [model.prompts.tokens]),
        "decoder": (config.learning_rate_decoder, config.weight_decay, []),
        "decoder_no_decay": (config.learning_rate_decoder, 0.0, []),
    }
    for name, parameter in backbone.items():
        groups["backbone_no_decay" if name.endswith("positional_embedding") else "backbone"][2].append(parameter)
    for parameter in model.decoder.parameters():
        groups["decoder_no_decay" if id(parameter) in norms else "decoder"][2].append(parameter)
    return torch.optim.AdamW(
        [{"name": name, "lr": rate, "weight_decay": decay, "params": p} for name, (rate, decay, p) in groups.items()],
        betas=(0.9, 0.999),
    )


def _state_tensors(model: PixelCLIP) -> Iterator[tuple[str, Tensor]]:
    """Everything that training changes in the model, by a name of its own."""
    for name, parameter in model.student.trained_parameters().items():
        yield f"student.{name}", parameter
    for name, parameter in model.teacher.trained_parameters().items():
        yield f"teacher.{name}", parameter
    yield "prompts.tokens", model.prompts.tokens
    for name, parameter in model.decoder.named_parameters():
        yield f"decoder.{name}", parameter


def save_state(path: Path, model: PixelCLIP, optimizer: torch.optim.AdamW, step: int) -> None:
    """Saves what a training needs to continue: weights, teacher, optimizer, number of steps done; atomically.

    Schedule, data position and random state are functions of the step and the seed, so they need no saving.
    """
    names = {id(tensor): name for name, tensor in _state_tensors(model)}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in _state_tensors(model)}
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            tensors[f"optimizer.{key}.{names[id(parameter)]}"] = value.detach().cpu().contiguous()
    temporary = path.with_suffix(".partial")
    save_file(tensors, temporary, metadata={"step": str(step)})
    with temporary.open("rb+") as file:
        os.fsync(file.fileno())
    temporary.replace(path)


@torch.no_grad()
def load_state(path: Path, model: PixelCLIP, optimizer: torch.optim.AdamW) -> int:
    """Restores `save_state`, where there is one; returns the number of steps done."""
    if not path.is_file():
        return 0
    tensors = read_tensors(path)
    with safe_open(path, framework="pt") as file:
        step = int(file.metadata()["step"])
    for name, tensor in _state_tensors(model):
        tensor.copy_(tensors[name])
    by_id = {id(tensor): name for name, tensor in _state_tensors(model)}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            name = by_id[id(parameter)]
            keys = ("step", "exp_avg", "exp_avg_sq")
            if f"optimizer.step.{name}" in tensors:
                state = {key: tensors[f"optimizer.{key}.{name}"] for key in keys}
                optimizer.state[parameter] = {
                    key: value if key == "step" else value.to(parameter.device) for key, value in state.items()
                }
    print(f"train: continues after step {step}", flush=True)
    return step
