"""What the autograd functions here share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Once(torch.autograd.Function):
    """Ties a gradient to its `inputs`, so that differentiating it again is an error and not a silent zero."""

    @staticmethod
    def forward(gradient, *inputs):
        return gradient.view_as(gradient)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError("patch_nce can be differentiated once: its gradient has no derivative of its own")


def directly(cls: Any) -> Any:
    """Class decorator: gives a function with `setup_context` a twin without, as `cls.direct`.

    `torch.func` needs the separate `setup_context`, but it costs 0.15 ms of Python a call, a tenth of the whole loss at
    the published sizes on a CPU; in everyday use the twin does the same.
    """

    class Direct(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs):
            output = cls.forward(*inputs)
            cls.setup_context(ctx, inputs, output)
            return output

        backward = staticmethod(cls.backward)

    cls.direct = Direct
    return cls


def call(cls: Any, *inputs: Any) -> Any:
    """`cls.apply(*inputs)` by the cheaper way where that will do, and so that a compiler computes the same."""
    if torch.compiler.is_compiling():
        if not any(t.requires_grad for t in inputs if isinstance(t, Tensor)) or not torch.is_grad_enabled():
            return cls.forward(*inputs)  # where PyTorch 2.11 passes functions of variable length a context too many
        return cls.apply(*_apart(inputs))
    if torch._C._are_functorch_transforms_active():
        return cls.apply(*inputs)
    return cls.direct.apply(*inputs)


def _apart(inputs: tuple[Any, ...]) -> list[Any]:
    """The same inputs, each tensor once: of one that is passed twice PyTorch 2.11 compiles half the gradient."""
    seen: list[Tensor] = []
    result: list[Any] = []
    for x in inputs:
        if isinstance(x, Tensor):
            if any(x is other for other in seen):
                x = x.view_as(x)
            else:
                seen.append(x)
        result.append(x)
    return result
