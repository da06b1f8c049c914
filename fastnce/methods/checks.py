"""Checks of image sizes before training. Shapes are traced, so no memory is needed for maps."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ..networks import tracing

Sizes = Mapping[tuple[int, int], str]
"""(height, width) of images, each with its name in messages, in the plural."""


def trace_shapes(network: nn.Module, images: int, height: int, width: int, **arguments: Any) -> Any:
    """What `network` returns for images of this size, as tensors without memory."""
    return tracing.trace_shapes(network, images, channels_of(network), height, width, **arguments)


def channels_of(network: nn.Module) -> int:
    """The channels of the images that a network takes: `in_channels`, or those of its first convolution.

    Raises:
        ValueError: it has neither.
    """
    own = getattr(network, "in_channels", None)
    if isinstance(own, int):
        return own
    for module in network.modules():
        if isinstance(module, nn.Conv2d):  # whose first parameter may be another than its weight, as in weight norm
            return module.in_channels
        for parameter in module.parameters(recurse=False):
            if parameter.dim() == 4:
                return parameter.shape[1]
    raise ValueError(f"{type(network).__name__} has no convolution: give it the attribute in_channels")


def extremes(sizes: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """The smallest and the largest sizes (height, width): no other size is smaller, or larger, in both sides.

    A size that is too small or too large for a network is among them. A data set may have thousands of sizes.
    """
    found: dict[tuple[int, int], None] = {}
    for sign in (1, -1):
        least = math.inf
        for height, width in sorted(sizes, key=lambda size: (sign * size[0], sign * size[1])):
            if sign * width < least:
                least = sign * width
                found[height, width] = None
    return list(found)


def check_learned_temperature(learn: bool, lambda_nce: float) -> None:
    """ValueError if a temperature is to be learned and no contrastive term trains it."""
    if learn and not lambda_nce > 0:
        raise ValueError(
            "loss.learn_temperature=true needs a contrastive term that trains the temperature: set loss.lambda_nce "
            "above 0, or loss.learn_temperature=false"
        )


def drawn_rows(generator: nn.Module, layers: Sequence[int], patches: int, sizes: Sizes) -> dict[str, list[int]]:
    """How many locations of each layer are contrasted, for images of the extreme sizes, by their names in `sizes`.

    Args:
        patches: drawn at most; 0 takes all.
    """
    rows = {}
    for height, width in extremes(sizes):
        maps = trace_shapes(generator, 1, height, width, layers=layers, encode_only=True)
        if not isinstance(maps, list | tuple) or not all(isinstance(m, Tensor) and m.dim() == 4 for m in maps):
            kind = type(generator).__name__
            raise ValueError(f"{kind}: forward(x, layers, encode_only=True) must return a list of feature maps")
        channels, found = generator.feature_channels(layers), [m.shape[1] for m in maps]  # type: ignore[operator]
        if found != list(channels):
            raise ValueError(f"feature_channels gives {channels}, and the feature maps have {found} channels")
        locations = [m.shape[2] * m.shape[3] for m in maps]
        rows[sizes[height, width]] = [min(n, patches or n) for n in locations]
    return rows


def check_contrast(rows: dict[str, list[int]], layers: Sequence[int], alone: bool, alike: str, remedy: str) -> None:
    """Refuse sizes whose maps leave nothing to contrast, or give different counts of rows where they must be equal.

    Args:
        rows: as `drawn_rows` returns.
        alone: a location has negatives of its own image only.
        alike: why the counts must be equal, as a clause; empty if they need not be.
        remedy: what to do about a size that does not fit.

    Raises:
        ValueError: the size, the layer and the remedy.
    """
    first, counts = next(iter(rows.items()))
    for what, found in rows.items():
        for layer, count, other in zip(layers, found, counts, strict=True):
            if alone and count == 1:
                raise ValueError(
                    f"{what} have a single location at layer {layer} of loss.nce_layers, which leaves nothing to "
                    f"contrast: leave the layer out, or {remedy}"
                )
            if alike and count != other:
                raise ValueError(
                    f"{what} give {count} locations at layer {layer} and {first} give {other}, but {alike}: lower "
                    f"loss.patches to {min(count, other)}, or {remedy}"
                )


def refuse_changed(options: Any, defaults: Any, keys: Sequence[str], method: str) -> None:
    """Refuse options of CUT that a method does not follow, if they were changed; ValueError names the first one."""
    for key in keys:
        if (value := getattr(options, key)) != getattr(defaults, key):
            raise ValueError(f"loss.{key}={value} has no effect in {method}: leave it at {getattr(defaults, key)}")
