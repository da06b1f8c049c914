"""The layers that the published networks share.

Their `state_dict` keys are the published ones, so that published weights load; how they compute is ours.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Literal, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..common.dispatch import Implementation, choose

try:
    from . import fused
except ImportError:  # no Triton for this platform
    fused = None  # type: ignore[assignment]

Norm = Literal["instance", "batch", "none"]
Layer = TypeVar("Layer", bound=nn.Module)


def own_precision(x: Tensor) -> AbstractContextManager:
    """Within: no autocast, so that an operation keeps the precision of x."""
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


class FusedLayer(nn.Module):
    """A layer with a Triton kernel: `implementation` is None (kernels on accelerators, PyTorch on the CPU), "triton" or
    "eager", which insist."""

    implementation: Implementation = None

    def fused(self, x: Tensor) -> bool:
        """Whether the kernel computes x; a ValueError where it must and cannot."""
        return choose(None if x.is_meta else self.implementation, x.device, x.dtype).triton  # meta: shapes only


def set_implementation(network: nn.Module, implementation: Implementation) -> None:
    """How the norms, pads, blurs and last convolutions in `network` compute: see `FusedLayer`. (Not its loss.)"""
    if implementation not in (None, "triton", "eager"):
        raise ValueError(f'implementation must be None, "triton" or "eager", not {implementation!r}')
    for module in network.modules():
        if isinstance(module, FusedLayer):
            module.implementation = implementation


def leave_out_biases(network: nn.Module, leave_out: bool = True) -> None:
    """Whether convolutions in `network` compute without a bias that an instance norm right after them takes away.

    They do unless this says otherwise. Such a bias keeps its value and gets no gradient (None, not zeros): a wrapper
    that waits for every parameter's gradient, such as PyTorch's DistributedDataParallel, wants False here.
    """
    for module in network.modules():
        if isinstance(module, InstanceNorm):
            module.leaves_out_biases = leave_out


class InstanceNorm(FusedLayer):
    """Instance normalisation without parameters: each channel of each picture to mean 0 and variance 1 (eps 1e-5).

    Without kernels it is a group norm with one group a channel. The library's own `F.instance_norm` is not used: on the
    CPU, at batch size 1, it returns a wrong input gradient when the incoming gradient is channels-last, and patch
    sampling produces such gradients (tests/networks/test_layers.py shows both).
    """

    leaves_out_biases = True
    """See `leave_out_biases`."""

    def __init__(self, channels: int, eps: float = 1e-5):
        super().__init__()
        self.channels = channels
        self.eps = eps

    def forward(self, x: Tensor, slope: float = 1.0, margin: int = 0, residual: Tensor | None = None) -> Tensor:
        """Normalise, and what follows in the networks, which the kernel does on the way.

        Args:
            x: (images, channels, height, width).
            slope: of an activation for negative values: 1 none, 0 ReLU, 0.2 the published leaky ReLU.
            margin: of a reflection pad.
            residual: added at the end, of x's shape and dtype; not with a margin.
        """
        if x.shape[2] * x.shape[3] == 1:
            raise ValueError("instance norm needs more than one location: the picture is too small for this network")
        if self.fused(x):
            return fused.instance_norm(x, self.eps, slope, margin, residual)
        y = self._normalise(x)
        if slope != 1.0:
            y = F.leaky_relu(y, slope) if slope else F.relu(y)
        if margin:
            with own_precision(y):
                y = F.pad(y, (margin,) * 4, mode="reflect")
        return y if residual is None else residual + y

    def _normalise(self, x: Tensor) -> Tensor:
        # Autocast would widen 16-bit maps here; the operator's sums are float32 all the same.
        with own_precision(x):
            if x.device.type != "cpu" or x.is_contiguous():
                return F.group_norm(x, self.channels, eps=self.eps)
            # The CPU's channels-last form sums squares without care: a flat picture of some megapixels comes out wrong
            # by whole units. Its plain form is exact, and two copies cost about what it saves.
            layout = (
                torch.channels_last if x.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format
            )
            return F.group_norm(x.contiguous(), self.channels, eps=self.eps).contiguous(memory_format=layout)

    def extra_repr(self) -> str:
        return f"{self.channels}, eps={self.eps}"


class ReflectionPad(FusedLayer):
    """Reflection padding of `margin` pixels on each side, in the precision of its input."""

    def __init__(self, margin: int):
        super().__init__()
        self.margin = margin

    def forward(self, x: Tensor) -> Tensor:
        if self.fused(x):
            return fused.reflection_pad(x, self.margin)
        with own_precision(x):  # a CPU's autocast would widen 16-bit maps here
            return F.pad(x, (self.margin,) * 4, mode="reflect")

    def extra_repr(self) -> str:
        return str(self.margin)


def channels_last(network: nn.Module) -> None:
    """Lay the convolutions' weights out channels-last, which convolutions on maps of that layout want.

    (`Module.to(memory_format=...)` refuses weights of other dimensions, which StyleGAN2's have.)
    """
    for parameter in network.parameters():
        if parameter.dim() == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)


def keep_float32(layer: Layer) -> Layer:
    """Mark a layer that computes in float32 whatever autocast says (see `full_precision`)."""
    layer.computes_float32 = True  # type: ignore[assignment]
    return layer


def keeps_float32(layer: nn.Module) -> bool:
    return bool(getattr(layer, "computes_float32", False))


class LastConvolution(FusedLayer, nn.Conv2d):
    """A generator's last convolution, of stride 1: to float32, whatever autocast says and whatever comes in.

    The kernels take at most 16 output channels and odd kernels of at most 7, and read 16-bit maps as they are.
    Everything else is the library's, in float32 (float64 where the map or the weights are), also where "triton" insists
    on kernels.
    """

    computes_float32 = True  # see `keep_float32`

    def __init__(self, in_channels: int, out_channels: int, kernel: int, padding: int = 0):
        super().__init__(in_channels, out_channels, kernel, padding=padding)
        self.margin = padding
        self.few = fused is not None and fused.few_outputs_obstacle(out_channels, in_channels, kernel) is None

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight, self.bias  # once: a parametrization computes at each look
        if self.few and self.fused(x):
            return fused.few_outputs_convolution(x, weight, bias, self.margin)
        with own_precision(x):
            dtype = torch.float64 if torch.float64 in (x.dtype, weight.dtype) else torch.float32
            return self._conv_forward(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))


def full_precision(layer: nn.Module, x: Tensor) -> Tensor:
    """`layer` on x in float32 whatever autocast says: for the last convolution and the tanh of a generator."""
    if isinstance(layer, LastConvolution):
        return layer(x)
    with own_precision(x):
        return layer(x.float() if x.dtype in (torch.bfloat16, torch.float16) else x)


def norm_layer(norm: Norm, channels: int) -> nn.Module:
    """The normalisation that follows a convolution."""
    if norm == "instance":
        return InstanceNorm(channels)
    if norm == "batch":
        return nn.BatchNorm2d(channels)
    if norm == "none":
        return nn.Identity()
    raise ValueError(f'norm must be "instance", "batch" or "none", not {norm!r}')


class _Blur(FusedLayer):
    """Holds the published filter buffer, so that checkpoints fit, and refuses a checkpoint with another filter."""

    filt: Tensor

    def __init__(self, channels: int, taps: list[float], gain: float):
        super().__init__()
        row = torch.tensor(taps)
        filt = row[:, None] * row[None, :]
        self.register_buffer("filt", (gain * filt / filt.sum())[None, None].repeat(channels, 1, 1, 1))

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, errors):
        mine, theirs = self.filt.clone(), state_dict.get(f"{prefix}filt")
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)
        if theirs is not None and theirs.shape == mine.shape and not torch.equal(theirs.to(mine), mine):
            self.filt.copy_(mine)
            errors.append(f"{prefix}filt holds another blur filter than the published one")


class BlurDown(_Blur):
    """Halves height and width after the filter [1, 2, 1], reflected at the border, against aliasing (Zhang, ICML 2019).

    (images, channels, height, width) -> (images, channels, ceil(height / 2), ceil(width / 2)).
    """

    def __init__(self, channels: int):
        super().__init__(channels, [1.0, 2.0, 1.0], 1.0)

    def forward(self, x: Tensor) -> Tensor:
        if self.fused(x):
            return fused.blur_down(x)
        with own_precision(x):
            padded = F.pad(x, (1, 1, 1, 1), mode="reflect")
        return F.conv2d(padded, self.filt.to(x.dtype), stride=2, groups=x.shape[1])


class BlurUp(_Blur):
    """Doubles height and width with the filter [1, 3, 3, 1] (replication at the border).

    The published transposed convolution has only two taps an output along each axis, 1/4 and 3/4: bilinear
    interpolation. That is how it is computed: a third of the time on a CPU, and the compiler accepts it.
    """

    def __init__(self, channels: int):
        super().__init__(channels, [1.0, 3.0, 3.0, 1.0], 4.0)

    def forward(self, x: Tensor) -> Tensor:
        if self.fused(x):
            return fused.blur_up(x)
        return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)


class Run(NamedTuple):
    """Modules that one kernel computes: a norm and what follows it."""

    length: int
    slope: float
    margin: int


def run_from(modules: Sequence[nn.Module], first: int, x: Tensor, kept: Container[int] = ()) -> Run | None:
    """The modules from `first` on that may be computed at once: norm, activation, reflection pad; None for others.

    Args:
        x: what comes into the first.
        kept: positions whose own outputs are wanted: such a module ends a run.

    A module with hooks, which see its own input and output, is left alone.
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
    return Run(end - first, slope, margin)


def _follower(modules: Sequence[nn.Module], position: int, kept: Container[int]) -> nn.Module | None:
    """The module at `position`, if it may join those before it."""
    if position - 1 in kept or position == len(modules):
        return None
    module = modules[position]
    return None if module._forward_hooks or module._forward_pre_hooks else module


def run_one(modules: Sequence[nn.Module], position: int, x: Tensor, kept: Container[int] = ()) -> Tensor:
    """What the module at `position` makes of x: a convolution without its bias where the norm after it takes that away.

    The norm subtracts each channel's mean, and with it what the bias has added: no output depends on such a bias, and
    its gradient is zero but for rounding.

    Args:
        kept: as for `run_from`: a convolution whose own output is wanted adds its bias.
    """
    module = modules[position]
    if not _bias_is_cancelled(modules, position, kept):
        return module(x)
    if isinstance(module, nn.ConvTranspose2d):
        more = (module.output_padding, module.groups, module.dilation)
        return F.conv_transpose2d(x, module.weight, None, module.stride, module.padding, *more)  # type: ignore[arg-type]
    assert isinstance(module, nn.Conv2d)
    return module._conv_forward(x, module.weight, None)


def _bias_is_cancelled(modules: Sequence[nn.Module], position: int, kept: Container[int]) -> bool:
    module = modules[position]
    if type(module) not in (nn.Conv2d, nn.ConvTranspose2d):  # a subclass may do something else with its bias
        return False
    norm = _follower(modules, position + 1, kept)
    if type(norm) is not InstanceNorm or "forward" in norm.__dict__ or not norm.leaves_out_biases:
        return False
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return not any(hooks) and "forward" not in module.__dict__ and module._compiled_call_impl is None


def run_all(modules: Sequence[nn.Module], x: Tensor, residual: Tensor | None = None) -> Tensor:
    """`modules` one after the other, plus the residual, in as few kernels as there are for them."""
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
