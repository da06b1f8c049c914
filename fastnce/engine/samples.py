"""Sample images: pad them for the generators, and translate them."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common.imports import CodeError
from ..common.messages import shown
from ..methods.base import Batch, Method
from ..networks.contracts import fitting_side


def padded(method: Method, *columns: Tensor) -> Batch:
    """Images of both domains, padded by replication at the right and the bottom to sides that every generator takes.

    Args:
        columns: A and B, (images, channels, height, width); the sides of A and B may differ.
    """
    generators = method.generators().values()
    factor = math.lcm(*(getattr(network, "factor", 1) for network in generators))
    least = max((getattr(network, "smallest", 1) for network in generators), default=1)

    def pad(pictures: Tensor) -> Tensor:
        bottom, right = (fitting_side(side, factor, least) - side for side in pictures.shape[2:])
        return F.pad(pictures, (0, right, 0, bottom), mode="replicate") if bottom or right else pictures

    return Batch(*(pad(pictures) for pictures in columns))


def translated(method: Method, samples: Batch) -> dict[str, Tensor]:
    """The columns of a sample grid, computed one image at a time, which takes no more memory than a step.

    Raises:
        CodeError: a user's `pictures` returns anything else than images by name.
    """
    pictures: dict[str, list[Tensor]] = {}
    kind = type(method).__name__
    for i in range(len(samples.a)):
        one = Batch(samples.a[i : i + 1].clone(), samples.b[i : i + 1].clone())  # a user's code may change them
        found = method.pictures(one)
        if not _are_images(found):
            wrong = {name: shown(p) for name, p in found.items()} if isinstance(found, dict) and found else shown(found)
            raise CodeError(
                f"pictures() of {kind} must return a dict of images (1, channels, height, width), not {wrong}"
            )
        for name, picture in found.items():
            pictures.setdefault(name, []).append(picture)
    for name, column in pictures.items():
        if len(sizes := {tuple(picture.shape[1:]) for picture in column}) > 1:
            raise CodeError(f"pictures() of {kind} must return {name} in one size for all samples, not {sorted(sizes)}")
    return {name: torch.cat(column) for name, column in pictures.items()}


def _are_images(found: Any) -> bool:
    return (
        isinstance(found, dict)
        and len(found) > 0
        and all(isinstance(name, str) for name in found)
        and all(isinstance(p, Tensor) and p.dim() == 4 and p.numel() > 0 for p in found.values())
    )
