"""STAGE train: train PixelCLIP on shards with masks, starting from a pretrained CLIP (PixelCLIP, section 3)."""

import glob
import math
import signal
import time
from collections import deque
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from pixelclip.config import TrainConfig
from pixelclip.data.class_names import benchmark_names, names_file
from pixelclip.data.dataset import MaskedImages, collate, load_batches, sample_indices
from pixelclip.data.shard_sources import describe_shards, list_shards
from pixelclip.data.views import Views
from pixelclip.distributed import ProcessGroup, copy_to_host_async, init_process_group, pick_precision
from pixelclip.evaluation.during_training import BEST, TrainingEvaluation
from pixelclip.mask_generators.dino import load_dino, masks_of_batch
from pixelclip.models.backbone import Backbone, check_multiple, check_side
from pixelclip.models.checkpoint import CONFIG, WEIGHTS, Clip, load_clip, save_model
from pixelclip.models.clip_sources import clip_folder
from pixelclip.models.clustering import pool_masks
from pixelclip.models.concepts import new_concepts
from pixelclip.models.decoder import new_decoder
from pixelclip.models.optimizer import learning_rate_factor, make_optimizer
from pixelclip.models.pixelclip import PixelCLIP
from pixelclip.models.tokenizer import TOKENIZER_FILES, describe_tokenizer
from pixelclip.models.training_state import Progress, load_state, save_state
from pixelclip.storage.download import local_copy
from pixelclip.storage.progress import track
from pixelclip.storage.urls import public_url
from pixelclip.toy_scenes.scenes import CLASSES
from pixelclip.tracking.description import run_name
from pixelclip.tracking.journal import write_table
from pixelclip.tracking.run import KILLED, Run
from pixelclip.tracking.trainjob import TrainJobStatus
from pixelclip.visualization.pictures import concept_words, examples_of, gallery, segmentation_picture, training_picture
from pixelclip.workflow.bad_samples import BadSamples
from pixelclip.workflow.cpus import count_workers
from pixelclip.workflow.stage import Metrics, Stage, describe
from pixelclip.workflow.termination import Terminated, deferred

STATE_FILE = "state.safetensors"
_MOST_WORKERS = 4
"""Loader processes by default, if this process has as many CPUs."""
_PICTURE_IMAGES = 4
"""Images in a training picture."""
_MAX_MASKLESS = 0.5  # of the steps; with more the masks are considered unusable


def run(masks: Path | str, out: Path, config: TrainConfig) -> Metrics:
    """Train PixelCLIP. An interrupted run resumes: on a CPU with bit-identical losses, on a GPU up to rounding.

    Under torchrun all processes train one model; batch, Sinkhorn assignment and gradients equal those of one process.

    Args:
        masks: shards with masks.
        out: model folder: weights, config, provenance, curves, pictures, gallery. Only the main process writes it.
        config: settings.

    Returns:
        `train/loss` and `train/concepts_used` of the last step, `train/bad_samples`, `train/maskless_batches`, ...

    Raises:
        ValueError: unusable input or settings, MLflow unreachable at the start, or a loss that is not finite.
    """
    shards = list_shards(masks)
    weights = clip_folder(config.clip)
    with init_process_group(config.device) as group:
        if config.batch_size < group.size * config.accumulate:
            raise ValueError(
                f"train.batch_size {config.batch_size} is too small for {group.size} processes with train.accumulate "
                f"{config.accumulate}: every micro-batch needs at least one image"
            )
        dino = local_copy(config.dino) if config.dino else None
        inputs = group.broadcast_object(_inputs(masks, weights, dino, config) if group.is_main else None)
        stage = Stage("train", out, inputs, config)
        if group.broadcast_object(stage.finished):
            return group.broadcast_object(stage.reuse() if group.is_main else {})
        clip = load_clip(config.clip)
        check_side("train.side", config.side, Backbone(clip.model.visual, config.residual))
        network = load_dino(dino) if dino else None
        if network:
            check_multiple("train.dino_side", config.dino_side, network.patch_embed.patch_size[0])
        with stage if group.is_main else nullcontext():
            shared = config.model_dump(include={field.name for field in fields(Views)})
            views = Views(**{**shared, "dino_side": config.dino_side if dino else 0}, mean=clip.mean, std=clip.std)
            dataset = MaskedImages(shards, views, config.seed, dino is None, config.shards_at_once)
            tracked: Run | None = None
            try:
                if group.is_main:
                    with deferred():  # otherwise a run could stay open that nobody knows
                        provenance = stage.provenance()
                        tracked = Run.start(stage.folder, config.run_name or run_name(provenance), provenance, config.run_tags)
                with deferred() as received:
                    metrics = _train(stage, clip, network, dataset, config, group, tracked, received)
            except BaseException as error:
                if tracked:
                    tracked.finish(KILLED if isinstance(error, Terminated) else "FAILED")
                raise
            if tracked:
                tracked.values(metrics)
                tracked.finish()
                write_table(stage.folder)
                own = glob.escape(stage.folder.name)  # not those of the folder of the best model
                stage.finish(metrics, files=[f"{own}/{name}" for name in (WEIGHTS, CONFIG, *TOKENIZER_FILES)])
                (stage.out / STATE_FILE).unlink(missing_ok=True)  # not earlier: an interrupted run resumes from it
                used = f"{metrics['train/concepts_used']:g} concepts used"
                print(f"train: finished after {config.steps} steps: loss {metrics['train/loss']:.4f}, {used}", flush=True)
            return metrics


