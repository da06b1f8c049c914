"""Layers that the published networks share.

Their `state_dict` keys are the published ones, so published weights load. The computation is our own.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..common.dispatch import KERNELS, Implementation, check_implementation, choose
from ..common.first_use import followed
from ..common.taps import Tap
from .uses import is_trusted

try:
    from . import fused
except ImportError:  # no Triton for this platform
    fused = None  # type: ignore[assignment]

Norm = Literal["instance", "batch", "none"]
Layer = TypeVar("Layer", bound=nn.Module)


def own_precision(x: Tensor) -> AbstractContextManager:
    """Return a context without autocast, in which operations keep the precision of x."""
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


class FusedLayer(nn.Module):
    """A layer with a Triton kernel. `implementation` is None (kernels on accelerators), "triton" or "eager"."""

    implementation: Implementation = None
    kernels = ""  # their name in `uses.LAYERS`

    def fused(self, x: Tensor, options: tuple[Any, ...] | None = None, *more: Tensor | None) -> bool:
        """Whether the kernel computes x. Raises ValueError if "triton" is forced and the kernel cannot run.

        With options and tensors as in `uses.formula`, the kernel is checked at its first use.
        """
        choice = choose(None if x.is_meta else self.implementation, x.device, x.dtype)  # meta: shapes only
        if choice is not KERNELS:
            return choice.triton
        if options is None or torch.compiler.is_compiling():
            return followed(self.kernels, x.device, x.dtype).triton
        return is_trusted(self.kernels, x, options, *more)


def set_implementation(network: nn.Module, implementation: Implementation) -> None:
    """Set the implementation of the norms, pads, blurs and last convolutions in `network` (see `FusedLayer`)."""
    check_implementation(implementation)
    for module in network.modules():
        if isinstance(module, FusedLayer):
            module.implementation = implementation


def leave_out_biases(network: nn.Module, leave_out: bool = True) -> None:
    """Set whether convolutions in `network` leave out a bias that the instance norm right after them cancels.

    By default they do. Such a bias keeps its value and gets no gradient (None, not zeros). Pass False for a wrapper
    that waits for the gradient of every parameter, such as PyTorch's DistributedDataParallel.
    """
    for module in network.modules():
        if isinstance(module, InstanceNorm):
            module.leaves_out_biases = leave_out


class InstanceNorm(FusedLayer):
    """Instance normalisation without parameters: each channel of each image gets mean 0 and variance 1 (eps 1e-5).

    Without kernels it is a group norm with one group per channel. It does not use `F.instance_norm`: on the CPU, at
    batch size 1, that returns a wrong input gradient if the incoming gradient is channels-last, and patch sampling
    produces such gradients (tests/networks/test_layers.py shows both).
    """

    kernels = "instance_norm"
    leaves_out_biases = True
    """See `leave_out_biases`."""

    def __init__(self, channels: int, eps: float = 1e-5):
        super().__init__()
        self.channels = channels
        self.eps = eps

    def forward(
        self, x: Tensor, slope: float = 1.0, margin: int = 0, residual: Tensor | None = None, tap: Tap | None = None
    ) -> Tensor:
        """Normalise, then activate, pad or add a residual, as follows in the networks; the kernel does all in one pass.

        Args:
            x: (images, channels, height, width).
            slope: slope of the activation for negative values: 1 none, 0 ReLU, 0.2 the published leaky ReLU.
            margin: pixels of reflection padding on each side.
            residual: added at the end, of x's shape and dtype; cannot be combined with a margin.
            tap: of x; it gets its token if kernels compute the norm.
        """
        if x.shape[2] * x.shape[3] == 1:
            raise ValueError("instance norm needs more than one location: the image is too small for this network")
        if self.fused(x, (self.eps, slope, margin), residual):
            return fused.instance_norm(x, self.eps, slope, margin, residual, tap)
        y = self._normalise(x)
        if slope != 1.0:
            y = F.leaky_relu(y, slope) if slope else F.relu(y)
        if margin:
            with own_precision(y):
                y = F.pad(y, (margin,) * 4, mode="reflect")
        return y if residual is None else residual + y

    def _normalise(self, x: Tensor) -> Tensor:
        if x.is_meta and not torch.is_grad_enabled():  # for a shape, PyTorch passes through the formula in Python
            return torch.empty_like(x)
        # Autocast would widen 16-bit maps here, but the operator sums in float32 anyway.
        with own_precision(x):
            if x.device.type != "cpu" or x.is_contiguous():
                return F.group_norm(x, self.channels, eps=self.eps)
            # On the CPU, the channels-last form sums squares inaccurately: a flat image of a few megapixels is wrong by
            # whole units. The contiguous form is accurate, and faster by about the cost of the two copies.
            last = x.is_contiguous(memory_format=torch.channels_last)
            layout = torch.channels_last if last else torch.contiguous_format
            return F.group_norm(x.contiguous(), self.channels, eps=self.eps).contiguous(memory_format=layout)

    def extra_repr(self) -> str:
        return f"{self.channels}, eps={self.eps}"


class ReflectionPad(FusedLayer):
    """Reflection padding of `margin` pixels on each side, in the precision of its input."""

    kernels = "reflection_pad"

    def __init__(self, margin: int):
        super().__init__()
        self.margin = margin

    def forward(self, x: Tensor) -> Tensor:
        if self.fused(x, (self.margin,)):
            return fused.reflection_pad(x, self.margin)
        with own_precision(x):  # CPU autocast would widen 16-bit maps here
            return F.pad(x, (self.margin,) * 4, mode="reflect")

    def extra_repr(self) -> str:
        return str(self.margin)


def channels_last(network: nn.Module) -> None:
    """Store the weights of convolutions channels-last, as is fastest for maps of that layout.

    `Module.to(memory_format=...)` refuses weights of other dimensions, which StyleGAN2 has.
    """
    for parameter in network.parameters():
        if parameter.dim() == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)


def keep_float32(layer: Layer) -> Layer:
    """Mark a layer that computes in float32 even under autocast (see `full_precision`)."""
    layer.computes_float32 = True  # type: ignore[assignment]
    return layer


def keeps_float32(layer: nn.Module) -> bool:
    """Whether a layer is marked by `keep_float32`."""
    return bool(getattr(layer, "computes_float32", False))


class LastConvolution(FusedLayer, nn.Conv2d):
    """A generator's last convolution, of stride 1: it returns float32 for every input dtype, also under autocast.

    The Triton kernels support at most 16 output channels and odd kernel sizes of at most 7, and read 16-bit maps
    directly. PyTorch computes all other cases in float32 (float64 if the map or the weights are), even if "triton" is
    forced.
    """

    computes_float32 = True  # see `keep_float32`
    kernels = "few_outputs_convolution"

    def __init__(self, in_channels: int, out_channels: int, kernel: int, padding: int = 0):
        super().__init__(in_channels, out_channels, kernel, padding=padding)
        self.margin = padding
        self.has_kernel = fused is not None and fused.few_outputs_obstacle(out_channels, in_channels, kernel) is None

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight, self.bias  # once: a parametrization recomputes them at each access
        if self.has_kernel and self.fused(x, (self.margin,), weight, bias):
            return fused.few_outputs_convolution(x, weight, bias, self.margin)
        with own_precision(x):
            dtype = torch.float64 if torch.float64 in (x.dtype, weight.dtype) else torch.float32
            return self._conv_forward(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))


def full_precision(layer: nn.Module, x: Tensor) -> Tensor:
    """Apply `layer` to x in float32 even under autocast: for the last convolution and the tanh of a generator."""
    if isinstance(layer, LastConvolution):
        return layer(x)
    with own_precision(x):
        return layer(x.float() if x.dtype in (torch.bfloat16, torch.float16) else x)


def norm_layer(norm: Norm, channels: int) -> nn.Module:
    """Return the normalisation that follows a convolution."""
    if norm == "instance":
        return InstanceNorm(channels)
    if norm == "batch":
        return nn.BatchNorm2d(channels)
    if norm == "none":
        return nn.Identity()
    raise ValueError(f'norm must be "instance", "batch" or "none", not {norm!r}')


class _Blur(FusedLayer):
    """Hold the published filter buffer, so that checkpoints load, and refuse checkpoints with another filter."""

    filt: Tensor

    def __init__(self, channels: int, taps: list[float], gain: float):
        super().__init__()
        filt = torch.tensor([[gain * a * b / sum(taps) ** 2 for b in taps] for a in taps])  # exact: powers of two
        self.register_buffer("filt", filt.repeat(channels, 1, 1, 1))

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, errors):
        published, loaded = self.filt.clone(), state_dict.get(f"{prefix}filt")
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)
        if loaded is None or loaded.shape != published.shape or published.is_meta or loaded.is_meta:
            return
        if not torch.equal(loaded.to(published), published):
            self.filt.copy_(published)
            errors.append(f"{prefix}filt holds another blur filter than the published one")


class BlurDown(_Blur):
    """Blur with the filter [1, 2, 1], reflected at the border, then halve height and width (Zhang, ICML 2019).

    (images, channels, height, width) -> (images, channels, ceil(height / 2), ceil(width / 2)).
    """

    kernels = "blur_down"

    def __init__(self, channels: int):
        super().__init__(channels, [1.0, 2.0, 1.0], 1.0)

    def forward(self, x: Tensor) -> Tensor:
        if self.fused(x, ()):
            return fused.blur_down(x)
        with own_precision(x):
            padded = F.pad(x, (1, 1, 1, 1), mode="reflect")
        return F.conv2d(padded, self.filt.to(x.dtype), stride=2, groups=x.shape[1])


class BlurUp(_Blur):
    """Double height and width with the filter [1, 3, 3, 1], replicated at the border.

    The published transposed convolution has only two taps per output along each axis, 1/4 and 3/4, which is bilinear
    interpolation. It is computed as such: this takes a third of the time on a CPU, and the compiler supports it.
    """

    kernels = "blur_up"

    def __init__(self, channels: int):
        super().__init__(channels, [1.0, 3.0, 3.0, 1.0], 4.0)

    def forward(self, x: Tensor) -> Tensor:
        if self.fused(x, ()):
            return fused.blur_up(x)
        # for a shape alone, PyTorch passes through the formula of `interpolate` in Python
        return x.repeat(1, 1, 2, 2) if x.is_meta else F.interpolate(x, scale_factor=2, mode="bilinear")
