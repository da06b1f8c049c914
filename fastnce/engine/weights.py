"""Convert the weights of a step to 16 bits, one network at a time.

Autocast converts each weight and each gradient on its own: two of ten launches of CUT's step in bf16. Here, all weights
of a network are converted in one call, which CUDA splits into few launches. The results are the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from ..common.dispatch import choose
from ..common.narrowed import narrowed
from ..nce import PatchSampleF
from ..networks.layers import keeps_float32

LAYERS = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)
"""Layers whose weights autocast converts unchanged. (Subclasses may modify them first.)"""


class _Convert(torch.autograd.Function):
    """Converts tensors to another dtype, and their gradients back."""

    @staticmethod
    def forward(ctx, dtype: torch.dtype, beside: list[Tensor], *tensors: Tensor):
        """`beside` are converted in the same launches and replaced in the list by the results, without gradients."""
        ctx.set_materialize_grads(False)  # the decoder's weights have no gradient after an encoder's pass
        ctx.dtype = tensors[0].dtype
        copies = _converted([*tensors, *beside], dtype)
        beside[:] = copies[len(tensors) :]
        return tuple(copies[: len(tensors)])

    @staticmethod
    def backward(ctx, *gradients: Tensor | None):
        wide = iter(_converted([g for g in gradients if g is not None], ctx.dtype))
        return None, None, *(None if g is None else next(wide) for g in gradients)


def _converted(tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    copies = [torch.empty_like(tensor, dtype=dtype) for tensor in tensors]
    if copies:
        torch._foreach_copy_(copies, list(tensors))
    return copies


@contextmanager
def converted_weights(
    networks: Sequence[nn.Module], dtype: torch.dtype, projectors: Sequence[nn.Module] = ()
) -> Iterator[None]:
    """Within: the convolutions and linear layers of `networks` compute with copies of their weights in `dtype`.

    Gradients are computed for the weights themselves, and equal those under autocast. Layers that `keep_float32` has
    marked are left unchanged. The kernels find copies of the weights of `projectors` (see `common.narrowed`).
    """
    held: list[tuple[nn.Module, str, nn.Parameter]] = []
    for network in networks:
        for layer in network.modules():
            if type(layer) in LAYERS and not keeps_float32(layer):
                held += [(layer, name, p) for name, p in layer._parameters.items() if p is not None]
    held = [entry for entry in held if entry[2].dtype == torch.float32]
    projected = _weights_of(projectors, dtype)
    copies_beside: list[Tensor] = list(projected)
    with ExitStack() as within:
        try:
            # frozen weights separately: all results of a function require a gradient if one argument does
            for trains in (True, False):
                chosen = [entry for entry in held if entry[2].requires_grad == trains]
                if chosen:
                    beside = copies_beside if trains else []
                    copies = _Convert.apply(dtype, beside, *(parameter for _, _, parameter in chosen))
                    for (layer, name, _), copy in zip(chosen, copies, strict=True):
                        layer._parameters[name] = copy
            if projected and copies_beside[0] is not projected[0]:
                within.enter_context(narrowed(projected, copies_beside))
            yield
        finally:
            for layer, name, parameter in held:
                layer._parameters[name] = parameter


def _weights_of(projectors: Sequence[nn.Module], dtype: torch.dtype) -> list[Tensor]:
    """The float32 weights by which the MLPs of our own projectors multiply in kernels."""
    found: list[Tensor] = []
    for projector in projectors:
        if isinstance(projector, PatchSampleF):
            weights = [layer._parameters.get("weight") for layer in projector.modules() if type(layer) is nn.Linear]
            known = [w for w in weights if w is not None and w.dtype == torch.float32]
            found += [w for w in known if choose(projector.implementation, w.device, dtype).triton]
    return found
