"""Published weight files, opened without running what is in them."""

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

_CORES = ("core", "_core")  # before and since numpy 2
# Checkpoints keep settings and counters beside their tensors, as a Namespace or numpy's numbers: plain values.
_PLAIN: list[Any] = [
    argparse.Namespace,
    np.ndarray,
    np.dtype,
    *{type(np.dtype(kind)) for kind in ("f4", "f8", "i4", "i8", "?")},
    *[(getattr(multiarray, name), f"numpy.{core}.multiarray.{name}") for name in ("scalar", "_reconstruct") for core in _CORES],
]


def read_weights(path: Path) -> Any:
    """What a `.safetensors`, or the tensors and plain values that a `.pth` or `.pt`, holds; on the CPU.

    Raises:
        ValueError: missing, truncated, no checkpoint, or a pickle that wants to run something. The message does not name
            the file: the caller knows what it should have been.
    """
    if not path.is_file():
        raise ValueError("no such file")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals(_PLAIN), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of formats that it then refuses
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:  # torch's own words here advise to execute the pickle
        wanted = re.search(r"GLOBAL (\S+)", str(error))
        raise ValueError(f"wants to run {wanted[1]}, which is refused" if wanted else "not a checkpoint") from None
    except OSError as error:
        raise ValueError(f"cannot be read: {error}") from None
    except Exception as error:  # a damaged file makes the readers raise whatever comes
        reason = re.split(r"\.\s|\n", str(error))[0]  # the sentences after it advise to execute the pickle
        raise ValueError(f"truncated, or not a checkpoint ({reason})") from None


def check_tensors(found: Any) -> dict[str, Tensor]:
    """`found`, if it is a dictionary of tensors; raises ValueError that says what it is."""
    if not isinstance(found, dict):
        raise ValueError(f"a {type(found).__name__} is found instead of named tensors")
    if others := [name for name, value in found.items() if not (isinstance(name, str) and isinstance(value, Tensor))]:
        raise ValueError(f"entries that are no tensors are found ({named(others)})")
    return found


def check_fit(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Raises ValueError that says which names and shapes of a state dict are not those of another."""
    problems = {
        "missing": [name for name in expected if name not in found],
        "unexpected": [name for name in found if name not in expected],
        "of another shape": [
            f"{name} {list(found[name].shape)} instead of {list(tensor.shape)}"
            for name, tensor in expected.items()
            if name in found and found[name].shape != tensor.shape
        ],
    }
    if said := [f"{problem}: {named(names)}" for problem, names in problems.items() if names]:
        raise ValueError("; ".join(said))


def named(names: Iterable[Any], most: int = 3) -> str:
    """A few of many names, for a message."""
    listed = [str(name) for name in names]
    return (", ".join(listed[:most]) or "nothing") + (f" and {len(listed) - most} more" if len(listed) > most else "")
