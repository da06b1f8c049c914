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
    from . import fused, fused_last
except ImportError:  # no Triton for this platform
    fused = fused_last = None  # type: ignore[assignment]

Norm = Literal["instance", "batch", "none"]
Layer = TypeVar("Layer", bound=nn.Module)


def own_precision(x: Tensor) -> AbstractContextManager:
    """Return a context without autocast, in which operations keep the precision of x."""
    if x.is_meta or (torch.compiler.is_exporting() and not torch.is_autocast_enabled(x.device.type)):
        return nullcontext()  # an exported graph would hold the context, which other programs do not know
    return torch.autocast(x.device.type, enabled=False)


class FusedLayer(nn.Module):
    """A layer with a Triton kernel. `implementation` is None (kernels on accelerators), "triton" or "eager"."""

    implementation: Implementation = None
    kernels = ""  # their name in `uses.LAYERS`
    joins_neighbours = True
    """See `fuse_neighbours`."""

    def fused(self, x: Tensor, options: tuple[Any, ...] | None = None, *more: Tensor | None, kernels: str = "") -> bool:
        """Whether the kernel computes x. Raises ValueError if "triton" is forced and the kernel cannot run.

        With options and tensors as in `uses.formula`, the kernel is checked at its first use.

        kernels: of the layer together with another one, if they are not its own.
        """
        kernels = kernels or self.kernels
        choice = choose(None if x.is_meta else self.implementation, x.device, x.dtype)  # meta: shapes only
        if choice is not KERNELS:
            return choice.triton
        if options is None or torch.compiler.is_compiling():
            return followed(kernels, x.device, x.dtype).triton
        return is_trusted(kernels, x, options, *more)


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


