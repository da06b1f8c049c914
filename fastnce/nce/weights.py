"""Weights of pairs and queries, as other papers change PatchNCE: MoNCE, hDCE, adaptive supervised PatchNCE."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from . import checks
from .api import patch_nce, project_patches
from .head import PatchNCEHead
from .impl.rows import similarity, widened

Weighting = Literal["none", "monce", "hdce"]

MULTIPLY_FROM = 0.25
"""From this eps on Sinkhorn's iterations multiply, in a third of the time: exp(-10 / eps) is a normal float32."""


def _codes(queries: Tensor, keys: Tensor, images: int) -> tuple[Tensor, Tensor]:
    """Both as (images, rows of an image, dim), float32 or float64."""
    checks.same_shape("queries", queries, "keys", keys, dims=2)
    images = checks.groups_of("images", images, queries.shape[0])
    return widened(queries).unflatten(0, (images, -1)), widened(keys).unflatten(0, (images, -1))


def _diagonal(pairs: Tensor) -> Tensor:
    return torch.eye(pairs.shape[1], dtype=torch.bool, device=pairs.device)


@torch.no_grad()
def monce_log_weight(
    queries: Tensor,
    keys: Tensor,
    images: int = 1,
    *,
    eps: float = 1.0,
    iterations: int = 50,
    strength: float = 1.0,
    hard: bool = True,
) -> Tensor:
    """MoNCE's `pair_log_weight`: negatives weighted by an optimal transport between queries and keys.

    Zhan et al., Modulated Contrast for Versatile Image Synthesis (CVPR 2022) and its code. With C_ij = q_i.k_j
    (1 - q_i.k_j for `hard=False`) and -10 on the diagonal, Sinkhorn's iterations scale rows and columns of exp(C / eps)
    to sum to 1; the weight is (rows - 1) * strength times that. The published code lets a gradient through to the
    queries; here weights are constants. A small eps iterates on logarithms, where nothing leaves float32's range.

    Args:
        queries, keys: (rows, dim), any floating dtype, of unit length (or shorter), image after image.
        images: groups that contrast within themselves, at least 1.
        eps: of the entropy, from 1e-4 to 1e4: small ones concentrate the weights, need more iterations until the rows
            too sum to 1, and raise the rounding of q_i.k_j by 1 / eps.
        iterations: of Sinkhorn, at least 1.
        strength: weight of all negatives together (published `neg_term_weight`), from 0 to 1e30.
        hard: more weight to negatives that are alike ("hard"); otherwise to those that differ ("easy").

    Returns:
        (images, rows / images, rows / images) float32, or float64 for float64; finite, at least log(1e-8).

    Raises:
        ValueError: a value outside of its range, or rows that do not fit together.
    """
    q, k = _codes(queries, keys, images)
    eps = checks.number("eps", eps, 1e-4, 1e4)
    strength = checks.number("strength", strength, 0.0, 1e30)
    cost = similarity(q, k)
    logits = (cost if hard else 1 - cost).masked_fill(_diagonal(cost), -10.0) / eps
    iterations = checks.count("iterations", iterations)
    if eps >= MULTIPLY_FROM:
        kernel = logits.exp()
        column = torch.ones_like(kernel[:, :1])
        for _ in range(iterations):
            row = 1 / (kernel * column).sum(2, keepdim=True)
            column = 1 / (kernel * row).sum(1, keepdim=True)
        weight = row * kernel * column
    else:
        column = torch.zeros_like(logits[:, :1])
        for _ in range(iterations):
            row = -torch.logsumexp(logits + column, 2, keepdim=True)
            column = -torch.logsumexp(logits + row, 1, keepdim=True)
        weight = (logits + row + column).exp()
    return (weight * ((cost.shape[1] - 1) * strength) + 1e-8).log()


@torch.no_grad()
def hdce_pair_weight(keys: Tensor, images: int = 1, *, gamma: float = 1.0) -> Tensor:
    """hDCE's `pair_weight`, to be used with `decoupled=True`: negatives whose keys resemble the positive count more.

    Jung et al., Exploring Patch-wise Semantic Relation for Contrastive Learning in Image-to-Image Translation Tasks
    (CVPR 2022), and its code: softmax over j != i of k_i.k_j / gamma, divided by its largest value in the
    row. It multiplies the logits.

    Args:
        keys: (rows, dim), any floating dtype, of unit length (or shorter).
        images: groups that contrast within themselves, at least 1.
        gamma: temperature, from 1e-4 to 1e4: small ones leave only the nearest negatives.

    Returns:
        (images, rows / images, rows / images) in [0, 1], float32, or float64 for float64.

    Raises:
        ValueError: a value outside of its range.
    """
    k, _ = _codes(keys, keys, images)
    gamma = checks.number("gamma", gamma, 1e-4, 1e4)
    relation = similarity(k, k)
    relation = relation.masked_fill(_diagonal(relation), -10.0) / gamma
    return (relation - relation.amax(2, keepdim=True)).exp()


