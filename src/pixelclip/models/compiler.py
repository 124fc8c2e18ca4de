"""Do without torch's compiler, whose import takes longer than torch's own, where it is only imported in passing."""

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType
from typing import Any

_NAMES = ("torch._dynamo", "torch._dynamo.utils")


@contextmanager
def without_compiler() -> Iterator[None]:
    """Do not import torch's compiler for code that only excludes functions from compilation.

    torchvision, timm and torch's operators on the meta device import `torch._dynamo` for `disable`, which excludes a function
    from compilation, and for one query. Inside the `with` block these two are placeholders: a function is excluded once the
    compiler is loaded; the query and any other attribute load it.
    """
    if any(name in sys.modules for name in _NAMES):
        yield
        return
    sys.modules.update({name: _Placeholder(name) for name in _NAMES})
    try:
        yield
    finally:
        _remove_placeholders()


class _Placeholder(ModuleType):
    """Stand in for `torch._dynamo` or `torch._dynamo.utils`."""

    def is_compile_supported(self, device_type: str) -> bool:
        return bool(_compiler("torch._dynamo.utils").is_compile_supported(device_type))

    def disable(self, fn: Callable[..., Any] | None = None, *args: Any, **options: Any) -> Any:
        if fn is None:
            return lambda function: self.disable(function, *args, **options)

        @functools.cache
        def disabled() -> Callable[..., Any]:
            return _compiler("torch._dynamo").disable(fn, *args, **options)

        @functools.wraps(fn)
        def call(*values: Any, **named: Any) -> Any:
            loaded = not isinstance(sys.modules.get("torch._dynamo", self), _Placeholder)
            return (disabled() if loaded else fn)(*values, **named)

        return call

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and (name, self.__name__) != ("__path__", _NAMES[0]):
            raise AttributeError(name)  # inspect asks every module for some of these
        return getattr(_compiler(self.__name__), name)


def _compiler(name: str) -> ModuleType:
    _remove_placeholders()
    return import_module(name)


def _remove_placeholders() -> None:
    for name in _NAMES:
        if isinstance(sys.modules.get(name), _Placeholder):
            del sys.modules[name]
