"""Several processes or micro-batches train exactly like one process with the whole batch."""

import json
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from helpers import fake_data, gradients, tiny, training, two_ranks
from helpers.training import SETTINGS
from pixelclip import distributed, train
from pixelclip.config import TrainConfig
from pixelclip.distributed import (
    SINGLE_PROCESS,
    ProcessGroup,
    copy_to_host_async,
    init_process_group,
    pick_device,
    pick_precision,
)

clip, shards = training.clip, training.shards
TWO = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"]


def losses(folder: Path) -> torch.Tensor:
    return torch.tensor(training.losses(folder), dtype=torch.double)


@pytest.fixture(scope="module")
def alone(shards, clip, tmp_path_factory) -> Path:
    """Train in one process without micro-batches."""
    folder = tmp_path_factory.mktemp("alone")
    with pytest.MonkeyPatch.context() as patch:
        tiny.mlflow_at(patch, folder / "mlflow")
        train.run(shards, folder / "model", TrainConfig(**SETTINGS, clip=str(clip)))
    return folder / "model"


def train_words(shards: Path, clip: Path, out: Path, **settings: object) -> list[str]:
    words = [f"{name}={value}" for name, value in {**SETTINGS, "clip": clip, **settings}.items()]
    return ["pixelclip", "train", "--masks", str(shards), "--out", str(out), *words]


def test_two_processes_train_like_one_and_only_the_main_process_writes(alone, shards, clip, tmp_path, monkeypatch):
    client = tiny.mlflow_at(monkeypatch, tmp_path / "mlflow")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    completed = subprocess.run(
        [*TWO, *train_words(shards, clip, tmp_path / "model")], env=environment, capture_output=True, timeout=250
    )
    assert completed.returncode == 0, completed.stderr[-3000:].decode()
    torch.testing.assert_close(losses(tmp_path / "model"), losses(alone), atol=1e-5, rtol=0)
    one, two = (load_file(folder / "model.safetensors") for folder in (alone, tmp_path / "model"))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, atol=2e-3, rtol=1e-3, msg=name)
    assert len(client.search_runs([e.experiment_id for e in client.search_experiments()])) == 1
    metrics = [json.loads((folder / "metrics.json").read_text()) for folder in (alone, tmp_path / "model")]
    assert metrics[0]["train/concepts_used"] == metrics[1]["train/concepts_used"]


def test_two_processes_compute_the_gradients_of_one(tmp_path):
    """Adam is invariant to the scale of gradients, so the losses would not reveal a wrong scale."""
    two_ranks.start("helpers.gradients", str(tmp_path / "two.safetensors"))
    one, two = gradients.gradients(SINGLE_PROCESS), load_file(tmp_path / "two.safetensors")
    assert one.keys() == two.keys()
    for module in ("student", "prompts", "decoder"):
        ours, theirs = (
            torch.cat([gradient[name].flatten() for name in one if name.startswith(module)]) for gradient in (one, two)
        )
        assert ours.norm() > 1e-4
        assert (ours - theirs).norm() < 1e-4 * ours.norm(), module


@pytest.mark.slow
def test_two_processes_resume_a_run_of_one(alone, shards, clip, tmp_path, monkeypatch):
    tiny.mlflow_at(monkeypatch, tmp_path / "mlflow")

    with monkeypatch.context() as patch:
        training.kill_at(10, patch)
        with pytest.raises(training.Killed):
            train.run(shards, tmp_path / "model", TrainConfig(**SETTINGS, clip=str(clip)))
    two_ranks.start(*train_words(shards, clip, tmp_path / "model"))
    torch.testing.assert_close(losses(tmp_path / "model"), losses(alone), atol=1e-5, rtol=0)


@pytest.mark.parametrize("accumulate", [2, 5])
def test_micro_batches_train_like_one_batch(alone, shards, clip, tmp_path, monkeypatch, accumulate):
    tiny.mlflow_at(monkeypatch, tmp_path / "mlflow")
    train.run(shards, tmp_path / "model", TrainConfig(**SETTINGS, clip=str(clip), accumulate=accumulate))
    torch.testing.assert_close(losses(tmp_path / "model"), losses(alone), atol=1e-5, rtol=0)


def test_more_micro_batches_than_images_are_rejected(shards, clip, tmp_path):
    with pytest.raises(ValueError, match=r"batch_size 5 is too small for 1 processes with train\.accumulate 6"):
        train.run(shards, tmp_path / "model", TrainConfig(**SETTINGS, clip=str(clip), accumulate=6))


def test_local_ranges_are_complete_and_balanced():
    for number in (0, 1, 7, 48):
        for size in (1, 2, 3, 8):
            ranges = [ProcessGroup(rank, size).local_range(number) for rank in range(size)]
            assert [index for part in ranges for index in part] == list(range(number))
            assert max(map(len, ranges)) - min(map(len, ranges)) <= 1


