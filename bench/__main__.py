"""Run benchmarks, print a table and write `bench/results.json`: `python -m bench [NAME ...]`."""

import importlib
import json
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench.case import compare, peak_memory

NAMES = (
    *("train_step", "train_step_bfloat16", "pool_masks", "loader", "amg", "dino_kmeans"),
    *("evaluate", "evaluate_bfloat16"),
    *("quality_best", "pamr", "propagation"),
)
RESULTS = Path(__file__).with_name("results.json")


def _in_process(name: str, part: str) -> dict[str, Any]:
    """Run one part of a benchmark in a new process, whose memory contains nothing from other parts."""
    command = [sys.executable, "-m", "bench", "--part", name, part]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"benchmark {name} ({part}) failed with exit code {done.returncode}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def _part(name: str, part: str) -> dict[str, Any]:
    case = importlib.import_module(f"bench.{name}").make()
    return compare(case) if part == "time" else peak_memory(getattr(case, part))


def _machine() -> dict[str, Any]:
    import torch

    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor())
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    threads = torch.get_num_threads()
    return {"cpu": model, "cores": os.cpu_count(), "threads": threads, "gpu": gpu, "torch": torch.__version__}


def _row(name: str, result: dict[str, Any]) -> str:
    def size(side: str) -> str:
        return f"{result[f'memory_{side}']['above'] / 2**20:>8.0f} MiB"

    times = f"{result['seconds_baseline']:>10.3f} s {result['seconds_ours']:>8.3f} s"
    return f"{name:<20}{times}{result['ratio']:>9.2f}{size('baseline')}{size('ours')}   {result['what']}; {result['same']}"


def main(words: list[str]) -> None:
    """Run the benchmarks in `words`, or all."""
    if words[:1] == ["--part"]:
        print(json.dumps(_part(*words[1:])))
        return
    if unknown := [word for word in words if word not in NAMES]:
        raise SystemExit(f"unknown benchmark {unknown[0]!r}; the benchmarks are {', '.join(NAMES)}")
    results = json.loads(RESULTS.read_text())["results"] if words and RESULTS.is_file() else {}
    print(f"{'':<20}{'baseline':>12}{'ours':>11}{'ratio':>9}{'memory, baseline':>16}{'ours':>8}", flush=True)
    for name in words or NAMES:
        result = _in_process(name, "time")
        result |= {f"memory_{side}": _in_process(name, side) for side in ("baseline", "ours")}
        results[name] = result | {"machine": _machine(), "when": datetime.now(UTC).isoformat(timespec="seconds")}
        print(_row(name, result), flush=True)
        RESULTS.write_text(json.dumps({"results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
