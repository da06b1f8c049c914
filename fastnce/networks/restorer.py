"""A generator for restoration: the image plus a correction (blocks after NAFNet, Chen et al., ECCV 2022).

A rainy image is the clean image plus streaks, so most of the output equals the input. There is no instance norm: it
would remove each image's contrast, and the decoder would have to guess it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import LastConvolution, own_precision
from .resnet import check_layers


class ChannelNorm(nn.Module):
    """Normalise the channels of each location to mean 0 and variance 1, with a learned scale and shift.

    It computes in the precision of its input, with sums in at least float32.
    """

    def __init__(self, channels: int, eps: float = 1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        with own_precision(x):
            return F.layer_norm(x.permute(0, 2, 3, 1), weight.shape, weight, bias, self.eps).permute(0, 3, 1, 2)


class GatedBlock(nn.Module):
    """A depthwise convolution with channel attention, then a pointwise part. Each is gated and added to its input.

    A gate multiplies one half of the channels with the other. The attention is a linear map of the channels' means over
    the image. Both parts start with weight 0 (`beta` and `gamma`).
    """

    def __init__(self, channels: int):
        super().__init__()
        self.norm1 = ChannelNorm(channels)
        self.widen1 = nn.Conv2d(channels, 2 * channels, 1)
        self.depthwise = nn.Conv2d(2 * channels, 2 * channels, 3, padding=1, groups=2 * channels)
        self.attention = nn.Conv2d(channels, channels, 1)
        self.project1 = nn.Conv2d(channels, channels, 1)
        self.norm2 = ChannelNorm(channels)
        self.widen2 = nn.Conv2d(channels, 2 * channels, 1)
        self.project2 = nn.Conv2d(channels, channels, 1)
        self.beta = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.gamma = nn.Parameter(torch.zeros(1, channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.depthwise(self.widen1(self.norm1(x))).chunk(2, dim=1)
        y = left * right
        y = y * self.attention(y.mean(dim=(2, 3), keepdim=True))
        x = x + self.beta.to(x.dtype) * self.project1(y)
        left, right = self.widen2(self.norm2(x)).chunk(2, dim=1)
        return x + self.gamma.to(x.dtype) * self.project2(left * right)


class Restorer(nn.Module):
    """Encoder and decoder with skip connections, whose output is added to the image; initially the identity.

    Args:
        channels: of the images, in and out.
        width: channels at full resolution; twice and four times as many after the two halvings.
        middle: number of blocks at a quarter of the resolution.

    Feature layers are positions in `encoder`: 0 the image, 1 the first convolution, 2 and 3 blocks, 4 a halving, 5 and
    6 blocks, 7 a halving, from 8 on the middle blocks. CUT's layers 0, 4, 8, 12, 16 exist, at about the same depth and
    resolution as in the ResNet.
    """

    factor = 4
    """Height and width of an image must be multiples of this."""
    features_repeat = True

    def __init__(self, channels: int = 3, width: int = 32, middle: int = 10):
        super().__init__()
        fine, half, quarter = width, 2 * width, 4 * width
        self.encoder = nn.Sequential(
            nn.Identity(),
            nn.Conv2d(channels, fine, 3, padding=1),
            GatedBlock(fine),
            GatedBlock(fine),
            nn.Conv2d(fine, half, 2, stride=2),
            GatedBlock(half),
            GatedBlock(half),
            nn.Conv2d(half, quarter, 2, stride=2),
            *(GatedBlock(quarter) for _ in range(middle)),
        )
        self.up2 = nn.Sequential(nn.Conv2d(quarter, 4 * half, 1, bias=False), nn.PixelShuffle(2))
        self.decode2 = nn.Sequential(GatedBlock(half), GatedBlock(half))
        self.up1 = nn.Sequential(nn.Conv2d(half, 4 * fine, 1, bias=False), nn.PixelShuffle(2))
        self.decode1 = nn.Sequential(GatedBlock(fine), GatedBlock(fine))
        self.ending = LastConvolution(fine, channels, 3, padding=1)
        nn.init.zeros_(self.ending.weight)
        nn.init.zeros_(self.ending.bias)  # type: ignore[arg-type]
        self.widths = [channels, fine, fine, fine, half, half, half, *[quarter] * (1 + middle)]

    def forward(self, x: Tensor, layers: Sequence[int] = (), encode_only: bool = False):
        """See `ResnetGenerator.forward`. Sides must be multiples of 4. The output is not limited to [-1, 1]."""
        features: list[Tensor] = []
        picture, skips = x, []
        for index, layer in enumerate(self.encoder):
            if index in (4, 7):
                skips.append(x)
            x = layer(x)
            if index in layers:
                features.append(x)
                if encode_only and index == layers[-1]:
                    return features
        # A sum has the memory layout of its first operand, and a pixel shuffle loses the channels-last layout.
        x = self.decode2(skips[1] + self.up2(x))
        x = self.decode1(skips[0] + self.up1(x))
        x = picture + self.ending(x)
        return (x, features) if layers else x

    def feature_channels(self, layers: Sequence[int]) -> list[int]:
        """Return the channels of the features at `layers`; raise ValueError for a layer that does not exist."""
        check_layers(layers, len(self.widths))
        return [self.widths[layer] for layer in layers]
