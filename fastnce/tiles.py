"""Generators over pictures that do not fit into memory, tile by tile.

A convolution needs its neighbourhood, so tiles overlap; an instance norm (or the restorer's channel attention) needs
the whole picture, so a tile alone comes out wrong. Two ways out:

- `translate_exact` computes the whole picture's statistics, one norm after another, each over all tiles, and keeps the
  maps between them where they are small (at half resolution or below; larger ones are computed again).
- `translate_fast` takes the statistics from one pass over a downscaled picture, then each tile once.

Each step of a network is described by what its output at some rows and columns needs of its input. Borders of the
picture are padded as the network does; borders of a tile are not padded, they are computed from the neighbours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .networks import BlurDown, BlurUp, InstanceNorm, ResnetGenerator, Restorer
from .networks.layers import ReflectionPad
from .networks.resnet import ResnetBlock
from .networks.restorer import GatedBlock

Span = tuple[int, int]
"""Rows (or columns) from the first to before the second."""
Window = tuple[Span, Span]
Size = tuple[int, int]
Statistics = dict[nn.Module, tuple[Tensor, Tensor]]
"""Mean and variance of what comes into a module, (1, channels, 1, 1) each."""


class Step:
    """One step of a network; the base class is pointwise."""

    shrinks = False

    def size(self, size: int) -> int:
        """Of the output along an axis, for an input of `size`."""
        return size

    def needs(self, want: Span, size: int) -> Span:
        """What an input of `size` must provide for the output at `want`."""
        return want

    def run(self, x: Tensor, have: Window, want: Window, size: Size) -> Tensor:
        """The output at `want` from the input at `have`, which is what `needs` says."""
        raise NotImplementedError


@dataclass
class Pointwise(Step):
    function: Callable[[Tensor], Tensor]

    def run(self, x: Tensor, have: Window, want: Window, size: Size) -> Tensor:
        return self.function(x)


@dataclass
class Normalise(Step):
    """Instance norm with given statistics."""

    norm: InstanceNorm
    statistics: Statistics

    def run(self, x: Tensor, have: Window, want: Window, size: Size) -> Tensor:
        mean, variance = self.statistics[self.norm]
        return (x - mean) * torch.rsqrt(variance + self.norm.eps)


@dataclass
class Convolve(Step):
    """Convolution with any padding."""

    function: Callable[[Tensor], Tensor]
    kernel: int
    stride: int = 1
    padding: int = 0
    mode: str = "constant"

    @property
    def shrinks(self) -> bool:  # type: ignore[override]
        return self.stride > 1

    def size(self, size: int) -> int:
        return (size + 2 * self.padding - self.kernel) // self.stride + 1

    def virtual(self, want: Span) -> Span:
        first = want[0] * self.stride - self.padding
        return first, (want[1] - 1) * self.stride - self.padding + self.kernel

    def needs(self, want: Span, size: int) -> Span:
        first, last = self.virtual(want)
        return max(first, 0), min(last, size)

    def run(self, x: Tensor, have: Window, want: Window, size: Size) -> Tensor:
        (top, bottom), (left, right) = (self.virtual(span) for span in want)
        missing = (max(-left, 0), max(right - size[1], 0), max(-top, 0), max(bottom - size[0], 0))
        return self.function(F.pad(x, missing, mode=self.mode) if any(missing) else x)


@dataclass
class Double(Step):
    """Twice the size; `reach` input pixels beyond the halved window are needed on each side."""

    function: Callable[[Tensor], Tensor]
    reach: int

    def size(self, size: int) -> int:
        return 2 * size

    def needs(self, want: Span, size: int) -> Span:
        return max(want[0] // 2 - self.reach, 0), min((want[1] + 1) // 2 + self.reach, size)

    def run(self, x: Tensor, have: Window, want: Window, size: Size) -> Tensor:
        (top, bottom), (left, right) = want
        y0, x0 = 2 * have[0][0], 2 * have[1][0]
        return self.function(x)[:, :, top - y0 : bottom - y0, left - x0 : right - x0]


@dataclass
class Residual(Step):
    """x + the inner steps."""

    inner: list[Step]

    def needs(self, want: Span, size: int) -> Span:
        for step in reversed(self.inner):
            want = step.needs(want, size)  # inner steps keep the size
        return want

    def run(self, x: Tensor, have: Window, want: Window, size: Size) -> Tensor:
        (top, bottom), (left, right) = want
        y0, x0 = have[0][0], have[1][0]
        return x[:, :, top - y0 : bottom - y0, left - x0 : right - x0] + run_steps(self.inner, x, have, want, size)


@dataclass
class Keep(Step):
    """Marks where the restorer keeps its map for the decoder."""

    name: int


@dataclass
class Gather(Step):
    """Adds the map kept under a name."""

    name: int


def windows(steps: Sequence[Step], want: Window, size: Size) -> tuple[list[Window], list[Size]]:
    """The window and the whole size of every step's input, and of the last one's output."""
    sizes = [size]
    for step in steps:
        sizes.append((step.size(sizes[-1][0]), step.size(sizes[-1][1])))
    found = [want]
    for step, before in zip(reversed(steps), reversed(sizes[:-1]), strict=True):
        rows, columns = found[-1]
        found.append((step.needs(rows, before[0]), step.needs(columns, before[1])))
    return found[::-1], sizes


def run_steps(steps: Sequence[Step], x: Tensor, have: Window, want: Window, size: Size) -> Tensor:
    """The output at `want`; `have` is what the first step needs."""
    found, sizes = windows(steps, want, size)
    for step, before, after, whole in zip(steps, found, found[1:], sizes, strict=False):
        x = step.run(x, before, after, whole)
    return x