def fuse_neighbours(network: nn.Module, fuse: bool = True) -> None:
    """Set whether kernels in `network` compute several layers at once, beyond a norm, its activation and its pad.

    By default they do: a norm also computes the blur after it, a residual block the pad or blur of the layer after it,
    and a convolution without a norm leaves its bias to the activation and blur after it.
    """
    for module in network.modules():
        if isinstance(module, FusedLayer):
            module.joins_neighbours = fuse


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
        self,
        x: Tensor,
        slope: float = 1.0,
        margin: int = 0,
        residual: Tensor | None = None,
        blur: int = 0,
        tap: Tap | None = None,
    ) -> Tensor:
        """Normalise, then activate, add, and pad or blur, as follows in the networks; the kernels do all at once.

        Args:
            x: (images, channels, height, width).
            slope: slope of the activation for negative values: 1 none, 0 ReLU, 0.2 the published leaky ReLU.
            margin: pixels of reflection padding on each side.
            residual: added before the padding or blur, of x's shape and dtype.
            blur: without padding: 0 none, 1 as `BlurDown`, 2 as `BlurUp`.
            tap: of x; it gets its token if kernels compute the norm.
        """
        _check_locations(x)
        if self.fused(x, (self.eps, slope, margin, blur, False), residual):
            return fused.instance_norm(x, self.eps, slope, margin, residual, blur, tap)
        return self._ended(self._normalise(x), slope, margin, residual, blur)

    def with_inner(self, x: Tensor, slope: float, margin: int, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return `forward` with a pad, and the same without the pad, which the kernels return as a view."""
        _check_locations(x)
        if self.fused(x, (self.eps, slope, margin, 0, True), residual):
            return fused.instance_norm_and_inner(x, self.eps, slope, margin, residual)
        y = self._ended(self._normalise(x), slope, 0, residual, 0)
        with own_precision(y):
            return F.pad(y, (margin,) * 4, mode="reflect"), y

    @staticmethod
    def _ended(y: Tensor, slope: float, margin: int, residual: Tensor | None, blur: int) -> Tensor:
        """Activate, add, and pad or blur in plain PyTorch."""
        if slope != 1.0:
            y = F.leaky_relu(y, slope) if slope else F.relu(y)
        y = y if residual is None else residual + y
        if margin:
            with own_precision(y):
                y = F.pad(y, (margin,) * 4, mode="reflect")
        return y if blur == 0 else _halved(y) if blur == 1 else _doubled(y)

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


def _check_locations(x: Tensor) -> None:
    if x.shape[2] * x.shape[3] == 1:
        raise ValueError("instance norm needs more than one location: the image is too small for this network")


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
        self.has_kernel = (
            fused_last is not None and fused_last.few_outputs_obstacle(out_channels, in_channels, kernel) is None
        )

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight, self.bias  # once: a parametrization recomputes them at each access
        if self.has_kernel and self.fused(x, (self.margin,), weight, bias):
            return fused_last.few_outputs_convolution(x, weight, bias, self.margin)
        with own_precision(x):
            dtype = torch.float64 if torch.float64 in (x.dtype, weight.dtype) else torch.float32
            return self._conv_forward(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))


def full_precision(layer: nn.Module, x: Tensor) -> Tensor:
    """Apply `layer` to x in float32 even under autocast: for the last convolution and the tanh of a generator."""
    if isinstance(layer, LastConvolution):
        return layer(x)
    with own_precision(x):
        return layer(x.float() if x.dtype in (torch.bfloat16, torch.float16) else x)


DOWN_TAPS = [1.0, 2.0, 1.0]


class _Blur(FusedLayer):
    """Hold the published filter buffer, so that checkpoints load, and refuse checkpoints with another filter."""

    filt: Tensor
    blur = 0

    def __init__(self, channels: int, taps: list[float], gain: float):
        super().__init__()
        self.register_buffer("filt", _blur_filter(channels, taps, gain))

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, errors):
        published, loaded = self.filt.clone(), state_dict.get(f"{prefix}filt")
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)
        if loaded is None or loaded.shape != published.shape or published.is_meta or loaded.is_meta:
            return
        if not torch.equal(loaded.to(published), published):
            self.filt.copy_(published)
            errors.append(f"{prefix}filt holds another blur filter than the published one")


def _blur_filter(channels: int, taps: list[float], gain: float) -> Tensor:
    filt = torch.tensor([[gain * a * b / sum(taps) ** 2 for b in taps] for a in taps])  # exact: powers of two
    return filt.repeat(channels, 1, 1, 1)


def _halved(x: Tensor, filt: Tensor | None = None) -> Tensor:
    """Compute `BlurDown` in plain PyTorch, with its filter if there is one."""
    filt = _blur_filter(x.shape[1], DOWN_TAPS, 1.0) if filt is None else filt
    with own_precision(x):
        padded = F.pad(x, (1, 1, 1, 1), mode="reflect")
    return F.conv2d(padded, filt.to(x), stride=2, groups=x.shape[1])


def _doubled(x: Tensor) -> Tensor:
    """Compute `BlurUp` in plain PyTorch."""
    # for a shape alone, PyTorch passes through the formula of `interpolate` in Python
    return x.repeat(1, 1, 2, 2) if x.is_meta else F.interpolate(x, scale_factor=2, mode="bilinear")


class BlurDown(_Blur):
    """Blur with the filter [1, 2, 1], reflected at the border, then halve height and width (Zhang, ICML 2019).

    (images, channels, height, width) -> (images, channels, ceil(height / 2), ceil(width / 2)).
    """

    kernels = "blur_down"
    blur = 1  # see `InstanceNorm.forward`

    def __init__(self, channels: int):
        super().__init__(channels, DOWN_TAPS, 1.0)

    def forward(self, x: Tensor) -> Tensor:
        if self.fused(x, ()):
            return fused.blur_down(x)
        return _halved(x, self.filt)

    def after(self, x: Tensor, bias: Tensor | None, slope: float) -> Tensor:
        """Add a bias to x, activate with this slope for negative values, and blur: in one kernel if there is one."""
        if self.fused(x, (slope, 1), bias, kernels="activate"):
            return fused.activate(x, bias, slope, 1)
        biased = x if bias is None else x + bias.to(x.dtype)[:, None, None]
        return self(F.leaky_relu(biased, slope))


class BlurUp(_Blur):
    """Double height and width with the filter [1, 3, 3, 1], replicated at the border.

    The published transposed convolution has only two taps per output along each axis, 1/4 and 3/4, which is bilinear
    interpolation. It is computed as such: this takes a third of the time on a CPU, and the compiler supports it.
    """

    kernels = "blur_up"
    blur = 2  # see `InstanceNorm.forward`

    def __init__(self, channels: int):
        super().__init__(channels, [1.0, 3.0, 3.0, 1.0], 4.0)

    def forward(self, x: Tensor) -> Tensor:
        if self.fused(x, ()):
            return fused.blur_up(x)
        return _doubled(x)
