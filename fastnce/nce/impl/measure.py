"""Measure the contrastive kernels on given data: their error against float64, forward and gradients.

Each function runs the kernels and the plain form in float64 on the same inputs, and yields one `Check` per result. With
`plain`, the plain form in the inputs' own dtype takes the place of the kernels. The check at the first use passes
made-up data (`uses`), `run.check_every` those of a step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...common.agreement import (
    GRADIENT_GATES,
    LOSS_GATES,
    MLP_GRADIENT_GATES,
    SAMPLING_GATES,
    UPSTREAM,
    Check,
    compared,
    exact_device,
    leaves,
    logit_rounding,
    pattern,
    relative,
    relative_per_row,
    run_kernels,
    widened,
)
from ...common.operators import uses_tf32
from ...common.taps import untapped
from . import eager, planned_calls, triton_layers, triton_maps, triton_rows
from .measure_taps import Biased, as_stored
from .rows import gather_patches, mlp, normalize_rows

Lists = Sequence[Tensor]
MLP = Sequence[Tensor]


def gates_of(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Return the dtype whose gates hold. TF32 keeps as many digits of a factor as float16."""
    return torch.float16 if uses_tf32(device, dtype) else dtype


def measure_rows(
    queries: Tensor,
    keys: Tensor,
    extra: Tensor | None = None,
    log_weight: Tensor | None = None,
    pair_weight: Tensor | None = None,
    *,
    groups: int,
    temperature: float | Tensor,
    decoupled: bool = False,
    unit: bool = False,
    wanted: Sequence[bool] = (True, False, False),
    kinds: dict[str, slice] | None = None,
    plain: bool = False,
) -> Iterator[Check]:
    """Measure the loss and the gradients of `triton_rows.nce_losses`.

    Args:
        queries, keys, extra, log_weight, pair_weight, groups, temperature, decoupled, unit: as `nce_losses` takes them.
        wanted: whether queries, keys and extra keys get a gradient.
        kinds: rows that are measured apart, by name; a norm over all rows would hide confident ones.
    """
    device = queries.device
    gates = gates_of(queries.dtype, device)
    wide = exact_device(device)
    given = [queries, keys] if extra is None else [queries, keys, extra]
    weights = [log_weight, pair_weight]

    def losses_and_gradients(function, tensors: Lists, used: Sequence[Tensor | None]) -> tuple[Tensor, Lists]:
        own = leaves(tensors, list(wanted)[: len(tensors)])
        t = temperature.to(own[0].device) if isinstance(temperature, Tensor) else temperature
        loss, _ = function(*own, *[None] * (3 - len(own)), *used, groups, t, decoupled, unit)
        sources = [x for x in own if x.requires_grad]
        return loss.detach(), torch.autograd.grad(loss.sum() * UPSTREAM, sources) if sources else ()

    function = eager.nce_losses if plain else partial(triton_rows.nce_losses, statistics=False)
    loss, gradients = run_kernels(lambda: losses_and_gradients(function, given, weights), device)
    exact_weights = [None if w is None else widened([w], wide)[0] for w in weights]
    exact, exact_gradients = losses_and_gradients(eager.nce_losses, widened(given, wide), exact_weights)
    names = [n for n, want in zip(("queries", "keys", "extra keys"), wanted, strict=True) if want]
    for kind, rows in (kinds or {"": slice(None)}).items():
        of = f" of {kind} rows" if kind else ""
        gate = LOSS_GATES[gates] + (0.0 if kind == "random" else logit_rounding(float(temperature)))
        error = _loss_error(loss[rows], exact[rows], decoupled)
        values = loss[rows].double().mean().item(), exact[rows].mean().item()
        yield Check(f"the loss{of}", error, gate, values=values)
        if wanted[0]:
            of_queries = [gradients[0][rows]], [exact_gradients[0][rows]]
            yield from compared([f"the gradient of queries{of}"], *of_queries, [GRADIENT_GATES[gates]])
    first = int(wanted[0])
    more = [f"the gradient of {name}" for name in names[first:]]
    yield from compared(more, gradients[first:], exact_gradients[first:], [GRADIENT_GATES[gates]] * len(more))


