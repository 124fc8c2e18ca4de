"""Time of the parts of a training step against the machine's peak: `python -m bench.roofline [bfloat16]`.

torch counts the operations (a multiply-add is two). The peak is the rate of a large matrix product.
"""

import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from bench.train_step import CONCEPTS, GRID, IMAGES, MASKS, SETTINGS, batch_of, model_of, random_clip
from pixelclip.models.clustering import merge_by_concept
from pixelclip.models.decoder import decoded_loss
from pixelclip.models.optimizer import make_optimizer


def _best(work: Callable[[], Any], rounds: int = 3) -> float:
    seconds = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


def _peak(precision: torch.dtype | None) -> tuple[float, float]:
    """Measure the operations per second of a matrix product and the bytes per second (read and written) of a copy."""
    size = 2048
    a, b = torch.randn(2, size, size).to(precision or torch.float32)
    large = torch.randn(1 << 26)
    other = torch.empty_like(large)
    copied = 2 * large.numel() * large.element_size()
    return 2 * size**3 / _best(lambda: a @ b, 8), copied / _best(lambda: other.copy_(large))


def main(words: list[str]) -> None:
    """Measure all parts of a step and print the table."""
    precision = torch.bfloat16 if words == ["bfloat16"] else None
    model = model_of(random_clip(), precision)
    optimizer, batch = make_optimizer(model, SETTINGS), batch_of(IMAGES, MASKS)
    with torch.no_grad():
        concepts = model.concepts()
        index = model.assign(model.mask_features(batch.weak, batch.masks, batch.image_index), concepts)[0]
        teacher = model.teacher(batch.weak)
        targets = merge_by_concept(batch.masks, batch.image_index, index, IMAGES, CONCEPTS).flatten(0, 1)
    covered = targets.unflatten(0, (IMAGES, CONCEPTS)).any(dim=1)
    owner = torch.arange(IMAGES).repeat_interleave(CONCEPTS)

    def student() -> None:
        features = F.normalize(model.student(batch.strong), dim=1)
        features.sum().backward()

    def text() -> None:
        model.concepts().sum().backward()

    def decoder() -> None:
        maps = torch.randn(IMAGES * CONCEPTS, *teacher.shape[2:], requires_grad=True)
        decoded_loss(model.decoder, maps, targets, covered, owner, covered.sum() * CONCEPTS, precision)[0].backward()

    def teacher_and_pool() -> Tensor:
        return model.mask_features(batch.weak, batch.masks, batch.image_index, [MASKS] * IMAGES)

    def rest() -> None:
        nn.utils.clip_grad_norm_(model.learning(), SETTINGS.gradient_clip)
        optimizer.step()
        model.update_teacher(SETTINGS.teacher_momentum)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        model.accumulate([batch])
        rest()

    operations, bandwidth = _peak(precision)
    print(
        f"{IMAGES} images, {MASKS} masks, K {CONCEPTS}, grid {GRID}, {precision or torch.float32}; a matrix product: "
        f"{operations / 1e9:.0f} GFLOP/s, a copy: {bandwidth / 1e9:.1f} GB/s"
    )
    print(f"{'':<28}{'GFLOP':>8}{'seconds':>9}{'of peak':>9}")
    parts = {
        "student, both passes": student,
        "teacher, pooled masks": teacher_and_pool,
        "prompts, both passes": text,
        "decoder and loss, both passes": decoder,
        "clip, AdamW, EMA": rest,
        "whole step": step,
    }
    for name, work in parts.items():
        with FlopCounterMode(display=False) as counter:
            work()
        seconds, count = _best(work), counter.get_total_flops()
        print(f"{name:<28}{count / 1e9:>8.0f}{seconds:>9.3f}{100 * count / seconds / operations:>8.0f}%", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
