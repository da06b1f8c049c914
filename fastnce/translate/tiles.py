"""Apply generators, tile by tile, to images that do not fit into memory.

A convolution needs its neighbourhood, so tiles overlap. An instance norm (or the restorer's channel attention) needs
statistics of the whole image, so translating tiles independently is wrong. There are two solutions:

- `translate_exact` computes the statistics of the whole image over all tiles, one norm after another. It stores the
  feature maps between norms if they are small (at half resolution or below) and recomputes larger ones.
- `translate_fast` takes the statistics from one pass over a downscaled image, then computes each tile once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..networks import InstanceNorm
from ..networks.contracts import fitting_side
from ..networks.restorer import GatedBlock
from .windows import (
    FirstGate,
    Normalise,
    Operation,
    Residual,
    RestorerBlock,
    Size,
    Statistics,
    Window,
    operations_of,
    run_operations,
    spans,
)

OVERLAP = 32
"""Pixels added on each side of a fast tile; a multiple of every generator's factor."""


class Moments:
    """Mean and variance per channel over tiles, merged in float64 (Chan et al., 1979)."""

    def __init__(self) -> None:
        self.count = 0
        self.mean = self.squares = torch.zeros((), dtype=torch.float64)

    def add(self, x: Tensor) -> None:
        variance, mean = (t.cpu().double() for t in torch.var_mean(x, dim=(0, 2, 3), correction=0))
        count = x.numel() // x.shape[1]
        total = self.count + count
        delta = mean - self.mean
        self.squares = self.squares + variance * count + delta.square() * (self.count * count / total)
        self.mean = self.mean + delta * (count / total)
        self.count, self.dtype = total, x.dtype

    def result(self, device: torch.device) -> tuple[Tensor, Tensor]:
        both = (self.mean, self.squares / self.count)
        mean, variance = (t.to(self.dtype).to(device)[None, :, None, None] for t in both)
        return mean, variance