def _inputs(masks: Path | str, clip: Path | None, dino: Path | None, config: TrainConfig) -> dict[str, dict[str, Any]]:
    """Identify all inputs; shards without provenance are read completely."""
    inputs = {"masks": describe_shards(masks)} | ({"clip": describe(clip), **describe_tokenizer(clip)} if clip else {})
    if config.concept_names and (names := names_file(config.concept_names)):
        inputs["concept_names"] = describe(names)
    if dino:
        inputs["dino"] = {**describe(dino), "path": config.dino}
    return inputs


def _train(
    stage: Stage,
    clip: Clip,
    dino: VisionTransformer | None,
    dataset: MaskedImages,
    config: TrainConfig,
    group: ProcessGroup,
    tracked: Run | None,
    received: Callable[[], int],
) -> Metrics:
    # Model. Every process builds the same one, because initial values depend only on the seed.
    text = clip.text_tower()
    precision = pick_precision(config.precision, group.device)
    student = Backbone(clip.model.visual, config.residual, precision).to(group.device)
    dino = dino and dino.to(group.device)
    described = None
    if config.concept_init == "data":
        fresh = group.is_main and not (stage.folder / STATE_FILE).is_file()  # otherwise that state has the prompts
        described = group.broadcast_object(_first_mask_features(student, dataset, dino, config) if fresh else None)
    model = PixelCLIP(
        student,
        text,
        new_concepts(text, config, described),
        new_decoder(config.seed),
        config.assignment_scale,
        config.sinkhorn_iterations,
        config.clustering,
        precision,
        config.decoded_concepts,
    )
    model = model.to(group.device).train()
    optimizer = make_optimizer(model, config)
    initial_rates = [parameters["lr"] for parameters in optimizer.param_groups]
    resumed = load_state(stage.folder / STATE_FILE, model, optimizer, group)
    start = resumed.steps

    origin = {"spec": public_url(config.clip), "md5": stage.inputs.get("clip", {}).get("md5", "")}
    save = partial(
        save_model,  # the student's tower is clip.model.visual itself
        clip=clip,
        prompts=model.prompts,
        decoder=model.decoder,
        side=config.side,
        residual=config.residual,
        origin=origin,
        templates=config.templates,
    )
    evaluates = tracked and config.evaluate_every
    evaluation = TrainingEvaluation(config, clip, model, stage.folder, group.device) if evaluates else None
    shipped = CLASSES if config.clip == "toy" else benchmark_names("readable", "pascal-context")
    names = evaluation.classes if evaluation else shipped  # for pictures

    # Data.
    bad = BadSamples("train", config.max_bad_share, found=list(dataset.bad))
    (bad.check if group.is_main else bad.stop_if_too_many)(_drawn_from(dataset, 0))
    if dataset.without_masks and group.is_main:
        print(f"train: {dataset.without_masks} samples have no masks and are skipped", flush=True)
    index_lists = sample_indices(
        config.batch_size, group.local_range(config.batch_size), config.accumulate, start, config.steps
    )
    workers = count_workers(config.workers, most=_MOST_WORKERS)
    loader = iter(load_batches(dataset, index_lists, workers, pin=group.device.type == "cuda"))
    if tracked:
        tracked.monitor_system()  # its thread starts after the loader's processes
        todo = f"CLIP {origin['spec']}, {config.steps} steps, batch {config.batch_size}"
        print(f"train: {todo}, {group.device}, {precision or 'float32'}", flush=True)
    status = TrainJobStatus().send
    bar = track(range(start, config.steps), "train", "step", config.steps, start, enabled=group.is_main, report=status)
    since = saved_at = time.monotonic()
    output, maskless, num_bad, seen = None, resumed.maskless, resumed.bad, 0

    def progress(steps: int) -> Progress:
        loss, used = (output.loss.item(), output.concepts_used()) if output else (resumed.loss, resumed.concepts_used)
        return Progress(steps=steps, maskless=maskless, bad=num_bad, loss=loss, concepts_used=used)

    pending: deque[tuple[int, Callable[[], list[float]]]] = deque()
    for step in bar:
        micro_batches = [next(loader) for _ in range(config.accumulate)]

        # Report and count bad samples; too many stop the training.
        bad.found += [name for batch in micro_batches for name in batch.bad]
        local = [len(bad.found) - len(dataset.bad), sum(len(batch.masks) for batch in micro_batches), received()]
        new_bad, num_masks, signals = group.all_reduce(torch.tensor(local)).tolist()
        if signals:  # of any process; all of them stop before this step
            if tracked:
                tracked.mark_killed()
                _check_finite(pending, keep=0)
                save_state(stage.folder / STATE_FILE, model, optimizer, progress(step))
            raise Terminated(received() or signal.SIGTERM, f"after step {step} of {config.steps}")
        num_bad = resumed.bad + new_bad
        if num_bad:
            bad.stop_if_too_many(_drawn_from(dataset, (step + 1) * config.batch_size), len(dataset.bad) + num_bad)
        if num_masks == 0:
            maskless += 1
            if maskless > max(10, _MAX_MASKLESS * (step + 1)) or maskless == config.steps:
                raise ValueError(
                    f"step {step + 1}: {maskless} batches contained no mask; check the masks or increase train.crop"
                )
            continue
        batches = [batch.to(group.device) for batch in micro_batches]
        if dino:
            batches = [masks_of_batch(dino, batch, config.dino_clusters, config.seed) for batch in batches]

        # Schedule.
        for parameters, rate in zip(optimizer.param_groups, initial_rates, strict=True):
            parameters["lr"] = rate * learning_rate_factor(parameters["name"], step, config)

        # Forward, loss, backward, clip. Seed per step, so that a resumed run draws the same stochastic depth.
        torch.manual_seed(config.seed * 1_000_003 + step * group.size + group.rank)
        optimizer.zero_grad(set_to_none=True)
        evaluated = config.evaluate_every and ((step + 1) % config.evaluate_every == 0 or step + 1 == config.steps)
        logged = (step + 1) % config.log_every == 0 or step + 1 == config.steps or evaluated
        pictured = tracked and config.picture_every and ((step + 1) % config.picture_every == 0 or step == 0)
        output = model.accumulate(batches, group, shown=_PICTURE_IMAGES if pictured else 0)
        norm = nn.utils.clip_grad_norm_(model.learning(), config.gradient_clip)
        saved = (step + 1) % config.checkpoint_every == 0 or step + 1 == config.steps
        saved |= 0 < 60 * config.checkpoint_minutes <= time.monotonic() - saved_at
        pending.append((step, copy_to_host_async(torch.stack([output.loss, norm]))))
        # On a GPU check one step late, so that the host does not wait. Check before a log or a checkpoint, too.
        _check_finite(pending, keep=int(group.device.type == "cuda" and not (logged or saved)))

        # Step, teacher.
        optimizer.step()
        model.update_teacher(config.teacher_momentum)

        scores: Metrics = {}  # of the main process
        if evaluation and tracked and evaluated:
            paused = time.monotonic()
            scores[f"train/miou_{evaluation.name}"], found = evaluation.run(step + 1, save)
            tracked.image(segmentation_picture(examples_of(found), names), f"segmentations {evaluation.name}", step + 1)
            since += time.monotonic() - paused

        # Log.
        seen += config.batch_size
        if tracked and logged:
            speed, seen, since = seen / (time.monotonic() - since), 0, time.monotonic()
            bar.show(loss=f"{output.loss.item():.4f}", images_s=f"{speed:.1f}")
            entropy = -(output.assignment * output.assignment.clamp_min(1e-12).log()).sum(dim=-1).mean().item()
            rates = {parameters["name"]: parameters["lr"] for parameters in optimizer.param_groups}
            tracked.log(
                {
                    "train/loss": output.loss.item(),
                    "train/gradient_norm": norm.item(),
                    "train/concepts_used": output.concepts_used(),
                    "train/assignment_entropy": entropy,
                    "train/images_per_second": speed,
                    **{f"train/learning_rate_{name}": rate for name, rate in rates.items() if not name.endswith("_no_decay")},
                    **scores,
                },
                step + 1,
            )
        if tracked and pictured and len(output.logits):
            picture = stage.folder / "pictures" / f"step-{step + 1:06d}.jpg"
            picture.parent.mkdir(exist_ok=True)
            drawn = training_picture(batches, output, clip.mean, clip.std, concept_words(model, names))
            if not picture.is_file():  # otherwise an interrupted run has sent it
                tracked.image(drawn, "training", step + 1)
            drawn.save(picture, quality=85)
            tracked.artifact(picture, "pictures")

        # Checkpoint.
        if group.is_main and saved:
            save_state(stage.folder / STATE_FILE, model, optimizer, progress(step + 1))
            saved_at = time.monotonic()

    _check_finite(pending, keep=0)
    bad.found = sum(group.all_gather_object(bad.found[len(dataset.bad) :]), list(dataset.bad))
    (bad.check if group.is_main else bad.stop_if_too_many)(
        _drawn_from(dataset, config.steps * config.batch_size), len(dataset.bad) + num_bad
    )
    if group.is_main:
        if not dino:  # on the training device: a CPU would take hours for a large tower in bfloat16
            gallery(model.eval(), dataset, stage.folder, group.device)
        model = model.cpu()
        save(stage.folder)
        if tracked and evaluation and (best := evaluation.finish(stage.provenance())):
            tracked.model(stage.folder / BEST, f"train/best_miou_{best['labelled']}", best["miou"], best["step"])
    last = progress(config.steps)
    return {
        "train/loss": last.loss,
        "train/concepts_used": float(last.concepts_used),
        "train/steps": float(config.steps),
        "train/bad_samples": float(len(dataset.bad) + num_bad),
        "train/maskless_batches": float(maskless),
    }


