"""PatchNCE of all layers and directions of a method in one call: a single launch on an accelerator.

nce1, nce2 = patch_nce_layers([q1, q2], [k1, k2], images=batch, cosine=True)   # each q, k: one (rows, dim) per layer
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from ..common.dispatch import KERNELS, Implementation
from ..common.first_use import trusted
from ..common.messages import shown
from ..common.precision import autocast_dtype, without_autocast
from . import checks
from .api import Negatives
from .impl import eager
from .impl.dispatch import choose_rows, triton_layers, triton_rows
from .impl.uses import LayersUse
from .temperature import given_temperatures, lowest_of, per_direction
from .weights import Weighting, Weights

Rows = Sequence[Sequence[Tensor]]
"""One list per direction, of one tensor per layer."""


def cosine_rows(rows: Tensor) -> Tensor:
    """Divide (rows, dim) by their length, or by 1e-8 if that is larger, as `F.cosine_similarity` does.

    Rows of zeros stay zeros. 16-bit rows are divided in float32.
    """
    wide = rows.float() if rows.dtype in (torch.bfloat16, torch.float16) else rows
    return (wide / torch.linalg.vector_norm(wide, dim=1, keepdim=True).clamp_min(1e-8)).to(rows.dtype)


def patch_nce_layers(
    queries: Rows,
    keys: Rows,
    *,
    images: int = 1,
    negatives: Negatives = "image",
    temperature: float | Tensor | Sequence[float | Tensor] = 0.07,
    extra_keys: Rows | Literal["other"] | None = None,
    cosine: bool = False,
    weighting: Weighting | None = None,
    unit_rows: bool = False,
    implementation: Implementation = None,
) -> Tensor:
    """Compute `patch_nce` of each layer and direction: float32 (directions,), the mean over rows, then over layers.

    Args:
        queries, keys: (rows, dim), rows = images * patches, image after image; one shape for all directions of a layer.
            Keys are constants.
        images, negatives: as in `patch_nce`, for each direction; rows of different directions are never contrasted.
        temperature: T > 0, one for all layers or one per layer: numbers, or tensors as in `patch_nce`, or one tensor
            (layers,).
        extra_keys: more negatives, constants, used unchanged: (count, dim) or (groups, count, dim) for each layer and
            direction, of one shape for all directions of a layer. "other", for two directions, uses the queries of the
            other direction, group by group (DCD-GAN: the codes of the same image in the other branch).
        cosine: divide queries and keys (and those of "other") by their length, see `cosine_rows` (DCLGAN).
        weighting: weights of pairs and queries, as in `PatchNCEHead`; extra keys have weight 1. It is called once per
            layer with the rows of all directions, and each layer then needs its own launch.
        unit_rows, implementation: as in `patch_nce`. The kernels need layers of one dtype.

    Raises:
        ValueError: lists that do not match, weights of another shape, and everything that `patch_nce` refuses.
    """
    other = isinstance(extra_keys, str) and extra_keys == "other"
    nested: dict[str, Any] = {"queries": queries, "keys": keys}
    if not (extra_keys is None or other):
        nested["extra_keys"] = extra_keys
    directions, layers = checks.nested(nested)
    if other and directions != 2:
        raise ValueError(f'extra_keys="other" needs two directions, not {directions}')
    if weighting is not None and not callable(weighting):
        raise ValueError(f"weighting must be a function or None, not {shown(weighting)}")
    temperatures = given_temperatures(temperature, layers, queries[0][0].device)
    # flat lists in which the directions of a layer are adjacent
    flat_queries, flat_keys = (
        [side[d][i] for i in range(layers) for d in range(directions)] for side in (queries, keys)
    )
    dtypes = {autocast_dtype(q) for q in flat_queries}
    flat_queries, flat_keys = ([x.to(autocast_dtype(x)) for x in side] for side in (flat_queries, flat_keys))
    extra: list[Tensor | None] = [None] * len(flat_queries)
    if "extra_keys" in nested:
        extra = [nested["extra_keys"][d][i].to(flat_queries[0].dtype) for i in range(layers) for d in range(directions)]
    groups = 0
    for i, (q, k, e) in enumerate(zip(flat_queries, flat_keys, extra, strict=True)):
        groups = checks.rows(q, k, images, negatives, e, None, False)
        first = flat_queries[i - i % directions]
        if q.shape != first.shape or q.dtype != first.dtype:
            raise ValueError(f"the directions of layer {i // directions} must have queries of one shape and dtype")
        if q.device != flat_queries[0].device:
            raise ValueError(f"queries are on {flat_queries[0].device} and {q.device}: move one of them")
    width, size = max(q.shape[1] for q in flat_queries), max(q.shape[0] for q in flat_queries) // groups
    learned = isinstance(temperatures[0], Tensor)
    # The gradient of T needs the rows as they are multiplied, so the kernels do not divide them.
    divide, unit = cosine and not learned, unit_rows or (cosine and learned and "extra_keys" not in nested)
    choice = choose_rows(implementation, flat_queries[0].device, flat_queries[0].dtype, width, size)
    if choice is KERNELS and len(dtypes) == 1:
        widths, rows = tuple(q.shape[1] for q in flat_queries), tuple(q.shape[0] for q in flat_queries)
        extras = 0 if extra[0] is None else extra[0].shape[-2]
        options = groups, directions, extras, other, divide, unit, lowest_of(temperatures), learned
        use = LayersUse(widths, rows, *options)
        choice = trusted(use, flat_queries[0].device, flat_queries[0].dtype)
    triton = choice.triton
    if triton and len(dtypes) > 1 and implementation == "triton":
        raise ValueError("implementation='triton' cannot run here: layers differ in dtype")
    triton = triton and len(dtypes) == 1
    with without_autocast(flat_queries[0].device):
        if triton and weighting is None:
            if cosine and learned:
                flat_queries, flat_keys = ([cosine_rows(x) for x in side] for side in (flat_queries, flat_keys))
            return triton_layers.nce_layers(
                flat_queries,
                flat_keys,
                [e if e.dim() == 3 else e[None] for e in extra if e is not None],
                temperatures=per_direction(temperatures, directions),
                groups=groups,
                directions=directions,
                other=other,
                divide=divide,
                unit=unit,
            )
        nce_losses: Any = triton_rows.nce_losses if triton else eager.nce_losses
        means = []
        for i, t in enumerate(temperatures):
            layer = slice(i * directions, (i + 1) * directions)
            q, k = torch.cat(flat_queries[layer]), torch.cat(flat_keys[layer]).detach()
            if cosine:
                q, k = cosine_rows(q), cosine_rows(k)
            if other:
                e = q.detach().unflatten(0, (2, groups, -1)).flip(0).flatten(0, 1)
            else:
                e = _grouped(extra[layer], groups)
            log_weight, weight, query_weight, decoupled = _weights(weighting, q, k, e, directions * groups)
            loss, _ = nce_losses(
                q, k, e, log_weight, weight, directions * groups, t, decoupled, unit_rows and weighting is None
            )
            if query_weight is not None:
                loss = loss * query_weight.to(loss.dtype)
            means.append(loss.unflatten(0, (directions, -1)).mean(dim=1))
        return torch.stack(means).mean(dim=0)


@torch.no_grad()
def _weights(weighting: Weighting | None, queries: Tensor, keys: Tensor, extra: Tensor | None, groups: int) -> Weights:
    """Call the weighting and check its result; without one, return empty `Weights`."""
    if weighting is None:
        return Weights()
    # copies: a weighting that works in place must not change the rows
    weights = Weights(*checks.weights(weighting(queries.detach().clone(), keys.clone(), groups), Weights, True))
    checks.rows(queries, keys, groups, "image", extra, weights.query_weight, weights.decoupled)
    size = len(queries) // groups
    log_weight, weight = (
        None if given is None else checks.pairs(name, given, queries, groups, size)
        for name, given in (("pair_log_weight", weights.pair_log_weight), ("pair_weight", weights.pair_weight))
    )
    return weights._replace(pair_log_weight=log_weight, pair_weight=weight)


def _grouped(extra: Sequence[Tensor | None], groups: int) -> Tensor | None:
    """Return the extra keys of one layer as (directions * groups, count, dim), or None."""
    wide = [(e if e.dim() == 3 else e[None]).detach().expand(groups, -1, -1) for e in extra if e is not None]
    return torch.cat(wide) if wide else None
