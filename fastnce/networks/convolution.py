"""Convolutions whose weight gradients are collected, and added once per step instead of once per use.

A step uses most weights of a generator twice: to translate an image and to encode the result. Autograd adds the
gradients of the two uses with one launch per weight. `convolve` stores them in a `Slot` of the weight instead, and
whoever made the slot adds those of all weights together (see `fastnce.engine.weights`).

With `run.streams`, they are computed aside: the next layer's backward does not wait for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..common.beside import active
from ..common.precision import autocast_dtype

PLAIN = (nn.Conv2d, nn.ConvTranspose2d)
"""The layers that `convolve` computes. A subclass may compute something else."""


class Collector:
    """Collects the gradients of several weights.

    Gradients are grouped by the part of the step that used the weight, so that their sum is rounded as under autocast:
    in 16 bits within a part, in float32 over the parts.
    """

    def __init__(self) -> None:
        self._found: dict[int, dict[int, list[Tensor]]] = {}
        self.streams = active()

    def add(self, part: int, weight: int, gradient: Tensor) -> None:
        """Store a gradient of weight number `weight`. `take` may change the first one of a weight in place."""
        self._found.setdefault(part, {}).setdefault(weight, []).append(gradient)

    def take(self) -> list[dict[int, Tensor]]:
        """Return the sums of each part by the number of the weight, and forget them.

        The gradients of all weights are added in one call: the second of each to the first, then the third, and so on.
        """
        if self.streams is not None:
            self.streams.join()
        found, self._found = self._found, {}
        for gradients in found.values():
            for use in range(1, max(map(len, gradients.values()))):
                pairs = [(uses[0], uses[use]) for uses in gradients.values() if use < len(uses)]
                torch._foreach_add_([first for first, _ in pairs], [more for _, more in pairs])
        return [{weight: uses[0] for weight, uses in gradients.items()} for _, gradients in sorted(found.items())]


class Slot(NamedTuple):
    """The place in a collector of the gradients of one weight, from one part of the step.

    `owner` is the autograd node that empties the collector: it runs after all uses of the weight.
    """

    collector: Collector
    part: int
    weight: int
    owner: Any

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()  # a network that is pickled in the middle of a step keeps its weights alone


def collect(weight: Tensor, slot: Slot) -> None:
    """Let `convolve` give the gradients of this weight to a slot. The weight must be an output of a function."""
    weight.slot = slot  # type: ignore[attr-defined]


def convolve(layer: nn.Conv2d | nn.ConvTranspose2d, x: Tensor, bias: Tensor | None) -> Tensor:
    """Compute a plain convolution without hooks, with this bias instead of its own.

    Args:
        layer: of a type in `PLAIN`.
        x: (images, channels, height, width).
        bias: `layer.bias`, or None to leave it out.

    Returns:
        the map that the layer itself would return, with the same gradients.
    """
    weight = layer.weight
    transposed = isinstance(layer, nn.ConvTranspose2d)
    if _collects(layer, x, weight, bias):
        more = (layer.dilation, transposed, layer.output_padding, layer.groups)
        return _Convolution.apply(x.to(weight.dtype), weight, bias, layer.stride, layer.padding, *more)
    if bias is layer.bias:
        return layer(x)
    if isinstance(layer, nn.ConvTranspose2d):
        geometry = (layer.stride, layer.padding, layer.output_padding, layer.groups, layer.dilation)
        return F.conv_transpose2d(x, weight, bias, *geometry)  # type: ignore[arg-type]
    return layer._conv_forward(x, weight, bias)


def _collects(layer: nn.Conv2d | nn.ConvTranspose2d, x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether the gradients of this use of the weights go to their slots. A compiler adds gradients by itself."""
    if torch.compiler.is_compiling() or getattr(weight, "slot", None) is None or not torch.is_grad_enabled():
        return False
    if bias is not None and getattr(bias, "slot", None) is None:
        return False
    if layer.padding_mode != "zeros" or isinstance(layer.padding, str) or x.dim() != 4:
        return False
    return autocast_dtype(x) == weight.dtype and not torch._C._are_functorch_transforms_active()


class _Convolution(torch.autograd.Function):
    """A convolution of autocast's dtype. The gradients of weight and bias go to their slots."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, *geometry: Any) -> Tensor:
        ctx.geometry = tuple(list(item) if isinstance(item, Sequence) else item for item in geometry)
        ctx.slots = [None if t is None else t.slot for t in (weight, bias)]  # type: ignore[attr-defined]
        ctx.sources = weight.grad_fn, None if bias is None else bias.grad_fn
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight)
        return torch.convolution(x, weight, bias, *ctx.geometry)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None) -> tuple[Tensor | None, ...]:
        unknown = (None,) * len(ctx.geometry)
        if gradient is None:
            return None, None, None, *unknown
        x, weight = ctx.saved_tensors
        # without the weights, where a loss differentiates with respect to something else on the way
        wanted = [ctx.needs_input_grad[0], *map(_will_run, ctx.sources)]
        # PyTorch copies the gradient of a single channel to another layout in each computation
        late = not torch.is_grad_enabled() and all(slot is None or _will_run(slot.owner) for slot in ctx.slots)
        streams = ctx.slots[0].collector.streams if late and gradient.shape[1] > 1 else None
        if streams is not None and wanted[0] and (wanted[1] or wanted[2]):
            if x.is_contiguous(memory_format=torch.channels_last):  # once, not in each of the two computations
                gradient = gradient.contiguous(memory_format=torch.channels_last)
            aside = partial(_gradients, gradient, x, weight, ctx.geometry, [False, *wanted[1:]])
            found = streams.aside(aside, (gradient, x, weight))
            found[0] = _gradients(gradient, x, weight, ctx.geometry, [True, False, False])[0]
        else:
            found = _gradients(gradient, x, weight, ctx.geometry, wanted)
        if torch.is_grad_enabled():  # create_graph=True: the gradients may be differentiated again
            return *found, *unknown
        for place, slot in enumerate(ctx.slots, 1):
            gradient = found[place]
            if gradient is not None and _will_run(slot.owner):  # else a loss asks for that of the copy itself
                slot.collector.add(slot.part, slot.weight, gradient)
                found[place] = None
        return *found, *unknown


def _will_run(node: Any) -> bool:
    """Whether the backward pass that goes on will reach this autograd node."""
    return node is not None and torch._C._will_engine_execute_node(node)


def _gradients(
    gradient: Tensor, x: Tensor, weight: Tensor, geometry: tuple[Any, ...], wanted: list[bool]
) -> list[Tensor | None]:
    """Return the gradients of x, weight and bias; None for those that are not wanted."""
    channels = [gradient.shape[1]] if wanted[2] else None
    found = torch.ops.aten.convolution_backward(gradient, x, weight, channels, *geometry, wanted)
    return [one if of else None for one, of in zip(found, wanted, strict=True)]
