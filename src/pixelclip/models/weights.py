"""Read published weight files without executing any code in them."""

import argparse
import pickle
import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy._core import multiarray  # numpy pickles by these names
from safetensors.torch import load_file
from torch import Tensor

from pixelclip.models.torchscript import is_torchscript, read_torchscript

_WRAPPERS = ("module.", "_orig_mod.")
_CORES = ("core", "_core")  # module name before and since numpy 2
# Plain values in checkpoints: settings as a Namespace, counters as numpy scalars.
_SAFE_GLOBALS: list[Any] = [
    argparse.Namespace,
    np.ndarray,
    np.dtype,
    *{type(np.dtype(kind)) for kind in ("f4", "f8", "i4", "i8", "?")},
    *[(getattr(multiarray, name), f"numpy.{core}.multiarray.{name}") for name in ("scalar", "_reconstruct") for core in _CORES],
]


def read_weights(path: Path) -> Any:
    """Load a `.safetensors` file, or the tensors and plain values of a `.pth` or `.pt` file, on the CPU.

    Of a TorchScript archive only the tensors are read.

    Raises:
        ValueError: the file is missing, truncated, not a checkpoint, or a pickle that would execute code. The caller adds the
            file's name and the expected content to the message.
    """
    if not path.is_file():
        raise ValueError("no such file")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        if is_torchscript(path):
            return read_torchscript(path)
        with torch.serialization.safe_globals(_SAFE_GLOBALS), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns about formats that it then rejects
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:  # torch recommends executing the pickle
        executed = re.search(r"GLOBAL (\S+)", str(error))
        raise ValueError(f"would execute {executed[1]}, which is not allowed" if executed else "not a checkpoint") from None
    except OSError as error:
        raise ValueError(f"cannot be read: {error}") from None
    except Exception as error:  # a damaged file can raise any exception
        reason = re.split(r"\.\s|\n", str(error))[0]  # later sentences recommend executing the pickle
        raise ValueError(f"truncated, or not a checkpoint ({reason})") from None


def without_wrappers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Remove the prefixes `module.` and `_orig_mod.` that DistributedDataParallel and torch.compile give to all names."""
    while state and any(all(name.startswith(prefix) for name in state) for prefix in _WRAPPERS):
        state = {name.partition(".")[2]: tensor for name, tensor in state.items()}
    return dict(state)


def check_tensors(state: Any) -> dict[str, Tensor]:
    """Return `state`; raise ValueError unless it is a dictionary of named tensors."""
    if not isinstance(state, dict):
        raise ValueError(f"expected named tensors, found a {type(state).__name__}")
    if others := [name for name, value in state.items() if not (isinstance(name, str) and isinstance(value, Tensor))]:
        raise ValueError(f"expected named tensors, found entries that are not tensors ({named(others)})")
    return state


def check_fit(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Raise ValueError with the differences in names and shapes between a state dict and the expected one."""
    problems = {
        "missing": [name for name in expected if name not in state],
        "unexpected": [name for name in state if name not in expected],
        "of a different shape": [
            f"{name} {list(state[name].shape)} instead of {list(tensor.shape)}"
            for name, tensor in expected.items()
            if name in state and state[name].shape != tensor.shape
        ],
    }
    if differences := [f"{problem}: {named(names)}" for problem, names in problems.items() if names]:
        raise ValueError("; ".join(differences))


def named(names: Iterable[Any], most: int = 3) -> str:
    """Format the first few names and the number of the others for a message."""
    listed = [str(name) for name in names]
    return (", ".join(listed[:most]) or "nothing") + (f" and {len(listed) - most} more" if len(listed) > most else "")
