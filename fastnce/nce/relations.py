"""Relations between the codes of one image, compared between the input and the output: hDCE's SRC."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import checks
from .impl.rows import normalize_rows, similarity, widened


def relation_loss(queries: Tensor, keys: Tensor, images: int = 1) -> Tensor:
    """Return the semantic relation consistency loss (SRC): how much the relations of two sets of codes differ.

    Jung et al., Exploring Patch-wise Semantic Relation for Contrastive Learning in Image-to-Image Translation Tasks
    (CVPR 2022), and its code. With P = softmax over i of z_i.z_j for either side, and M the mean of both, the loss is
    the Jensen-Shannon divergence (KL(P_queries | M) + KL(P_keys | M)) / 2, summed over all pairs i, j of an image.

    Args:
        queries, keys: (rows, dim), image after image, any floating dtype, of unit length. The keys are constants.
        images: number of groups, at least 1; rows are related within their group.

    Returns:
        a scalar, the mean over images; float32, or float64 for float64.

    Raises:
        ValueError: rows that do not match, or that are not a multiple of `images`.
    """
    checks.same_shape("queries", queries, "keys", keys, dims=2)
    images = checks.groups_of("images", images, queries.shape[0])
    q, k = (widened(rows).unflatten(0, (images, -1)) for rows in (queries, keys.detach()))
    log_p, log_q = (similarity(rows, rows).log_softmax(1) for rows in (q, k))
    log_m = torch.logaddexp(log_p, log_q) - math.log(2.0)
    divergence = log_p.exp() * (log_p - log_m) + log_q.exp() * (log_q - log_m)
    return 0.5 * divergence.sum((1, 2)).mean()


def unit_rows(rows: Tensor) -> Tensor:
    """Divide rows (rows, dim) by their length plus 1e-7 once more, as SRC's code does; float32, or float64."""
    return normalize_rows(widened(rows))
