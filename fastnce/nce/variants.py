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
from typing import Literal

import torch
from torch import Tensor, nn

from .api import patch_nce, project_patches
from .modules import PatchNCEHead
from .reference import normalize_rows

Weighting = Literal["none", "monce", "hdce"]


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _similarity(x: Tensor, y: Tensor) -> Tensor:
    """All products of rows, (groups, rows, rows), in the precision of x whatever autocast says."""
    with torch.autocast(x.device.type, enabled=False):
        return torch.bmm(x, y.transpose(1, 2))


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
    queries; here weights are constants.

    Args:
        queries, keys: (rows, dim), unit length, image after image.
        images: groups that contrast within themselves.
        eps: of the entropy: small ones concentrate the weights.
        iterations: of Sinkhorn.
        strength: weight of all negatives together (published `neg_term_weight`).
        hard: more weight to negatives that are alike ("hard"); otherwise to those that differ ("easy").

    Returns:
        (images, rows / images, rows / images) float32, or float64 for float64.
    """
    q, k = (_wide(rows).unflatten(0, (images, -1)) for rows in (queries, keys))
    cost = _similarity(q, k)
    size = cost.shape[1]
    diagonal = torch.eye(size, dtype=torch.bool, device=cost.device)
    kernel = ((cost if hard else 1 - cost).masked_fill(diagonal, -10.0) / eps).exp()
    column = torch.ones_like(kernel[:, :1])
    for _ in range(iterations):
        row = 1 / (kernel * column).sum(2, keepdim=True)
        column = 1 / (kernel * row).sum(1, keepdim=True)
    return (row * kernel * column * ((size - 1) * strength) + 1e-8).log()


@torch.no_grad()
def hdce_pair_weight(keys: Tensor, images: int = 1, *, gamma: float = 1.0) -> Tensor:
    """hDCE's `pair_weight`, to be used with `decoupled=True`: negatives whose keys resemble the positive count more.

    Jung et al., Exploring Patch-wise Semantic Relation for Contrastive Learning in Image-to-Image Translation Tasks
    (CVPR 2022), and its code: softmax over j != i of k_i.k_j / gamma, divided by its largest value in the
    row. It multiplies the logits.

    Args:
        keys: (rows, dim), unit length.
        gamma: temperature: small ones leave only the nearest negatives.

    Returns:
        (images, rows / images, rows / images) in (0, 1].
    """
    k = _wide(keys).unflatten(0, (images, -1))
    relation = _similarity(k, k)
    diagonal = torch.eye(relation.shape[1], dtype=torch.bool, device=keys.device)
    relation = relation.masked_fill(diagonal, -10.0) / gamma
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
    from 1 to 0 with `progress`. For `lookup="top"` the similarity is cut off at 0 (and, for rounding, at 2).

    Args:
        queries, keys: (rows, dim), unit length: the output, and the supervising picture.
        progress: part of the training that is over, in [0, 1].
        schedule: "lambda" stays at 1 until `decay_from` and then falls linearly, "linear" and "sigmoid" fall all the
            time, "none" stays at 1.
        lookup: w: relu(x) for "linear", sqrt(1 - (x - 1)^2) for "top", a normal density around 0.5 for "bell", 1.

    Returns:
        (rows,), mean 1.
    """
    if schedule == "lambda":
        p = min(1.0, (1.0 - progress) / (1.0 - decay_from))
    elif schedule == "linear":
        p = 1.0 - progress
    elif schedule == "sigmoid":
        p = 1.0 / (1.0 + math.exp(10 * (progress - 0.5)))
    elif schedule == "none":
        p = 1.0
    else:
        raise ValueError(f'schedule must be "lambda", "linear", "sigmoid" or "none", not {schedule!r}')
    similarity = (_wide(queries) * _wide(keys)).sum(1)
    if lookup == "linear":
        weight = similarity.relu()
    elif lookup == "top":
        weight = (1 - (similarity.clamp(0, 2) - 1).square()).sqrt()
    elif lookup == "bell":
        weight = (-8 * (similarity - 0.5).square()).exp() / (2 * torch.pi) ** 0.5
    elif lookup == "uniform":
        weight = torch.ones_like(similarity)
    else:
        raise ValueError(f'lookup must be "linear", "top", "bell" or "uniform", not {lookup!r}')
    weight = p + (1 - p) * weight
    return weight / weight.mean()


