"""Helpers for the autograd functions of the kernels and of the fast CPU path."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def no_forward_mode(ctx: Any, *tangents: Any) -> Any:
    """The `jvp` of functions without a forward-mode derivative."""
    raise ValueError("patch_nce has no forward-mode derivative (jvp, jacfwd, hessian): use grad, vjp or jacrev")


class FirstOrderOnly(torch.autograd.Function):
    """Connect a gradient to `inputs`, so that differentiating it again raises an error instead of returning zeros."""

    generate_vmap_rule = True

    @staticmethod
    def forward(gradient, *inputs):
        return gradient.view_as(gradient)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError("patch_nce can be differentiated once: its gradient has no derivative")


def with_fast_path(cls: Any) -> Any:
    """Class decorator: add `cls.direct` and `cls.transformed`, the same function for two kinds of calls.

    `torch.func` needs a separate `setup_context`, which costs 0.15 ms of Python per call: a tenth of the whole loss at
    the published sizes on a CPU. `direct` has it merged into `forward`, and `apply` uses it where no transform is
    active. `transformed` adds the rules of transforms: none for forward mode, and `cls.batched`, if any, for `vmap`.
    """

    class Direct(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs):
            output = cls.forward(*inputs)
            cls.setup_context(ctx, inputs, output)
            return output

        backward = staticmethod(cls.backward)
        jvp = staticmethod(no_forward_mode)

    # apart, because a compiler refuses functions with a `jvp`
    rules: dict[str, Any] = {"jvp": staticmethod(no_forward_mode)}
    if hasattr(cls, "batched"):
        rules["vmap"] = staticmethod(cls.batched)
    cls.direct = fast_apply(Direct)
    cls.transformed = type(cls.__name__, (cls,), rules)
    return cls


def fast_apply(cls: Any) -> Callable:
    """Return `cls.apply` without its search for tensors of a `torch.func` transform that has ended.

    Only for calls while no transform is active.
    """
    return super(torch.autograd.Function, cls).apply


def apply(cls: Any, *inputs: Any) -> Any:
    """Call `cls.apply(*inputs)` by the fastest valid path, also while a compiler traces."""
    if torch.compiler.is_compiling():
        if not any(t.requires_grad for t in inputs if isinstance(t, Tensor)) or not torch.is_grad_enabled():
            return cls.forward(*inputs)  # PyTorch 2.11 passes an extra context to functions of *args
        return cls.apply(*_without_duplicates(inputs))
    if torch._C._are_functorch_transforms_active():
        return cls.transformed.apply(*inputs)
    return cls.direct(*inputs)


def _without_duplicates(inputs: tuple[Any, ...]) -> list[Any]:
    """Replace repeated tensors by views: PyTorch 2.11 compiles half the gradient of a tensor that is passed twice."""
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
