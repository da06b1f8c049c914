"""What the autograd functions here share."""

from __future__ import annotations

from typing import Any

import torch


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
    """`cls.apply(*inputs)` by the cheaper way where that will do."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return cls.apply(*inputs)
    return cls.direct.apply(*inputs)
