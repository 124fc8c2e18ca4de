"""Save and load the training state, so that an interrupted run resumes.

On a CPU, losses after a resume are bit-identical to those of an uninterrupted run; on a GPU they are equal up to rounding.
"""

from pathlib import Path

import torch
from pydantic import BaseModel, NonNegativeInt
from safetensors import safe_open
from torch import Tensor

from pixelclip.distributed import SINGLE_PROCESS, ProcessGroup
from pixelclip.models.checkpoint import read_tensors, write_tensors
from pixelclip.models.pixelclip import PixelCLIP
from pixelclip.models.weights import check_fit
from pixelclip.storage.files import parse_json


class Progress(BaseModel, frozen=True):
    """Progress of a training run, over all processes.

    Attributes:
        steps: completed steps.
        maskless: completed steps without any mask.
        bad: unusable samples among those drawn.
        loss: loss of the last step that had masks.
        concepts_used: number of concepts used in that step.
    """

    steps: NonNegativeInt
    maskless: NonNegativeInt
    bad: NonNegativeInt
    loss: float
    concepts_used: NonNegativeInt


_NONE = Progress(steps=0, maskless=0, bad=0, loss=0.0, concepts_used=0)


def _state_tensors(model: PixelCLIP) -> dict[str, Tensor]:
    """Return all tensors that training changes, by unique name."""
    modules = {
        "student": model.student.trained_parameters(),
        "teacher": model.teacher.trained_parameters(),
        "prompts": dict(model.prompts.named_parameters()),
        "decoder": dict(model.decoder.named_parameters()),
    }
    return {f"{module}.{name}": tensor for module, tensors in modules.items() for name, tensor in tensors.items()}


def save_state(path: Path, model: PixelCLIP, optimizer: torch.optim.AdamW, done: Progress) -> None:
    """Save weights, teacher, optimizer state and progress atomically.

    Schedule, data position and random state are functions of step and seed, so they are not saved.
    """
    state_tensors = _state_tensors(model)
    names = {id(tensor): name for name, tensor in state_tensors.items()}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state_tensors.items()}
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            tensors[f"optimizer.{key}.{names[id(parameter)]}"] = value.detach().cpu().contiguous()
    write_tensors(path, tensors, metadata={"done": done.model_dump_json()})


@torch.no_grad()
def load_state(path: Path, model: PixelCLIP, optimizer: torch.optim.AdamW, group: ProcessGroup = SINGLE_PROCESS) -> Progress:
    """Load the state on the main process, broadcast it to all ranks and restore it.

    Without a file at `path` the progress is that of no step.

    Raises:
        ValueError: the file is damaged or of another model.
    """
    done: Progress
    done, tensors = group.broadcast_object(_read(path) if group.is_main and path.is_file() else (_NONE, {}))
    if not tensors:
        return _NONE
    names = {}
    state_tensors = _state_tensors(model)
    expected = dict(state_tensors)
    for name in state_tensors.keys() & {key.split(".", 2)[-1] for key in tensors}:  # with a state of the optimizer
        moments = {f"optimizer.{key}.{name}": state_tensors[name] for key in ("exp_avg", "exp_avg_sq")}
        expected |= moments | {f"optimizer.step.{name}": torch.zeros(())}
    try:
        check_fit(tensors, expected)
    except ValueError as error:
        raise ValueError(f"{path}: does not fit the settings: {error}") from None
    for name, tensor in state_tensors.items():
        tensor.copy_(tensors[name])
        names[id(tensor)] = name
    for param_group in optimizer.param_groups:
        for parameter in param_group["params"]:
            name = names[id(parameter)]
            if f"optimizer.step.{name}" in tensors:
                state = {key: tensors[f"optimizer.{key}.{name}"] for key in ("step", "exp_avg", "exp_avg_sq")}
                optimizer.state[parameter] = {key: value.to(parameter.device) for key, value in state.items()}
    if group.is_main:
        print(f"train: resuming after step {done.steps}", flush=True)
    return done


def _read(path: Path) -> tuple[Progress, dict[str, Tensor]]:
    tensors = read_tensors(path)
    with safe_open(path, framework="pt") as file:
        done = (file.metadata() or {}).get("done", "")
    return Progress(**parse_json(done, f"{path}: done", Progress)), tensors