class Tiler:
    """Run operations over whole feature maps, tile by tile.

    Args:
        picture: (1, channels, height, width), with sides as the generator requires.
        tile: side of a tile, in pixels of the image.
        device: where tiles are computed. Feature maps are stored there if they fit, else in the host's memory.
    """

    def __init__(self, picture: Tensor, tile: int, device: torch.device):
        self.height, self.width = picture.shape[2:]
        self.tile, self.device = tile, device

    def outputs(self, source: Tensor, operations: Sequence[Operation]) -> Iterator[tuple[Window, Size, Tensor]]:
        """Yield (window, whole size, output in the window) for every tile. The windows tile the output."""
        size = (source.shape[2], source.shape[3])
        height, width = (spans(operations, (0, 1), side)[1][-1] for side in size)
        tall = max(8, self.tile * height // self.height)
        wide = max(8, self.tile * width // self.width)
        for top in range(0, height, tall):
            for left in range(0, width, wide):
                want = ((top, min(top + tall, height)), (left, min(left + wide, width)))
                (y0, y1), (x0, x1) = (spans(operations, w, side)[0][0] for w, side in zip(want, size, strict=True))
                x = source[:, :, y0:y1, x0:x1].to(self.device).contiguous(memory_format=torch.channels_last)
                yield want, (height, width), run_operations(operations, x, want, size)

    def moments(self, source: Tensor, operations: Sequence[Operation]) -> tuple[Tensor, Tensor]:
        """Return mean and variance of the output."""
        found = Moments()
        for _, _, output in self.outputs(source, operations):
            found.add(output)
        return found.result(self.device)

    def whole(
        self,
        source: Tensor,
        operations: Sequence[Operation],
        into: Tensor | None = None,
        moments: Moments | None = None,
    ) -> Tensor:
        """Return the whole output as one map. If `into` is given, add the output to it in place."""
        result = into
        for ((top, bottom), (left, right)), size, output in self.outputs(source, operations):
            if result is None:
                result = self._room((1, output.shape[1], *size), output.dtype)
            place = result[:, :, top:bottom, left:right]
            place.copy_(output) if into is None else place.add_(output.to(place.device))
            if moments is not None:
                moments.add(output)
        assert result is not None
        return result

    def _room(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        device = torch.device("cpu")
        if self.device.type == "cuda" and 16 * math.prod(shape) < torch.cuda.mem_get_info(self.device)[0]:
            device = self.device  # at most a quarter of the free memory: up to three maps are alive, plus the tiles
        return torch.empty(shape, dtype=dtype, device=device)

    def exact(self, source: Tensor, operations: Sequence[Operation], keep: int, into: Tensor | None = None) -> Tensor:
        """Run operations, and compute the statistics that they need on the way.

        Args:
            keep: largest number of elements of a map that is stored; larger maps are recomputed.
            into: if given, the result is added to it in place.
        """
        current = source
        pending: list[Operation] = []
        for operation in operations:
            if pending and pending[-1].shrinks and not isinstance(operation, Normalise):
                current, pending = self.whole(current, pending), []
            if isinstance(operation, Residual):
                if pending or current is source:
                    current, pending = self.whole(current, pending), []
                current = self.exact(current, operation.inner, keep, into=current)
            elif isinstance(operation, RestorerBlock):
                gate = FirstGate(operation.block)
                operation.statistics[operation.block.attention] = self.moments(current, [*pending, gate])
                current, pending = self.whole(current, [*pending, operation]), []
            elif isinstance(operation, Normalise):
                height, width = (spans(pending, (0, 1), side)[1][-1] for side in current.shape[2:])
                if pending and height * width * operation.norm.channels <= keep:
                    moments = Moments()
                    current, pending = self.whole(current, pending, moments=moments), []
                    operation.statistics[operation.norm] = moments.result(self.device)
                else:
                    operation.statistics[operation.norm] = self.moments(current, pending)
                pending.append(operation)
            else:
                pending.append(operation)
        if into is not None and current is into:  # the input must not change while neighbouring tiles still read it
            return into.add_(self.whole(current, pending))
        return self.whole(current, pending, into)


@torch.inference_mode()
def translate_exact(generator: nn.Module, picture: Tensor, tile: int, device: torch.device | str) -> Tensor:
    """Compute `generator(picture)`, up to rounding, in the memory of a few tiles and of maps at half resolution.

    Args:
        generator: a `ResnetGenerator` or `Restorer` on the device, in eval mode.
        picture: (1, channels, height, width), with sides as the generator requires; on any device.
        tile: side of a tile in pixels.
        device: of the generator.

    Raises:
        ValueError: the generator is of another kind.
    """
    operations = operations_of(generator, {})
    picture = picture.to(next(generator.parameters()).dtype)
    first = next(module for module in generator.modules() if isinstance(module, nn.Conv2d))
    keep = picture.shape[2] * picture.shape[3] * max(first.out_channels // 2, 1)
    return Tiler(picture, tile, torch.device(device)).exact(picture, operations, keep)


@dataclass(frozen=True)
class FastError:
    """Difference of fast from exact tiles on a crop of the image, in levels of 255."""

    mean: float
    largest: float
    crop: Size

    def __str__(self) -> str:
        height, width = self.crop
        return (
            f"fast tiles differ from exact ones by {self.mean:.2f} levels of 255 in the mean, {self.largest:.0f} at "
            f"most, on a crop of {width}x{height}"
        )


@torch.inference_mode()
def translate_fast(
    generator: nn.Module, picture: Tensor, tile: int, device: torch.device | str
) -> tuple[Tensor, FastError]:
    """Translate tile by tile with the statistics of the image downscaled to about one tile.

    Tiles overlap by `OVERLAP` pixels on each side, which is less than the receptive field of a generator with many
    blocks. Only the output is stored between tiles.

    For arguments and errors, see `translate_exact`. The returned error is measured on a crop from the middle, which is
    translated as a whole, and in four tiles with statistics of the crop downscaled by the same factor.
    """
    device = torch.device(device)
    factor = getattr(generator, "factor", 1)
    picture = picture.to(next(generator.parameters()).dtype)
    height, width = picture.shape[2:]
    shrink = min(1.0, tile / (height * width) ** 0.5)
    output = _with_shrunk_statistics(generator, picture, shrink, tile, device)
    rows, columns = (min(side, max(256, min(tile, 512))) // factor * factor for side in (height, width))
    top, left = ((side - size) // 2 for side, size in ((height, rows), (width, columns)))
    crop = picture[:, :, top : top + rows, left : left + columns]
    exact = generator(crop.to(device)).cpu()
    part = max(rows, columns) // 2 if max(height, width) > tile else tile
    fast = _with_shrunk_statistics(generator, crop, shrink, part, device)
    levels = (fast.clamp(-1, 1) - exact.clamp(-1, 1)).abs().mul(127.5)
    return output, FastError(levels.mean().item(), levels.max().item(), (rows, columns))


def _with_shrunk_statistics(
    generator: nn.Module, picture: Tensor, shrink: float, tile: int, device: torch.device
) -> Tensor:
    factor, smallest = getattr(generator, "factor", 1), max(32, getattr(generator, "smallest", 1))
    size = [fitting_side(round(side * shrink / factor) * factor, factor, smallest) for side in picture.shape[2:]]
    small = F.interpolate(picture.to(device), size, mode="bilinear", antialias=True, align_corners=False)
    statistics: Statistics = {}
    operations = operations_of(generator, statistics)

    def record(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        variance, mean = torch.var_mean(inputs[0], dim=(0, 2, 3), correction=0, keepdim=True)
        statistics[module] = (mean, variance)

    recorded = [m for m in generator.modules() if isinstance(m, InstanceNorm)]
    recorded += [m.attention for m in generator.modules() if isinstance(m, GatedBlock)]  # type: ignore[misc]
    hooks = [module.register_forward_pre_hook(record) for module in recorded]
    try:
        generator(small)
    finally:
        for hook in hooks:
            hook.remove()

    tile = max(tile // factor, 1) * factor
    output: Tensor | None = None
    for top, y0, y1 in _overlapping(picture.shape[2], tile):
        for left, x0, x1 in _overlapping(picture.shape[3], tile):
            x = picture[:, :, y0:y1, x0:x1].to(device).contiguous(memory_format=torch.channels_last)
            part = run_operations(operations, x, ((0, y1 - y0), (0, x1 - x0)), (y1 - y0, x1 - x0))
            part = part[:, :, top - y0 :, left - x0 :][:, :, :tile, :tile].cpu()
            if output is None:
                output = torch.empty((1, part.shape[1], *picture.shape[2:]), dtype=part.dtype)
            output[:, :, top : top + tile, left : left + tile] = part
    assert output is not None
    return output


def _overlapping(size: int, tile: int) -> list[tuple[int, int, int]]:
    """Return (start of the tile, start and end of its input) for each tile along an axis."""
    return [(start, max(start - OVERLAP, 0), min(start + tile + OVERLAP, size)) for start in range(0, size, tile)]
