"""A temperature that is a tensor: its gradient, and 1 / T as the kernels read it. The host never reads its value."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...common.autograd import apply, with_fast_path


@with_fast_path
class _WithTemperature(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(queries, temperature):
        return queries.view_as(queries)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, gradient):
        queries, temperature = ctx.saved_tensors
        share = None
        if ctx.needs_input_grad[1]:
            wide = torch.promote_types(torch.float32, queries.dtype)
            product = (gradient.to(wide) * queries.to(wide)).sum() / temperature.to(wide)
            share = product.neg().to(temperature.dtype)
        return gradient if ctx.needs_input_grad[0] else None, share


def with_temperature(queries: Tensor, temperature: Tensor) -> Tensor:
    """Return the queries, whose gradient then also gives the temperature its gradient.

    The loss depends on queries and T only through queries / T, also with weights of pairs and extra keys. Therefore
    dL/dT = -(queries . dL/dqueries) / T: no kernel has to compute it.

    Args:
        queries: (rows, dim), as the loss multiplies them: already divided by their length if it divides them.
        temperature: (), a floating tensor.
    """
    return apply(_WithTemperature, queries, temperature)


@with_fast_path
class _Bounded(torch.autograd.Function):
    @staticmethod
    def forward(x, low, high):
        return x.clamp(low, high)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, ctx.low, ctx.high = inputs
        ctx.save_for_backward(x)

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        outward = ((x >= ctx.high) & (gradient < 0)) | ((x <= ctx.low) & (gradient > 0))
        return gradient.masked_fill(outward, 0.0), None, None


def bounded(x: Tensor, low: float, high: float) -> Tensor:
    """Return x clamped to [low, high]. At a bound, only a gradient whose descent leads back inside passes.

    `clamp` alone passes none, so that a parameter beyond a bound would stay there for ever.
    """
    return apply(_Bounded, x, low, high)


def scales_of(temperatures: Sequence[Tensor]) -> list[Tensor]:
    """Return 1 / T per temperature, each the first of 4 equal float32: its address is then a multiple of 16.

    A kernel that gets one other address must assume this of all tensors, and its loads become narrow.
    """
    inverse = 1.0 / torch.stack([t.detach().float() for t in temperatures])
    return list(inverse[:, None].repeat(1, 4).unbind())
