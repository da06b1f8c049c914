"""A generator as a graph of PyTorch's own operators, for pictures of any size, and its check after writing.

Height, width and the number of images stay free. The graph takes and returns float32, whatever its weights are.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx.experimental._config as _tracer
from torch import Tensor, nn

from ..common.imports import first_line
from ..networks import set_implementation
from ..networks.contracts import fitting_side
from ..networks.layers import LastConvolution, keeps_float32
from .source import DTYPES, Source

TOLERANCE = 1e-4
"""The largest difference from the network in float32, relative to the largest output or to 1."""
MOST = 2**14
"""Pixels: about the largest side that a graph takes."""

tracer: Any = _tracer  # its functions are made at run time

Run = Callable[[Tensor], Tensor]
"""Float32 images (images, channels, height, width) to translated ones, as a written file computes it."""


class Interface(nn.Module):
    """Takes and returns float32; computes in the dtype of the weights."""

    def __init__(self, network: nn.Module, dtype: torch.dtype):
        super().__init__()
        self.network, self.dtype = network, dtype

    def forward(self, images: Tensor) -> Tensor:
        if self.dtype == torch.float32:
            return self.network(images)
        return self.network(images.to(self.dtype)).to(torch.float32)


@dataclass(frozen=True)
class Checked:
    """What was compared after writing.

    sizes: of the pictures (images, height, width).
    difference: the largest one from the network in float32.
    allowed: the largest difference that is accepted.
    """

    sizes: tuple[tuple[int, int, int], ...]
    difference: float
    allowed: float


def prepared(source: Source, dtype: str) -> Interface:
    """Copy the network with weights in `dtype`; its last convolution keeps float32, as in training.

    Raises:
        ValueError: a weight is too large for `dtype`.
    """
    network = copy.deepcopy(source.network).eval().requires_grad_(False)
    set_implementation(network, "eager")  # no kernels: whoever runs the graph has PyTorch's operators alone
    network.to(DTYPES[dtype])
    for module in network.modules():
        if isinstance(module, LastConvolution) or keeps_float32(module):
            module.float()
    for key, tensor in network.state_dict().items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ValueError(f"{key} of {source.name} is too large for {dtype}: take another --dtype")
    return Interface(network, DTYPES[dtype]).eval()


def trace(source: Source, network: Interface, format: str) -> torch.export.ExportedProgram:
    """Trace the network with free height, width and number of images.

    Raises:
        ValueError: PyTorch cannot trace it, or an operator is not PyTorch's own.
    """
    images, height, width = example_size(source)
    least, factor = _least(source), source.factor
    sides = [torch.export.Dim(name, min=least // factor, max=max(MOST, 4 * least) // factor) for name in ("h", "w")]
    height_axis, width_axis = (factor * side if factor > 1 else side for side in sides)
    free = {0: torch.export.Dim("n", min=1), 2: height_axis, 3: width_axis}
    example = pictures(source, images, height, width)
    try:
        # Without this, PyTorch takes a side of 1 for a case of its own. The deepest maps of a U-Net have such sides.
        with quiet(), torch.no_grad(), tracer.patch(backed_size_oblivious=True):
            program = torch.export.export(network, (example,), dynamic_shapes=(free,))
    except Exception as error:  # a user's code can raise anything
        name = source.own or type(source.network).__name__
        raise ValueError(f"{source.name} ({name}) cannot be written as {format}: {first_line(error)}") from error
    _tidy(program)
    if own := {str(node.target) for node in program.graph.nodes if "fastnce" in str(node.target)}:
        raise ValueError(f"{source.name} cannot be written as {format}: it uses operators of fastnce, {', '.join(own)}")
    return program


def _tidy(program: torch.export.ExportedProgram) -> None:
    """Remove lines of code, which hold paths of this machine, and conditions that a side or a number is not 1.

    Those conditions come from the choice of a memory layout while tracing. No value depends on them, and the check
    after writing has images of one picture and of the smallest size.
    """
    for module in program.graph_module.modules():
        for node in getattr(getattr(module, "graph", None), "nodes", ()):
            for key in ("stack_trace", "nn_module_stack", "source_fn_stack"):
                node.meta.pop(key, None)
    guards = getattr(program, "_guards_code", None)
    if guards:
        program._guards_code = [guard for guard in guards if not guard.endswith((" > 1", " != 1"))]


def example_size(source: Source) -> tuple[int, int, int]:
    """The pictures that are traced: (images, height, width)."""
    least = _least(source)
    return 2, least + source.factor, least + 2 * source.factor


def _least(source: Source) -> int:
    return fitting_side(source.smallest, source.factor, source.smallest)


def check_sizes(source: Source) -> tuple[tuple[int, int, int], ...]:
    """Pictures (images, height, width) that a written file is checked with; none is the traced one."""
    least, side, factor = _least(source), fitting_side(40, source.factor, source.smallest), source.factor
    return (1, least, least), (1, side, side + 2 * factor), (2, side + factor, side)


def pictures(source: Source, images: int, height: int, width: int) -> Tensor:
    """Noise in [-1, 1], the same at each call: (images, in_channels, height, width)."""
    numbers = torch.Generator().manual_seed(height * width)
    return 2 * torch.rand(images, source.in_channels, height, width, generator=numbers) - 1


def check(source: Source, network: Interface, run: Run, name: str) -> Checked:
    """Compare a written file with the network in float32.

    In float32 `TOLERANCE` is allowed, relative to the largest output or to 1. In 16 bits, twice the difference of the
    same weights computed by PyTorch is allowed, plus one rounding step: the roundings of a file may fall otherwise,
    but they are of the same size. Pictures of the smallest size are allowed as much in float32 too: instance norms of
    maps of few pixels amplify rounding.

    Args:
        network: as it was traced.
        run: computes the file.
        name: of the file.

    Raises:
        ValueError: the file cannot be computed, or it computes something else.
    """
    worst, allowed = 0.0, 0.0
    for images, height, width in check_sizes(source):
        x, place = pictures(source, images, height, width), f"{images} x {height} x {width}"
        with torch.no_grad():
            wanted = source.network(x).float()
            inexact = torch.zeros(()) if network.dtype == torch.float32 else (network(x) - wanted).abs().max()
            try:
                found = run(x)
            except Exception as error:
                raise ValueError(f"{name} cannot compute pictures of {place}: {first_line(error)}") from error
        if found.shape != wanted.shape or found.dtype != torch.float32:
            kind = f"{tuple(found.shape)} {found.dtype}"
            raise ValueError(f"{name} returns {kind} instead of {tuple(wanted.shape)} float32")
        scale = max(1.0, float(wanted.abs().max()))
        step = TOLERANCE if network.dtype == torch.float32 else torch.finfo(network.dtype).eps
        limit, difference = 2 * float(inexact) + step * scale, float((found - wanted).abs().max())
        if limit < difference < 10 * limit and height == _least(source) and not source.own:
            limit += 2 * _rounding(source, x, wanted)
        if not difference <= limit:  # also NaN
            raise ValueError(
                f"{name} computes something else than {source.name}: on pictures of {place} the largest difference is "
                f"{difference:.3g}, and {limit:.3g} is allowed; nothing was written"
            )
        worst, allowed = max(worst, difference), max(allowed, limit)
    return Checked(check_sizes(source), worst, allowed)


def _rounding(source: Source, x: Tensor, found: Tensor) -> float:
    """The largest rounding error of the network in float32: its difference from float64."""
    exact = copy.deepcopy(source.network)
    set_implementation(exact, "eager")
    with torch.no_grad():
        return float((exact.double()(x.double()) - found).abs().max())


HARMLESS = (
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",
    r"The given buffer is not writable",  # PyTorch 2.11, of a file that it reads
)
"""Beginnings of warnings that PyTorch's exporters give about their own code."""


@contextmanager
def quiet() -> Iterator[None]:
    """Within: the exporters log nothing below an error, and warn of nothing that only concerns their own code."""
    names = ("torch", "torch.export", "torch.onnx", "torch._inductor", "onnxscript")
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            for text in HARMLESS:
                warnings.filterwarnings("ignore", text)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
