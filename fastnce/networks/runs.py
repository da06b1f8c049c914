"""Consecutive layers in as few kernels as possible, and convolutions without biases that a norm cancels."""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..common.taps import Tap, can_tap
from .convolution import PLAIN, convolve
from .layers import BlurDown, BlurUp, FusedLayer, InstanceNorm, ReflectionPad
from .norms import AffineInstanceNorm

ACTIVATIONS = (nn.ReLU, nn.LeakyReLU)
"""The activations that the kernels compute. A subclass may compute something else."""
has_global_hook = nn.modules.module._has_any_global_hook


class FusedRun(NamedTuple):
    """Consecutive modules that one kernel computes: a norm, and the activation and the pad or blur after it."""

    length: int
    slope: float = 1.0
    margin: int = 0
    blur: int = 0
    """0 for none, 1 for `BlurDown`, 2 for `BlurUp`."""


def run_from(modules: Sequence[nn.Module], first: int, x: Tensor, kept: Container[int] = ()) -> FusedRun | None:
    """Find the modules from `first` on that one kernel can compute: norm, activation, pad or blur; None for others.

    Args:
        x: input of the first module.
        kept: positions whose own outputs are needed; such a module ends the run.

    A module with hooks is not fused, because hooks receive its own input and output.
    """
    norm = modules[first]
    if not isinstance(norm, InstanceNorm) or not norm.fused(x) or norm._forward_hooks:
        return None
    if isinstance(norm, AffineInstanceNorm):  # its weight and bias come between the kernel and the activation
        return FusedRun(1)
    slope, margin, blur, end = 1.0, 0, 0, first + 1
    follower = _follower(modules, end, kept)
    if type(follower) in ACTIVATIONS:
        slope = _slope(follower)  # type: ignore[arg-type]
        end += 1
        follower = _follower(modules, end, kept)
    if type(follower) is ReflectionPad and follower.fused(x):
        margin = follower.margin
        end += 1
    elif joins(norm) and blurs(follower, x):
        blur = follower.blur  # type: ignore[union-attr, assignment]
        end += 1
    return FusedRun(end - first, slope, margin, blur)


def _slope(activation: nn.ReLU | nn.LeakyReLU) -> float:
    return activation.negative_slope if isinstance(activation, nn.LeakyReLU) else 0.0


def joins(norm: nn.Module) -> bool:
    """Whether a norm's kernel may compute more than the norm, its activation and its pad (see `fuse_neighbours`)."""
    if type(norm) is not InstanceNorm or not norm.joins_neighbours or torch.compiler.is_compiling():
        return False
    return not changed(norm)


def blurs(module: nn.Module | None, x: Tensor) -> bool:
    """Whether a module is a blur that can be fused with the layers before it, of which x is a map."""
    return type(module) in (BlurDown, BlurUp) and not changed(module) and _may_join(module, x)  # type: ignore[arg-type]


def pads(module: nn.Module | None, x: Tensor) -> bool:
    """Whether a module is a reflection pad that can be fused with the layers before it, of which x is a map."""
    return type(module) is ReflectionPad and not changed(module) and _may_join(module, x)


def _may_join(module: FusedLayer, x: Tensor) -> bool:
    return module.joins_neighbours and module.fused(x)


def _follower(modules: Sequence[nn.Module], position: int, kept: Container[int]) -> nn.Module | None:
    """Return the module at `position` if it can be fused with the one before it."""
    if position - 1 in kept or position == len(modules):
        return None
    return None if changed(modules[position]) else modules[position]


def changed(module: nn.Module) -> bool:
    """Whether a module has hooks, a `forward` of its own (as of a wrapper), or was compiled by itself.

    Hooks of all modules (`torch.nn.modules.module.register_module_forward_hook`) count. What a subclass computes is not
    known either: callers compare the type.
    """
    if has_global_hook():
        return True
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks) or "forward" in module.__dict__ or module._compiled_call_impl is not None