def _drawn_from(dataset: MaskedImages, position: int) -> int:
    """Return an upper bound on the samples drawn so far, counting each started epoch in full."""
    return max(1, math.ceil(position / len(dataset))) * (len(dataset) + len(dataset.bad))


def _check_finite(pending: deque[tuple[int, Callable[[], list[float]]]], keep: int) -> None:
    """Check loss and gradient norm of pending steps, oldest first, until `keep` remain."""
    while len(pending) > keep:
        step, read = pending.popleft()
        loss, norm = read()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise ValueError(
                f"step {step + 1}: loss {loss} or gradient norm {norm} is not finite, so the step is discarded; "
                "lower the learning rates (train.learning_rate_*) or check the images and masks"
            )


@torch.inference_mode()
def _first_mask_features(
    backbone: Backbone, dataset: MaskedImages, dino: VisionTransformer | None, config: TrainConfig
) -> Tensor:
    """Pool the initial CLIP's features inside the masks of the first `concept_init_images` samples: [N, C], on the CPU."""
    device = next(backbone.parameters()).device
    features = []
    for first in range(0, config.concept_init_images, config.batch_size):
        positions = range(first, min(first + config.batch_size, config.concept_init_images))
        batch = collate([dataset[position] for position in positions]).to(device)
        batch = masks_of_batch(dino, batch, config.dino_clusters, config.seed) if dino else batch
        if len(batch.masks):
            features.append(pool_masks(backbone.eval()(batch.weak), batch.masks, batch.image_index, batch.counts).cpu())
    if not features:
        raise ValueError(f"the first {config.concept_init_images} samples have no masks; check them or increase train.crop")
    return torch.cat(features)
