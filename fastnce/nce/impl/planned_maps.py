"""Sampling, projection and the whole loss from maps, outside of tracers: one plan forward, one backward.

`triton_maps` computes the same through operators that a compiler can trace. Here the host does less: ids are drawn in
the plan, what the backward needs is one tensor, and a call like an earlier one is not checked again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...common.autograd import FirstOrderOnly
from ...common.narrowed import copies_of
from ...common.taps import Slot, Untapped
from ...kernels import nce, project, project_backward, sample
from ...kernels.common import dense_rows, fp32_precision
from ...kernels.map_layout import MapLayout, map_layout, rows_layout
from ...kernels.plan import Field, Plan, State
from ...kernels.planned import layout, plan_of, planned


def _drawn(seeds: Tensor, maps: Sequence[Tensor], patches: int) -> tuple[Tensor, list[Tensor]]:
    """Distinct locations of all maps in one launch: flat, and (sets, patches) for each map."""
    sets, counts = seeds.shape[1], [m.shape[2] * m.shape[3] for m in maps]
    flat = sample.draw_ids(seeds, counts, patches)
    return flat, [part.view(sets, -1) for part in flat.split([sets * min(patches, count) for count in counts])]


@planned(products="matmul")
def loss_forward(
    query_maps: Sequence[Tensor],
    key_maps: Sequence[Tensor],
    query_biases: Sequence[Tensor | None],
    key_biases: Sequence[Tensor | None],
    query_mlp: Sequence[Tensor],
    key_mlp: Sequence[Tensor],
    ids: Sequence[Tensor],
    seeds: Tensor | None,
    *,
    patches: int,
    temperatures: tuple[float, ...],
    groups: int,
    directions: int,
    dtype: torch.dtype,
    gradient: bool,
) -> tuple[Tensor, State | None]:
    """The loss (directions,) of drawn (`seeds`) or given ids, and what `_backward` needs.

    Biases are those that the maps lack: one or None per map, or none at all.
    """
    layers = len(query_maps)
    none = [None] * layers
    biases = [*(query_biases or none), *(key_biases or none)] if query_biases or key_biases else []
    drawn: list[Tensor] = []
    if seeds is not None:
        _, drawn = _drawn(seeds, query_maps, patches)
    ids = ids or drawn
    units, *saved = project.project(
        [*query_maps, *key_maps], [*ids, *ids], [*query_mlp, *key_mlp], dtype, layers if gradient else 0, biases
    )
    grouped = [u.unflatten(0, (groups, -1)) for u in units]
    loss, _, _, d_units = nce.nce_forward(
        grouped[:layers], grouped[layers:], [], [], [], temperatures, unit=True, gradient=gradient, statistics=False
    )
    mean = nce.mean_by_direction(loss, [u.shape[0] for u in units[:layers]], directions)
    if not gradient:
        return mean, None
    return mean, State((*units[:layers], *(d.flatten(0, 1) for d in d_units), *saved, *drawn))


@planned(products="matmul")
def rows_forward(
    maps: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    mlp: Sequence[Tensor],
    ids: Sequence[Tensor],
    seeds: Tensor | None,
    *,
    patches: int,
    dtype: torch.dtype,
    gradient: bool,
) -> tuple[list[Tensor], Tensor | None, State | None]:
    """The unit rows of each layer, the drawn ids of all, flat, and what `_backward` needs beside them."""
    flat = None
    if seeds is not None:
        flat, ids = _drawn(seeds, maps, patches)
    units, *saved = project.project(maps, ids, mlp, dtype, len(maps) if gradient else 0, biases)
    return units, flat, State(tuple(saved)) if gradient else None


@planned(products="matmul")
def _backward(
    buffer: Tensor,
    state: Tensor,
    upstream: Tensor | None,
    d_units: Sequence[Tensor],
    units: Sequence[Tensor],
    ids: Sequence[Tensor],
    weights: Sequence[Tensor],
    *,
    fields: tuple[Field, ...],
    layouts: tuple[MapLayout, ...],
    directions: int,
    distinct: bool,
    wanted: tuple[bool, ...],
    weights_wanted: bool,
) -> Tensor:
    """Write the gradients of the maps into the zeroed buffer; return those of weight1, bias1, ... of each layer, flat.

    `weights`: weight1 and weight2 of each layer. The other tensors that are not given are in the state.
    """
    layers = len(layouts)
    stored = [field.of(state) for field in fields]
    if not units:
        units, d_units, stored = stored[:layers], stored[layers : 2 * layers], stored[2 * layers :]
    length, x, hidden, *drawn = stored
    mlp = []
    for weight1, weight2 in zip(weights[::2], weights[1::2], strict=True):
        # only the shapes of biases are needed
        mlp += [weight1, weight1.new_empty(weight1.shape[0]), weight2, weight2.new_empty(weight2.shape[0])]
    return project_backward.into_buffer(
        buffer, d_units, upstream, directions, layouts, ids or drawn, mlp, units, length, x, hidden,
        distinct=distinct, wanted=wanted, weights_wanted=weights_wanted,
    )  # fmt: skip


class _Gradients(NamedTuple):
    """How the gradients of one kind of backward pass are computed."""

    plan: Plan
    bytes: int
    maps: tuple[tuple[torch.dtype, tuple[int, ...], tuple[int, ...], int] | None, ...]
    """dtype, shape, strides and offset of the gradient of each map in the buffer; None for one that is not wanted."""
    sizes: list[int]
    """Elements of the gradient of each weight and bias; empty if none is wanted."""
    shapes: list[torch.Size]
    """Of weight1 and weight2 of each layer."""


class Entry:
    """The plan of a forward pass, and those of its backward passes.

    Args:
        ids: the locations of each map, or how many are drawn.
        sets: how many sets of locations are drawn; 0 for none.
        narrow: the dtype of the copies that are read in place of the weights (see `common.narrowed`), or None.
    """

    def __init__(
        self, forward: Plan, sources: Untapped, ids: Sequence[Tensor] | int, directions: int, distinct: bool,
        sets: int = 0, narrow: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        self.forward, self.sets, self.narrow = forward, sets, narrow
        maps = sources.maps
        if isinstance(ids, int):
            self.patches = [min(ids, m.shape[2] * m.shape[3]) for m in maps]
        else:
            self.patches = [i.shape[-1] for i in ids]
        self.layouts = tuple(
            map_layout(m) if tap is None else rows_layout(m, patches)
            for m, tap, patches in zip(maps, sources.taps or [None] * len(maps), self.patches, strict=True)
        )
        self.directions, self.distinct = directions, distinct
        self.backward: dict[Any, _Gradients] = {}

    def read(self, mlp: Sequence[Tensor]) -> Sequence[Tensor]:
        """The weights and biases as the forward pass reads them."""
        return copies_of(mlp, self.narrow) or mlp

    def kept(self, mlp: Sequence[Tensor], read: Sequence[Tensor]) -> Sequence[Tensor]:
        """The weights as the backward pass reads them: it multiplies in bfloat16 if the rows are float16."""
        return (mlp if self.narrow is torch.float16 else read)[::2]

    def gradients(
        self, state: Tensor, upstream: Tensor | None, rows: Sequence[Sequence[Tensor]], wanted: Sequence[bool]
    ) -> tuple[list[Tensor | None], list[Tensor]]:
        """The gradients of the maps (None for those that are not wanted) and of the weights, if any is wanted.

        `rows`: gradients of unit rows, unit rows, ids, weights.
        """
        arriving = rows[0] if upstream is None else (upstream,)
        key = (
            *wanted,
            fp32_precision("cuda", "matmul"),
            *map(layout, arriving),
            *(x.stride() for xs in rows[1:] for x in xs),  # hooks of saved tensors may have copied them
        )
        if key not in self.backward:
            self.backward[key] = self._prepare(state, upstream, rows, wanted)
        found = self.backward[key]
        buffer = torch.zeros(found.bytes, dtype=torch.uint8, device=state.device)
        given = [buffer, state, *(() if upstream is None else arriving), *(x for xs in rows for x in xs)]
        flat = found.plan.replay(given)
        typed = {one[0]: buffer.view(one[0]) for one in found.maps if one is not None}
        maps = [None if one is None else typed[one[0]].as_strided(*one[1:]) for one in found.maps]
        weights = list(flat.split(found.sizes)) if found.sizes else []
        weights[::2] = [part.view(shape) for part, shape in zip(weights[::2], found.shapes, strict=False)]
        return maps, weights

    def _prepare(self, state, upstream, rows, wanted) -> _Gradients:
        of_maps, layers = tuple(wanted[: len(self.layouts)]), len(self.layouts)
        views: list[Any] = []
        size = 0
        for m, want in zip(self.layouts, of_maps, strict=True):
            views.append((m.dtype, m[:4], m.strides(), size // m.dtype.itemsize) if want else None)
            size += m.bytes() if want else 0
        buffer = torch.empty(size, dtype=torch.uint8, device=state.device)  # for its layout
        d_units, units, ids, weights = rows
        ids = [i if i.dim() == 2 else i[None] for i in ids]
        plan = plan_of(
            _backward, buffer, state, upstream, d_units, units, ids, weights,
            fields=self.forward.state, layouts=self.layouts, directions=self.directions, distinct=self.distinct,
            wanted=of_maps, weights_wanted=any(wanted[layers:]),
        )  # fmt: skip
        assert plan is not None  # the forward pass has one
        shapes = [w.shape for w in weights]
        sizes = [n for shape in shapes for n in (shape.numel(), shape[0])]  # a bias has one element per row
        return _Gradients(plan, size, tuple(views), sizes if any(wanted[layers:]) else [], shapes)


class LossFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, entry, constants, count, *leaves):
        queries, key_maps, biases, key_mlp, chosen = constants
        mlp = leaves[count:]
        read = entry.read(mlp)
        given = [*queries.maps, *key_maps, *biases, *read, *entry.read(key_mlp), *chosen]
        mean, state = entry.forward.replay(given)
        ctx.entry, ctx.count, ctx.dtype = entry, count, mlp[0].dtype if mlp else None
        ctx.slots = _slots(queries)
        ctx.set_materialize_grads(False)
        ids = [] if entry.sets else chosen
        ctx.save_for_backward(mean, state, *ids, *entry.kept(mlp, read))
        return mean

    @staticmethod
    def backward(ctx, upstream):
        if upstream is None:
            return (None,) * len(ctx.needs_input_grad)
        mean, state, *others = ctx.saved_tensors
        entry, wanted = ctx.entry, ctx.needs_input_grad[3:]
        weights = (len(wanted) - ctx.count) // 2
        ids, weights = others[: len(others) - weights], others[len(others) - weights :]
        enabled = torch.is_grad_enabled()
        with torch.no_grad():
            maps, mlp = entry.gradients(state, upstream.detach(), ((), (), ids, weights), wanted)
            if ctx.slots:
                drawn = [field.of(state) for field in entry.forward.state[-ctx.count :]]
                _leave(ctx.slots, maps, ids or drawn)
        return _once(ctx, enabled, (mean, upstream), maps, mlp, weights)


class RowsFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, entry, constants, count, *leaves):
        sources, biases, chosen = constants
        mlp = leaves[count:]
        read = entry.read(mlp)
        units, drawn, state = entry.forward.replay([*sources.maps, *biases, *read, *chosen])
        if drawn is not None:
            chosen[:] = drawn.split(entry.patches)  # in place of the seeds
        ids = chosen
        ctx.entry, ctx.count, ctx.dtype = entry, count, mlp[0].dtype if mlp else None
        ctx.slots = _slots(sources)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(state, *units, *ids, *entry.kept(mlp, read))
        return tuple(units)

    @staticmethod
    def backward(ctx, *upstream):
        state, *others = ctx.saved_tensors
        entry, count, wanted = ctx.entry, ctx.count, ctx.needs_input_grad[3:]
        units, ids, weights = others[:count], others[count : 2 * count], others[2 * count :]
        enabled = torch.is_grad_enabled()
        with torch.no_grad():
            d_units = [
                torch.zeros_like(u) if d is None else dense_rows(d) for d, u in zip(upstream, units, strict=True)
            ]
            maps, mlp = entry.gradients(state, None, (d_units, units, ids, weights), wanted)
            if ctx.slots:
                _leave(ctx.slots, maps, ids)
        return _once(ctx, enabled, (*units, *(d for d in upstream if d is not None)), maps, mlp, weights)


def _slots(sources: Untapped) -> list[tuple[Slot, int] | None]:
    """The slot and the first image of each tap, None for other maps; empty without taps."""
    return [None if tap is None else (tap.slot, tap.first) for tap in sources.taps]


def _leave(slots: Sequence[tuple[Slot, int] | None], gradients: list[Tensor | None], ids: Sequence[Tensor]) -> None:
    """Leave the gradients of tapped rows in their slots, and None in their places."""
    for i, found in enumerate(slots):
        rows = gradients[i]
        if found is not None and rows is not None:
            slot, first = found
            slot.leave(rows, ids[i] if ids[i].dim() == 2 else ids[i][None], first)
            gradients[i] = None


def _once(ctx, enabled: bool, sources: Sequence[Tensor], maps, mlp, weights) -> tuple[Any, ...]:
    """The gradients in the order of the inputs; a derivative of them is an error."""
    if mlp and mlp[0].dtype is not ctx.dtype:
        mlp = [g.to(ctx.dtype) for g in mlp]
    gradients = [*maps, *(mlp or [None] * (2 * len(weights)))]
    if enabled:
        gradients = [None if g is None else FirstOrderOnly.apply(g, *sources) for g in gradients]
    return None, None, None, *gradients
