"""Open-vocabulary segmentation from images that nobody labelled (PixelCLIP, NeurIPS 2024).

`pixelclip.load` loads a model; the other functions have the names and options of the commands (docs/python.md).
"""

import inspect
import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pixelclip.api import load as load
    from pixelclip.api import merge as merge

__version__ = "0.2.0"
_COMMANDS = ("toy", "fetch_data", "shards", "masks", "train", "evaluate_clip", "evaluate", "register", "predict")
__all__ = ["__version__", "load", "merge", *_COMMANDS]


def __getattr__(name: str) -> Any:
    """Import on first use, because torch takes seconds."""
    if name in ("load", "merge"):
        return getattr(import_module("pixelclip.api"), name)
    if name in _COMMANDS:
        return import_module(f"pixelclip.{name}")
    raise AttributeError(f"module 'pixelclip' has no attribute {name!r}")


class _Command(ModuleType):
    """Module of a stage that can be called as its command: `pixelclip.train(...)` calls `pixelclip.api.train(...)`."""

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self._function)

    @property
    def _function(self) -> Any:
        return getattr(import_module("pixelclip.api"), self.__name__.rpartition(".")[2])

    def __call__(self, *inputs: Any, **options: Any) -> Any:
        return self._function(*inputs, **options)


class _Package(ModuleType):
    def __setattr__(self, name: str, value: Any) -> None:
        if name in _COMMANDS and isinstance(value, ModuleType):  # Python sets every imported submodule
            value.__class__ = _Command
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