@torch.no_grad()
def attention_patch_ids(feature_map: Tensor, patches: int) -> tuple[Tensor, Tensor]:
    """QS-Attn's choice of queries: the locations whose attention over the map has the least entropy.

    Hu et al., QS-Attn: Query-Selected Attention for Contrastive Learning in I2I Translation (CVPR 2022), and its code
    (global attention). Attention is softmax over locations of f_i.f_j. It holds (locations, locations) values a
    picture: for the deep layers.

    Args:
        feature_map: (images, channels, height, width), of the *source* picture.
        patches: how many; all where there are fewer.

    Returns:
        ids (images, patches), least entropy first, and their attention (images, patches, locations), with which QS-Attn
        also averages the features of both sides, `attention @ features`, before projecting them.
    """
    features = _wide(feature_map.flatten(2).transpose(1, 2))  # (images, locations, channels)
    logits = _similarity(features, features)
    attention = logits.softmax(2)
    entropy = -(attention * logits.log_softmax(2)).sum(2)
    ids = entropy.topk(min(patches, entropy.shape[1]), dim=1, largest=False, sorted=True).indices
    return ids, attention.gather(1, ids[:, :, None].expand(-1, -1, attention.shape[2]))


def dense_patch_ids(maps: Sequence[Tensor]) -> list[Tensor]:
    """Every location of every map, (locations,) a layer: dense PatchNCE. The cost grows with locations squared."""
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
    return _Ascend.apply(x)


class LearnedNegatives(nn.Module):
    """NEGCUT's generator of negatives for one layer, to be given as `extra_keys`.

    Wang et al., Instance-wise Hard Negative Example Generation for Contrastive Learning in Unpaired Image-to-Image
    Translation (ICCV 2021) and its code: each negative is a two-layer MLP of the picture's mean code and of noise, of
    unit length. It is trained to raise the contrastive loss (pass it through `ascend`, or give it a phase of its own)
    and to make its negatives differ (`diversity`). NEGCUT has no other negatives: `pair_log_weight=only_external(...)`.

    Args:
        dim: of the codes.
        noise: values of noise a negative.
    """

    def __init__(self, dim: int = 256, noise: int = 64):
        super().__init__()
        self.noise = noise
        self.mlp = nn.Sequential(nn.Linear(dim + noise, dim), nn.ReLU(), nn.Linear(dim, dim))

    def forward(self, mean_code: Tensor, count: int = 256, noise: Tensor | None = None) -> Tensor:
        """(images, dim) to (images, count, dim). `noise` (images, count, noise) is drawn unless given."""
        if noise is None:
            noise = torch.randn(len(mean_code), count, self.noise, device=mean_code.device, dtype=mean_code.dtype)
        codes = mean_code.detach()[:, None, :].expand(-1, noise.shape[1], -1)
        return normalize_rows(_wide(self.mlp(torch.cat([codes, noise], dim=2))))


def diversity(negatives: Tensor) -> Tensor:
    """NEGCUT's diversity of (images, count, dim) negatives, to be raised: mean |first half - second half|."""
    half = negatives.shape[1] // 2
    return (negatives[:, :half] - negatives[:, half : 2 * half]).abs().mean()


def only_external(images: int, rows: int, device: torch.device | str | None = None) -> Tensor:
    """A `pair_log_weight` that leaves no negative but `extra_keys`: (images, rows, rows) of -1e4."""
    return torch.full((images, rows, rows), -1e4, device=device)


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
    """
    if weighting not in ("none", "monce", "hdce"):
        raise ValueError(f'weighting must be "none", "monce" or "hdce", not {weighting!r}')
    images = query_maps[0].shape[0]
    if patch_ids is None:
        ids = head.draw_ids(key_maps, directions)
    elif all(isinstance(layer, Tensor) for layer in patch_ids):
        ids = list(patch_ids)  # type: ignore[arg-type]
    else:
        share = images // directions
        layers = zip(*patch_ids, strict=True)
        ids = [torch.cat([i.expand(share, -1) if i.dim() == 1 else i for i in layer]) for layer in layers]
    own, mlps = patch_ids is None, head.mlps(head.layers)
    with torch.no_grad():
        key_rows = project_patches(key_maps, ids, mlps, distinct_ids=own)
    query_rows = project_patches(query_maps, ids, mlps, distinct_ids=own)
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
        )
        losses.append(loss.unflatten(0, (directions, -1)).mean(1))
    means = torch.stack(losses).mean(0)
    return means if directions > 1 else means[0]
