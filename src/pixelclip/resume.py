"""A training's state on disk, so that a killed one continues to the very same losses."""

import os
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from pixelclip.checkpoint import read_tensors
from pixelclip.model import PixelCLIP
from pixelclip.ranks import ALONE, Ranks


def _state_tensors(model: PixelCLIP) -> Iterator[tuple[str, Tensor]]:
    """Everything that training changes in the model, by a name of its own."""
    for name, parameter in model.student.trained_parameters().items():
        yield f"student.{name}", parameter
    for name, parameter in model.teacher.trained_parameters().items():
        yield f"teacher.{name}", parameter
    for part in ("prompts", "decoder"):
        for name, parameter in getattr(model, part).named_parameters():
            yield f"{part}.{name}", parameter


def save_state(path: Path, model: PixelCLIP, optimizer: torch.optim.AdamW, step: int) -> None:
    """Saves what a training needs to continue: weights, teacher, optimizer, number of steps done; atomically.

    Schedule, data position and random state are functions of the step and the seed, so they need no saving.
    """
    names = {id(tensor): name for name, tensor in _state_tensors(model)}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in _state_tensors(model)}
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            tensors[f"optimizer.{key}.{names[id(parameter)]}"] = value.detach().cpu().contiguous()
    temporary = path.with_suffix(".partial")
    save_file(tensors, temporary, metadata={"step": str(step)})
    with temporary.open("rb+") as file:
        os.fsync(file.fileno())
    temporary.replace(path)


@torch.no_grad()
def load_state(path: Path, model: PixelCLIP, optimizer: torch.optim.AdamW, ranks: Ranks = ALONE) -> int:
    """Restores what the first rank finds at `path`, for all ranks; returns the number of steps done, 0 without a file."""
    step, tensors = ranks.from_first(_read(path) if ranks.first and path.is_file() else (0, {}))
    if not step:
        return 0
    names = {}
    for name, tensor in _state_tensors(model):
        tensor.copy_(tensors[name])
        names[id(tensor)] = name
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            if f"optimizer.step.{name}" in tensors:
                state = {key: tensors[f"optimizer.{key}.{name}"] for key in ("step", "exp_avg", "exp_avg_sq")}
                optimizer.state[parameter] = {key: value.to(parameter.device) for key, value in state.items()}
    if ranks.first:
        print(f"train: continues after step {step}", flush=True)
    return int(step)


def _read(path: Path) -> tuple[int, dict[str, Tensor]]:
    tensors = read_tensors(path)
    with safe_open(path, framework="pt") as file:
        return int(file.metadata()["step"]), tensors
