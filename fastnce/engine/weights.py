"""The weights of a step in 16 bits, made a network at a time.

Autocast converts every weight on its own where it is used, and every gradient on its way back: two of ten launches of
CUT's step in bf16. The conversions here are the same, from the same numbers, and all of a network's are one call, which
CUDA splits into few launches.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..networks.layers import keeps_float32

LAYERS = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)
"""Whose weights and biases autocast converts as they are. (Subclasses may do something to them first.)"""


class _Convert(torch.autograd.Function):
    """Tensors to as many of another dtype; gradients back to the dtype that each came from."""

    @staticmethod
    def forward(ctx, dtype: torch.dtype, *tensors: Tensor):
        ctx.set_materialize_grads(False)  # an encoder's pass leaves the decoder's weights without gradient
        ctx.dtype = tensors[0].dtype
        return tuple(_converted(tensors, dtype))

    @staticmethod
    def backward(ctx, *gradients: Tensor | None):
        wide = iter(_converted([g for g in gradients if g is not None], ctx.dtype))
        return None, *(None if g is None else next(wide) for g in gradients)


def _converted(tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    copies = [torch.empty_like(tensor, dtype=dtype) for tensor in tensors]
    if copies:
        torch._foreach_copy_(copies, list(tensors))
    return copies


@contextmanager
def converted_weights(networks: Sequence[nn.Module], dtype: torch.dtype) -> Iterator[None]:
    """Within: the convolutions and linear layers of `networks` compute with copies of their weights in `dtype`.

    Gradients with respect to the weights themselves are what they are without: it is autocast's work, done at once. A
    layer that `keep_float32` marked is left alone.
    """
    held: list[tuple[nn.Module, str, nn.Parameter]] = []
    for network in networks:
        for layer in network.modules():
            if type(layer) in LAYERS and not keeps_float32(layer):
                held += [(layer, name, p) for name, p in layer._parameters.items() if p is not None]
    held = [entry for entry in held if entry[2].dtype == torch.float32]
    try:
        # apart where they do not train: a function's results all require a gradient if one argument does
        for trains in (True, False):
            chosen = [entry for entry in held if entry[2].requires_grad == trains]
            if chosen:
                copies = _Convert.apply(dtype, *(parameter for _, _, parameter in chosen))
                for (layer, name, _), copy in zip(chosen, copies, strict=True):
                    layer._parameters[name] = copy
        yield
    finally:
        for layer, name, parameter in held:
            layer._parameters[name] = parameter
