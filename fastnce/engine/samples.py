"""Sample images: pad them for the generators, and translate them."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..methods.base import Batch, Method


def padded(method: Method, *columns: Tensor) -> Batch:
    """Images of both domains, padded by replication at the right and the bottom to sides that every generator takes.

    Args:
        columns: A and B, (images, channels, height, width); the sides of A and B may differ.
    """
    generators = method.generators().values()
    factor = math.lcm(*(getattr(network, "factor", 1) for network in generators))
    least = max((getattr(network, "smallest", 1) for network in generators), default=1)

    def pad(pictures: Tensor) -> Tensor:
        bottom, right = (max(side, least) + -max(side, least) % factor - side for side in pictures.shape[2:])
        return F.pad(pictures, (0, right, 0, bottom), mode="replicate") if bottom or right else pictures

    return Batch(*(pad(pictures) for pictures in columns))


def translated(method: Method, samples: Batch) -> dict[str, Tensor]:
    """The columns of a sample grid, computed one image at a time, which takes no more memory than a step."""
    pictures: dict[str, list[Tensor]] = {}
    for i in range(len(samples.a)):
        one = Batch(samples.a[i : i + 1], samples.b[i : i + 1])
        for name, picture in method.pictures(one).items():
            pictures.setdefault(name, []).append(picture)
    return {name: torch.cat(column) for name, column in pictures.items()}
