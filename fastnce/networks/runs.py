"""Consecutive layers in as few kernels as possible, and convolutions without biases that a norm cancels."""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from ..common.taps import can_tap
from .layers import InstanceNorm, ReflectionPad


class FusedRun(NamedTuple):
    """Consecutive modules that one kernel computes: a norm, and the activation and pad after it."""

    length: int
    slope: float
    margin: int


def run_from(modules: Sequence[nn.Module], first: int, x: Tensor, kept: Container[int] = ()) -> FusedRun | None:
    """Find the modules from `first` on that one kernel can compute: norm, activation, reflection pad; None for others.

    Args:
        x: input of the first module.
        kept: positions whose own outputs are needed; such a module ends the run.

    A module with hooks is not fused, because hooks receive its own input and output.
    """
    norm = modules[first]
    if not isinstance(norm, InstanceNorm) or not norm.fused(x) or norm._forward_hooks:
        return None
    slope, margin, end = 1.0, 0, first + 1
    follower = _follower(modules, end, kept)
    if isinstance(follower, nn.ReLU | nn.LeakyReLU):
        slope = follower.negative_slope if isinstance(follower, nn.LeakyReLU) else 0.0
        end += 1
        follower = _follower(modules, end, kept)
    if isinstance(follower, ReflectionPad) and follower.fused(x):
        margin = follower.margin
        end += 1
    return FusedRun(end - first, slope, margin)


def _follower(modules: Sequence[nn.Module], position: int, kept: Container[int]) -> nn.Module | None:
    """Return the module at `position` if it can be fused with the one before it."""
    if position - 1 in kept or position == len(modules):
        return None
    module = modules[position]
    return None if module._forward_hooks or module._forward_pre_hooks else module


def run_one(modules: Sequence[nn.Module], position: int, x: Tensor, kept: Container[int] = ()) -> Tensor:
    """Apply the module at `position` to x; a convolution leaves out its bias if the norm after it cancels it.

    The norm subtracts the mean of each channel, which includes the bias. No output depends on such a bias, and its
    gradient is zero except for rounding.

    Args:
        kept: as in `run_from`; a convolution whose own output is needed adds its bias.
    """
    module = modules[position]
    if not _bias_is_cancelled(modules, position, kept):
        return module(x)
    if isinstance(module, nn.ConvTranspose2d):
        more = (module.output_padding, module.groups, module.dilation)
        return F.conv_transpose2d(x, module.weight, None, module.stride, module.padding, *more)  # type: ignore[arg-type]
    assert isinstance(module, nn.Conv2d)
    return module._conv_forward(x, module.weight, None)


def tapped(modules: Sequence[nn.Module], position: int, x: Tensor) -> bool:
    """Whether the output of the convolution at `position`, with input x, can be handed out as a `Tap`.

    It can if kernels compute the norm after it, and if no hook would see the map without its bias.
    """
    if not can_tap(x) or not _bias_is_cancelled(modules, position, ()):
        return False
    norm = modules[position + 1]
    assert isinstance(norm, InstanceNorm)
    return norm.fused(x) and not (norm._backward_hooks or norm._backward_pre_hooks or norm._compiled_call_impl)


def _bias_is_cancelled(modules: Sequence[nn.Module], position: int, kept: Container[int]) -> bool:
    """Whether the module is a plain convolution without hooks, followed by an instance norm that leaves out biases."""
    module = modules[position]
    if type(module) not in (nn.Conv2d, nn.ConvTranspose2d):  # a subclass may do something else with its bias
        return False
    norm = _follower(modules, position + 1, kept)
    if type(norm) is not InstanceNorm or "forward" in norm.__dict__ or not norm.leaves_out_biases:
        return False
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return not any(hooks) and "forward" not in module.__dict__ and module._compiled_call_impl is None


def run_all(modules: Sequence[nn.Module], x: Tensor, residual: Tensor | None = None) -> Tensor:
    """Apply `modules` one after another and add the residual, in as few kernels as possible."""
    first = 0
    while first < len(modules):
        run = run_from(modules, first, x)
        if run is None:
            x = run_one(modules, first, x)
            first += 1
            continue
        norm = modules[first]
        first += run.length
        last = first == len(modules) and not run.margin
        if last and residual is not None and residual.shape == x.shape and residual.dtype == x.dtype:
            return norm(x, run.slope, 0, residual)
        x = norm(x, run.slope, run.margin)
    return x if residual is None else residual + x