@torch.no_grad()
def asp_query_weight(
    queries: Tensor,
    keys: Tensor,
    progress: float,
    *,
    schedule: Literal["lambda", "linear", "sigmoid", "none"] = "lambda",
    lookup: Literal["linear", "top", "bell", "uniform"] = "linear",
    decay_from: float = 0.5,
) -> Tensor:
    """Adaptive supervised PatchNCE's `query_weight`: pairs that disagree count less and less as training goes on.

    Li et al., Adaptive Supervised PatchNCE Loss for Learning H&E-to-IHC Stain Translation with Inconsistent Groundtruth
    Image Pairs (MICCAI 2023) and its code. The weight p + (1 - p) * w(q_i.k_i), divided by its mean; p falls
    from 1 to 0 with `progress`. For `lookup="top"` the similarity is cut off at 0 (and, for rounding, at 2). Where
    every pair has weight 0 (p is 0 and all disagree), each row gets 1: that is the limit for p towards 0.

    Args:
        queries, keys: (rows, dim), any floating dtype, of unit length (or shorter): the output, and the supervising
            picture.
        progress: part of the training that is over, in [0, 1].
        schedule: "lambda" stays at 1 until `decay_from` and then falls linearly, "linear" and "sigmoid" fall all the
            time, "none" stays at 1.
        lookup: w: relu(x) for "linear", sqrt(1 - (x - 1)^2) for "top", a normal density around 0.5 for "bell", 1.
        decay_from: in [0, 1]; with 1 "lambda" stays at 1 to the end.

    Returns:
        (rows,), mean 1, float32, or float64 for float64.

    Raises:
        ValueError: a value outside of its range, or rows that do not fit together.
    """
    checks.same_shape("queries", queries, "keys", keys, dims=2)
    progress = checks.number("progress", progress, 0.0, 1.0)
    decay_from = checks.number("decay_from", decay_from, 0.0, 1.0)
    checks.choice("schedule", schedule, ("lambda", "linear", "sigmoid", "none"))
    checks.choice("lookup", lookup, ("linear", "top", "bell", "uniform"))
    p = 1.0
    if schedule == "lambda" and progress > decay_from:
        p = (1.0 - progress) / (1.0 - decay_from)
    elif schedule == "linear":
        p = 1.0 - progress
    elif schedule == "sigmoid":
        p = 1.0 / (1.0 + math.exp(10 * (progress - 0.5)))
    likeness = (widened(queries) * widened(keys)).sum(1)
    if lookup == "linear":
        weight = likeness.relu()
    elif lookup == "top":
        weight = (1 - (likeness.clamp(0, 2) - 1).square()).sqrt()
    elif lookup == "bell":
        weight = (-8 * (likeness - 0.5).square()).exp() / (2 * torch.pi) ** 0.5
    else:
        weight = torch.ones_like(likeness)
    weight = p + (1 - p) * weight
    top = weight.amax()  # by the largest first: the mean of very small weights may round to 0
    weight = torch.where(top > 0, weight / top, torch.ones_like(weight))
    return weight / weight.mean()


def weighted_contrast(
    head: PatchNCEHead,
    query_maps: Sequence[Tensor],
    key_maps: Sequence[Tensor],
    *,
    weighting: Weighting = "none",
    symmetric: bool = False,
    patch_ids: Sequence[Tensor] | Sequence[Sequence[Tensor]] | None = None,
    directions: int = 1,
) -> Tensor:
    """`head(query_maps, key_maps, ...)` with MoNCE's or hDCE's weights, or in both directions; the same arguments.

    Returns:
        a scalar, or (directions,).

    Raises:
        ValueError: what the head refuses, and a head that shares keys with other ranks.
    """
    checks.choice("weighting", weighting, get_args(Weighting))
    if not isinstance(head, PatchNCEHead) or head.others is not None:
        wrong = "one with others" if isinstance(head, PatchNCEHead) else checks.shown(head)
        raise ValueError(f"head must be a PatchNCEHead that takes no keys of other ranks, not {wrong}")
    own, mlps = patch_ids is None, head.mlps(head.layers)
    images = head.images_of(query_maps, key_maps, projected=mlps is not None)
    directions = checks.directions(directions, images)
    ids = head.draw_ids(key_maps, directions) if patch_ids is None else head.given_ids(patch_ids, images, directions)
    options: Any = {"distinct_ids": own, "implementation": head.implementation}
    with torch.no_grad():
        key_rows = project_patches(key_maps, ids, mlps, **options)
    query_rows = project_patches(query_maps, ids, mlps, **options)
    groups = images if head.negatives == "image" else directions
    losses = []
    for queries, keys, temperature in zip(query_rows, key_rows, head.temperatures, strict=True):
        loss = patch_nce(
            queries,
            keys,
            images=groups,
            temperature=temperature,
            pair_log_weight=monce_log_weight(queries, keys, groups) if weighting == "monce" else None,
            pair_weight=hdce_pair_weight(keys, groups) if weighting == "hdce" else None,
            decoupled=weighting == "hdce",
            symmetric=symmetric,
            reduction="none",
            implementation=head.implementation,
        )
        losses.append(loss.unflatten(0, (directions, -1)).mean(1))
    means = torch.stack(losses).mean(0)
    return means if directions > 1 else means[0]
