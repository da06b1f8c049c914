"""The Triton kernels as PyTorch operators with gradients: one operator a step, for all layers.

The operators (`torch.ops.fastnce.*`) take lists of tensors and have fakes, so that `torch.compile` traces through them
without a break; the gradients are `autograd.Function`s around them, whose forward already forms the query gradient.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..kernels import common, nce, sample_project
from ..kernels.sample_project import MapLayout, map_layout, map_views, weight_views
from .autograd import Once, call, directly

MAX_WIDTH = 512
"""Channels or dims that a kernel holds on chip."""

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_MAP_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)

_library = torch.library.Library("fastnce", "DEF")


def _operator(schema: str, run, fake) -> None:
    name = schema.split("(", 1)[0]
    _library.define(schema)
    for key in ("CPU", "CUDA", "XPU"):  # CPU is Triton's interpreter, CUDA is ROCm as well
        _library.impl(name, run, key)
    torch.library.register_fake(f"fastnce::{name}", fake, lib=_library)


def obstacle(device: torch.device, dtype: torch.dtype, width: int) -> str | None:
    """Why the kernels cannot run on such rows, or None."""
    if device.type == "cpu" and not common.INTERPRET.value:
        return "the tensors are on the CPU, and Triton's interpreter is off (TRITON_INTERPRET=1 before the import)"
    if device.type not in ("cpu", "cuda", "xpu"):
        return f"there is no kernel for {device.type}"
    if dtype not in DTYPES:
        return f"the kernels compute in bfloat16, float16 or float32, not {dtype}"
    if width > MAX_WIDTH:
        return f"the kernels hold at most {MAX_WIDTH} channels or dims, not {width}"
    return None


# InfoNCE of grouped rows


def _nce_forward(queries, keys, extra, log_weight, pair_weight, temperatures, decoupled, unit, gradient):
    return nce.nce_forward(
        queries, keys, extra, log_weight, pair_weight, temperatures, decoupled=decoupled, unit=unit, gradient=gradient
    )


def _nce_forward_fake(queries, keys, extra, log_weight, pair_weight, temperatures, decoupled, unit, gradient):
    rows = sum(q.shape[0] * q.shape[1] for q in queries)
    loss, negative, positive = (queries[0].new_empty(rows, dtype=torch.float32) for _ in range(3))
    return loss, negative, positive, [q.new_empty(q.shape) for q in queries] if gradient else []


def _nce_keys(queries, keys, log_weight, pair_weight, temperatures, negative, coefficient, extra):
    return nce.nce_key_gradients(
        queries, keys, log_weight, pair_weight, temperatures, negative, coefficient, extra=extra
    )


_operator(
    "nce_forward(Tensor[] queries, Tensor[] keys, Tensor[] extra, Tensor[] log_weight, Tensor[] pair_weight, "
    "float[] temperatures, bool decoupled, bool unit, bool gradient) -> (Tensor, Tensor, Tensor, Tensor[])",
    _nce_forward,
    _nce_forward_fake,
)
_operator(
    "nce_keys(Tensor[] queries, Tensor[] keys, Tensor[] log_weight, Tensor[] pair_weight, float[] temperatures, "
    "Tensor negative, Tensor coefficient, bool extra) -> Tensor[]",
    _nce_keys,
    lambda queries, keys, *_: [k.new_empty(k.shape) for k in keys],
)


def _listed(tensor: Tensor | None) -> list[Tensor]:
    return [] if tensor is None else [tensor]


@directly
class _NCERows(torch.autograd.Function):
    @staticmethod
    def forward(queries, keys, extra, log_weight, pair_weight, temperature, decoupled, unit, with_gradient):
        groups, rows, _ = queries.shape
        loss, negative, positive, gradient = torch.ops.fastnce.nce_forward(
            [queries],
            [keys],
            [] if extra is None else [extra.expand(groups, -1, -1)],
            _listed(log_weight),
            _listed(pair_weight),
            [temperature],
            decoupled,
            unit,
            with_gradient,
        )
        shape = (groups, rows)
        ready = gradient[0] if with_gradient else queries.new_empty(0)
        return loss.view(shape), negative.view(shape), positive.view(shape), ready

    @staticmethod
    def setup_context(ctx, inputs, output):
        *leaves, log_weight, pair_weight, temperature, decoupled, _, _ = inputs
        _, negative, positive, gradient = output
        ctx.mark_non_differentiable(negative, positive, gradient)
        ctx.set_materialize_grads(False)  # no launch for the outputs without a gradient
        ctx.temperature, ctx.decoupled = temperature, decoupled
        rest = (log_weight, pair_weight, negative, positive)
        if not any(ctx.needs_input_grad[1:3]):
            rest = (None,) * 4  # keys are constants: the ready gradient is all the backward needs
        # constant keys are not kept: they may be overwritten before the backward, as a NegativeBank's are
        leaves = [leaf if i == 0 or ctx.needs_input_grad[i] else None for i, leaf in enumerate(leaves)]
        ctx.save_for_backward(gradient, *leaves, *rest)

    @staticmethod
    def backward(ctx, upstream, *_):
        if upstream is None:
            return (None,) * 9
        gradient, queries, keys, extra, log_weight, pair_weight, negative, positive = ctx.saved_tensors
        gradients: list[Tensor | None] = [None, None, None]
        with torch.no_grad():
            if ctx.needs_input_grad[0]:
                gradients[0] = (gradient * upstream[:, :, None]).to(queries.dtype)
            if any(ctx.needs_input_grad[1:3]):
                share = upstream if ctx.decoupled else upstream * torch.sigmoid(negative - positive)
                shared = [ctx.temperature], negative.flatten(), share.flatten()
            if ctx.needs_input_grad[1]:
                weights = _listed(log_weight), _listed(pair_weight)
                gradients[1] = torch.ops.fastnce.nce_keys([queries], [keys], *weights, *shared, False)[0]
            if ctx.needs_input_grad[2]:
                asking = queries if extra.shape[0] == queries.shape[0] else queries.flatten(0, 1)[None]
                gradients[2] = torch.ops.fastnce.nce_keys([asking], [extra], [], [], *shared, True)[0]
        if torch.is_grad_enabled():
            sources = [leaf for leaf in [queries, keys, extra, upstream] if leaf is not None and leaf.requires_grad]
            gradients = [None if g is None else Once.apply(g, *sources) for g in gradients]
        return *gradients, None, None, None, None, None, None


def nce_rows(
    queries_GSD: Tensor,
    keys_GSD: Tensor,
    extra_keys_GED: Tensor | None = None,
    *,
    temperature: float,
    pair_log_weight_GSS: Tensor | None = None,
    pair_weight_GSS: Tensor | None = None,
    decoupled: bool = False,
    unit: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `eager.nce_rows`; extra keys may be (1, count, dim) for all groups, `unit` says that rows have unit length."""
    with_gradient = torch.is_grad_enabled() and queries_GSD.requires_grad
    loss, negative, positive, _ = call(
        _NCERows,
        queries_GSD,
        keys_GSD,
        extra_keys_GED,
        pair_log_weight_GSS,
        pair_weight_GSS,
        temperature,
        decoupled,
        unit,
        with_gradient,
    )
    logsumexp = negative if decoupled else torch.logaddexp(negative, positive)
    return loss, logsumexp, positive


