"""SinCUT's networks after StyleGAN2 (Karras et al., CVPR 2020; published `StyleGAN2Generator`, `...Discriminator`).

Weights are initialised with N(0, 1) and multiplied by 1 / sqrt(fan-in) at each use, so that all learn at the same rate.
Every operation is twice differentiable, as the discriminator's gradient penalty requires.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import own_precision
from .resnet import check_layers


class Blur(nn.Module):
    """Pad with zeros, then apply the filter [1, 3, 3, 1] along both axes with a stride."""

    kernel: Tensor

    def __init__(self, before: int, after: int, stride: int = 1, gain: float = 1.0):
        super().__init__()
        row = torch.tensor([1.0, 3.0, 3.0, 1.0])
        kernel = row[:, None] * row[None, :]
        self.register_buffer("kernel", gain * kernel / kernel.sum())
        self.pad = (before, after, before, after)
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        kernel = self.kernel.to(x.dtype).expand(x.shape[1], 1, 4, 4)
        return F.conv2d(F.pad(x, self.pad), kernel, stride=self.stride, groups=x.shape[1])


class EqualConv(nn.Module):
    """Convolution without bias, with a weight that is scaled at each use."""

    def __init__(self, in_channels: int, out_channels: int, size: int, stride: int, padding: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, size, size))
        self.scale = 1 / math.sqrt(in_channels * size**2)
        self.stride, self.padding = stride, padding

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight * self.scale, stride=self.stride, padding=self.padding)


class EqualLinear(nn.Module):
    """Linear layer with a weight that is scaled at each use, optionally followed by the scaled leaky ReLU."""

    def __init__(self, in_features: int, out_features: int, activate: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_features, in_features))
        self.bias = nn.Parameter(torch.zeros(out_features))
        self.scale = 1 / math.sqrt(in_features)
        self.activate = activate

    def forward(self, x: Tensor) -> Tensor:
        x = F.linear(x, self.weight * self.scale, self.bias)
        return math.sqrt(2) * F.leaky_relu(x, 0.2) if self.activate else x


class BiasedLeakyReLU(nn.Module):
    """sqrt(2) * leaky_relu(x + bias); the factor preserves the variance."""

    def __init__(self, channels: int):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(1, channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return math.sqrt(2) * F.leaky_relu(x + self.bias.to(x.dtype), 0.2)


def conv_layer(
    in_channels: int, out_channels: int, size: int, halve: bool = False, activate: bool = True
) -> nn.Sequential:
    """A blur if it halves the resolution, a convolution and an activation."""
    layers: list[nn.Module] = []
    stride = 1
    if halve:
        room = 2 + size - 1  # pixels that the filter and the convolution remove
        # A strided 1x1 convolution reads every other pixel, so the blur computes only these.
        skip, stride = (2, 1) if size == 1 else (1, 2)
        layers.append(Blur((room + 1) // 2, room // 2, skip))
    layers.append(EqualConv(in_channels, out_channels, size, stride, 0 if halve else size // 2))
    if activate:
        layers.append(BiasedLeakyReLU(out_channels))
    return nn.Sequential(*layers)


class ResBlock(nn.Module):
    """Two 3x3 convolutions plus a skip connection, divided by sqrt(2)."""

    def __init__(self, in_channels: int, out_channels: int, halve: bool):
        super().__init__()
        self.conv1 = conv_layer(in_channels, in_channels, 3)
        self.conv2 = conv_layer(in_channels, out_channels, 3, halve)
        same = in_channels == out_channels and not halve
        self.skip = nn.Identity() if same else conv_layer(in_channels, out_channels, 1, halve, activate=False)

    def forward(self, x: Tensor) -> Tensor:
        return (self.conv2(self.conv1(x)) + self.skip(x)) / math.sqrt(2)


class UpConv(nn.Module):
    """Upsample by 2: a transposed 3x3 convolution with each output channel's weights at length 1, then the blur."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(1, out_channels, in_channels, 3, 3))
        self.scale = 1 / math.sqrt(in_channels * 9)
        self.blur = Blur(1, 1, gain=4.0)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.scale * self.weight[0]
        weight = weight * torch.rsqrt(weight.square().sum((1, 2, 3), keepdim=True) + 1e-8)
        return self.blur(F.conv_transpose2d(x, weight.transpose(0, 1), stride=2))


class Noise(nn.Module):
    """In training, add a map of normal noise to all channels, times a learned weight that starts at 0.

    Without `active` it adds nothing: the published small generator has the weight, but no noise.
    """

    def __init__(self, active: bool = True):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.active = active

    def forward(self, x: Tensor) -> Tensor:
        if not (self.training and self.active):
            return x
        return x + self.weight.to(x.dtype) * torch.randn(x.shape[0], 1, *x.shape[2:], dtype=x.dtype, device=x.device)


