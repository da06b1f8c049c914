"""Generators as sequences of operations that can be computed in a window of rows and columns.

Each operation knows which part of its input it needs for a window of its output. Borders of the image are padded as in
the network; borders of a window are computed from neighbouring pixels instead. Quantities of the whole image (the
statistics of an instance norm, the means for the restorer's channel attention) are passed in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..networks import BlurDown, BlurUp, InstanceNorm, ResnetGenerator, Restorer
from ..networks.layers import ReflectionPad
from ..networks.norms import AffineInstanceNorm
from ..networks.resnet import ResnetBlock
from ..networks.restorer import GatedBlock

Span = tuple[int, int]
"""Rows (or columns) as a half-open range."""
Window = tuple[Span, Span]
Size = tuple[int, int]
Statistics = dict[nn.Module, tuple[Tensor, Tensor]]
"""Mean and variance of a module's input, (1, channels, 1, 1) each."""


class Operation:
    """One operation of a network. The base class is pointwise."""

    shrinks = False

    def size(self, size: int) -> int:
        """Return the output's size along an axis, for an input of `size`."""
        return size

    def needs(self, want: Span, size: int) -> Span:
        """Return the span of an input of `size` that the output at `want` needs."""
        return want

    def run(self, x: Tensor, have: Window, want: Window, size: Size) -> Tensor:
        """Compute the output at `want` from the input at `have`, the span that `needs` returns."""
        raise NotImplementedError


@dataclass
class Pointwise(Operation):
    function: Callable[[Tensor], Tensor]

    def run(self, x: Tensor, have: Window, want: Window, size: Size) -> Tensor:
        return self.function(x)


@dataclass
class Normalise(Operation):
    """Instance norm with given statistics."""

    norm: InstanceNorm
    statistics: Statistics

    def run(self, x: Tensor, have: Window, want: Window, size: Size) -> Tensor:
        mean, variance = self.statistics[self.norm]
        y = (x - mean) * torch.rsqrt(variance + self.norm.eps)
        return self.norm.scaled(y) if isinstance(self.norm, AffineInstanceNorm) else y


@dataclass
class Convolve(Operation):
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
class Upsample(Operation):
    """Upsampling by 2. It needs `reach` input pixels beyond the halved window on each side."""

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
class Residual(Operation):
    """x plus the output of the inner operations, which keep its size."""

    inner: list[Operation]

    def needs(self, want: Span, size: int) -> Span:
        return spans(self.inner, want, size)[0][0]

    def run(self, x: Tensor, have: Window, want: Window, size: Size) -> Tensor:
        (top, bottom), (left, right) = want
        y0, x0 = have[0][0], have[1][0]
        return x[:, :, top - y0 : bottom - y0, left - x0 : right - x0] + run_operations(self.inner, x, want, size)


@dataclass
class FirstGate(Operation):
    """The restorer's block up to its first gate. The attention needs the mean of this output over the image."""

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
class RestorerBlock(FirstGate):
    """The whole block of the restorer, with a given mean."""

    statistics: Statistics

    def run(self, x: Tensor, have: Window, want: Window, size: Size) -> Tensor:
        block = self.block
        y = super().run(x, have, want, size) * block.attention(self.statistics[block.attention][0])
        (top, bottom), (left, right) = want
        y0, x0 = have[0][0], have[1][0]
        x = x[:, :, top - y0 : bottom - y0, left - x0 : right - x0] + block.beta * block.project1(y)
        a, b = block.widen2(block.norm2(x)).chunk(2, dim=1)
        return x + block.gamma * block.project2(a * b)


def spans(operations: Sequence[Operation], want: Span, size: int) -> tuple[list[Span], list[int]]:
    """Propagate a span of the last output backwards, along one axis.

    Returns:
        the spans of every operation's input and of the last output, and their whole sizes.
    """
    sizes = [size]
    for operation in operations:
        sizes.append(operation.size(sizes[-1]))
    found = [want]
    for operation, before in zip(reversed(operations), reversed(sizes[:-1]), strict=True):
        found.append(operation.needs(found[-1], before))
    return found[::-1], sizes


