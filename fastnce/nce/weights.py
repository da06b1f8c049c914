"""Weights of pairs and queries in PatchNCE, from other papers: MoNCE, hDCE, adaptive supervised PatchNCE.

A *weighting* is a function (queries, keys, groups) -> `Weights`; `PatchNCEHead(weighting=monce)` uses one. To add one,
write the function here and add its line to `WEIGHTINGS`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from . import checks
from .impl.rows import similarity, widened


class Weights(NamedTuple):
    """How much each pair and each query counts in `patch_nce`. All tensors are constants.

    pair_log_weight: (groups, rows of a group, rows of a group), added to the logits of negatives. -inf removes a
        negative. The diagonal is ignored.
    pair_weight: of the same shape, multiplies the logits of negatives. The diagonal is ignored.
    query_weight: (rows,), multiplies the loss of each row.
    decoupled: leave the positive out of the denominator (decoupled contrastive learning, Yeh et al., ECCV 2022).
    """

    pair_log_weight: Tensor | None = None
    pair_weight: Tensor | None = None
    query_weight: Tensor | None = None
    decoupled: bool = False


Weighting = Callable[[Tensor, Tensor, int], Weights]
"""(queries, keys, groups) -> Weights. Queries and keys are (rows, dim) of unit length, without gradient, group after
group; rows are contrasted within their group."""

MULTIPLY_FROM = 0.25
"""From this eps on, Sinkhorn's iterations multiply, which takes a third of the time of logarithms: exp(-10 / eps) is a
normal float32."""


def _codes(queries: Tensor, keys: Tensor, images: int) -> tuple[Tensor, Tensor]:
    """Check queries and keys; return both as (images, rows of an image, dim), float32 or float64."""
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
    """Return MoNCE's `pair_log_weight`: an optimal transport between queries and keys weights the negatives.

    Zhan et al., Modulated Contrast for Versatile Image Synthesis (CVPR 2022) and its code. With C_ij = q_i.k_j
    (1 - q_i.k_j for `hard=False`) and -10 on the diagonal, Sinkhorn's iterations scale rows and columns of exp(C / eps)
    to sum to 1; the weight is the result times (rows - 1) * strength. The published code passes a gradient to the
    queries; here weights are constants. For a small eps the iterations use logarithms, which stay in float32's range.

    Args:
        queries, keys: (rows, dim), any floating dtype, of unit length (or shorter), image after image.
        images: number of groups, at least 1; rows are contrasted within their group.
        eps: weight of the entropy, from 1e-4 to 1e4. Small values concentrate the weights, need more iterations until
            the rows also sum to 1, and amplify the rounding errors of q_i.k_j by 1 / eps.
        iterations: number of Sinkhorn's iterations, at least 1.
        strength: weight of all negatives together (published `neg_term_weight`), from 0 to 1e30.
        hard: give more weight to similar negatives ("hard"); otherwise to dissimilar ones ("easy").

    Returns:
        (images, rows / images, rows / images) float32, or float64 for float64; finite, at least log(1e-8).

    Raises:
        ValueError: a value outside its range, or rows that do not match.
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
def hdce_pair_weight(keys: Tensor, images: int = 1, *, gamma: float | Tensor = 1.0) -> Tensor:
    """Return hDCE's `pair_weight`, for use with `decoupled=True`: negatives similar to the positive count more.

    Jung et al., Exploring Patch-wise Semantic Relation for Contrastive Learning in Image-to-Image Translation Tasks
    (CVPR 2022), and its code: softmax over j != i of k_i.k_j / gamma, divided by its largest value in the
    row. It multiplies the logits.

    Args:
        keys: (rows, dim), any floating dtype, of unit length (or shorter).
        images: number of groups, at least 1; rows are contrasted within their group.
        gamma: temperature, from 1e-4 to 1e4; small values leave only the nearest negatives. A scalar tensor, such as
            one that changes between recorded steps, is not checked.

    Returns:
        (images, rows / images, rows / images) in [0, 1], float32, or float64 for float64.

    Raises:
        ValueError: a value outside its range.
    """
    k, _ = _codes(keys, keys, images)
    gamma = gamma if isinstance(gamma, Tensor) else checks.number("gamma", gamma, 1e-4, 1e4)
    relation = similarity(k, k)
    relation.diagonal(dim1=1, dim2=2).fill_(-10.0)
    relation = relation / gamma
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
    """Return adaptive supervised PatchNCE's `query_weight`: pairs that disagree count less as training proceeds.

    Li et al., Adaptive Supervised PatchNCE Loss for Learning H&E-to-IHC Stain Translation with Inconsistent Groundtruth
    Image Pairs (MICCAI 2023) and its code. The weight is p + (1 - p) * w(q_i.k_i), divided by its mean; p falls
    from 1 to 0 with `progress`. For `lookup="top"` the similarity is clamped at 0 (and at 2, because of rounding). If
    every pair has weight 0 (p is 0 and all pairs disagree), each row gets 1, which is the limit for p towards 0.

    Args:
        queries, keys: (rows, dim), any floating dtype, of unit length (or shorter): of the output and of the
            supervising image.
        progress: completed fraction of the training, in [0, 1].
        schedule: "lambda" keeps p at 1 until `decay_from`, then p falls linearly; "linear" and "sigmoid" fall from the
            start; "none" keeps p at 1.
        lookup: the function w: relu(x) for "linear", sqrt(1 - (x - 1)^2) for "top", a normal density around 0.5 for
            "bell", 1 for "uniform".
        decay_from: in [0, 1]; with 1, "lambda" keeps p at 1 to the end.

    Returns:
        (rows,), mean 1, float32, or float64 for float64.

    Raises:
        ValueError: a value outside its range, or rows that do not match.
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
    cosine = (widened(queries) * widened(keys)).sum(1)
    if lookup == "linear":
        weight = cosine.relu()
    elif lookup == "top":
        weight = (1 - (cosine.clamp(0, 2) - 1).square()).sqrt()
    elif lookup == "bell":
        weight = (-8 * (cosine - 0.5).square()).exp() / (2 * torch.pi) ** 0.5
    else:
        weight = torch.ones_like(cosine)
    weight = p + (1 - p) * weight
    top = weight.amax()  # first, because the mean of very small weights may round to 0
    weight = torch.where(top > 0, weight / top, torch.ones_like(weight))
    return weight / weight.mean()


def monce(
    queries: Tensor,
    keys: Tensor,
    groups: int,
    *,
    eps: float = 1.0,
    iterations: int = 50,
    strength: float = 1.0,
    hard: bool = True,
) -> Weights:
    """MoNCE as a weighting: `monce_log_weight` with the same arguments."""
    weight = monce_log_weight(queries, keys, groups, eps=eps, iterations=iterations, strength=strength, hard=hard)
    return Weights(pair_log_weight=weight)


def hdce(queries: Tensor, keys: Tensor, groups: int, *, gamma: float = 1.0) -> Weights:
    """hDCE as a weighting: `hdce_pair_weight` of the keys, without the positive in the denominator."""
    return Weights(pair_weight=hdce_pair_weight(keys, groups, gamma=gamma), decoupled=True)


WEIGHTINGS: dict[str, Callable[..., Weights]] = {"monce": monce, "hdce": hdce}
"""Weightings by their name in `loss.weighting`. `loss.weighting_options` sets keyword arguments with a default."""