def run_one(modules: Sequence[nn.Module], position: int, x: Tensor, kept: Container[int] = ()) -> Tensor:
    """Apply the module at `position` to x; a convolution leaves out its bias if the norm after it cancels it.

    The norm subtracts the mean of each channel, which includes the bias. No output depends on such a bias, and its
    gradient is zero except for rounding.

    Args:
        kept: as in `run_from`; a convolution whose own output is needed adds its bias.
    """
    module = modules[position]
    if not _is_plain(module):
        return module(x)
    assert isinstance(module, PLAIN)
    return convolve(module, x, None if _bias_is_cancelled(modules, position, kept) else module.bias)


def _is_plain(module: nn.Module) -> bool:
    """Whether the module is a convolution without hooks. A subclass may do something else with its bias."""
    if type(module) not in PLAIN:
        return False
    return not changed(module)


def _activation_after(modules: Sequence[nn.Module], position: int, x: Tensor) -> bool:
    """Whether a convolution, its activation and a blur follow, so that one kernel computes all but the products."""
    if position + 3 > len(modules) or torch.compiler.is_compiling():
        return False
    convolution, activation, blur = modules[position : position + 3]
    if type(convolution) is not nn.Conv2d or type(activation) not in ACTIVATIONS:
        return False
    return type(blur) is BlurDown and blurs(blur, x) and not changed(convolution) and not changed(activation)


def _bias_is_cancelled(modules: Sequence[nn.Module], position: int, kept: Container[int]) -> bool:
    """Whether the plain convolution at `position` is followed by an instance norm that leaves out biases."""
    norm = _follower(modules, position + 1, kept)
    if not isinstance(norm, InstanceNorm) or type(norm) not in (InstanceNorm, AffineInstanceNorm):
        return False
    return "forward" not in norm.__dict__ and norm.leaves_out_biases


def run_all(modules: Sequence[nn.Module], x: Tensor, residual: Tensor | None = None) -> Tensor:
    """Apply `modules` one after another and add the residual, in as few kernels as possible."""
    return run_block(modules, x, residual)[0]


def run_block(
    modules: Sequence[nn.Module], x: Tensor, residual: Tensor | None = None, margin: int = 0, blur: int = 0
) -> tuple[Tensor, Tensor | None]:
    """Apply `modules`, add the residual, and prepare the output for the layer after them.

    Args:
        margin, blur: of a reflection pad or a blur after the modules, as in `FusedRun`.

    Returns:
        the output, and the output padded or blurred if one kernel computes both, else None. A blurred output replaces
        the other, which is then not computed.
    """
    first = 0
    while first < len(modules):
        run = run_from(modules, first, x)
        if run is None and _activation_after(modules, first, x):
            convolution, activation, down = modules[first : first + 3]
            y = convolve(convolution, x, None)  # type: ignore[arg-type]
            x = down.after(y, convolution.bias, _slope(activation))  # type: ignore[operator, arg-type]
            first += 3
            continue
        if run is None:
            x = run_one(modules, first, x)
            first += 1
            continue
        norm = modules[first]
        first += run.length
        last = first == len(modules) and not run.margin and not run.blur
        if last and residual is not None and residual.shape == x.shape and residual.dtype == x.dtype:
            if margin and joins(norm):
                padded, y = norm.with_inner(x, run.slope, margin, residual)  # type: ignore[operator]
                return y, padded
            if blur and joins(norm):
                y = norm(x, run.slope, 0, residual, blur)
                return y, y
            return norm(x, run.slope, 0, residual), None
        x = apply_run(norm, x, run)
    return x if residual is None else residual + x, None


def tapped(modules: Sequence[nn.Module], position: int, x: Tensor) -> bool:
    """Whether the output of the convolution at `position`, with input x, can be handed out as a `Tap`.

    It can if kernels compute the norm after it, and if no hook would see the map without its bias.
    """
    if not can_tap(x) or not _is_plain(modules[position]) or not _bias_is_cancelled(modules, position, ()):
        return False
    norm = modules[position + 1]
    assert isinstance(norm, InstanceNorm)
    return norm.fused(x) and not changed(norm)


def apply_run(norm: nn.Module, x: Tensor, run: FusedRun, tap: Tap | None = None) -> Tensor:
    """Apply a run to x. A subclass of the norm may not know a blur, and none is passed to it (see `joins`)."""
    if tap is not None:
        return norm(x, run.slope, run.margin, None, run.blur, tap)
    return norm(x, run.slope, run.margin, None, run.blur) if run.blur else norm(x, run.slope, run.margin)