def run_operations(operations: Sequence[Operation], x: Tensor, want: Window, size: Size) -> Tensor:
    """Compute the output at `want` for an input of `size`; x is the part of it that the first operation needs."""
    (rows, heights), (columns, widths) = (spans(operations, span, side) for span, side in zip(want, size, strict=True))
    for i, operation in enumerate(operations):
        x = operation.run(x, (rows[i], columns[i]), (rows[i + 1], columns[i + 1]), (heights[i], widths[i]))
    return x


def operations_of(generator: nn.Module, statistics: Statistics) -> list[Operation]:
    """Return the operations of a generator. The caller must fill `statistics` before they run.

    Raises:
        ValueError: the generator is not supported, such as a U-Net, whose layers see too much of the image.
    """
    if isinstance(generator, ResnetGenerator):
        return _chain(generator.model, statistics)
    tile_layers: Any = getattr(generator, "tile_layers", None)  # of a user's own, see `fastnce.networks.Generator`
    if tile_layers is not None:
        return _chain(tile_layers(), statistics)
    if not isinstance(generator, Restorer):
        name = type(generator).__name__
        raise ValueError(
            f"tiles are for the ResNet generator, the restorer and generators with tile_layers(), not {name}"
        )

    def part(*modules: nn.Module) -> list[Operation]:
        return _chain(modules, statistics)

    encoder = list(generator.encoder)
    quarter = Residual(part(*encoder[7:], *generator.up2))
    half = Residual([*part(*encoder[4:7]), quarter, *part(*generator.decode2, *generator.up1)])
    return [Residual([*part(*encoder[:4]), half, *part(*generator.decode1, generator.ending)])]


def _chain(modules: Iterable[nn.Module], statistics: Statistics) -> list[Operation]:
    operations: list[Operation] = []
    margin = 0  # of a reflection padding that the next convolution applies
    for module in modules:
        if isinstance(module, ReflectionPad):
            margin = module.margin
        elif isinstance(module, nn.Conv2d):
            _check_convolution(module)
            function = partial(F.conv2d, weight=module.weight, bias=module.bias, stride=module.stride)
            padding, mode = (margin, "reflect") if margin else (int(module.padding[0]), "constant")
            operations.append(Convolve(function, module.kernel_size[0], module.stride[0], padding, mode))
            margin = 0
        elif isinstance(module, BlurDown):
            filt = module.filt
            operations.append(Convolve(partial(F.conv2d, weight=filt, stride=2, groups=len(filt)), 3, 2, 1, "reflect"))
        elif isinstance(module, BlurUp | nn.ConvTranspose2d):
            if isinstance(module, nn.ConvTranspose2d):
                _check_doubling(module)
            operations.append(Upsample(module, reach=1))
        elif isinstance(module, nn.PixelShuffle):
            operations.append(Upsample(module, reach=0))
        elif isinstance(module, ResnetBlock):
            operations.append(Residual(_chain(module.conv_block, statistics)))
        elif isinstance(module, InstanceNorm):
            operations.append(Normalise(module, statistics))
        elif isinstance(module, GatedBlock):
            operations.append(RestorerBlock(module, statistics))
        elif isinstance(module, nn.ReLU):
            operations.append(Pointwise(F.relu))  # the module works in place
        elif isinstance(module, nn.Tanh | nn.BatchNorm2d | nn.Identity | nn.Dropout):
            operations.append(Pointwise(module))
        else:
            raise ValueError(f"tiles do not support the layer {type(module).__name__}")
    return operations


def _check_convolution(module: nn.Conv2d) -> None:
    square = len(set(module.kernel_size)) == len(set(module.stride)) == 1
    dense = module.groups == 1 and set(module.dilation) == {1} and module.padding_mode == "zeros"
    if not (square and dense and isinstance(module.padding, tuple) and len(set(module.padding)) == 1):
        raise ValueError(f"tiles support square, dense convolutions with numbers as padding, not {module}")


def _check_doubling(module: nn.ConvTranspose2d) -> None:
    """One pixel of the input beside it reaches each output: kernels up to 4, and no row at the end is dropped."""
    sides: Any = zip(
        module.kernel_size, module.stride, module.padding, module.output_padding, module.dilation, strict=True
    )
    exact = all(
        stride == 2 and kernel <= 4 and kernel - 2 * int(padding) + more == 2 and dilation == 1
        for kernel, stride, padding, more, dilation in sides
    )
    if not (exact and module.groups == 1):
        raise ValueError(f"tiles support transposed convolutions that double both sides, not {module}")
