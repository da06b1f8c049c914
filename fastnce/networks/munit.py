"""The generator `resnet_cat`: MUNIT's content encoder and decoder (Huang et al., ECCV 2018; published `G_Resnet`).

The published code cannot train it: `define_G` reads an option `nz` that no parser defines, and `forward` has other
arguments than its callers use. This is the class without a style code (`nz=0`), with the arguments of every generator.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import InstanceNorm, LastConvolution, ReflectionPad, full_precision, own_precision
from .resnet import check_layers
from .runs import run_all


class ImageNorm(nn.Module):
    """Normalise each image over all channels and locations, then scale and shift each channel (published `LayerNorm`).

    The deviation is that of a sample (n - 1), and eps is added to it. Sums are at least float32.
    """

    def __init__(self, channels: int, eps: float = 1e-5):
        super().__init__()
        self.gamma = nn.Parameter(torch.empty(channels).uniform_())
        self.beta = nn.Parameter(torch.zeros(channels))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        with own_precision(x):
            wide = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
            deviation, mean = torch.std_mean(wide, dim=(1, 2, 3), keepdim=True)
            gamma, beta = (p.to(wide.dtype).view(1, -1, 1, 1) for p in (self.gamma, self.beta))
            return ((wide - mean) / (deviation + self.eps) * gamma + beta).to(x.dtype)


class ConvBlock(nn.Module):
    """Reflection pad, convolution with a bias, norm and ReLU, with the published module names `conv` and `norm`."""

    def __init__(self, before: int, after: int, kernel: int, stride: int, margin: int, norm: nn.Module, relu: bool):
        super().__init__()
        self.pad = ReflectionPad(margin)
        self.conv = nn.Conv2d(before, after, kernel, stride)
        self.norm = norm
        self.activation = nn.ReLU(True) if relu else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return run_all([self.pad, self.conv, self.norm, self.activation], x)


class Ending(nn.Module):
    """Reflection pad, the last convolution and tanh, in float32 even under autocast."""

    def __init__(self, before: int, after: int):
        super().__init__()
        self.pad = ReflectionPad(3)
        self.conv = LastConvolution(before, after, 7)

    def forward(self, x: Tensor) -> Tensor:
        return full_precision(nn.Tanh(), full_precision(self.conv, self.pad(x)))


class Doubling(nn.Module):
    """Repeat each pixel twice along both axes."""

    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(x, scale_factor=2, mode="nearest")


class _Model(nn.Module):
    """A container that gives layers the published name `model`."""

    def __init__(self, layers: list[nn.Module]):
        super().__init__()
        self.model = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


class ContentBlock(_Model):
    """Two 3x3 convolutions with instance norm, and a skip connection."""

    def __init__(self, channels: int):
        super().__init__(
            [ConvBlock(channels, channels, 3, 1, 1, InstanceNorm(channels), relu) for relu in (True, False)]
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.model(x)


class MUNITGenerator(nn.Module):
    """Two halvings, residual blocks and two doublings, with the published names `enc_content.model`, `dec.model`.

    Args:
        in_channels, out_channels: of the images.
        width: channels after the first convolution (published `ngf`).
        blocks: residual blocks of the encoder, and as many of the decoder; published 4.

    Feature layers are positions in `enc_content.model`: 0 is the first convolution, 1 and 2 the halvings, 3 the output
    of the encoder's residual blocks. The norms are fixed: instance norm, and `ImageNorm` after a doubling.
    """

    factor = 4
    """Height and width of an image must be multiples of this."""
    smallest = 8
    """Smallest side of an image: the residual blocks pad maps of a quarter of it by reflection."""
    features_repeat = True

    def __init__(self, in_channels: int = 3, out_channels: int = 3, width: int = 64, blocks: int = 4):
        super().__init__()
        half, quarter = 2 * width, 4 * width

        def residual() -> nn.Module:
            return _Model([ContentBlock(quarter) for _ in range(blocks)])

        self.enc_content = _Model(
            [
                ConvBlock(in_channels, width, 7, 1, 3, InstanceNorm(width), True),
                ConvBlock(width, half, 4, 2, 1, InstanceNorm(half), True),
                ConvBlock(half, quarter, 4, 2, 1, InstanceNorm(quarter), True),
                residual(),
            ]
        )
        self.dec = _Model(
            [
                residual(),
                Doubling(),
                ConvBlock(quarter, half, 5, 1, 2, ImageNorm(half), True),
                Doubling(),
                ConvBlock(half, width, 5, 1, 2, ImageNorm(width), True),
                Ending(width, out_channels),
            ]
        )
        self.in_channels, self.out_channels = in_channels, out_channels
        self.channels = [width, half, quarter, quarter]

    def forward(self, x: Tensor, layers: Sequence[int] = (), encode_only: bool = False):
        """See `ResnetGenerator.forward`. Sides must be multiples of 4."""
        features: list[Tensor] = []
        for index, layer in enumerate(self.enc_content.model):
            x = layer(x)
            if index in layers:
                features.append(x)
                if encode_only and index == layers[-1]:
                    return features
        x = self.dec(x)
        return (x, features) if layers else x

    def feature_channels(self, layers: Sequence[int]) -> list[int]:
        """Return the channels of the features at `layers`; raise ValueError for a layer that does not exist."""
        check_layers(layers, len(self.channels))
        return [self.channels[layer] for layer in layers]
