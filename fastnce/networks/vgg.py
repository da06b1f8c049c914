"""VGG16's convolutions as a fixed extractor of features: Simonyan and Zisserman, ICLR 2015."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, max_pool2d

CHANNELS = (64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512)
"""Channels of the 13 convolutions."""
HALVED = (2, 4, 7, 10)
"""Convolutions that a max-pooling precedes."""
PLACES = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)
"""The number of each convolution in torchvision's `features`."""
KEY = re.compile(r"(?:features|relu\d_\d)\.(\d+)\.(weight|bias)")
"""Names of weights in files of torchvision's VGG16, and of F-LSeSim's, which has the same numbers."""
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of the colours of ImageNet, in [0, 1]."""


class VGG16(nn.Module):
    """The features of VGG16 after chosen ReLUs. Its weights are constants.

    Args:
        depth: number of convolutions, from 1 to 13.
        weights: a state dict of torchvision's VGG16 or of F-LSeSim's; None leaves random weights.
        where: names the weights in messages.

    Raises:
        ValueError: a weight is missing or does not fit.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, depth: int = 13, weights: Mapping[str, Tensor] | None = None, where: str = "the weights"):
        super().__init__()
        found = {match.groups(): tensor for key, tensor in (weights or {}).items() if (match := KEY.fullmatch(key))}
        layers, before = [], 3
        for layer, place in enumerate(PLACES[:depth]):
            shape, given = (
                (CHANNELS[layer], before, 3, 3),
                [found.get((str(place), name)) for name in ("weight", "bias")],
            )
            if weights is not None:
                kernel, bias = given
                if kernel is None or bias is None:
                    raise ValueError(f"{where} holds no VGG16: features.{place} is not there")
                shape = (len(kernel), before, 3, 3)
                if kernel.shape != shape or bias.shape != shape[:1]:
                    raise ValueError(
                        f"{where} holds no VGG16: the weight and the bias of features.{place} are "
                        f"{tuple(kernel.shape)} and {tuple(bias.shape)}, not {shape} and {shape[:1]}"
                    )
            convolution = nn.Conv2d(before, shape[0], 3, padding=1)
            if weights is not None:
                with torch.no_grad():
                    for parameter, tensor in zip(convolution.parameters(), given, strict=True):
                        parameter.copy_(tensor)  # type: ignore[arg-type]
            layers.append(convolution)
            before = shape[0]
        self.layers = nn.ModuleList(layers)
        self.register_buffer("mean", torch.tensor(MEAN, dtype=torch.float64).view(3, 1, 1), persistent=False)
        deviation = torch.tensor(DEVIATION, dtype=torch.float64).view(3, 1, 1)
        self.register_buffer("deviation", deviation, persistent=False)
        self.requires_grad_(False)

    def channels(self, layers: Sequence[int]) -> list[int]:
        """Channels of the features after these ReLUs."""
        return [self.layers[layer].out_channels for layer in layers]  # type: ignore[misc]

    def forward(self, pictures: Tensor, layers: Sequence[int]) -> list[Tensor]:
        """Return the features after ReLUs, counted from 0, of pictures (images, 1 or 3, height, width) in [-1, 1]."""
        x = ((pictures + 1) * 0.5 - self.mean.to(pictures.dtype)) / self.deviation.to(pictures.dtype)
        maps = []
        for layer, convolution in enumerate(self.layers[: max(layers) + 1]):
            if layer in HALVED:
                x = max_pool2d(x, 2, 2)
            x = conv2d(x, convolution.weight, convolution.bias, padding=1).relu()  # type: ignore[arg-type]
            if layer in layers:
                maps.append(x)
        return maps
