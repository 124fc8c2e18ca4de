"""`python -m benchmarks [NAME ...]`: every benchmark in processes of its own, a table, and `benchmarks/results.json`."""

import importlib
import json
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.case import compare, peak_memory

NAMES = (
    *("train_step", "train_step_bfloat16", "pool_masks", "loader", "amg", "dino_kmeans"),
    *("evaluate", "evaluate_bfloat16"),
)
RESULTS = Path(__file__).with_name("results.json")


def _in_process(name: str, part: str) -> dict[str, Any]:
    """What one part of a benchmark measures: its memory must not be another's leftovers."""
    command = [sys.executable, "-m", "benchmarks", "--part", name, part]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"benchmark {name} ({part}) failed with exit code {done.returncode}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def _part(name: str, part: str) -> dict[str, Any]:
    case = importlib.import_module(f"benchmarks.{name}").make()
    return compare(case) if part == "time" else peak_memory(getattr(case, part))


def _machine() -> dict[str, Any]:
    import torch

    said = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.partition(":")[2].strip() for line in said if line.startswith("model name")), platform.processor())
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    threads = torch.get_num_threads()
    return {"cpu": model, "cores": os.cpu_count(), "threads": threads, "gpu": gpu, "torch": torch.__version__}


def _row(name: str, found: dict[str, Any]) -> str:
    def size(side: str) -> str:
        return f"{found[f'memory_{side}']['above'] / 2**20:>8.0f} MiB"

    times = f"{found['seconds_baseline']:>10.3f} s {found['seconds_ours']:>8.3f} s"
    return f"{name:<20}{times}{found['ratio']:>9.2f}{size('baseline')}{size('ours')}   {found['what']}; {found['same']}"


def main(words: list[str]) -> None:
    """Runs the benchmarks named, or all of them."""
    if words[:1] == ["--part"]:
        print(json.dumps(_part(*words[1:])))
        return
    if unknown := [word for word in words if word not in NAMES]:
        raise SystemExit(f"unknown benchmark {unknown[0]!r}; there are {', '.join(NAMES)}")
    there = json.loads(RESULTS.read_text())["results"] if words and RESULTS.is_file() else {}
    print(f"{'':<20}{'baseline':>12}{'ours':>11}{'ratio':>9}{'memory, baseline':>16}{'ours':>8}", flush=True)
    for name in words or NAMES:
        found = _in_process(name, "time")
        found |= {f"memory_{side}": _in_process(name, side) for side in ("baseline", "ours")}
        there[name] = found | {"machine": _machine(), "when": datetime.now(UTC).isoformat(timespec="seconds")}
        print(_row(name, found), flush=True)
        RESULTS.write_text(json.dumps({"results": there}, indent=2) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
