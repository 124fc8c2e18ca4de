"""Read the tensors of a TorchScript archive, such as OpenAI's CLIP files, without compiling or running its code.

The archive is a zip file. `data.pkl` pickles the module's attributes: objects of classes in `__torch__`, whose state is a
dictionary, and tensors, whose storages are the records `data/N`. The code in `code/` is not read.
"""

import io
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_STORAGES = {
    f"{kind}Storage": dtype
    for kind, dtype in {
        "Float": torch.float32,
        "Double": torch.float64,
        "Half": torch.float16,
        "BFloat16": torch.bfloat16,
        "Long": torch.int64,
        "Int": torch.int32,
        "Short": torch.int16,
        "Char": torch.int8,
        "Byte": torch.uint8,
        "Bool": torch.bool,
    }.items()
}


def is_torchscript(path: Path) -> bool:
    """Return True if the file is a zip archive with TorchScript's constants."""
    try:
        reader: Any = torch._C.PyTorchFileReader(str(path))
        return bool(reader.has_record("constants.pkl"))
    except RuntimeError:
        return False


def read_torchscript(path: Path) -> dict[str, Tensor]:
    """Return the parameters and buffers of a scripted or traced module by name, on the CPU.

    Raises:
        pickle.UnpicklingError: the archive contains something other than modules, tensors and plain values.
        RuntimeError: the archive is damaged.
    """
    reader = torch._C.PyTorchFileReader(str(path))
    module = _Unpickler(reader).load()
    if not isinstance(module, _Module):
        raise pickle.UnpicklingError(f"expected a module, found a {type(module).__name__}")
    return dict(_tensors(module, ""))


class _Module:
    """Attributes of an object of a class that the archive defines."""

    def __setstate__(self, state: Any) -> None:
        self.attributes = state if isinstance(state, dict) else {}


class _Unpickler(pickle.Unpickler):
    def __init__(self, reader: Any) -> None:
        super().__init__(io.BytesIO(reader.get_record("data.pkl")))
        self._reader = reader
        self._storages: dict[str, Any] = {}

    def find_class(self, module: str, name: str) -> Any:
        if module.partition(".")[0] == "__torch__":
            return _Module
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _rebuild
        if module == "torch.jit._pickle":  # build_intlist, restore_type_tag, ...: lists and dictionaries with a type
            return lambda value, *_: value
        raise pickle.UnpicklingError(f"GLOBAL {module}.{name} is not allowed")

    def persistent_load(self, pid: Any) -> Any:
        kind, dtype, record, _, numel = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype):
            raise pickle.UnpicklingError(f"expected a storage, found {kind}")
        if record not in self._storages:
            typed = self._reader.get_storage_from_record(f"data/{record}", numel, dtype)._typed_storage()
            self._storages[record] = torch.empty(0, dtype=dtype).set_(typed._untyped_storage, 0, (numel,), (1,))
        return self._storages[record]


def _rebuild(flat: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Tensor:
    return torch.as_strided(flat, size, stride, offset)


def _tensors(module: _Module, prefix: str) -> Any:
    for name, value in module.attributes.items():
        if isinstance(value, Tensor):
            yield f"{prefix}{name}", value
        elif isinstance(value, _Module):
            yield from _tensors(value, f"{prefix}{name}.")
