"""The layers that the published networks share.

Their `state_dict` keys are the published ones, so that published weights load; how they compute is ours.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Norm = Literal["instance", "batch", "none"]


def own_precision(x: Tensor) -> AbstractContextManager:
    """Within: no autocast, so that an operation keeps the precision of x."""
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


class InstanceNorm(nn.Module):
    """Instance normalisation without parameters: each channel of each picture to mean 0 and variance 1 (eps 1e-5).

    Computed as a group norm with one group a channel. The library's own `F.instance_norm` is not used: on the CPU, at
    batch size 1, it returns a wrong input gradient when the incoming gradient is channels-last, and patch sampling
    produces such gradients (tests/test_layers.py shows both).
    """

    def __init__(self, channels: int, eps: float = 1e-5):
        super().__init__()
        self.channels = channels
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[2] * x.shape[3] == 1:
            raise ValueError("instance norm needs more than one location: the picture is too small for this network")
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


class ReflectionPad(nn.Module):
    """Reflection padding of `margin` pixels on each side, in the precision of its input."""

    def __init__(self, margin: int):
        super().__init__()
        self.margin = margin

    def forward(self, x: Tensor) -> Tensor:
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


def full_precision(layer: nn.Module, x: Tensor) -> Tensor:
    """`layer` on x in float32 whatever autocast says: for the last convolution and the tanh of a generator."""
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


class _Blur(nn.Module):
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
        return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
