"""The contrastive operation, written as the papers write it.

This file is the specification: plain differentiable PyTorch in the dtype of its inputs. It materialises every logit, so
it is neither fast nor small. The tests hold `fastnce.nce.eager` and the kernels against it in float64.

Sources: Park et al., Contrastive Learning for Unpaired Image-to-Image Translation (ECCV 2020), eq. 2-4, and its code.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

NORM_EPS = 1e-7
"""Added to the length of a row before dividing by it (published `Normalize`); visible at initialisation, where
projected rows are as short as 1e-6."""


def normalize_rows(rows: Tensor) -> Tensor:
    """`x / (|x| + 1e-7)` over the last dimension.

    The gradient at a row of zeros is 0 here, where the published code yields NaN (the slope of a length at 0).
    """
    length = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    scale = torch.where(length > 0, 1.0 / (length + NORM_EPS), torch.zeros_like(length))
    return rows * scale


def gather_patches(feature_map: Tensor, patch_ids: Tensor) -> Tensor:
    """Rows of a map (images, channels, height, width) at `patch_ids`, as (images, patches, channels).

    `patch_ids` counts locations row by row (y * width + x): (patches,) for all images or (images, patches).
    """
    # Index along the dimension that is dense in memory: it reads the sampled rows only, never the whole map, and the
    # gradient comes back in the map's own layout.
    channels = feature_map.shape[1]
    channels_last = feature_map.stride(1) == 1 and channels > 1
    flat = feature_map.permute(0, 2, 3, 1).flatten(1, 2) if channels_last else feature_map.flatten(2)
    dim = 1 if channels_last else 2
    if patch_ids.dim() == 1:
        sampled = flat.index_select(dim, patch_ids)
    else:
        sampled = flat.gather(dim, patch_ids.unsqueeze(3 - dim).expand(*_with(flat.shape, dim, patch_ids.shape[1])))
    return sampled if channels_last else sampled.transpose(1, 2)


def _with(shape: torch.Size, dim: int, size: int) -> list[int]:
    return [size if axis == dim else length for axis, length in enumerate(shape)]


def mlp(rows: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """Linear, ReLU, Linear, with (weight1, bias1, weight2, bias2) as in `nn.Linear`."""
    weight1, bias1, weight2, bias2 = weights
    hidden = torch.relu(torch.nn.functional.linear(rows, weight1, bias1))
    return torch.nn.functional.linear(hidden, weight2, bias2)


def project(rows: Tensor, weights: Sequence[Tensor] | None) -> Tensor:
    """`mlp`, then `normalize_rows`; without weights only the latter."""
    return normalize_rows(rows if weights is None else mlp(rows, weights))


def nce_rows(
    queries_GSD: Tensor,
    keys_GSD: Tensor,
    extra_keys_GED: Tensor | None = None,
    *,
    temperature: float,
    pair_log_weight_GSS: Tensor | None = None,
    pair_weight_GSS: Tensor | None = None,
    decoupled: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """InfoNCE of each row: its positive is the key of the same row, its negatives the other keys and the extras.

    With s_ij = q_i.k_j / T (times `pair_weight`, plus `pair_log_weight`, both for i != j only):
    `loss_i = logsumexp_j(s_ij) - s_ii`, where j runs over the group and the extra keys; `decoupled` leaves the positive
    out of the logsumexp. Returns (loss, logsumexp, positive logit), each (groups, rows).
    """
    rows = queries_GSD.shape[1]
    logits_GSS = queries_GSD @ keys_GSD.transpose(1, 2) / temperature
    positive_GS = logits_GSS.diagonal(dim1=1, dim2=2)
    diagonal = torch.eye(rows, dtype=torch.bool, device=queries_GSD.device)
    negatives = logits_GSS
    if pair_weight_GSS is not None:
        negatives = negatives * pair_weight_GSS
    if pair_log_weight_GSS is not None:
        negatives = negatives + pair_log_weight_GSS
    negatives = negatives.masked_fill(diagonal, -torch.inf)
    if extra_keys_GED is not None:
        negatives = torch.cat([negatives, queries_GSD @ extra_keys_GED.transpose(1, 2) / temperature], dim=2)
    terms = negatives if decoupled else torch.cat([positive_GS[:, :, None], negatives], dim=2)
    logsumexp_GS = torch.logsumexp(terms, dim=2)
    return logsumexp_GS - positive_GS, logsumexp_GS, positive_GS
