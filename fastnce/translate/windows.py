"""Generators as steps that can be computed at some rows and columns only.

Each step says what its output at a window needs of its input. Borders of the picture are padded as the network does;
borders of a window are not padded, they are computed from the neighbours. What needs the whole picture (the statistics
of an instance norm, the restorer's channel attention) is given from outside.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..networks import BlurDown, BlurUp, InstanceNorm, ResnetGenerator, Restorer
from ..networks.layers import ReflectionPad
from ..networks.resnet import ResnetBlock
from ..networks.restorer import GatedBlock

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
    """x + the inner steps, which give the size back that they take."""

    inner: list[Step]

    def needs(self, want: Span, size: int) -> Span:
        return spans(self.inner, want, size)[0][0]

    def run(self, x: Tensor, have: Window, want: Window, size: Size) -> Tensor:
        (top, bottom), (left, right) = want
        y0, x0 = have[0][0], have[1][0]
        return x[:, :, top - y0 : bottom - y0, left - x0 : right - x0] + run_steps(self.inner, x, want, size)


@dataclass
class Gate(Step):
    """The restorer's block up to its first gate, whose mean over the picture the attention asks for."""

    block: GatedBlock

    def needs(self, want: Span, size: int) -> Span:
        return max(want[0] - 1, 0), min(want[1] + 1, size)

    def run(self, x: Tensor, have: Window, want: Window, size: Size) -> Tensor:
        (top, bottom), (left, right) = want
        missing = (int(left == 0), int(right == size[1]), int(top == 0), int(bottom == size[0]))
        conv = self.block.depthwise
        y = F.pad(self.block.widen1(self.block.norm1(x)), missing)
        a, b = F.conv2d(y, conv.weight, conv.bias, groups=conv.groups).chunk(2, dim=1)
        return a * b


@dataclass
class Gated(Gate):
    """The restorer's block with a given mean."""

    statistics: Statistics

    def run(self, x: Tensor, have: Window, want: Window, size: Size) -> Tensor:
        block = self.block
        y = super().run(x, have, want, size) * block.attention(self.statistics[block.attention][0])
        (top, bottom), (left, right) = want
        y0, x0 = have[0][0], have[1][0]
        x = x[:, :, top - y0 : bottom - y0, left - x0 : right - x0] + block.beta * block.project1(y)
        a, b = block.widen2(block.norm2(x)).chunk(2, dim=1)
        return x + block.gamma * block.project2(a * b)


def spans(steps: Sequence[Step], want: Span, size: int) -> tuple[list[Span], list[int]]:
    """Along one axis: the span of every step's input and of the last one's output; the same for whole sizes."""
    sizes = [size]
    for step in steps:
        sizes.append(step.size(sizes[-1]))
    found = [want]
    for step, before in zip(reversed(steps), reversed(sizes[:-1]), strict=True):
        found.append(step.needs(found[-1], before))
    return found[::-1], sizes


def run_steps(steps: Sequence[Step], x: Tensor, want: Window, size: Size) -> Tensor:
    """The output at `want` of a picture of `size`; x is the part of it that the first step needs."""
    (rows, heights), (columns, widths) = (spans(steps, span, side) for span, side in zip(want, size, strict=True))
    for i, step in enumerate(steps):
        x = step.run(x, (rows[i], columns[i]), (rows[i + 1], columns[i + 1]), (heights[i], widths[i]))
    return x


def steps_of(generator: nn.Module, statistics: Statistics) -> list[Step]:
    """The steps of a generator; `statistics` is filled in before they run.

    Raises:
        ValueError: a generator whose parts see too much of the picture (U-Net), or of another kind.
    """
    if isinstance(generator, ResnetGenerator):
        return _chain(generator.model, statistics)
    if not isinstance(generator, Restorer):
        raise ValueError(f"tiles are for the ResNet generator and the restorer, not for {type(generator).__name__}")

    def part(*modules: nn.Module) -> list[Step]:
        return _chain(modules, statistics)

    encoder = list(generator.encoder)
    quarter = Residual(part(*encoder[7:], *generator.up2))
    half = Residual([*part(*encoder[4:7]), quarter, *part(*generator.decode2, *generator.up1)])
    return [Residual([*part(*encoder[:4]), half, *part(*generator.decode1, generator.ending)])]


def _chain(modules: Iterable[nn.Module], statistics: Statistics) -> list[Step]:
    steps: list[Step] = []
    margin = 0  # of a reflection that belongs to the next convolution
    for module in modules:
        if isinstance(module, ReflectionPad):
            margin = module.margin
        elif isinstance(module, nn.Conv2d):
            function = partial(F.conv2d, weight=module.weight, bias=module.bias, stride=module.stride)
            padding, mode = (margin, "reflect") if margin else (int(module.padding[0]), "constant")
            steps.append(Convolve(function, module.kernel_size[0], module.stride[0], padding, mode))
            margin = 0
        elif isinstance(module, BlurDown):
            filt = module.filt
            steps.append(Convolve(partial(F.conv2d, weight=filt, stride=2, groups=len(filt)), 3, 2, 1, "reflect"))
        elif isinstance(module, BlurUp | nn.ConvTranspose2d):
            steps.append(Double(module, reach=1))
        elif isinstance(module, nn.PixelShuffle):
            steps.append(Double(module, reach=0))
        elif isinstance(module, ResnetBlock):
            steps.append(Residual(_chain(module.conv_block, statistics)))
        elif isinstance(module, InstanceNorm):
            steps.append(Normalise(module, statistics))
        elif isinstance(module, GatedBlock):
            steps.append(Gated(module, statistics))
        elif isinstance(module, nn.ReLU):
            steps.append(Pointwise(F.relu))  # the module would work in place
        elif isinstance(module, nn.Tanh | nn.BatchNorm2d | nn.Identity | nn.Dropout):
            steps.append(Pointwise(module))
        else:
            raise ValueError(f"tiles cannot pass through {type(module).__name__}")
    return steps
