"""Build a module without random weights, when its weights are loaded afterwards."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_RANDOM = {nn.init.normal_, nn.init.uniform_, nn.init.kaiming_uniform_, Tensor.normal_, Tensor.uniform_}
_SAME_SHAPE = {Tensor.triu_, Tensor.mul, Tensor.__mul__, Tensor.__rmul__}


class Uninitialised(TorchFunctionMode):
    """Leave tensors as they are instead of filling them with normal or uniform random numbers.

    Random numbers take seconds for large models. Everything else is computed, since the state dict lacks some buffers, such as
    attention masks. On the meta device, where only shapes count, triangles and products with numbers are left out, too: to
    check their arguments torch would import sympy.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in _RANDOM:
            return args[0] if args else kwargs["tensor"]
        if func in _SAME_SHAPE and args[0].is_meta and all(isinstance(value, int | float) for value in args[1:]):
            return args[0]
        if func is torch.randn and "generator" not in kwargs:
            func = torch.empty
        return func(*args, **kwargs)
