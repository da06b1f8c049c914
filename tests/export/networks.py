"""Generators with known weights as sources of an export."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from fastnce.export import Source
from fastnce.networks import MUNITGenerator, ResnetGenerator, Restorer, StyleGAN2Generator, UnetGenerator

TINY: dict[str, Callable[[], nn.Module]] = {
    "resnet": lambda: ResnetGenerator(width=2, blocks=1),
    "unet": lambda: UnetGenerator(downs=5, width=2),
    "restorer": lambda: Restorer(width=4, middle=1),
    "stylegan2": lambda: StyleGAN2Generator(width=1, blocks=2),
    "munit": lambda: MUNITGenerator(width=2, blocks=1),
}
WHOLE: dict[str, Callable[[], nn.Module]] = {
    "resnet_9blocks": ResnetGenerator,
    "resnet_9blocks, no antialias": lambda: ResnetGenerator(antialias=False),
    "resnet_9blocks, batch norm": lambda: ResnetGenerator(norm="batch"),
    "resnet_9blocks, no norm": lambda: ResnetGenerator(norm="none"),
    "unet_128": lambda: UnetGenerator(downs=7),
    "unet_256": lambda: UnetGenerator(downs=8),
    "unet_256, batch norm": lambda: UnetGenerator(downs=8, norm="batch"),
    "restorer": Restorer,
    "stylegan2": lambda: StyleGAN2Generator(width=64, resolution=256),
    "smallstylegan2": lambda: StyleGAN2Generator(width=64, resolution=256, blocks=2, noise=False),
    "resnet_cat": MUNITGenerator,
}
"""At their published widths."""


class Small(nn.Module):
    """A network that is exported in a fraction of a second, and compiled in seconds."""

    factor = smallest = 4

    def __init__(self):
        super().__init__()
        self.convolution = nn.Conv2d(3, 3, 1)

    def forward(self, x):
        return torch.tanh(self.convolution(x))


def source_of(network: nn.Module, **changes: Any) -> Source:
    """A source of this network. Weights that begin at zero, and statistics of batch norms, get values."""
    numbers = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            if not parameter.any():
                parameter.normal_(std=0.1, generator=numbers)
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(std=0.1, generator=numbers)
                module.running_var.uniform_(0.5, 1.5, generator=numbers)
    network = network.eval().requires_grad_(False)
    factor = getattr(network, "factor", 1)
    source = Source(network, "G", None, False, {}, factor, getattr(network, "smallest", factor), 3, 3)
    return replace(source, **changes)