def test_single_process_needs_no_torch_process_group():
    with init_process_group("cpu") as alone:
        assert (alone.rank, alone.size, alone.is_main) == (0, 1, True)
        rows = torch.arange(6).view(3, 2)
        gathered, mine = alone.all_gather(rows)
        assert torch.equal(gathered[mine], rows)
        assert alone.all_gather_object("a") == ["a"]
        assert alone.broadcast_object(3) == 3


def test_missing_gpus_of_a_pod_are_an_error(monkeypatch):
    monkeypatch.setenv("PIXELCLIP_GPUS", "2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)  # the driver counts GPUs even if CUDA cannot initialise
    message = "CUDA finds 0 of the 2 GPUs that this pod requested"
    with pytest.raises(ValueError, match=message):
        pick_device("auto")
    assert pick_device("cpu").type == "cpu"
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message), init_process_group("auto"):
        pass


@pytest.mark.parametrize(
    ("device", "message"), [("cuda:1", "each process needs its own device"), ("cuda", "its machine has 0 GPUs")]
)
def test_each_rank_has_its_own_gpu(monkeypatch, device, message):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message), init_process_group(device):
        raise AssertionError


@pytest.mark.parametrize(("device", "current"), [("cuda:1", [torch.device("cuda:1")]), ("cuda", []), ("cpu", [])])
def test_single_process_uses_the_requested_gpu(monkeypatch, device, current):
    chosen = []
    monkeypatch.setattr(distributed, "pick_device", torch.device)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    with init_process_group(device) as alone:
        assert alone.device == torch.device(device)
    assert chosen == current


def test_copy_to_host_waits_on_the_stream_of_its_gpu(monkeypatch):
    """Record the calls of torch.cuda, so that the test needs no GPU."""
    calls = []
    event = SimpleNamespace(record=calls.append, synchronize=lambda: calls.append("waited"))
    monkeypatch.setattr(torch.cuda, "Event", lambda: event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    values = SimpleNamespace(device=torch.device("cuda:1"), to=lambda *args, **kwargs: torch.tensor([1.0, 2.0]))
    values.detach = lambda: values
    read = copy_to_host_async(values)
    assert calls == ["stream of cuda:1"]
    assert read() == [1.0, 2.0]
    assert calls[1:] == ["waited"]


def test_all_gather_exchanges_counts_on_the_cpu(monkeypatch):
    """Counts on a GPU would require a synchronization."""
    backends, devices = [], []
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda backend, timeout: backends.append(backend))
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: None)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda values: devices.append(values.device.type))
    monkeypatch.setattr(torch.distributed, "all_gather", lambda gathered, rows: devices.append(rows.device.type))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    with init_process_group("cuda") as two:
        rows, mine = two.all_gather(torch.zeros(3, 5, device="meta"))
    assert backends == ["cpu:gloo,cuda:nccl"]
    assert devices == ["cpu", "meta"]
    assert (rows.shape, mine) == ((3, 5), slice(0, 3))


@pytest.mark.parametrize("fails", [True, False])
def test_failed_rank_raises_without_waiting_for_the_others(monkeypatch, fails):
    """Destroying an NCCL group waits for the other ranks, so the error would never be reported."""
    destroyed = []
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *args, **kwargs: None)
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: destroyed.append(True))
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    with suppress(ZeroDivisionError), init_process_group("cpu") as two:
        assert 1 / (two.size - 2 * fails)
    assert destroyed == [True] * (not fails)


def test_precision_follows_the_setting():
    cpu = pick_device("cpu")
    assert pick_precision("float32", cpu) is None
    assert pick_precision("tf32", cpu) is None
    assert pick_precision("bfloat16", cpu) is torch.bfloat16


def test_rank_without_masks_neither_blocks_nor_changes_the_loss(clip, tmp_path, monkeypatch):
    client = tiny.mlflow_at(monkeypatch, tmp_path / "mlflow")
    halves = np.zeros((2, 40, 48), bool)
    halves[0, :, :24] = halves[1, :, 24:] = True
    dot = np.zeros((1, 40, 48), bool)
    dot[0, 3, 3] = True  # too small for the mask grid
    members = {}
    for number in range(8):
        members[f"{number}.jpg"] = fake_data.encoded(fake_data.pixels(40, 48, number))
        members[f"{number}.json"] = fake_data.annotation(dot if number % 2 else halves)
    fake_data.write_tar(tmp_path / "masks" / "0.tar", members | {"8.json": fake_data.annotation(dot)})
    settings = {"batch_size": 2, "steps": 12}
    train.run(tmp_path / "masks", tmp_path / "alone", TrainConfig(**SETTINGS | settings, clip=str(clip)))
    stdout = two_ranks.start(*train_words(tmp_path / "masks", clip, tmp_path / "two", **settings))
    assert stdout.count("8.json: has no image") == 2  # printed by the main process at start and end
    torch.testing.assert_close(losses(tmp_path / "two"), losses(tmp_path / "alone"), atol=1e-5, rtol=0)
    assert len(losses(tmp_path / "two")) > 4
    assert client.search_experiments()
