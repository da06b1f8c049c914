"""A method's translation from A to B as a network."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..common.imports import CodeError
from ..networks.contracts import check_output, fitting_side
from ..networks.tracing import KEPT, trace_shapes, was_traced
from .base import Method
from .checks import channels_of


class Translation(nn.Module):
    """`Method.translate` as a network, such as `fastnce.translate.Translator` takes.

    Its members `factor`, `smallest`, `in_channels` and `out_channels` are those of the first generator.
    """

    def __init__(self, method: Method):
        super().__init__()
        first = next(iter(method.generators().values()))
        self.method = method
        self.factor = getattr(first, "factor", 1)
        self.smallest = getattr(first, "smallest", self.factor)
        self.in_channels = channels_of(first)
        self.out_channels = getattr(first, "out_channels", self.in_channels)

    def forward(self, x: Tensor) -> Tensor:
        """Translate (images, channels, height, width) from A to B."""
        return translate(self.method, x)


def translate(method: Method, x: Tensor) -> Tensor:
    """Translate (images, channels, height, width) from A to B with a method, which may be a user's own.

    Raises:
        CodeError: the result has another number of images or another size, or holds no floats.
    """
    output, size = method.translate(x), (x.shape[2], x.shape[3])
    wrong = check_output(output, len(x), size)
    if not wrong and not output.dtype.is_floating_point:
        wrong = f"returns {output.dtype} instead of floats in [-1, 1]"
    if not wrong and (output.device != x.device or output.layout != torch.strided):
        wrong = f"returns a tensor of layout {output.layout} on {output.device} instead of a dense one on {x.device}"
    if not wrong and was_traced(output) and not was_traced(x):
        wrong = KEPT
    if wrong:
        raise CodeError(f"translate() of {type(method).__name__} {wrong}")
    return output


def check_translation(method: Method, name: str) -> None:
    """Check the shape of what a user's `translate` returns, if it can be traced.

    Code that reads values cannot; then `translate` finds a wrong shape during training.

    Args:
        method: one that is not trained: hooks may change what they belong to.
        name: its import path.

    Raises:
        CodeError: the shape is wrong.
    """
    network = Translation(method)
    side = fitting_side(64, network.factor, network.smallest)
    try:
        trace_shapes(network, 2, network.in_channels, side, side + network.factor)
    except CodeError as error:
        raise CodeError(f"method={name}: {error}") from None
    except Exception:  # it reads values, which a traced tensor lacks, or fails; a failure shows with real images
        return


def translation_of(method: Method) -> nn.Module:
    """The network that translates from A to B: the first generator, unless a user's own method does more than that."""
    own = not type(method).translate.__module__.startswith("fastnce.")
    return Translation(method) if own else next(iter(method.generators().values()))
