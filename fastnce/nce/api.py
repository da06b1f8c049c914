"""The contrastive operation as it is called: check the arguments, choose an implementation, reduce.

from fastnce import patch_nce
loss = patch_nce(queries, keys, images=batch, temperature=0.07)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor

from ..common.dispatch import Implementation, operators
from ..common.precision import autocast_dtype, without_autocast
from . import checks
from .impl import eager
from .impl.dispatch import choose_maps, choose_rows, triton_maps, triton_rows
from .impl.rows import gather_patches, mlp, normalize_rows
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
    temperature: float = 0.07,
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
    temperature: float = 0.07,
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
    temperature: float = 0.07,
    extra_keys: Tensor | None = None,
    weights: Weights | None = None,
    symmetric: bool = False,
    detach_keys: bool = True,
    reduction: Reduction = "mean",
    return_stats: bool = False,
    unit_rows: bool = False,
    implementation: Implementation = None,
) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
    """PatchNCE: each query against the key of the same row (its positive) and the other keys of its group.

    `loss_i = logsumexp_j(q_i.k_j / T) - q_i.k_i / T` (CUT, eq. 3-4). Rows are taken as they are: `project_patches` and
    `PatchSampleF` give them unit length.

    Args:
        queries, keys: (rows, dim), rows = images * patches, image after image; any floating dtype, the same for both.
        images: number of pictures that the rows come from, at least 1; it divides the rows.
        negatives: "image" contrasts within a picture (CUT, FastCUT), "batch" within all rows (SinCUT, DCLGAN).
        temperature: T, a number from 1e-30 to 1e30. To learn it, pass `queries / T` and `temperature=1.0`: T may then
            be a tensor and gets its gradient through the queries.
        extra_keys: more negatives: (count, dim) for all groups or (groups, count, dim); groups is `images` for
            "image", 1 for "batch". They receive a gradient if they require one.
        weights: of pairs and queries, see `Weights`; `fastnce.nce.weights` computes those of other papers. These
            tensors and the extra keys may have any floating dtype; they are on the device of the queries.
        symmetric: mean of both directions: each key is also a query against the queries.
        detach_keys: keys are constants, as published.
        reduction: "mean" over rows, "sum" or "none".
        return_stats: also return a dict of "logsumexp" and "positive" (logits, (rows,), without gradient).
        unit_rows: a promise that no row of queries, keys and extra keys is longer than 1. The kernels then skip the
            check that their exponentials stay in range; longer rows may overflow.
        implementation: None chooses (see `which`), "triton" and "eager" insist. Under autocast, float32 rows are taken
            in its dtype, as by a matrix product; logits and losses stay float32. Float32 rows are multiplied exactly
            unless the library's products may use TF32 (`torch.set_float32_matmul_precision`): see `products`.

    Returns:
        a float32 (float64 for float64 input) scalar, or (rows,) for "none"; a tuple with the stats if asked for.

    Raises:
        ValueError: an argument that makes no sense, or an implementation that cannot run here.
    """
    pair_log_weight, pair_weight, query_weight, decoupled = checks.weights(weights, Weights)
    groups = checks.rows(queries, keys, images, negatives, extra_keys, query_weight, decoupled)
    temperature = checks.temperature(temperature)
    checks.choice("reduction", reduction, ("mean", "sum", "none"))
    if detach_keys:
        keys = keys.detach()
    size = queries.shape[0] // groups
    if pair_log_weight is not None:
        pair_log_weight = checks.pairs("pair_log_weight", pair_log_weight, queries, groups, size)
    if pair_weight is not None:
        pair_weight = checks.pairs("pair_weight", pair_weight, queries, groups, size)
    dtype = autocast_dtype(queries)
    if dtype is not queries.dtype:
        queries, keys = queries.to(dtype), keys.to(dtype)
    if extra_keys is not None:
        extra_keys = (extra_keys if extra_keys.dim() == 3 else extra_keys[None]).to(dtype)
    choice = choose_rows(implementation, queries.device, dtype, queries.shape[1], size)
    nce_losses: Any = triton_rows.nce_losses if choice.triton else eager.nce_losses
    options = groups, temperature, decoupled, unit_rows
    with without_autocast(queries.device):
        loss, positive = nce_losses(queries, keys, extra_keys, pair_log_weight, pair_weight, *options)
        stats = {"logsumexp": (loss + positive).detach(), "positive": positive.detach()} if return_stats else {}
        if symmetric:
            transposed = [None if w is None else w.transpose(1, 2) for w in (pair_log_weight, pair_weight)]
            # the other direction: even with constant keys the gradient reaches the queries
            other, _ = nce_losses(keys, queries, extra_keys, *transposed, *options)
            loss = 0.5 * (loss + other)
    if query_weight is not None:
        loss = loss * query_weight.to(loss.dtype)
    if reduction == "mean":
        loss = loss.mean()
    elif reduction == "sum":
        loss = loss.sum()
    if return_stats:
        return loss, stats
    return loss


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
        patches: how many to draw; if there are fewer locations, all of them in random order.
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
    maps: Sequence[Tensor],
    patch_ids: Sequence[Tensor],
    mlps: Sequence[tuple[Tensor, Tensor, Tensor, Tensor]] | None = None,
    *,
    distinct_ids: bool = False,
    check_ids: bool = False,
    implementation: Implementation = None,
) -> list[Tensor]:
    """Rows of every map at its ids, through its two-layer MLP if given, divided by their length plus 1e-7.

    Args:
        maps: one (images, channels, height, width) per layer, of any floating dtype, all on one device.
        patch_ids: per layer (patches,) for all images, or (sets, patches), of which the images share each equally, in
            order (sets = images: one set per image). int64, on the device of the maps.
        mlps: one (weight1 (dim, channels), bias1, weight2 (dim, dim), bias2) per layer, as in `nn.Linear`, all of one
            dtype.
        distinct_ids: no location appears twice in a set. The backward then needs one launch less.
        check_ids: check that all ids are inside their maps. This is always done on the CPU; elsewhere it waits for the
            device. Without the check, an id outside gives NaN or a device error.
        implementation: None chooses, "triton" and "eager" insist.

    Returns:
        one (images * patches, dim) per layer, image after image (CUT, `PatchSampleF`), in the dtype of the weights (of
        the map without MLPs); under autocast in its dtype. Lengths are computed in float32 for every dtype. Float32
        products are exact unless the library's may use TF32, see `products`.

    Raises:
        ValueError: lists that do not match, or tensors with another shape, dtype or device than above.
    """
    checks.maps("maps", maps)
    checks.ids(patch_ids, maps, check_ids)
    if mlps is not None:
        checks.mlps(mlps, maps)
    ids = [i[None] if i.dim() == 1 else i for i in patch_ids]
    choice, dtypes = choose_maps(implementation, maps, mlps, max(i.shape[1] for i in ids))
    if choice.triton:
        return triton_maps.project_rows(maps, ids, mlps, dtypes[0], distinct_ids)
    rows = []
    for layer, (feature_map, given, dtype) in enumerate(zip(maps, ids, dtypes, strict=True)):
        images = feature_map.shape[0]
        one_set = patch_ids[layer].dim() == 1
        sampled = gather_patches(
            feature_map, given[0] if one_set else given.repeat_interleave(images // given.shape[0], dim=0)
        )
        sampled = sampled.flatten(0, 1)
        # Rows are as short as 1e-6 at first: their gradients, scaled by 1 / length, would overflow float16.
        inner = torch.float32 if dtype == torch.float16 else dtype
        with without_autocast(feature_map.device):
            projected = sampled if mlps is None else mlp(sampled.to(inner), _cast(mlps[layer], inner))
        wide = projected if projected.dtype == torch.float64 else projected.float()
        rows.append(normalize_rows(wide).to(dtype))
    return rows


def products(dtype: torch.dtype, device: torch.device) -> str:
    """How rows of this dtype are multiplied there: "exact", "tf32" (as the library allows now), or the 16-bit dtype."""
    if dtype in (torch.bfloat16, torch.float16):
        return str(dtype).removeprefix("torch.")
    # the kernels follow the library's setting
    return "tf32" if operators is not None and operators.uses_tf32(device, dtype) else "exact"


def _cast(mlp: tuple[Tensor, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    weight1, bias1, weight2, bias2 = (tensor.to(dtype) for tensor in mlp)
    return weight1, bias1, weight2, bias2
