"""The harness of `make bench`: alternation, comparison and memory, but not speed."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from bench import loader  # noqa: E402
from bench.__main__ import NAMES  # noqa: E402
from bench.case import Case, compare  # noqa: E402
from pixelclip.data.dataset import MaskedImages, collate  # noqa: E402


def same(one: int, other: int) -> str:
    assert one == other
    return "equal"


def test_both_sides_alternate_after_one_comparison():
    calls: list[str] = []

    def call(name: str) -> int:
        calls.append(name)
        return 7

    found = compare(Case("seven", lambda: call("baseline"), lambda: call("ours"), same, rounds=2))
    assert calls == ["baseline", "ours", "baseline", "ours", "ours", "baseline"]
    assert found["same"] == "equal"
    assert len(found["ratios"]) == 2


def test_different_results_are_not_timed():
    with pytest.raises(AssertionError):
        compare(Case("differs", lambda: 1, lambda: 2, same))


def test_memory_counts_temporary_allocations():
    # In a separate process, as in `make bench`: memory freed during the call would be subtracted.
    work = 'from bench.case import peak_memory; print(peak_memory(lambda: bytearray(b"x" * (64 << 20)) and None)["above"])'
    above = int(subprocess.run([sys.executable, "-c", work], cwd=ROOT, capture_output=True, check=True).stdout)
    assert 64 << 20 <= above < 256 << 20


@pytest.mark.parametrize("name", NAMES)
def test_every_benchmark_has_a_comparison(name):
    assert callable(importlib.import_module(f"bench.{name}").make)


def test_both_sides_of_the_loader_read_the_same_samples(tmp_path):
    shards = loader.write_shards(tmp_path, loader.BATCH, edges=(600, 900), masks=12)
    dataset = MaskedImages(shards, loader.paper_views(), seed=0)
    literal = loader.DecodeAll(shards, dataset.views, dataset)
    theirs = loader._join([literal[position] for position in range(loader.BATCH)])
    ours = collate([dataset[position] for position in range(loader.BATCH)]).to(torch.device("cpu"))
    assert "masks agree in 99.9" in loader._same([theirs], [ours])


def test_unknown_benchmark_is_rejected():
    done = subprocess.run([sys.executable, "-m", "bench", "speed"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0
    assert "unknown benchmark 'speed'; the benchmarks are train_step" in done.stderr
