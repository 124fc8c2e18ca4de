"""Time and memory of a step over concepts and masks: `python -m bench.scaling`; writes `bench/scaling.json`."""

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from bench.case import peak_memory

CONCEPTS = (16, 32, 64, 128, 256, 512)
MASKS = (10, 20, 50, 100, 200, 500)


def _measure(concepts: int, masks: int) -> dict[str, Any]:
    """Measure steps of one image (ViT-B/16, float32): memory added by the first, best time of the next two."""
    from bench.train_step import batch_of, model_of, our_step, random_clip
    from pixelclip.config import TrainConfig
    from pixelclip.models.optimizer import make_optimizer

    settings = TrainConfig(concepts=concepts)
    model = model_of(random_clip(), settings=settings)
    optimizer, batch = make_optimizer(model, settings), batch_of(1, masks)
    above = peak_memory(lambda: our_step(model, optimizer, batch))["above"]  # later steps reuse its memory
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        our_step(model, optimizer, batch)
        seconds.append(time.perf_counter() - start)
    return {"seconds": min(seconds), "above": above}


def _in_process(concepts: int, masks: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "bench.scaling", str(concepts), str(masks)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=os.environ)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def _table(name: str, rows: dict[int, dict[str, Any]]) -> None:
    print(f"{name:>8} {'seconds':>9} {'MiB':>7}  exponent from the row above")
    before = None
    for number, row in rows.items():
        exponent = ""
        if before:
            exponent = f"{math.log(row['seconds'] / before[1]['seconds']) / math.log(number / before[0]):.2f}"
        print(f"{number:>8} {row['seconds']:>9.3f} {row['above'] / 2**20:>7.0f}  {exponent}", flush=True)
        before = (number, row)
    (first, low), (last, high) = next(iter(rows.items())), list(rows.items())[-1]
    slope = (high["seconds"] - low["seconds"]) / (last - first)
    straight = [row["seconds"] / (low["seconds"] + slope * (number - first)) for number, row in rows.items()]
    print(f"line through both ends: {low['seconds'] - slope * first:.3f} s + {1000 * slope:.2f} ms each; maximum deviation "
          f"{100 * max(abs(ratio - 1) for ratio in straight):.0f} %\n")  # fmt: skip


def main(words: list[str]) -> None:
    """Measure all sizes, each in a separate process, or only the size `CONCEPTS MASKS`."""
    if words:
        print(json.dumps(_measure(*map(int, words))))
        return
    over_concepts = {number: _in_process(number, 40) for number in CONCEPTS}
    _table("concepts", over_concepts)
    over_masks = {number: _in_process(64, number) for number in MASKS}
    _table("masks", over_masks)
    results = {"concepts, 40 masks": over_concepts, "masks, 64 concepts": over_masks}
    Path(__file__).with_name("scaling.json").write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
