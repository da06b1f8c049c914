"""What other papers change in PatchNCE, as arguments of `patch_nce` and `PatchNCEHead`.

Each function computes one paper's weights, locations or negatives from codes or maps:

    log_weight = monce_log_weight(queries, keys, images=4)
    loss = patch_nce(queries, keys, images=4, pair_log_weight=log_weight)

Two need no function: both directions at once is `symmetric=True`, and a temperature for each layer is a list given to
`PatchNCEHead`. `weighted_contrast` puts weights and sampled maps together, as `PatchNCEHead` does without weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from . import checks
from .api import patch_nce, project_patches
from .head import PatchNCEHead
from .reference import normalize_rows

Weighting = Literal["none", "monce", "hdce"]

MULTIPLY_FROM = 0.25
"""From this eps on Sinkhorn's iterations multiply, in a third of the time: exp(-10 / eps) is a normal float32."""


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _similarity(x: Tensor, y: Tensor) -> Tensor:
    """All products of rows, (groups, rows, rows), in the precision of x whatever autocast says."""
    with torch.autocast(x.device.type, enabled=False):
        return torch.bmm(x, y.transpose(1, 2))


def _codes(queries: Tensor, keys: Tensor, images: int) -> tuple[Tensor, Tensor]:
    """Both as (images, rows of an image, dim), float32 or float64."""
    checks.same_shape("queries", queries, "keys", keys, dims=2)
    images = checks.groups_of("images", images, queries.shape[0])
    return _wide(queries).unflatten(0, (images, -1)), _wide(keys).unflatten(0, (images, -1))


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
    cost = _similarity(q, k)
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
    relation = _similarity(k, k)
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
    similarity = (_wide(queries) * _wide(keys)).sum(1)
    if lookup == "linear":
        weight = similarity.relu()
    elif lookup == "top":
        weight = (1 - (similarity.clamp(0, 2) - 1).square()).sqrt()
    elif lookup == "bell":
        weight = (-8 * (similarity - 0.5).square()).exp() / (2 * torch.pi) ** 0.5
    else:
        weight = torch.ones_like(similarity)
    weight = p + (1 - p) * weight
    top = weight.amax()  # by the largest first: the mean of very small weights may round to 0
    weight = torch.where(top > 0, weight / top, torch.ones_like(weight))
    return weight / weight.mean()


@torch.no_grad()
def attention_patch_ids(feature_map: Tensor, patches: int) -> tuple[Tensor, Tensor]:
    """QS-Attn's choice of queries: the locations whose attention over the map has the least entropy.

    Hu et al., QS-Attn: Query-Selected Attention for Contrastive Learning in I2I Translation (CVPR 2022), and its code
    (global attention). Attention is softmax over locations of f_i.f_j. It holds (locations, locations) values a
    picture: for the deep layers.

    Args:
        feature_map: (images, channels, height, width), any floating dtype, of the *source* picture. f_i.f_j must lie
            in the range of float32 (of float64 for float64).
        patches: how many, at least 1; all where there are fewer.

    Returns:
        ids (images, patches), least entropy first, and their attention (images, patches, locations), with which QS-Attn
        also averages the features of both sides, `attention @ features`, before projecting them.

    Raises:
        ValueError: what is no such map or count.
    """
    checks.maps("feature_map", [feature_map])
    patches = checks.count("patches", patches)
    features = _wide(feature_map.flatten(2).transpose(1, 2))  # (images, locations, channels)
    logits = _similarity(features, features)
    attention = logits.softmax(2)
    entropy = -(attention * logits.log_softmax(2)).sum(2)
    ids = entropy.topk(min(patches, entropy.shape[1]), dim=1, largest=False, sorted=True).indices
    return ids, attention.gather(1, ids[:, :, None].expand(-1, -1, attention.shape[2]))


def dense_patch_ids(maps: Sequence[Tensor]) -> list[Tensor]:
    """Every location of every map, (locations,) a layer: dense PatchNCE. The cost grows with locations squared."""
    checks.maps("maps", maps)
    return [torch.arange(m.shape[2] * m.shape[3], device=m.device) for m in maps]


class _Ascend(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return -gradient


def ascend(x: Tensor) -> Tensor:
    """The same values with the gradient reversed: what made `x` learns to raise the loss that others lower."""
    checks.tensor("x", x)
    return _Ascend.apply(x)


class LearnedNegatives(nn.Module):
    """NEGCUT's generator of negatives for one layer, to be given as `extra_keys`.

    Wang et al., Instance-wise Hard Negative Example Generation for Contrastive Learning in Unpaired Image-to-Image
    Translation (ICCV 2021) and its code: each negative is a two-layer MLP of the picture's mean code and of noise, of
    unit length. It is trained to raise the contrastive loss (pass it through `ascend`, or give it a phase of its own)
    and to make its negatives differ (`diversity`). NEGCUT has no other negatives: `pair_log_weight=only_external(...)`.

    Args:
        dim: of the codes, at least 1.
        noise: values of noise a negative, at least 1.
    """

    def __init__(self, dim: int = 256, noise: int = 64):
        super().__init__()
        self.dim, self.noise = checks.count("dim", dim), checks.count("noise", noise)
        self.mlp = nn.Sequential(nn.Linear(dim + noise, dim), nn.ReLU(), nn.Linear(dim, dim))

    def forward(self, mean_code: Tensor, count: int = 256, noise: Tensor | None = None) -> Tensor:
        """(images, dim) to (images, count, dim). `noise` (images, count, noise) is drawn unless given.

        Both in any floating dtype; negatives are float32, or float64 where the weights are.
        """
        checks.tensor("mean_code", mean_code)
        if mean_code.dim() != 2 or mean_code.shape[1] != self.dim or mean_code.numel() == 0:
            raise ValueError(f"mean_code must be (images, {self.dim}), not {tuple(mean_code.shape)}")
        images = mean_code.shape[0]
        if noise is None:
            shape = (images, checks.count("count", count), self.noise)
            noise = torch.randn(shape, device=mean_code.device, dtype=mean_code.dtype)
        checks.tensor("noise", noise)
        if noise.dim() != 3 or noise.shape[0] != images or noise.shape[2] != self.noise or noise.numel() == 0:
            raise ValueError(f"noise must be ({images}, count, {self.noise}), not {tuple(noise.shape)}")
        codes = mean_code.detach()[:, None, :].expand(-1, noise.shape[1], -1)
        both = torch.cat([codes, noise], dim=2).to(next(self.mlp.parameters()).dtype)
        return normalize_rows(_wide(self.mlp(both)))


def diversity(negatives: Tensor) -> Tensor:
    """NEGCUT's diversity of (images, count, dim) negatives, to be raised: mean |first half - second half|.

    count is at least 2; of an odd count the last negative is left out.
    """
    checks.tensor("negatives", negatives)
    if negatives.dim() != 3 or negatives.shape[1] < 2 or negatives.numel() == 0:
        raise ValueError(f"negatives must be (images, 2 or more, dim), not {tuple(negatives.shape)}")
    half = negatives.shape[1] // 2
    return (negatives[:, :half] - negatives[:, half : 2 * half]).abs().mean()


def only_external(images: int, rows: int, device: torch.device | str | None = None) -> Tensor:
    """A `pair_log_weight` that leaves no negative but `extra_keys`: (images, rows, rows) of -1e34.

    That is below the logits of unit rows at every temperature.
    """
    images, rows = checks.count("images", images), checks.count("rows", rows)
    return torch.full((images, rows, rows), -1e34, device=device, dtype=torch.float32)


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
