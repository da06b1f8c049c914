"""The public functions of the contrastive operation: check the arguments, choose an implementation, reduce.

from fastnce import patch_nce
loss = patch_nce(queries, keys, images=batch, temperature=0.07)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor

from ..common.dispatch import KERNELS, Implementation, operators
from ..common.first_use import settled, trusted
from ..common.precision import autocast_dtype, without_autocast
from ..common.taps import Tap, Untapped, untapped
from . import checks
from .impl import eager
from .impl.dispatch import choose_maps, choose_rows, planned_calls, triton_maps, triton_rows
from .impl.rows import gather_patches, mlp, normalize_rows
from .impl.transforms import check_vmap, transforms_active
from .impl.uses import RowsUse, maps_use
from .temperature import given_temperature, lowest_of
from .weights import Weights

Negatives = Literal["image", "batch"]
NEGATIVES = ("image", "batch")
Reduction = Literal["mean", "sum", "none"]


@overload
def patch_nce(
    queries: Tensor,
    keys: Tensor,
    *,
    images: int = 1,
    negatives: Negatives = "image",
    temperature: float | Tensor = 0.07,
    extra_keys: Tensor | None = None,
    weights: Weights | None = None,
    symmetric: bool = False,
    detach_keys: bool = True,
    reduction: Reduction = "mean",
    return_stats: Literal[False] = False,
    unit_rows: bool = False,
    implementation: Implementation = None,
) -> Tensor: ...


@overload
def patch_nce(
    queries: Tensor,
    keys: Tensor,
    *,
    images: int = 1,
    negatives: Negatives = "image",
    temperature: float | Tensor = 0.07,
    extra_keys: Tensor | None = None,
    weights: Weights | None = None,
    symmetric: bool = False,
    detach_keys: bool = True,
    reduction: Reduction = "mean",
    return_stats: Literal[True],
    unit_rows: bool = False,
    implementation: Implementation = None,
) -> tuple[Tensor, dict[str, Tensor]]: ...


def patch_nce(
    queries: Tensor,
    keys: Tensor,
    *,
    images: int = 1,
    negatives: Negatives = "image",
    temperature: float | Tensor = 0.07,
    extra_keys: Tensor | None = None,
    weights: Weights | None = None,
    symmetric: bool = False,
    detach_keys: bool = True,
    reduction: Reduction = "mean",
    return_stats: bool = False,
    unit_rows: bool = False,
    implementation: Implementation = None,
) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
    """Compute PatchNCE: contrast each query with the key of its row (the positive) and the other keys of its group.

    `loss_i = logsumexp_j(q_i.k_j / T) - q_i.k_i / T` (CUT, eq. 3-4). Rows are not normalised here: `project_patches`
    and `PatchSampleF` return rows of unit length.

    Args:
        queries, keys: (rows, dim), rows = images * patches, image after image; any floating dtype, the same for both.
        images: number of images that the rows come from, at least 1; it must divide the number of rows.
        negatives: "image" contrasts within each image (CUT, FastCUT), "batch" within all rows (SinCUT, DCLGAN).
        temperature: T, a number from 1e-30 to 1e30; or a tensor of one element on the device of the queries, of any
            floating dtype, which gets its gradient if it requires one. The host does not read it (only on a CPU, to
            check its range), so a captured step may learn it.
        extra_keys: more negatives: (count, dim) for all groups, or (groups, count, dim), where groups is `images` for
            "image" and 1 for "batch". They receive a gradient if they require one.
        weights: weights of pairs and queries, see `Weights`; `fastnce.nce.weights` computes those of other papers.
            These tensors and the extra keys may have any floating dtype; they must be on the device of the queries.
        symmetric: average both directions: each key is also a query that is contrasted with the queries.
        detach_keys: treat keys as constants, as published.
        reduction: "mean" over rows, "sum" or "none".
        return_stats: also return a dict with "logsumexp" and "positive" (logits, (rows,), without gradient).
        unit_rows: promise that no row of queries, keys and extra keys is longer than 1. The kernels then skip the check
            that their exponentials stay in range; longer rows may overflow.
        implementation: None chooses (see `which`); "triton" or "eager" forces one. Under autocast, float32 rows are
            converted to its dtype, as for a matrix product; logits and losses stay float32. Float32 rows are multiplied
            exactly unless PyTorch may use TF32 (`torch.set_float32_matmul_precision`), see `products`.

    Returns:
        a float32 (float64 for float64 input) scalar, or (rows,) for "none". With `return_stats`, a tuple (loss, stats).

    Raises:
        ValueError: an invalid argument, or an implementation that cannot run here.
    """
    checks.choice("reduction", reduction, ("mean", "sum", "none"))
    simple = weights is None and extra_keys is None and detach_keys and not (symmetric or return_stats)
    simple = simple and triton_rows is not None and type(images) is int and type(temperature) is float
    settings = images, negatives, temperature, unit_rows, implementation
    if simple and (found := triton_rows.repeated(queries, keys, *settings)) is not None:
        return _reduced(found, None, reduction)
    pair_log_weight, pair_weight, query_weight, decoupled = checks.weights(weights, Weights)
    groups = checks.rows(queries, keys, images, negatives, extra_keys, query_weight, decoupled)
    temperature = given_temperature(temperature, queries.device)
    if detach_keys:
        keys = keys.detach()
    size = queries.shape[0] // groups
    if pair_log_weight is not None:
        pair_log_weight = checks.pairs("pair_log_weight", pair_log_weight, queries, groups, size)
    if pair_weight is not None:
        pair_weight = checks.pairs("pair_weight", pair_weight, queries, groups, size)
    device, dtype = queries.device, queries.dtype
    autocast = device.type != "meta" and torch.is_autocast_enabled(device.type)
    if autocast and dtype is not (dtype := autocast_dtype(queries)):
        queries, keys = queries.to(dtype), keys.to(dtype)
    if extra_keys is not None:
        extra_keys = (extra_keys if extra_keys.dim() == 3 else extra_keys[None]).to(dtype)
    if transforms_active():
        check_vmap((queries, keys, extra_keys), (keys, extra_keys, queries if symmetric else None))
    choice = choose_rows(implementation, device, dtype, queries.shape[1], size)
    if choice is KERNELS:
        extras, grad = 0 if extra_keys is None else extra_keys.shape[1], torch.is_grad_enabled()
        of_keys, of_extra = keys.requires_grad or symmetric, extra_keys is not None and extra_keys.requires_grad
        learned = isinstance(temperature, Tensor)
        of_queries = queries.requires_grad or (learned and temperature.requires_grad)  # type: ignore[union-attr]
        wanted = grad and of_queries, grad and of_keys, grad and of_extra
        weighted = pair_log_weight is not None, pair_weight is not None
        kind = *weighted, decoupled, unit_rows, lowest_of([temperature]), wanted, learned
        use = RowsUse(queries.shape[1], size, groups, extras, *kind)
        choice = trusted(use, device, dtype)
    nce_losses: Any = triton_rows.nce_losses if choice.triton else eager.nce_losses
    options = groups, temperature, decoupled, unit_rows
    if choice.triton and simple and not autocast and settled(choice):
        chosen = {"groups": groups, "temperature": temperature, "decoupled": False, "unit": unit_rows}
        triton_rows.remember(queries, keys, chosen, *settings)
    with without_autocast(device):
        tensors = queries, keys, extra_keys, pair_log_weight, pair_weight
        more = {"statistics": return_stats} if choice.triton else {}
        loss, positive = nce_losses(*tensors, *options, **more)
        stats = {"logsumexp": (loss + positive).detach(), "positive": positive.detach()} if return_stats else {}
        if symmetric:
            transposed = [None if w is None else w.transpose(1, 2) for w in (pair_log_weight, pair_weight)]
            # The gradient also reaches the queries in this direction, even if the keys are constants.
            other, _ = nce_losses(keys, queries, extra_keys, *transposed, *options, **more)
            loss = 0.5 * (loss + other)
    loss = _reduced(loss, query_weight, reduction)
    return (loss, stats) if return_stats else loss


def _reduced(loss: Tensor, query_weight: Tensor | None, reduction: Reduction) -> Tensor:
    if query_weight is not None:
        loss = loss * query_weight.detach().to(loss.dtype)
    if reduction == "mean":
        return loss.mean()
    return loss.sum() if reduction == "sum" else loss


def sample_patch_ids(
    locations: int,
    patches: int,
    *,
    images: int | None = None,
    device: torch.device | str | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw distinct locations of a map on the device, uniformly without replacement.

    Args:
        locations: height * width of the map.
        patches: number of locations to draw; if there are fewer, all of them in random order.
        images: None draws one set for all images (published); a number draws one set per image.

    Returns:
        int64 (patches,) or (images, patches).

    Raises:
        ValueError: a count that is not a whole number of at least 1.
    """
    locations, patches = checks.count("locations", locations), checks.count("patches", patches)
    shape = (locations,) if images is None else (checks.count("images", images), locations)
    scores = torch.rand(shape, device=device, generator=generator)
    return scores.topk(min(patches, locations), dim=-1, sorted=False).indices