def _loss_error(loss: Tensor, exact: Tensor, decoupled: bool) -> float:
    """Return the error per row. A decoupled loss may be 0 or negative, so the rows are measured together."""
    return relative(loss, exact) if decoupled else relative_per_row(loss, exact)


def measure_layers(
    queries: Lists,
    keys: Lists,
    extra: Lists,
    *,
    temperatures: Sequence[float | Tensor],
    groups: int,
    directions: int,
    other: bool,
    divide: bool,
    unit: bool,
    plain: bool = False,
) -> Iterator[Check]:
    """Measure the means and the query gradients of `triton_layers.nce_layers`, which describes the arguments."""
    device, dtype = queries[0].device, queries[0].dtype
    gates = gates_of(dtype, device)
    wide = exact_device(device)
    numbers = [float(t) for t in temperatures]

    def by_kernels() -> tuple[Tensor, Lists]:
        own = leaves(queries)
        mean = triton_layers.nce_layers(
            own, keys, extra, temperatures=temperatures, groups=groups, directions=directions, other=other,
            divide=divide, unit=unit,
        )  # fmt: skip
        return mean.detach(), torch.autograd.grad(mean.sum() * UPSTREAM, own)

    def by_formula(given: Lists, constants: Lists, more: Lists) -> tuple[Tensor, Lists]:
        own = leaves(given)
        units = [_divided(q) if divide else q for q in own]
        losses = []
        for i, (q, k) in enumerate(zip(units, constants, strict=True)):
            e = None
            if other:
                e = units[i ^ 1].detach().unflatten(0, (groups, -1))
            elif more:
                e = more[i]
            unit_key = _divided(k) if divide else k
            losses.append(eager.nce_losses(q, unit_key, e, None, None, groups, numbers[i])[0].mean())
        mean = torch.stack(losses).view(-1, directions).mean(dim=0)
        return mean.detach(), torch.autograd.grad(mean.sum() * UPSTREAM, own)

    mean, gradients = by_formula(queries, keys, extra) if plain else run_kernels(by_kernels, device)
    exact, exact_gradients = by_formula(*(widened(x, wide) for x in (queries, keys, extra)))
    rounded = SAMPLING_GATES if divide else GRADIENT_GATES  # divided rows are rounded to the dtype once more
    loss_gate = LOSS_GATES[gates] + logit_rounding(min(numbers))
    yield from compared(["the loss"], [mean], [exact], [loss_gate])
    names = [f"the gradient of queries {i}" for i in range(len(queries))]
    yield from compared(names, gradients, exact_gradients, [rounded[gates]] * len(names))


def _divided(rows: Tensor) -> Tensor:
    """Divide rows by their length in float32 or wider; the result has the dtype of the rows."""
    wide = rows if rows.dtype == torch.float64 else rows.float()
    return (wide / torch.linalg.vector_norm(wide, dim=1, keepdim=True).clamp_min(1e-8)).to(rows.dtype)


def measure_ids(seeds: Tensor, locations: Sequence[int], patches: int) -> Iterator[Check]:
    """Count the drawn ids that are out of range or occur twice in a set."""
    sets = seeds.shape[1]
    flat = run_kernels(lambda: triton_maps.draw.op(seeds, list(locations), patches), seeds.device)
    sizes = [sets * min(patches, n) for n in locations]
    for layer, (ids, count) in enumerate(zip(flat.split(sizes), locations, strict=True)):
        drawn = ids.view(sets, -1).sort(dim=1).values
        wrong = ((drawn < 0) | (drawn >= count)).sum() + (drawn[:, 1:] == drawn[:, :-1]).sum()
        yield Check(f"the ids of layer {layer} that are out of range or drawn twice", float(wrong.item()), 0.0)


