"""The U-Net generator of pix2pix (Isola et al., CVPR 2017; published `UnetGenerator`), with feature taps."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import Norm, full_precision, keep_float32
from .norms import norm_layer
from .resnet import check_layers
from .runs import run_one


class UnetBlock(nn.Module):
    """One level: down, the levels below, up. Except at the top, its input is concatenated to its output."""

    def __init__(
        self,
        outer: int,
        inner: int,
        in_channels: int,
        below: UnetBlock | None,
        top: bool,
        norm: Norm,
        dropout: bool,
        norm_affine: bool = False,
    ):
        super().__init__()
        bias = norm == "instance"
        down: list[nn.Module] = [nn.Conv2d(in_channels, inner, 4, stride=2, padding=1, bias=bias)]
        up: list[nn.Module] = [nn.ReLU(True)]
        arriving = inner if below is None else 2 * inner
        widen = nn.ConvTranspose2d(arriving, outer, 4, stride=2, padding=1, bias=bias or top)
        if top:
            up += [keep_float32(widen), nn.Tanh()]
        else:
            down = [nn.LeakyReLU(0.2), *down, *([] if below is None else [norm_layer(norm, inner, norm_affine)])]
            up += [widen, norm_layer(norm, outer, norm_affine)]
        middle = [] if below is None else [below]
        self.model = nn.Sequential(*down, *middle, *up, *([nn.Dropout(0.5)] if dropout else []))
        self.top = top

    def forward(
        self, x: Tensor, depth: int, layers: Sequence[int], features: list[Tensor], encode_only: bool
    ) -> Tensor:
        if not self.top:
            # The published LeakyReLU works in place, so the skip connection carries its output.
            x = F.leaky_relu(x, 0.2)
        y = x
        modules = list(self.model)
        for index in range(0 if self.top else 1, len(modules)):
            layer = modules[index]
            if isinstance(layer, UnetBlock):
                y = layer(y, depth + 1, layers, features, encode_only)
            else:
                last = self.top and isinstance(layer, nn.ConvTranspose2d | nn.Tanh)
                tapped = isinstance(layer, nn.Conv2d) and depth + 1 in layers
                y = full_precision(layer, y) if last else run_one(modules, index, y, [index] if tapped else ())
                if tapped:
                    features.append(y)
            if encode_only and len(features) == len(layers):
                return y
        return y if self.top else torch.cat([x, y], dim=1)


class UnetGenerator(nn.Module):
    """U-Net with `downs` halvings, 7 for 128x128 images and 8 for 256x256; published module names `model.model...`.

    Feature layers count halvings: 0 is the image, i the output of the i-th strided convolution. (The published class
    cannot return features, so it cannot serve as CUT's generator.)
    """

    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        downs: int = 8,
        width: int = 64,
        norm: Norm = "instance",
        dropout: bool = False,
        norm_affine: bool = False,
    ):
        super().__init__()
        if downs < 5:
            raise ValueError(f"a U-Net has at least 5 halvings, not {downs}")
        block = UnetBlock(8 * width, 8 * width, 8 * width, None, False, norm, False, norm_affine)
        for _ in range(downs - 5):
            block = UnetBlock(8 * width, 8 * width, 8 * width, block, False, norm, dropout, norm_affine)
        for outer in (4 * width, 2 * width, width):
            block = UnetBlock(outer, 2 * outer, outer, block, False, norm, False, norm_affine)
        self.model = UnetBlock(out_channels, width, in_channels, block, True, norm, False, norm_affine)
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.width = width
        self.downs = downs
        self.factor = self.smallest = 2**downs
        self.features_repeat = norm != "batch" and not dropout

    def forward(self, x: Tensor, layers: Sequence[int] = (), encode_only: bool = False):
        """See `ResnetGenerator.forward`. Sides must be multiples of 2**downs."""
        features: list[Tensor] = [x] if 0 in layers else []
        if encode_only and len(features) == len(layers):
            return features
        y = self.model(x, 0, layers, features, encode_only)
        if encode_only:
            return features
        return (y, features) if layers else y

    def feature_channels(self, layers: Sequence[int]) -> list[int]:
        """Return the channels of the features at `layers`; raise ValueError for a layer that does not exist."""
        check_layers(layers, self.downs + 1)
        return [self.in_channels if i == 0 else min(8, 2 ** (i - 1)) * self.width for i in layers]