class StyledConv(nn.Module):
    """UpConv, noise and activation, without a style."""

    def __init__(self, in_channels: int, out_channels: int, noise: bool = True):
        super().__init__()
        self.conv = UpConv(in_channels, out_channels)
        self.noise = Noise(noise)
        self.activate = BiasedLeakyReLU(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.activate(self.noise(self.conv(x)))


class _Convs(nn.Module):
    """A container that gives layers the published name `convs`."""

    def __init__(self, layers: list[nn.Module]):
        super().__init__()
        self.convs = nn.Sequential(*layers)


def log2_resolution(resolution: int) -> int:
    """Return log2 of a crop's side, rounded to the nearest integer, as published."""
    if resolution < 8:
        raise ValueError(f"network.resolution must be at least 8, not {resolution}")
    return round(math.log2(resolution))


class StyleGAN2Generator(nn.Module):
    """Encoder and decoder of residual blocks, without instance norm or tanh.

    Args:
        in_channels, out_channels: of the images.
        width: published `ngf`. At the crops' resolution there are `width * 512 / resolution` channels, at most 512
            below 64.
        resolution: side of the training crops. It determines the number of channels.
        blocks: number of residual blocks between halving and doubling, an even number.
        downsampling: number of halvings, and of doublings (published `stylegan2_G_num_downsampling`).
        noise: the doublings add noise in training; the published small generator, with 2 blocks, has none.
        widths: channels at the crops' resolution and after each halving; overrides the three that determine them.

    Feature layers are positions in `encoder.convs`: 0 is the image, 1 the 1x1 convolution, then one layer per halving
    block and one per residual block. Sides of images must be multiples of 2**downsampling.
    """

    features_repeat = True  # only the decoder has noise

    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        width: int = 10,
        resolution: int = 64,
        blocks: int = 6,
        *,
        downsampling: int = 1,
        noise: bool = True,
        widths: tuple[int, ...] | None = None,
    ):
        super().__init__()
        level = log2_resolution(resolution)
        if widths is None and not 0 <= downsampling <= level - 2:  # the published tables of channels begin at 4
            raise ValueError(
                f"network.stylegan2_downsampling={downsampling} leaves maps of less than 4x4 at network.resolution="
                f"{resolution}: it must be at most {level - 2}"
            )

        def channels(l: int) -> int:
            wanted = round(2 ** (14 - l) * width / 32)
            return min(512, wanted) if l < 6 else wanted

        widths = widths or tuple(channels(level - i) for i in range(downsampling + 1))
        fine, coarse = widths[0], widths[-1]
        if fine < 1:
            raise ValueError(f"network.width={width} leaves no channels at network.resolution={resolution}: raise it")
        self.encoder = _Convs(
            [nn.Identity(), conv_layer(in_channels, fine, 1)]
            + [ResBlock(before, after, halve=True) for before, after in pairwise(widths)]
            + [ResBlock(coarse, coarse, halve=False) for _ in range(blocks // 2)]
        )
        self.decoder = _Convs(
            [ResBlock(coarse, coarse, halve=False) for _ in range(blocks // 2)]
            + [StyledConv(before, after, noise) for before, after in pairwise(widths[::-1])]
            + [conv_layer(fine, out_channels, 1)]
        )
        self.channels = [in_channels, *widths, *[coarse] * (blocks // 2)]
        self.factor = 2 ** (len(widths) - 1)
        self.out_channels = out_channels

    def forward(self, x: Tensor, layers: Sequence[int] = (), encode_only: bool = False):
        """See `ResnetGenerator.forward`. Sides must be multiples of 2**downsampling."""
        features: list[Tensor] = []
        for index, layer in enumerate(self.encoder.convs):
            x = layer(x)
            if index in layers:
                features.append(x)
                if encode_only and index == layers[-1]:
                    return features
        x = self.decoder.convs[:-1](x)
        last = self.decoder.convs[-1]
        with own_precision(x):  # float32 under autocast, as the last convolution of every generator
            x = last(x.to(next(last.parameters()).dtype))
        return (x, features) if layers else x

    def feature_channels(self, layers: Sequence[int]) -> list[int]:
        """Return the channels of the features at `layers`; raise ValueError for a layer that does not exist."""
        check_layers(layers, len(self.channels))
        return [self.channels[layer] for layer in layers]


class StyleGAN2Discriminator(nn.Module):
    """Score whole crops of one size: (images, channels, side, side) to (images, 1); side is 2**n.

    Args:
        in_channels: of the images.
        width: published `ndf`. At the crops' resolution there are `width * 256 / resolution` channels, at most 384
            below 64.
        resolution: side of the crops.
    """

    pictures_independent = True

    def __init__(self, in_channels: int = 3, width: int = 8, resolution: int = 64):
        super().__init__()
        level = log2_resolution(resolution)

        def channels(l: int) -> int:
            wanted = int(2 ** (14 - l) * width / 64)
            return min(384, wanted) if l < 6 else wanted

        if channels(level) < 1:
            raise ValueError(
                f"network.discriminator_width={width} leaves no channels at network.resolution={resolution}: raise it"
            )
        self.side = 2**level
        self.convs = nn.Sequential(
            conv_layer(in_channels, channels(level), 1),
            *(ResBlock(channels(l), channels(l - 1), halve=True) for l in range(level, 2, -1)),
        )
        last = channels(2)
        self.final_conv = conv_layer(last, last, 3)
        self.final_linear = nn.Sequential(EqualLinear(last * 16, last, True), EqualLinear(last, 1, False))

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[2:] != (self.side, self.side):
            raise ValueError(
                f"this discriminator takes crops of {self.side}x{self.side}, not {x.shape[2]}x{x.shape[3]}: "
                f"data.crop_size and network.resolution must agree, at a power of two"
            )
        return self.final_linear(self.final_conv(self.convs(x)).flatten(1))
