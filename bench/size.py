"""Memory and time of the loader over the size of the training set: `python -m bench.size`; writes `bench/size.json`.

Memory is the PSS of the main process and its children, which counts shared pages once. Images are small, because only the
growth with their number matters.
"""

import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from pixelclip.data.dataset import MaskedImages, load_batches, sample_indices
from pixelclip.data.views import Views

SIZES, PER_SHARD = (100, 1_000, 10_000, 100_000), 100
WORKERS, BATCH, WARM, STEPS = 2, 16, 20, 300
VIEWS = Views(
    side=64, mask_grid=64, shortest_edge=96, longest_edge=144, crop=64, color_jitter=True, flip=True, strong_view=True,
    cutout_min=0.1, cutout_max=0.5, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25),
)  # fmt: skip
RESULTS = Path(__file__).with_name("size.json")


def _pss() -> int:
    """Return the bytes of this process and its descendants."""
    parent_of, total = {}, 0
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent_of[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:  # the process has ended
            continue
    ours = {int(Path("/proc/self").resolve().name)}
    while more := {pid for pid, parent in parent_of.items() if parent in ours} - ours:
        ours |= more
    for pid in ours:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        total += next(1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total


def _measure(folder: Path, samples: int) -> dict[str, Any]:
    """Read a fixed number of batches from as many shards of a folder as contain `samples`."""
    shards = sorted(folder.glob("*.tar"))[: samples // PER_SHARD]
    start = time.perf_counter()
    dataset = MaskedImages(shards, VIEWS, seed=0)
    indexed = time.perf_counter()
    loader = iter(load_batches(dataset, sample_indices(BATCH, range(BATCH), 1, 0, WARM + STEPS), WORKERS, pin=False))
    first, seconds = 0.0, []
    for step in range(WARM + STEPS):
        before = time.perf_counter()
        next(loader)
        seconds.append(time.perf_counter() - before)
        first = first or time.perf_counter() - indexed
        if step == WARM + STEPS - 20:  # while the workers read
            memory = _pss()
    return {
        "samples": len(dataset),
        "pss": memory,
        "milliseconds_per_sample": 1000 * float(np.sum(seconds[WARM:])) / (STEPS * BATCH),
        "seconds_to_index": indexed - start,
        "seconds_to_first_batch": first,
    }


def main() -> None:
    """Measure every size in a separate process; fail if memory varies by more than 10 %."""
    from bench.loader import write_shards  # not at the top: workers import this module

    with tempfile.TemporaryDirectory(prefix="pixelclip-size-") as name:
        folder = Path(name)
        write_shards(folder, images=PER_SHARD, edges=(96, 144), masks=3)
        for number in range(1, max(SIZES) // PER_SHARD):
            shutil.copyfile(folder / "0.tar", folder / f"{number}.tar")
        results = []
        for samples in SIZES:
            words = [sys.executable, "-m", "bench.size", str(folder), str(samples)]
            results.append(json.loads(subprocess.run(words, stdout=subprocess.PIPE, check=True, text=True).stdout))
            row = results[-1]
            print(
                f"{row['samples']:>7} samples {row['pss'] / 2**20:>7.0f} MiB "
                f"{row['milliseconds_per_sample']:>6.2f} ms per sample {row['seconds_to_index']:>7.2f} s to index "
                f"{row['seconds_to_first_batch']:>6.2f} s to the first batch",
                flush=True,
            )
    memory = [row["pss"] for row in results]
    RESULTS.write_text(json.dumps({"workers": WORKERS, "flat": max(memory) / min(memory), "sizes": results}, indent=2) + "\n")
    if max(memory) > 1.1 * min(memory):
        raise SystemExit(f"memory grows with the training set, by a factor of {max(memory) / min(memory):.2f}")


if __name__ == "__main__":
    if sys.argv[1:]:
        print(json.dumps(_measure(Path(sys.argv[1]), int(sys.argv[2]))))
    else:
        main()
