"""A training's state on disk, so that a killed one continues: on a CPU to the very same losses, on a GPU but for rounding."""

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from pixelclip.checkpoint import read_tensors, write_tensors
from pixelclip.model import PixelCLIP
from pixelclip.ranks import SINGLE_PROCESS, ProcessGroup


@dataclass(frozen=True)
class Progress:
    """What a training has done, all processes together.

    Attributes:
        steps: done.
        maskless: of them without any mask.
        bad: samples that were drawn and could not be used.
        loss: of the last step that had masks.
        concepts_used: of the same.
    """

    steps: int = 0
    maskless: int = 0
    bad: int = 0
    loss: float = 0.0
    concepts_used: int = 0


def _state_tensors(model: PixelCLIP) -> Iterator[tuple[str, Tensor]]:
    """Everything that training changes in the model, by a name of its own."""
    for name, parameter in model.student.trained_parameters().items():
        yield f"student.{name}", parameter
    for name, parameter in model.teacher.trained_parameters().items():
        yield f"teacher.{name}", parameter
    for part in ("prompts", "decoder"):
        for name, parameter in getattr(model, part).named_parameters():
            yield f"{part}.{name}", parameter


def save_state(path: Path, model: PixelCLIP, optimizer: torch.optim.AdamW, done: Progress) -> None:
    """Saves what a training needs to continue: weights, teacher, optimizer, what was done and counted; atomically.

    Schedule, data position and random state are functions of the step and the seed, so they need no saving.
    """
    names = {id(tensor): name for name, tensor in _state_tensors(model)}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in _state_tensors(model)}
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            tensors[f"optimizer.{key}.{names[id(parameter)]}"] = value.detach().cpu().contiguous()
    temporary = path.with_suffix(".partial")
    write_tensors(temporary, tensors, metadata={"done": json.dumps(asdict(done))})
    with temporary.open("rb+") as file:
        os.fsync(file.fileno())
    temporary.replace(path)


@torch.no_grad()
def load_state(path: Path, model: PixelCLIP, optimizer: torch.optim.AdamW, group: ProcessGroup = SINGLE_PROCESS) -> Progress:
    """Restores what the first rank finds at `path`, for all ranks; returns what was done: nothing without a file."""
    done: Progress
    done, tensors = group.broadcast_object(_read(path) if group.is_main and path.is_file() else (Progress(), {}))
    if not tensors:
        return Progress()
    names = {}
    for name, tensor in _state_tensors(model):
        tensor.copy_(tensors[name])
        names[id(tensor)] = name
    for param_group in optimizer.param_groups:
        for parameter in param_group["params"]:
            name = names[id(parameter)]
            if f"optimizer.step.{name}" in tensors:
                state = {key: tensors[f"optimizer.{key}.{name}"] for key in ("step", "exp_avg", "exp_avg_sq")}
                optimizer.state[parameter] = {key: value.to(parameter.device) for key, value in state.items()}
    if group.is_main:
        print(f"train: continues after step {done.steps}", flush=True)
    return done


def _read(path: Path) -> tuple[Progress, dict[str, Tensor]]:
    tensors = read_tensors(path)
    with safe_open(path, framework="pt") as file:
        return Progress(**json.loads(file.metadata()["done"])), tensors
