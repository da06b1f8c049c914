"""The contrastive operation as it is called: check the arguments, choose an implementation, reduce.

from fastnce import patch_nce
loss = patch_nce(queries, keys, images=batch, temperature=0.07)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from . import eager, reference

Negatives = Literal["image", "batch"]
Reduction = Literal["mean", "sum", "none"]
Implementation = Literal["triton", "eager"] | None


def patch_nce(
    queries: Tensor,
    keys: Tensor,
    *,
    images: int = 1,
    negatives: Negatives = "image",
    temperature: float = 0.07,
    extra_keys: Tensor | None = None,
    pair_log_weight: Tensor | None = None,
    pair_weight: Tensor | None = None,
    query_weight: Tensor | None = None,
    decoupled: bool = False,
    symmetric: bool = False,
    detach_keys: bool = True,
    reduction: Reduction = "mean",
    return_stats: bool = False,
    implementation: Implementation = None,
):
    """PatchNCE: each query against the key of the same row (its positive) and the other keys of its group.

    `loss_i = logsumexp_j(q_i.k_j / T) - q_i.k_i / T` (CUT, eq. 3-4). Rows are taken as they are: `project_patches` and
    `PatchSampleF` give them unit length.

    Args:
        queries, keys: (rows, dim), rows = images * patches, image after image; any floating dtype, the same for both.
        images: number of pictures that the rows come from.
        negatives: "image" contrasts within a picture (CUT, FastCUT), "batch" within all rows (SinCUT, DCLGAN).
        temperature: T > 0.
        extra_keys: more negatives: (count, dim) for all groups or (groups, count, dim); groups is `images` for
            "image", 1 for "batch". They receive a gradient when they require one.
        pair_log_weight: (groups, rows of a group, rows of a group), added to the logits of negatives: MoNCE's weights
            as logarithms (Zhan et al., CVPR 2022). The diagonal is ignored. Constant.
        pair_weight: the same shape, multiplies the logits of negatives: hDCE's relation weights (Jung et al.,
            CVPR 2022). The diagonal is ignored. Constant.
        query_weight: (rows,), multiplies each row's loss (adaptive supervised PatchNCE, Li et al., MICCAI 2023).
        decoupled: leave the positive out of the denominator (decoupled contrastive learning, Yeh et al., ECCV 2022).
        symmetric: mean of both directions, each key being a query of the queries too.
        detach_keys: keys are constants, as published.
        reduction: "mean" over rows, "sum" or "none".
        return_stats: also return a dict of "logsumexp" and "positive" (logits, (rows,), without gradient).
        implementation: None chooses, "triton" and "eager" insist.

    Returns:
        a float32 (float64 for float64 input) scalar, or (rows,) for "none"; with the stats if asked.

    Raises:
        ValueError: an argument that makes no sense, or an implementation that cannot run here.
    """
    groups = _check_rows(queries, keys, images, negatives, temperature, extra_keys, query_weight, decoupled)
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f'reduction must be "mean", "sum" or "none", not {reduction!r}')
    if detach_keys:
        keys = keys.detach()
    grouped_queries = queries.unflatten(0, (groups, -1))
    grouped_keys = keys.unflatten(0, (groups, -1))
    size = grouped_queries.shape[1]
    pair_log_weight = _check_pairs("pair_log_weight", pair_log_weight, groups, size)
    pair_weight = _check_pairs("pair_weight", pair_weight, groups, size)
    if extra_keys is not None and extra_keys.dim() == 2:
        extra_keys = extra_keys.expand(groups, -1, -1)

    rows = _implementation(implementation, queries)
    options = {"temperature": float(temperature), "decoupled": decoupled}
    weights = {"pair_log_weight_GSS": pair_log_weight, "pair_weight_GSS": pair_weight}
    loss, logsumexp, positive = rows(grouped_queries, grouped_keys, extra_keys, **weights, **options)
    if symmetric:
        transposed = {name: None if w is None else w.transpose(1, 2) for name, w in weights.items()}
        # the other direction: keys ask, queries answer; with constant keys the gradient still reaches the queries
        other, _, _ = rows(grouped_keys, grouped_queries, extra_keys, **transposed, **options)
        loss = 0.5 * (loss + other)
    loss = loss.flatten()
    if query_weight is not None:
        loss = loss * query_weight.to(loss.dtype)
    if reduction == "mean":
        loss = loss.mean()
    elif reduction == "sum":
        loss = loss.sum()
    if return_stats:
        return loss, {"logsumexp": logsumexp.detach().flatten(), "positive": positive.detach().flatten()}
    return loss


def sample_patch_ids(
    locations: int,
    patches: int,
    *,
    images: int | None = None,
    device: torch.device | str | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Distinct locations of a map, uniformly without replacement, drawn on the device (no transfer from the host).

    Args:
        locations: height * width of the map.
        patches: how many to draw; all of them, in random order, when there are fewer.
        images: None draws one set for all pictures (published); a number draws a set for each.

    Returns:
        int64 (patches,) or (images, patches).
    """
    if locations < 1 or patches < 1:
        raise ValueError(f"locations and patches must be at least 1, not {locations} and {patches}")
    shape = (locations,) if images is None else (images, locations)
    scores = torch.rand(shape, device=device, generator=generator)
    return scores.topk(min(patches, locations), dim=-1, sorted=False).indices


