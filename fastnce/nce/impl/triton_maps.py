"""Triton kernels that start from maps as PyTorch operators: drawing, sampling with projection, and the whole loss.

Each operator handles all layers at once. `triton_rows` describes how operators and gradients are connected.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...common.autograd import FirstOrderOnly, apply, with_fast_path
from ...common.operators import operator
from ...kernels import nce, project, project_backward, sample
from ...kernels.map_layout import MapLayout, map_layout, map_views
from ...kernels.weight_gradient import weight_views

_MAP_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)

draw = operator(
    "draw_ids(Tensor seeds, SymInt[] locations, SymInt patches) -> Tensor",
    sample.draw_ids,
    lambda seeds, locations, patches: seeds.new_empty(seeds.shape[1] * sum(min(patches, n) for n in locations)),
)


def draw_ids(locations: Sequence[int], patches: int, sets: int, device: torch.device) -> list[Tensor]:
    """Draw distinct locations for every layer in two launches: [(sets, min(patches, locations))]."""
    seeds = torch.randint(2**62, (len(locations), sets), device=device)
    flat = draw(seeds, list(locations), patches)
    return [part.view(sets, -1) for part in flat.split([sets * min(patches, n) for n in locations])]


def _pack(layouts: Sequence[MapLayout]) -> list[int]:
    """Encode layouts as whole numbers, which operators accept as an argument."""
    return [x for m in layouts for x in (*m[:4], int(m.channels_last), _MAP_DTYPES.index(m.dtype))]


def _unpack(packed: Sequence[int]) -> list[MapLayout]:
    sixes = [packed[i : i + 6] for i in range(0, len(packed), 6)]
    return [MapLayout(n, c, h, w, bool(last), _MAP_DTYPES[dtype]) for n, c, h, w, last, dtype in sixes]


def _project(maps, ids, mlp, dtype, save):
    return project.project(maps, ids, mlp, dtype, len(maps) if save else 0)


def _project_fake(maps, ids, mlp, dtype, save):
    rows = [m.shape[0] * i.shape[1] for m, i in zip(maps, ids, strict=True)]
    dims = [mlp[2].shape[0] if mlp else m.shape[1] for m in maps]
    units = [m.new_empty(r, d, dtype=dtype) for m, r, d in zip(maps, rows, dims, strict=True)]
    return units, *_saved_fake(maps, rows, mlp, dtype, save)


def _saved_fake(maps, rows, mlp, dtype, save):
    kept = sum(rows) if save else 0
    x = sum(r * m.shape[1] for m, r in zip(maps, rows, strict=True)) if save else 0
    new = maps[0].new_empty
    hidden = kept * mlp[0].shape[0] if mlp else 0
    return new(kept, dtype=torch.float32), new(x, dtype=dtype), new(hidden, dtype=dtype)


def _project_backward(
    d_units, upstream, directions, layout, ids, mlp, units, length, x, hidden, distinct, wanted, weights_wanted
):
    return project_backward.project_backward(
        d_units, upstream, directions, _unpack(layout), ids, mlp, units, length, x, hidden,
        distinct=distinct, wanted=wanted, weights_wanted=weights_wanted,
    )  # fmt: skip


def _project_backward_fake(
    d_units, upstream, directions, layout, ids, mlp, units, length, x, hidden, distinct, wanted, weights_wanted
):
    size = sum(m.bytes() for m, want in zip(_unpack(layout), wanted, strict=True) if want)
    weights = sum(w.numel() for w in mlp) if weights_wanted else 0
    return length.new_empty(size, dtype=torch.uint8), length.new_empty(weights)


_project_op = operator(
    "project(Tensor[] maps, Tensor[] ids, Tensor[] mlp, ScalarType dtype, bool save) "
    "-> (Tensor[], Tensor, Tensor, Tensor)",
    _project,
    _project_fake,
)
_project_backward_op = operator(
    "project_backward(Tensor[] d_units, Tensor? upstream, SymInt directions, SymInt[] layout, Tensor[] ids, "
    "Tensor[] mlp, Tensor[] units, Tensor length, Tensor x, Tensor hidden, bool distinct, bool[] wanted, "
    "bool weights_wanted) -> (Tensor, Tensor)",
    _project_backward,
    _project_backward_fake,
)


def _backward(ctx, d_units, upstream, directions, wanted, weights_wanted):
    """Compute the gradients of maps and MLPs from those of unit rows, for both functions below.

    Both save ids, MLP weights, tensors of their own, unit rows, and the three flat tensors that `project` returns, in
    this order.
    """
    saved, layers = ctx.saved_tensors, len(ctx.layouts)
    ids, mlp, units = saved[:layers], saved[layers : layers + ctx.weights], saved[-3 - layers : -3]
    buffer, flat = _project_backward_op(
        d_units, upstream, directions, _pack(ctx.layouts), ids, mlp, units, *saved[-3:], ctx.distinct, wanted,
        weights_wanted,
    )  # fmt: skip
    maps = map_views(buffer, ctx.layouts, wanted)
    if not weights_wanted:
        return maps, [None] * len(mlp)
    return maps, [g.to(w.dtype) for g, w in zip(weight_views(flat, mlp), mlp, strict=True)]


@with_fast_path
class _Project(torch.autograd.Function):
    @staticmethod
    def forward(layers, dtype, distinct, save, *tensors):
        maps, ids, mlp = tensors[:layers], tensors[layers : 2 * layers], tensors[2 * layers :]
        units, length, x, hidden = _project_op(maps, ids, mlp, dtype, save)
        return *units, length, x, hidden

    @staticmethod
    def setup_context(ctx, inputs, output):
        layers, _, ctx.distinct, _, *tensors = inputs
        ctx.mark_non_differentiable(*output[layers:])
        ctx.set_materialize_grads(False)
        ctx.layouts = [map_layout(m) for m in tensors[:layers]]
        ctx.weights = len(tensors) - 2 * layers
        ctx.save_for_backward(*tensors[layers:], *output)

    @staticmethod
    def backward(ctx, *upstream):
        layers, needs = len(ctx.layouts), ctx.needs_input_grad[4:]
        with torch.no_grad():
            units = ctx.saved_tensors[-3 - layers : -3]
            d_units = [torch.zeros_like(u) if d is None else d for d, u in zip(upstream, units, strict=False)]
            maps, mlp = _backward(ctx, d_units, None, 1, list(needs[:layers]), any(needs[2 * layers :]))
        if torch.is_grad_enabled():
            # The unit rows are outputs, so a second derivative reaches `FirstOrderOnly` through them.
            sources = [*units, *(d for d in upstream if d is not None)]
            maps = [None if g is None else FirstOrderOnly.apply(g, *sources) for g in maps]
            mlp = [None if g is None else FirstOrderOnly.apply(g, *sources) for g in mlp]
        return None, None, None, None, *maps, *([None] * layers), *mlp


def project_rows(
    maps: Sequence[Tensor], ids: Sequence[Tensor], mlps: Sequence[Sequence[Tensor]] | None, dtype, distinct: bool
) -> list[Tensor]:
    """Compute `project_patches` of all layers in one launch; ids are (sets, patches)."""
    mlp = [] if mlps is None else [w.contiguous() for four in mlps for w in four]
    save = torch.is_grad_enabled() and any(t.requires_grad for t in [*maps, *mlp])
    return list(apply(_Project, len(maps), dtype, distinct, save, *maps, *ids, *mlp)[: len(maps)])


def _head(query_maps, key_maps, ids, query_mlp, key_mlp, temperatures, groups, directions, dtype, gradient):
    layers = len(query_maps)
    units, *saved = project.project(
        [*query_maps, *key_maps], [*ids, *ids], [*query_mlp, *key_mlp], dtype, layers if gradient else 0
    )
    rows = [u.shape[0] for u in units[:layers]]
    grouped = [u.unflatten(0, (groups, -1)) for u in units]
    loss, _, _, gradients = nce.nce_forward(
        grouped[:layers], grouped[layers:], [], [], [], temperatures, unit=True, gradient=gradient, statistics=False
    )
    mean = nce.mean_by_direction(loss, rows, directions)
    return mean, [g.flatten(0, 1) for g in gradients], units[:layers] if gradient else [], *saved


def _head_fake(query_maps, key_maps, ids, query_mlp, key_mlp, temperatures, groups, directions, dtype, gradient):
    units, *saved = _project_fake(query_maps, ids, query_mlp, dtype, gradient)
    mean = query_maps[0].new_empty(directions, dtype=torch.float32)
    return mean, [torch.empty_like(u) for u in units] if gradient else [], units if gradient else [], *saved


_head_op = operator(
    "head(Tensor[] query_maps, Tensor[] key_maps, Tensor[] ids, Tensor[] query_mlp, Tensor[] key_mlp, "
    "float[] temperatures, SymInt groups, SymInt directions, ScalarType dtype, bool gradient) "
    "-> (Tensor, Tensor[], Tensor[], Tensor, Tensor, Tensor)",
    _head,
    _head_fake,
)


@with_fast_path
class _Head(torch.autograd.Function):
    @staticmethod
    def forward(layers, temperatures, groups, directions, dtype, distinct, gradient, *tensors):
        query_maps, key_maps, ids = (tensors[i * layers : (i + 1) * layers] for i in range(3))
        weights = (len(tensors) - 3 * layers) // 2
        mlp = tensors[3 * layers : 3 * layers + weights], tensors[3 * layers + weights :]
        mean, gradients, units, *saved = _head_op(
            query_maps, key_maps, ids, *mlp, temperatures, groups, directions, dtype, gradient
        )
        return mean, *gradients, *units, *saved

    @staticmethod
    def setup_context(ctx, inputs, output):
        layers, _, _, ctx.directions, _, ctx.distinct, gradient, *tensors = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.layouts = [map_layout(m) for m in tensors[:layers]]
        ctx.weights = (len(tensors) - 3 * layers) // 2
        query_mlp = tensors[3 * layers : 3 * layers + ctx.weights]
        if gradient:
            ctx.save_for_backward(*tensors[2 * layers : 3 * layers], *query_mlp, *output)

    @staticmethod
    def backward(ctx, upstream, *_):
        if upstream is None:
            return (None,) * len(ctx.needs_input_grad)
        layers, weights, needs = len(ctx.layouts), ctx.weights, ctx.needs_input_grad[7:]
        weights_wanted = any(needs[3 * layers : 3 * layers + weights])
        with torch.no_grad():
            mean, *d_units = ctx.saved_tensors[layers + weights : 2 * layers + weights + 1]
            maps, mlp = _backward(ctx, d_units, upstream, ctx.directions, list(needs[:layers]), weights_wanted)
        if torch.is_grad_enabled():
            maps = [None if g is None else FirstOrderOnly.apply(g, mean, upstream) for g in maps]
            mlp = [None if g is None else FirstOrderOnly.apply(g, mean, upstream) for g in mlp]
        return *([None] * 7), *maps, *([None] * (2 * layers)), *mlp, *([None] * weights)


def head_loss(
    query_maps: Sequence[Tensor],
    key_maps: Sequence[Tensor],
    ids: Sequence[Tensor],
    query_mlps: Sequence[Sequence[Tensor]] | None,
    key_mlps: Sequence[Sequence[Tensor]] | None,
    *,
    temperatures: Sequence[float],
    groups: int,
    directions: int,
    dtype: torch.dtype,
    distinct: bool,
) -> Tensor:
    """Compute `PatchNCEHead.forward` of maps and ids (sets, patches), with constant keys: float32 (directions,)."""
    query_mlp, key_mlp = (
        [] if mlps is None else [w.contiguous() for four in mlps for w in four] for mlps in (query_mlps, key_mlps)
    )
    key_maps, key_mlp = [m.detach() for m in key_maps], [w.detach() for w in key_mlp]
    gradient = torch.is_grad_enabled() and any(t.requires_grad for t in [*query_maps, *query_mlp])
    return apply(
        _Head,
        len(query_maps), list(temperatures), groups, directions, dtype, distinct, gradient,
        *query_maps, *key_maps, *ids, *query_mlp, *key_mlp,
    )[0]  # fmt: skip