# Patches of maps

_operator(
    "draw_ids(Tensor seeds, SymInt[] locations, SymInt patches) -> Tensor",
    sample_project.draw_ids,
    lambda seeds, locations, patches: seeds.new_empty(seeds.shape[1] * sum(min(patches, n) for n in locations)),
)


def draw_ids(locations: Sequence[int], patches: int, sets: int, device: torch.device) -> list[Tensor]:
    """Distinct locations for every layer in two launches: [(sets, min(patches, locations))]."""
    seeds = torch.randint(2**62, (len(locations), sets), device=device)
    flat = torch.ops.fastnce.draw_ids(seeds, list(locations), patches)
    return [part.view(sets, -1) for part in flat.split([sets * min(patches, n) for n in locations])]


def _pack(layouts: Sequence[MapLayout]) -> list[int]:
    return [x for m in layouts for x in (*m[:4], int(m.channels_last), _MAP_DTYPES.index(m.dtype))]


def _unpack(packed: Sequence[int]) -> list[MapLayout]:
    sixes = [packed[i : i + 6] for i in range(0, len(packed), 6)]
    return [MapLayout(*x[:4], bool(x[4]), _MAP_DTYPES[x[5]]) for x in sixes]


def _project(maps, ids, mlp, dtype, save):
    return sample_project.project(maps, ids, mlp, dtype, len(maps) if save else 0)


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
    return sample_project.project_backward(
        d_units, upstream, directions, _unpack(layout), ids, mlp, units, length, x, hidden,
        distinct=distinct, wanted=wanted, weights_wanted=weights_wanted,
    )  # fmt: skip


def _project_backward_fake(
    d_units, upstream, directions, layout, ids, mlp, units, length, x, hidden, distinct, wanted, weights_wanted
):
    size = sum(m.bytes() for m, want in zip(_unpack(layout), wanted, strict=True) if want)
    weights = sum(w.numel() for w in mlp) if weights_wanted else 0
    return length.new_empty(size, dtype=torch.uint8), length.new_empty(weights)


_operator(
    "project(Tensor[] maps, Tensor[] ids, Tensor[] mlp, ScalarType dtype, bool save) "
    "-> (Tensor[], Tensor, Tensor, Tensor)",
    _project,
    _project_fake,
)
_operator(
    "project_backward(Tensor[] d_units, Tensor? upstream, SymInt directions, SymInt[] layout, Tensor[] ids, "
    "Tensor[] mlp, Tensor[] units, Tensor length, Tensor x, Tensor hidden, bool distinct, bool[] wanted, "
    "bool weights_wanted) -> (Tensor, Tensor)",
    _project_backward,
    _project_backward_fake,
)