def _rows_of(feature_map: Tensor, ids: Tensor, weights: MLP | None) -> Tensor:
    """Sample, project and normalise one map in its dtype, as `project_patches`; ids are (sets, patches)."""
    each = ids.repeat_interleave(feature_map.shape[0] // ids.shape[0], dim=0)
    rows = gather_patches(feature_map, each).flatten(0, 1)
    if weights is not None:
        inner = torch.float32 if rows.dtype == torch.float16 else rows.dtype
        rows = mlp(rows.to(inner), [w.to(inner) for w in weights])
    wide = rows if rows.dtype == torch.float64 else rows.float()
    return normalize_rows(wide).to(feature_map.dtype)


def _rounded(tensors: Lists, dtype: torch.dtype, to: torch.dtype, device: torch.device) -> list[Tensor]:
    """Return leaves in the dtype `to` of the tensors as the kernels read them: rounded to `dtype` unless a bias."""
    read = [t.detach() if t.dim() == 1 else t.detach().to(dtype) for t in tensors]
    return leaves([t.to(device, to) for t in read])


def _fours(flat: Lists) -> list[Lists]:
    return [flat[i : i + 4] for i in range(0, len(flat), 4)]


def measure_projection(
    maps: Lists,
    ids: Lists,
    flat_mlp: Lists,
    dtype: torch.dtype,
    *,
    distinct: bool,
    with_gradients: bool = True,
    plain: bool = False,
    biases: Sequence[Tensor | None] = (),
    taps: Sequence[int] = (),
) -> Iterator[Check]:
    """Measure the rows, map gradients and weight gradients of `triton_maps.project_rows`, or of taps.

    Args:
        flat_mlp: four weights per layer, one after another; empty without MLPs.
        biases, taps: which maps are taps, as `Untapped.kinds`, and the bias of each map; none without taps.
    """
    device = maps[0].device
    gate, gradient_gate = _chain_gates(dtype, device, bool(flat_mlp))
    wide = exact_device(device)
    upstream: list[Tensor] = []

    def gradients(rows: Lists, sources: Lists) -> Lists:
        if not with_gradients:
            return []
        if not upstream:
            upstream.extend(pattern(r) for r in rows)
        pairs = zip(rows, upstream, strict=True)
        total = torch.stack([(r * u.to(r.device, r.dtype)).sum() for r, u in pairs]).sum()
        return torch.autograd.grad(total, sources)

    def by_kernels() -> tuple[Lists, Lists]:
        own, weights = leaves(maps), leaves(flat_mlp)
        parts = Biased(own, biases, taps)
        sources, rows = untapped(parts.opened(), distinct), None
        if sources.taps:
            found = planned_calls.RowsCall(sources, weights, ids, ("check",)).plan(
                dtype=dtype, distinct=distinct, keep=False
            )
            rows = None if found is None else found[0]
        if rows is None:
            rows = triton_maps.project_rows(sources.dense(), ids, _fours(weights) if weights else None, dtype, distinct)
        return [r.detach() for r in rows], parts.joined(gradients(rows, [*own, *weights, *parts.given]))

    def by_formula(to: torch.dtype, where: torch.device) -> tuple[Lists, Lists]:
        own, weights = (_rounded(x, dtype, to, where) for x in (maps, flat_mlp))
        fours: list[Lists | None] = list(_fours(weights)) or [None] * len(maps)
        parts = Biased(own, biases, ())
        rows = [_rows_of(m, i.to(where), four) for m, i, four in zip(parts.dense(dtype), ids, fours, strict=True)]
        return [r.detach() for r in rows], parts.joined(gradients(rows, [*own, *weights, *parts.given]))

    measured = by_formula(dtype, device) if plain else run_kernels(by_kernels, device)
    rows, exact = by_formula(torch.float64, wide)
    names = [f"the rows of layer {i}" for i in range(len(maps))]
    yield from compared(names, measured[0], rows, [gate] * len(rows))
    yield from _gradient_checks(measured[1], exact, len(maps), gradient_gate)


def _gradient_checks(gradients: Lists, exact: Lists, maps: int, gate: float) -> Iterator[Check]:
    """Compare gradients of maps, then of MLPs, all tensors of an MLP together.

    The loss nearly cancels in the gradient of a bias, whose own norm says little.
    """
    names = [f"the gradient of map {i}" for i in range(maps)][: len(gradients)]
    names += [f"the gradient of MLP {i}" for i in range((len(gradients) - maps) // 4)]
    ours, theirs = (
        [*tensors[:maps], *(torch.cat([w.flatten() for w in four]) for four in _fours(tensors[maps:]))]
        for tensors in (gradients, exact)
    )
    yield from compared(names, ours, theirs, [gate] * len(names))


def measure_head(
    query_maps: Lists,
    key_maps: Lists,
    ids: Lists,
    query_mlp: Lists,
    key_mlp: Lists,
    *,
    temperatures: Sequence[float],
    groups: int,
    directions: int,
    dtype: torch.dtype,
    distinct: bool,
    with_gradients: bool = True,
    plain: bool = False,
    biases: Sequence[Tensor | None] = (),
    taps: Sequence[int] = (),
) -> Iterator[Check]:
    """Measure the loss, map gradients and weight gradients of `triton_maps.head_loss`, with flat lists of MLPs.

    `biases` and `taps` are as in `measure_projection`, and those of the keys too.
    """
    device = query_maps[0].device
    gate, gradient_gate = _chain_gates(dtype, device, bool(query_mlp))
    wide = exact_device(device)

    def by_kernels() -> tuple[Tensor, Lists]:
        own, weights = leaves(query_maps), leaves(query_mlp)
        parts = Biased(own, biases, taps)
        queries = untapped(parts.opened(), distinct)
        keys = untapped([m.detach() for m in Biased(key_maps, biases, taps).opened()], distinct)
        settings: dict[str, Any] = {
            "temperatures": temperatures, "groups": groups, "directions": directions, "dtype": dtype
        }  # fmt: skip
        mean = None
        if queries.taps:
            call = planned_calls.LossCall(queries, keys, weights, key_mlp, ids, ("check",))
            mean = call.plan(sets=0, patches=0, keep=False, distinct=distinct, **settings)
        if mean is None:
            mlps = _fours(weights) if weights else None, _fours(key_mlp) if key_mlp else None
            mean = triton_maps.head_loss(queries.dense(), keys.dense(), ids, *mlps, distinct=distinct, **settings)
        return mean.detach(), parts.joined(gradients_of(mean, [*own, *weights, *parts.given]))

    def gradients_of(mean: Tensor, sources: Lists) -> Lists:
        return torch.autograd.grad(mean.sum() * UPSTREAM, sources) if with_gradients else []

    def by_formula(to: torch.dtype, where: torch.device) -> tuple[Tensor, Lists]:
        own, weights, key_weights, constants = (
            _rounded(x, dtype, to, where) for x in (query_maps, query_mlp, key_mlp, key_maps)
        )
        fours: list[Lists | None] = list(_fours(weights)) or [None] * len(own)
        key_fours: list[Lists | None] = list(_fours(key_weights)) or [None] * len(own)
        parts, losses = Biased(own, biases, ()), []
        key_values = Biased(constants, biases, ()).dense(dtype)
        for i, (q, k) in enumerate(zip(parts.dense(dtype), key_values, strict=True)):
            at = ids[i].to(where)
            units = as_stored(_rows_of(q, at, fours[i]), dtype)
            keys = as_stored(_rows_of(k, at, key_fours[i]), dtype).detach()
            loss, _ = eager.nce_losses(units, keys, None, None, None, groups, temperatures[i])
            losses.append(loss.unflatten(0, (directions, -1)).mean(dim=1))
        mean = torch.stack(losses).mean(dim=0)
        return mean.detach(), parts.joined(gradients_of(mean, [*own, *weights, *parts.given]))

    mean, gradients = by_formula(dtype, device) if plain else run_kernels(by_kernels, device)
    exact, exact_gradients = by_formula(torch.float64, wide)
    yield from compared(["the loss"], [mean], [exact], [gate])
    yield from _gradient_checks(gradients, exact_gradients, len(query_maps), gradient_gate)


def _chain_gates(dtype: torch.dtype, device: torch.device, projected: bool) -> tuple[float, float]:
    """Return the gates of rows (and losses of rows) and of gradients."""
    gates = gates_of(dtype, device)
    return SAMPLING_GATES[gates], (MLP_GRADIENT_GATES if projected else SAMPLING_GATES)[gates]
