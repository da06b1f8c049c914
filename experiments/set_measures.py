"""Compares the translations of all test pictures with the target domain, over the checkpoints of a run."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastnce.data.folder import Folder, load_image
from fastnce.evaluate.quality import to_levels
from fastnce.translate.load import load_translator

FEATURES = "fastnce.evaluate.features"


class Colours:
    """The mean colour of a set of pictures of one size, and how much the pictures differ from each other."""

    def __init__(self) -> None:
        self._count, self._sum, self._squares = 0, torch.zeros(()), torch.zeros(())

    def add(self, picture: Tensor) -> None:
        """Add a picture (1, channels, height, width) in [-1, 1]."""
        levels = to_levels(picture)[0]
        self._count, self._sum, self._squares = self._count + 1, self._sum + levels, self._squares + levels.square()

    @property
    def mean(self) -> Tensor:
        """(channels,) float64, levels from 0 to 255."""
        return self._sum.mean(dim=(1, 2)) / self._count

    @property
    def spread(self) -> float:
        """The standard deviation over the pictures at a pixel, as the root of its mean square over all pixels."""
        variance = self._squares / self._count - (self._sum / self._count).square()
        return float(variance.clamp(min=0).mean().sqrt())


def compared(outputs: Colours, targets: Colours) -> dict[str, float]:
    """`colour_shift`, the distance of the mean colours in levels, and `variety`, the ratio of the spreads."""
    spread = targets.spread
    found = {"colour_shift": float((outputs.mean - targets.mean).norm())}
    return found | ({"variety": outputs.spread / spread} if spread > 0 else {})


def new_distance() -> Any:
    """A `fastnce.evaluate.features.FeatureDistance`; None if this checkout or this machine cannot compute it."""
    try:
        return importlib.import_module(FEATURES).FeatureDistance()
    except ImportError:
        return None
    except ValueError as error:  # a package is not installed
        print(f"no feature distance: {error}", file=sys.stderr)
        return None


def set_measures(
    checkpoints: Iterable[Path], inputs: Folder, targets: Folder, channels: int, side: int | tuple[int, int]
) -> tuple[list[dict[str, float]], dict[str, float]]:
    """Compare the translations of all inputs with all targets, per checkpoint.

    Args:
        checkpoints: folders.
        inputs, targets: all their pictures are used, resized to `side`.

    Returns:
        the measures by name of each checkpoint, and those of the untranslated inputs: `colour_shift`, `variety`, and
        the feature distances where they can be computed.
    """
    distance = new_distance() if min(len(inputs), len(targets)) > 1 else None

    def pictures(folder: Folder) -> Iterator[Tensor]:
        return (load_image(folder.file(place), channels, side)[None] for place in range(len(folder)))

    def measure(outputs: Iterable[Tensor]) -> dict[str, float]:
        colours = Colours()
        if distance is not None:
            distance.outputs.clear()  # the targets stay
        for picture in outputs:
            colours.add(picture)
            if distance is not None:
                distance.update(outputs=picture)
        return compared(colours, of_targets) | ({} if distance is None else distance.compute())

    of_targets = Colours()
    for picture in pictures(targets):
        of_targets.add(picture)
        if distance is not None:
            distance.update(reference=picture)
    untranslated = measure(pictures(inputs))
    return [measure(map(load_translator(checkpoint), pictures(inputs))) for checkpoint in checkpoints], untranslated
