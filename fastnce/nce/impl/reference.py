"""The contrastive operation, in the notation of the papers.

This file is the specification: plain differentiable PyTorch in the dtype of its inputs. It materialises every logit, so
it is slow and needs much memory. The tests compare `fastnce.nce.impl.eager` and the kernels with it in float64.

Sources: Park et al., Contrastive Learning for Unpaired Image-to-Image Translation (ECCV 2020), eq. 2-4, and its code.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .rows import mlp, normalize_rows


def project(rows: Tensor, weights: Sequence[Tensor] | None) -> Tensor:
    """Apply `mlp`, then `normalize_rows`; without weights only the latter."""
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
    """Compute InfoNCE per row: the positive is the key of the same row, negatives are the other and the extra keys.

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