def _backward(ctx, d_units, upstream, directions, wanted, weights_wanted):
    """The gradients of maps and MLPs from those of unit rows: shared by the two functions below.

    Both save ids, MLP weights, anything, unit rows, and the three flat tensors that `project` leaves.
    """
    saved, layers = ctx.saved_tensors, len(ctx.layouts)
    ids, mlp, units = saved[:layers], saved[layers : layers + ctx.weights], saved[-3 - layers : -3]
    buffer, flat = torch.ops.fastnce.project_backward(
        d_units, upstream, directions, _pack(ctx.layouts), ids, mlp, units, *saved[-3:], ctx.distinct, wanted,
        weights_wanted,
    )  # fmt: skip
    maps = map_views(buffer, ctx.layouts, wanted)
    if not weights_wanted:
        return maps, [None] * len(mlp)
    return maps, [g.to(w.dtype) for g, w in zip(weight_views(flat, mlp), mlp, strict=True)]


@directly
class _Project(torch.autograd.Function):
    @staticmethod
    def forward(layers, dtype, distinct, save, *tensors):
        maps, ids, mlp = tensors[:layers], tensors[layers : 2 * layers], tensors[2 * layers :]
        units, length, x, hidden = torch.ops.fastnce.project(maps, ids, mlp, dtype, save)
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
        if torch.is_grad_enabled():  # the unit rows are outputs: through them a second derivative finds `Once`
            sources = [*units, *(d for d in upstream if d is not None)]
            maps = [None if g is None else Once.apply(g, *sources) for g in maps]
            mlp = [None if g is None else Once.apply(g, *sources) for g in mlp]
        return None, None, None, None, *maps, *([None] * layers), *mlp


def project_rows(
    maps: Sequence[Tensor], ids: Sequence[Tensor], mlps: Sequence[Sequence[Tensor]] | None, dtype, distinct: bool
) -> list[Tensor]:
    """`project_patches` of all layers in one launch; ids are (sets, patches)."""
    mlp = [] if mlps is None else [w.contiguous() for four in mlps for w in four]
    save = torch.is_grad_enabled() and any(t.requires_grad for t in [*maps, *mlp])
    return list(call(_Project, len(maps), dtype, distinct, save, *maps, *ids, *mlp)[: len(maps)])


# The whole chain


def _head(query_maps, key_maps, ids, query_mlp, key_mlp, temperatures, groups, directions, dtype, gradient):
    layers = len(query_maps)
    units, *saved = sample_project.project(
        [*query_maps, *key_maps], [*ids, *ids], [*query_mlp, *key_mlp], dtype, layers if gradient else 0
    )
    rows = [u.shape[0] for u in units[:layers]]
    grouped = [u.unflatten(0, (groups, -1)) for u in units]
    loss, _, _, gradients = nce.nce_forward(
        grouped[:layers], grouped[layers:], [], [], [], temperatures, unit=True, gradient=gradient
    )
    mean = sample_project.mean_by_direction(loss, rows, directions)
    return mean, [g.flatten(0, 1) for g in gradients], units[:layers] if gradient else [], *saved


def _head_fake(query_maps, key_maps, ids, query_mlp, key_mlp, temperatures, groups, directions, dtype, gradient):
    units, *saved = _project_fake(query_maps, ids, query_mlp, dtype, gradient)
    mean = query_maps[0].new_empty(directions, dtype=torch.float32)
    return mean, [torch.empty_like(u) for u in units] if gradient else [], units if gradient else [], *saved


_operator(
    "head(Tensor[] query_maps, Tensor[] key_maps, Tensor[] ids, Tensor[] query_mlp, Tensor[] key_mlp, "
    "float[] temperatures, SymInt groups, SymInt directions, ScalarType dtype, bool gradient) "
    "-> (Tensor, Tensor[], Tensor[], Tensor, Tensor, Tensor)",
    _head,
    _head_fake,
)


@directly
class _Head(torch.autograd.Function):
    @staticmethod
    def forward(layers, temperatures, groups, directions, dtype, distinct, gradient, *tensors):
        query_maps, key_maps, ids = (tensors[i * layers : (i + 1) * layers] for i in range(3))
        weights = (len(tensors) - 3 * layers) // 2
        mlp = tensors[3 * layers : 3 * layers + weights], tensors[3 * layers + weights :]
        mean, gradients, units, *saved = torch.ops.fastnce.head(
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
            maps = [None if g is None else Once.apply(g, mean, upstream) for g in maps]
            mlp = [None if g is None else Once.apply(g, mean, upstream) for g in mlp]
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
    """Float32 (directions,): `PatchNCEHead.forward` from maps and ids (sets, patches); keys are constants."""
    query_mlp, key_mlp = (
        [] if mlps is None else [w.contiguous() for four in mlps for w in four] for mlps in (query_mlps, key_mlps)
    )
    key_maps, key_mlp = [m.detach() for m in key_maps], [w.detach() for w in key_mlp]
    gradient = torch.is_grad_enabled() and any(t.requires_grad for t in [*query_maps, *query_mlp])
    return call(
        _Head,
        len(query_maps), list(temperatures), groups, directions, dtype, distinct, gradient,
        *query_maps, *key_maps, *ids, *query_mlp, *key_mlp,
    )[0]  # fmt: skip
