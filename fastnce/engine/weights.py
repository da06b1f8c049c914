"""Convert the weights of a step to 16 bits, one network at a time.

Autocast converts each weight and each gradient on its own: two of ten launches of CUT's step in bf16. Here, all weights
of a network are converted in one call, which CUDA splits into few launches. The results are the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..networks.layers import keeps_float32

LAYERS = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)
"""Layers whose weights autocast converts unchanged. (Subclasses may modify them first.)"""


class _Convert(torch.autograd.Function):
    """Converts tensors to another dtype, and their gradients back."""

    @staticmethod
    def forward(ctx, dtype: torch.dtype, *tensors: Tensor):
        ctx.set_materialize_grads(False)  # the decoder's weights have no gradient after an encoder's pass
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

    Gradients are computed for the weights themselves, and equal those under autocast. Layers that `keep_float32` has
    marked are left unchanged.
    """
    held: list[tuple[nn.Module, str, nn.Parameter]] = []
    for network in networks:
        for layer in network.modules():
            if type(layer) in LAYERS and not keeps_float32(layer):
                held += [(layer, name, p) for name, p in layer._parameters.items() if p is not None]
    held = [entry for entry in held if entry[2].dtype == torch.float32]
    try:
        # frozen weights separately: all results of a function require a gradient if one argument does
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
