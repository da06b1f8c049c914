"""A file of weights of a narrow VGG16, for FSeSim and LSeSim."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import torch

from fastnce.networks.vgg import PLACES

WIDTHS = (3, 3, 4, 4, 5, 5, 5, 6, 6, 6, 6, 6, 6)


def narrow_weights() -> dict[str, torch.Tensor]:
    """Return random weights under torchvision's names."""
    generator = torch.Generator().manual_seed(0)
    weights, before = {}, 3
    for place, width in zip(PLACES, WIDTHS, strict=True):
        weights[f"features.{place}.weight"] = torch.randn(width, before, 3, 3, generator=generator) / before**0.5
        weights[f"features.{place}.bias"] = torch.randn(width, generator=generator) / 5
        before = width
    return weights


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory()


@functools.cache
def narrow_vgg() -> str:
    """Write the file once per process; returns its path."""
    path = Path(_folder().name) / "vgg.pth"
    torch.save(narrow_weights(), path)
    return str(path)


def with_vgg(options):
    """Name the file in the options of a method that needs one; returns them."""
    if hasattr(options, "vgg_weights"):
        options.vgg_weights = narrow_vgg()
    return options
