"""Processes that work on one thing together: started by torchrun, or just this one. N rows."""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

_PATIENCE = timedelta(hours=2)  # a rank may wait while the first one reads a terabyte of shards to identify them


@dataclass(frozen=True)
class ProcessGroup:
    """Who this process is among `size`; every method below is called by all ranks, or by none."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def is_main(self) -> bool:
        """Whether this is the one that writes and speaks."""
        return self.rank == 0

    def local_range(self, number: int) -> range:
        """This rank's part of `range(number)`: contiguous, without overlap or loss, sizes differ by one at most."""
        return range(number * self.rank // self.size, number * (self.rank + 1) // self.size)

    def all_reduce(self, values: Tensor) -> Tensor:
        """The sum of a tensor over all ranks."""
        if self.size > 1:
            values = values.clone()
            dist.all_reduce(values)
        return values

    def all_gather(self, rows: Tensor) -> tuple[Tensor, slice]:
        """All ranks' rows in the order of ranks, and where this rank's are.

        Args:
            rows: [N, ...]; N may differ from rank to rank, and be 0.
        """
        if self.size == 1:
            return rows, slice(0, len(rows))
        # Counts stay on the CPU: a GPU would have to be waited for.
        counts: list[int] = self.all_reduce(torch.eye(self.size, dtype=torch.long)[self.rank] * len(rows)).tolist()
        padded = rows.new_zeros(max(counts), *rows.shape[1:])
        padded[: len(rows)] = rows
        found = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(found, padded)
        start = sum(counts[: self.rank])
        return torch.cat([part[:n] for part, n in zip(found, counts, strict=True)]), slice(start, start + len(rows))

    def all_gather_object(self, value: Any) -> list[Any]:
        """Every rank's small Python object, in the order of ranks."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value)
        return found

    def broadcast_object(self, value: Any) -> Any:
        """The first rank's Python object, for all."""
        if self.size > 1:
            box = [value]
            dist.broadcast_object_list(box, src=0)
            return box[0]
        return value

    def all_reduce_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Adds up the gradients of all ranks; a rank that has none adds zero."""
        if self.size == 1:
            return
        learning = [p for p in parameters if p.requires_grad]
        flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in learning])
        dist.all_reduce(flat)
        for parameter, part in zip(learning, flat.split([p.numel() for p in learning]), strict=True):
            parameter.grad = part.view_as(parameter)


SINGLE_PROCESS = ProcessGroup()


def count_gpus() -> int:
    """How many GPUs this process can compute on.

    Raises:
        ValueError: fewer than PIXELCLIP_GPUS, the number that this pod asked for.
    """
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    asked = int(os.environ.get("PIXELCLIP_GPUS", "0"))
    if found < asked:  # a CPU would go on, for days, and nobody would be told
        raise ValueError(
            f"CUDA finds {found} of the {asked} GPUs that this pod asked for (PIXELCLIP_GPUS): see the node's driver"
        )
    return found


def pick_device(name: str) -> torch.device:
    """Returns the device called `name`; `auto` is a GPU if there is one.

    Raises:
        ValueError: no such device here, or as `count_gpus`.
    """
    if name == "auto":
        return torch.device("cuda" if count_gpus() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"device {name!r} cannot be used: {str(error).splitlines()[0]}; allowed: auto, cpu, cuda, cuda:N"
        ) from None
    return device


def pick_precision(name: str, device: torch.device) -> torch.dtype | None:
    """What autocast computes in, or None for plain float32; `tf32` also lets a GPU multiply float32 in TF32.

    Args:
        name: auto, float32, tf32, bfloat16; auto is bfloat16 where the device has units for it.
        device: where to compute.
    """
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = name == "tf32"
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        able = torch.cpu.get_capabilities()
        fast = bool(able.get("avx512_bf16") or able.get("amx_bf16"))
    return torch.bfloat16 if name == "bfloat16" or (name == "auto" and fast) else None


def copy_to_host_async(values: Tensor) -> Callable[[], list[float]]:
    """Sends numbers [N] on their way from the device; calling the result waits for them alone, not for what came after."""
    copied = values.detach().to("cpu", non_blocking=True)
    if values.device.type != "cuda":
        return copied.tolist
    there = torch.cuda.Event()
    there.record(torch.cuda.current_stream(values.device))  # by itself an event means the current device

    def read() -> list[float]:
        there.synchronize()
        return copied.tolist()

    return read


@contextmanager
def init_process_group(device: str) -> Iterator[ProcessGroup]:
    """The ranks that torchrun started (RANK, WORLD_SIZE, LOCAL_RANK), each on a device of its own; else this process alone.

    Args:
        device: auto, cpu, cuda, cuda:1, ...; with several ranks `auto` and `cuda` mean one GPU a rank, `cuda:1` nothing.

    Raises:
        ValueError: no such device here, more ranks than GPUs, or as `count_gpus`.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        chosen = pick_device(device)
        if chosen.type == "cuda" and chosen.index is not None:
            torch.cuda.set_device(chosen)  # pinned memory, streams and events are those of the current one
        yield ProcessGroup(device=chosen)
        return
    rank, local = int(os.environ["RANK"]), int(os.environ.get("LOCAL_RANK", "0"))
    if device.startswith("cuda:"):
        raise ValueError(f"device {device!r} with {size} processes: each needs one of its own; allowed: auto, cpu, cuda")
    gpus = 0 if device == "cpu" else count_gpus()
    if device == "cuda" or gpus:
        if local >= gpus:
            raise ValueError(f"rank {rank} is number {local} of its machine, which has {gpus} GPUs")
        chosen = torch.device("cuda", local)
        torch.cuda.set_device(chosen)  # before anything touches the first GPU, where every rank would leave a context
    else:
        chosen = pick_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo", timeout=_PATIENCE)
    yield ProcessGroup(rank, size, chosen)
    # Not after an error: NCCL would wait here for ranks that are still at work, and nobody would hear that this one failed.
    dist.destroy_process_group()
