"""Process group, device and precision, under torchrun or in a single process."""

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pixelclip.config import DEVICES
from pixelclip.workflow.cpus import count_cpus, count_threads
from pixelclip.workflow.failures import first_line

_TIMEOUT = timedelta(hours=2)  # ranks wait while the main process reads a terabyte of shards to identify them


@dataclass(frozen=True)
class ProcessGroup:
    """The rank of this process among `size`. Collective methods must be called by all ranks or by none."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes files and logs."""
        return self.rank == 0

    def local_range(self, number: int) -> range:
        """Return this rank's contiguous part of `range(number)`; the sizes of all parts differ by at most one."""
        return range(number * self.rank // self.size, number * (self.rank + 1) // self.size)

    def all_reduce(self, values: Tensor) -> Tensor:
        """Return the sum of a tensor over all ranks."""
        if self.size > 1:
            values = values.clone()
            dist.all_reduce(values)
        return values

    def all_gather(self, rows: Tensor) -> tuple[Tensor, slice]:
        """Return the rows of all ranks in rank order, and the slice of this rank's rows.

        Args:
            rows: [N, ...]; N may differ between ranks and may be 0.
        """
        if self.size == 1:
            return rows, slice(0, len(rows))
        # Counts stay on the CPU: reading them from a GPU would synchronize with it.
        counts: list[int] = self.all_reduce(torch.eye(self.size, dtype=torch.long)[self.rank] * len(rows)).tolist()
        padded = rows.new_zeros(max(counts), *rows.shape[1:])
        padded[: len(rows)] = rows
        gathered = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(gathered, padded)
        start = sum(counts[: self.rank])
        return torch.cat([part[:n] for part, n in zip(gathered, counts, strict=True)]), slice(start, start + len(rows))

    def all_gather_object(self, value: Any) -> list[Any]:
        """Return the picklable object of every rank, in rank order."""
        if self.size == 1:
            return [value]
        gathered: list[Any] = [None] * self.size
        dist.all_gather_object(gathered, value)
        return gathered

    def broadcast_object(self, value: Any) -> Any:
        """Return the main process's object on every rank."""
        if self.size > 1:
            values = [value]
            dist.broadcast_object_list(values, src=0)
            return values[0]
        return value

    def all_reduce_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Sum the gradients over all ranks in place; a missing gradient counts as zero."""
        if self.size == 1:
            return
        learning = [p for p in parameters if p.requires_grad]
        flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in learning])
        dist.all_reduce(flat)
        for parameter, part in zip(learning, flat.split([p.numel() for p in learning]), strict=True):
            parameter.grad = part.view_as(parameter)


SINGLE_PROCESS = ProcessGroup()


@cache
def limit_threads() -> None:
    """Compute with one thread per CPU of this process (`count_threads`), unless OMP_NUM_THREADS is set; log the change once.

    torch itself starts a thread for every core of the node, which a CPU quota then stops for most of the time.
    """
    threads = count_threads()
    if "OMP_NUM_THREADS" in os.environ or threads >= torch.get_num_threads():
        return
    torch.set_num_threads(threads)
    limit = f"this process may use {count_cpus():g} of {os.cpu_count()} CPUs"
    print(f"threads: {threads} ({limit}; OMP_NUM_THREADS overrides it)", file=sys.stderr, flush=True)


def count_gpus() -> int:
    """Return the number of GPUs that CUDA can use.

    Raises:
        ValueError: there are fewer than PIXELCLIP_GPUS, the number that this pod requested.
    """
    available = torch.cuda.device_count() if torch.cuda.is_available() else 0
    requested = int(os.environ.get("PIXELCLIP_GPUS", "0"))
    if available < requested:  # otherwise the job would silently run on the CPU for days
        raise ValueError(
            f"CUDA finds {available} of the {requested} GPUs that this pod requested (PIXELCLIP_GPUS): check the node's driver"
        )
    return available


def pick_device(name: str) -> torch.device:
    """Return the device called `name`; `auto` selects a GPU if one is available. Limits the threads of this process.

    Raises:
        ValueError: the device cannot be used; also the errors of `count_gpus`.
    """
    limit_threads()
    if name == "auto":
        return torch.device("cuda" if count_gpus() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {name!r} cannot be used: {first_line(error)}; allowed: {DEVICES}") from None
    return device


def pick_precision(name: str, device: torch.device) -> torch.dtype | None:
    """Return autocast's dtype, or None for float32; set whether the GPU may multiply float32 in TF32.

    Args:
        name: auto, float32, tf32 or bfloat16; auto selects bfloat16 on devices that support it in hardware.
        device: device of the computation.
    """
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = name == "tf32"
        supported = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        features = torch.cpu.get_capabilities()
        supported = bool(features.get("avx512_bf16") or features.get("amx_bf16"))
    return torch.bfloat16 if name == "bfloat16" or (name == "auto" and supported) else None


def copy_to_host_async(values: Tensor) -> Callable[[], list[float]]:
    """Start an asynchronous copy of `values` [N] to the CPU; the returned function waits for this copy only and returns it."""
    copied = values.detach().to("cpu", non_blocking=True)
    if values.device.type != "cuda":
        return copied.tolist
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(values.device))  # without a stream it would record on the current device

    def read() -> list[float]:
        event.synchronize()
        return copied.tolist()

    return read


@contextmanager
def init_process_group(device: str) -> Iterator[ProcessGroup]:
    """Join the process group that torchrun started (RANK, WORLD_SIZE, LOCAL_RANK), or yield a group of one process.

    Args:
        device: one of `DEVICES`; with several ranks `cuda:N` is invalid, and `auto` and `cuda` give each rank its own GPU.

    Raises:
        ValueError: the device cannot be used, there are more ranks than GPUs; also the errors of `count_gpus`.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        chosen = pick_device(device)
        if chosen.type == "cuda" and chosen.index is not None:
            torch.cuda.set_device(chosen)  # pinned memory, streams and events belong to the current device
        yield ProcessGroup(device=chosen)
        return
    rank, local = int(os.environ["RANK"]), int(os.environ.get("LOCAL_RANK", "0"))
    if device.startswith("cuda:"):
        raise ValueError(
            f"device {device!r} with {size} processes: each process needs its own device; allowed: auto, cpu, cuda"
        )
    gpus = 0 if device == "cpu" else count_gpus()
    if device == "cuda" or gpus:
        if local >= gpus:
            raise ValueError(f"rank {rank} has local rank {local}, but its machine has {gpus} GPUs")
        limit_threads()
        chosen = torch.device("cuda", local)
        torch.cuda.set_device(chosen)  # before any CUDA call, which would create a context of every rank on the first GPU
    else:
        chosen = pick_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo", timeout=_TIMEOUT)
    yield ProcessGroup(rank, size, chosen)
    # Skipped after an error: NCCL would wait here for the other ranks, and the error would never be reported.
    dist.destroy_process_group()