def project_patches(
    maps: Sequence[Tensor | Tap],
    patch_ids: Sequence[Tensor],
    mlps: Sequence[tuple[Tensor, Tensor, Tensor, Tensor]] | None = None,
    *,
    distinct_ids: bool = False,
    check_ids: bool = False,
    implementation: Implementation = None,
) -> list[Tensor]:
    """Gather the rows of each map at its ids, apply its two-layer MLP if given, divide by the length plus 1e-7.

    Args:
        maps: one (images, channels, height, width) per layer, of any floating dtype, all on one device; tensors, or
            taps of a generator's maps.
        patch_ids: per layer (patches,) for all images, or (sets, patches), where each set serves equally many
            consecutive images (sets = images: one set per image). int64, on the device of the maps.
        mlps: one (weight1 (dim, channels), bias1, weight2 (dim, dim), bias2) per layer, as in `nn.Linear`, all of one
            dtype.
        distinct_ids: promise that no location appears twice in a set. The backward pass then needs one launch less.
        check_ids: check that all ids are inside their maps. On the CPU this is always checked; on other devices the
            check waits for the device. Without it, an id outside gives NaN or a device error.
        implementation: None chooses; "triton" or "eager" forces one.

    Returns:
        one (images * patches, dim) per layer, image after image (CUT, `PatchSampleF`), in the dtype of the weights (of
        the map without MLPs), or in autocast's dtype. Lengths are computed in float32 (in float64 for float64). Float32
        products are exact unless PyTorch may use TF32, see `products`.

    Raises:
        ValueError: lists that do not match, or a tensor of a shape, dtype or device other than above.
    """
    sources = untapped(maps, distinct_ids, patch_ids)
    maps = sources.maps
    call = None if check_ids else _call(sources, patch_ids, mlps, (distinct_ids, implementation))
    if call is not None and (found := call.repeat()) is not None:
        return found[0]
    checks.maps("maps", maps)
    checks.ids(patch_ids, maps, check_ids)
    if mlps is not None:
        checks.mlps(mlps, maps)
    ids = [i[None] if i.dim() == 1 else i for i in patch_ids]
    patches = max(i.shape[1] for i in ids)
    choice, dtypes = choose_maps(implementation, maps, mlps, patches)
    if choice is KERNELS:
        choice = trusted(
            maps_use("project_patches", maps, mlps, patches, distinct=distinct_ids, taps=sources.kinds()),
            maps[0].device,
            dtypes[0],
        )
    if choice.triton:
        if call is not None and (found := call.plan(dtype=dtypes[0], distinct=distinct_ids, keep=settled(choice))):
            return found[0]
        return triton_maps.project_rows(sources.dense(), ids, mlps, dtypes[0], distinct_ids)
    maps = sources.dense()
    rows = []
    for layer, (feature_map, given, dtype) in enumerate(zip(maps, ids, dtypes, strict=True)):
        images = feature_map.shape[0]
        one_set = patch_ids[layer].dim() == 1
        sampled = gather_patches(
            feature_map, given[0] if one_set else given.repeat_interleave(images // given.shape[0], dim=0)
        )
        sampled = sampled.flatten(0, 1)
        # At initialisation rows are as short as 1e-6: their gradients, scaled by 1 / length, would overflow float16.
        inner = torch.float32 if dtype == torch.float16 else dtype
        with without_autocast(feature_map.device):
            projected = sampled if mlps is None else mlp(sampled.to(inner), _cast(mlps[layer], inner))
        wide = projected if projected.dtype == torch.float64 else projected.float()
        rows.append(normalize_rows(wide).to(dtype))
    return rows


def _call(sources: Untapped, patch_ids: Any, mlps: Any, settings: tuple[Any, ...]) -> Any:
    """A call of `project_patches` as `planned_calls` takes it; None if it is traced, malformed or on a CPU."""
    if planned_calls is None or torch.compiler.is_compiling() or not planned_calls.usable(sources.maps):
        return None
    ids = planned_calls.given_ids(patch_ids)
    if not ids:
        return None
    try:
        weights = [] if mlps is None else [w for mlp in mlps for w in mlp]
    except TypeError:
        return None
    return planned_calls.RowsCall(sources, weights, ids, settings)


def products(dtype: torch.dtype, device: torch.device) -> str:
    """Return how a device multiplies such rows: "exact", "tf32" (if PyTorch allows it now) or the name of the dtype."""
    if dtype in (torch.bfloat16, torch.float16):
        return str(dtype).removeprefix("torch.")
    # the kernels follow PyTorch's setting
    return "tf32" if operators is not None and operators.uses_tf32(device, dtype) else "exact"


def _cast(mlp: tuple[Tensor, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    weight1, bias1, weight2, bias2 = (tensor.to(dtype) for tensor in mlp)
    return weight1, bias1, weight2, bias2
