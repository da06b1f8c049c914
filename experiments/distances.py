"""The distance between translations and pictures of the target domain, over the checkpoints of a run."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from fastnce.data.folder import Folder, load_image
from fastnce.translate.load import load_translator

MODULE = "fastnce.evaluate.features"


def new_distance() -> Any:
    """A `fastnce.evaluate.features.FeatureDistance`; None if this checkout or this machine cannot compute it."""
    try:
        return importlib.import_module(MODULE).FeatureDistance()
    except ImportError:
        return None
    except ValueError as error:  # a package is not installed
        print(f"no feature distance: {error}", file=sys.stderr)
        return None


def feature_distances(
    checkpoints: Iterable[Path], inputs: Folder, targets: Folder, channels: int, side: int | tuple[int, int]
) -> tuple[list[dict[str, float]], dict[str, float]]:
    """Compare the translations of all inputs with all targets, per checkpoint.

    Args:
        checkpoints: folders.
        inputs, targets: all their pictures are used, resized to `side`.

    Returns:
        the distances by name of each checkpoint, and those of the untranslated inputs; both empty if nothing can
        measure them.
    """
    distance = new_distance()
    if distance is None or min(len(inputs), len(targets)) < 2:
        return [{} for _ in checkpoints], {}

    def pictures(folder: Folder) -> Iterable[torch.Tensor]:
        return (load_image(folder.file(place), channels, side)[None] for place in range(len(folder)))

    for picture in pictures(targets):
        distance.update(reference=picture)
    for picture in pictures(inputs):
        distance.update(outputs=picture)
    untranslated, found = distance.compute(), []
    for checkpoint in checkpoints:
        model = load_translator(checkpoint)
        distance.outputs.clear()  # the targets stay
        for picture in pictures(inputs):
            distance.update(outputs=model(picture))
        found.append(distance.compute())
    return found, untranslated
