"""InfoNCE of all layers and directions as one PyTorch operator: rows in, one mean per direction out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...common.autograd import FirstOrderOnly, apply, with_fast_path
from ...common.operators import operator
from ...kernels import cosine, nce
from .learned import scales_of, with_temperature


def _layers(queries, keys, extra, temperatures, groups, directions, other, divide, unit, gradient, scales):
    rows = [q.shape[0] for q in queries]
    if divide:
        units = cosine.cosine([*queries, *keys])
        queries, keys = units[: len(queries)], units[len(queries) :]
    unit = unit or (divide and (other or not extra))  # given extra keys are used unchanged
    grouped, grouped_keys = ([x.unflatten(0, (groups, -1)) for x in side] for side in (queries, keys))
    if other:  # the two directions of a layer are adjacent
        extra = [grouped[i ^ 1] for i in range(len(grouped))]
    else:
        extra = [e.expand(groups, -1, -1) for e in extra]
    loss, _, _, gradients = nce.nce_forward(
        grouped, grouped_keys, extra, [], [], temperatures, scales, unit=unit, gradient=gradient, statistics=False
    )
    totals = [sum(rows[i : i + directions]) for i in range(0, len(rows), directions)]
    return nce.mean_by_direction(loss, totals, directions), [g.flatten(0, 1) for g in gradients]


def _layers_fake(queries, keys, extra, temperatures, groups, directions, other, divide, unit, gradient, scales):
    mean = queries[0].new_empty(directions, dtype=torch.float32)
    return mean, [q.new_empty(q.shape) for q in queries] if gradient else []


def _row_gradients(queries, gradients, upstream, divide):
    return cosine.row_gradients(queries, gradients, upstream, divided=divide)


_layers_op = operator(
    "nce_layers(Tensor[] queries, Tensor[] keys, Tensor[] extra, float[] temperatures, SymInt groups, "
    "SymInt directions, bool other, bool divide, bool unit, bool gradient, Tensor[] scales) -> (Tensor, Tensor[])",
    _layers,
    _layers_fake,
)
_row_gradients_op = operator(
    "row_gradients(Tensor[] queries, Tensor[] gradients, Tensor upstream, bool divide) -> Tensor[]",
    _row_gradients,
    lambda queries, *_: [q.new_empty(q.shape) for q in queries],
)


@with_fast_path
class _NCELayers(torch.autograd.Function):
    @staticmethod
    def forward(count, temperatures, groups, directions, other, divide, unit, gradient, learned, *tensors):
        queries, keys, rest = tensors[:count], tensors[count : 2 * count], tensors[2 * count :]
        scales, extra = (rest[:count], rest[count:]) if learned else ((), rest)
        mean, gradients = _layers_op(
            queries, keys, extra, temperatures, groups, directions, other, divide, unit, gradient, scales
        )
        return mean, *gradients

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.count, ctx.divide, gradient = inputs[0], inputs[5], inputs[7]
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        if gradient:
            ctx.save_for_backward(*inputs[9 : 9 + ctx.count], *output)

    @staticmethod
    def backward(ctx, upstream, *_):
        if upstream is None:
            return (None,) * len(ctx.needs_input_grad)
        queries, (mean, *ready) = ctx.saved_tensors[: ctx.count], ctx.saved_tensors[ctx.count :]
        with torch.no_grad():
            gradients = _row_gradients_op(queries, ready, upstream, ctx.divide)
        if torch.is_grad_enabled():
            gradients = [FirstOrderOnly.apply(g, mean, upstream) for g in gradients]
        return *([None] * 9), *gradients, *([None] * (len(ctx.needs_input_grad) - 9 - ctx.count))


def nce_layers(
    queries: Sequence[Tensor],
    keys: Sequence[Tensor],
    extra: Sequence[Tensor],
    *,
    temperatures: Sequence[float | Tensor],
    groups: int,
    directions: int,
    other: bool,
    divide: bool,
    unit: bool,
) -> Tensor:
    """Compute `patch_nce_layers` of flat lists, the directions of a layer adjacent: float32 (directions,).

    Temperatures are numbers or, all of them, tensors (). For tensors, rows have their final length (`divide` is false).
    """
    scales: list[Tensor] = []
    if learned := [t for t in temperatures if isinstance(t, Tensor)]:
        assert not divide, "dividing inside would hide the length of the rows from the gradient of T"
        queries = [with_temperature(q, t) for q, t in zip(queries, learned, strict=True)]
        temperatures, scales = [1.0] * len(queries), scales_of(learned)
    gradient = torch.is_grad_enabled() and any(q.requires_grad for q in queries)
    constants = [x.detach() for x in (*keys, *extra)]
    return apply(
        _NCELayers,
        len(queries), list(temperatures), groups, directions, other, divide, unit, gradient, len(scales) > 0,
        *queries, *constants[: len(queries)], *scales, *constants[len(queries) :],
    )[0]  # fmt: skip