def project_patches(
    maps: Sequence[Tensor],
    patch_ids: Sequence[Tensor],
    mlps: Sequence[tuple[Tensor, Tensor, Tensor, Tensor]] | None = None,
    *,
    implementation: Implementation = None,
) -> list[Tensor]:
    """Rows of every map at its ids, through its two-layer MLP if given, divided by their length plus 1e-7.

    Args:
        maps: one (images, channels, height, width) a layer.
        patch_ids: one (patches,) for all images, or (images, patches), a layer.
        mlps: one (weight1 (dim, channels), bias1, weight2 (dim, dim), bias2) a layer, as in `nn.Linear`.

    Returns:
        one (images * patches, dim) a layer, image after image (CUT, `PatchSampleF`).
    """
    if len(maps) != len(patch_ids) or (mlps is not None and len(mlps) != len(maps)):
        raise ValueError(
            f"one set of patch ids (and one MLP) a map is needed: {len(maps)} maps, {len(patch_ids)} sets of ids"
            + ("" if mlps is None else f", {len(mlps)} MLPs")
        )
    for layer, (feature_map, ids) in enumerate(zip(maps, patch_ids, strict=True)):
        if feature_map.dim() != 4:
            raise ValueError(f"map {layer} must be (images, channels, height, width), not {tuple(feature_map.shape)}")
        if ids.dim() not in (1, 2) or (ids.dim() == 2 and ids.shape[0] != feature_map.shape[0]):
            wanted = f"(patches,) or ({feature_map.shape[0]}, patches)"
            raise ValueError(f"patch_ids {layer} must be {wanted}, not {tuple(ids.shape)}")
    _implementation(implementation, maps[0])
    rows = []
    for layer, (feature_map, ids) in enumerate(zip(maps, patch_ids, strict=True)):
        sampled = reference.gather_patches(feature_map, ids).flatten(0, 1)
        rows.append(reference.project(sampled, None if mlps is None else mlps[layer]))
    return rows


def _implementation(name: Implementation, tensor: Tensor):
    """The function that computes rows on this tensor's device."""
    if name not in (None, "triton", "eager"):
        raise ValueError(f'implementation must be None, "triton" or "eager", not {name!r}')
    if name == "triton":
        raise ValueError("implementation='triton' cannot run here: this version has the eager implementation only")
    return eager.nce_rows


def _check_rows(queries, keys, images, negatives, temperature, extra_keys, query_weight, decoupled) -> int:
    """Refuse what makes no sense; return the number of groups."""
    if queries.dim() != 2 or keys.dim() != 2:
        raise ValueError(f"queries and keys must be (rows, dim), not {tuple(queries.shape)} and {tuple(keys.shape)}")
    if queries.shape != keys.shape:
        raise ValueError(
            f"queries and keys must have the same shape, not {tuple(queries.shape)} and {tuple(keys.shape)}"
        )
    if not queries.is_floating_point() or queries.dtype != keys.dtype:
        raise ValueError(f"queries and keys must share a floating dtype, not {queries.dtype} and {keys.dtype}")
    others = {"keys": keys, "extra_keys": extra_keys, "query_weight": query_weight}
    for name, tensor in others.items():
        if tensor is not None and tensor.device != queries.device:
            raise ValueError(f"{name} is on {tensor.device}, queries are on {queries.device}: move one of them")
    if negatives not in ("image", "batch"):
        raise ValueError(f'negatives must be "image" or "batch", not {negatives!r}')
    if not temperature > 0:
        raise ValueError(f"temperature must be greater than 0, not {temperature}")
    rows, dim = queries.shape
    if rows == 0 or dim == 0:
        raise ValueError(f"queries are empty: {tuple(queries.shape)}")
    if images < 1 or rows % images:
        raise ValueError(f"{rows} rows cannot be shared equally among images={images}")
    groups = images if negatives == "image" else 1
    if extra_keys is not None:
        shape = tuple(extra_keys.shape)
        if extra_keys.dim() not in (2, 3) or shape[-1] != dim or (len(shape) == 3 and shape[0] != groups) or 0 in shape:
            raise ValueError(f"extra_keys must be (count, {dim}) or ({groups}, count, {dim}), not {shape}")
    if query_weight is not None and query_weight.shape != (rows,):
        raise ValueError(f"query_weight must be ({rows},), not {tuple(query_weight.shape)}")
    if decoupled and rows == groups and extra_keys is None:
        raise ValueError("decoupled needs at least one negative a row: there is one patch a group and no extra keys")
    return groups


def _check_pairs(name: str, weight: Tensor | None, groups: int, size: int) -> Tensor | None:
    if weight is None:
        return None
    if weight.dim() == 2 and groups == 1:
        weight = weight[None]
    if weight.shape != (groups, size, size):
        raise ValueError(f"{name} must be ({groups}, {size}, {size}), not {tuple(weight.shape)}")
    return weight.detach()
