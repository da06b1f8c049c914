"""Baselines: the published mathematics in plain PyTorch, and other libraries, called as they document it.

To use a library without installing it, put an unpacked copy on PYTHONPATH.

Every function takes unit rows and detaches the keys, as the papers do. The code is readable and fair: no needless copy,
no loop over images.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def cut_loss(queries: Tensor, keys: Tensor, images: int = 1, temperature: float = 0.07) -> Tensor:
    """CUT's PatchNCE (Park et al., ECCV 2020): the positive, then a matrix whose diagonal is filled with -10.

    queries, keys: (rows, dim), rows = images * patches. Returns (rows,).
    """
    keys = keys.detach()
    positive = (queries * keys).sum(1, keepdim=True)
    similarity = queries.unflatten(0, (images, -1)) @ keys.unflatten(0, (images, -1)).transpose(1, 2)
    diagonal = torch.eye(similarity.shape[1], dtype=torch.bool, device=queries.device)
    negatives = similarity.masked_fill(diagonal, -10.0).flatten(0, 1)
    logits = torch.cat([positive, negatives], dim=1) / temperature
    target = torch.zeros(len(logits), dtype=torch.long, device=logits.device)
    return F.cross_entropy(logits, target, reduction="none")


def dclgan_loss(queries: Tensor, keys: Tensor, temperature: float = 0.07) -> Tensor:
    """DCLGAN's PatchNCE (Han et al., CVPRW 2021): cosines by broadcasting (rows, 1, dim) against (1, rows, dim)."""
    keys = keys.detach()
    positive = F.cosine_similarity(queries, keys, dim=1)[:, None]
    similarity = F.cosine_similarity(queries[:, None], keys[None], dim=2)
    diagonal = torch.eye(len(queries), dtype=torch.bool, device=queries.device)
    logits = torch.cat([positive, similarity.masked_fill(diagonal, -10.0)], dim=1) / temperature
    target = torch.zeros(len(logits), dtype=torch.long, device=logits.device)
    return F.cross_entropy(logits, target, reduction="none")


def normalized_cross_entropy(queries: Tensor, keys: Tensor, temperature: float = 0.07) -> Tensor:
    """The most common form: normalise, one matrix product, cross-entropy with the row index as target."""
    logits = F.normalize(queries, dim=1) @ F.normalize(keys.detach(), dim=1).T / temperature
    return F.cross_entropy(logits, torch.arange(len(logits), device=logits.device), reduction="none")


def sdpa_query_gradient(queries: Tensor, keys: Tensor, temperature: float = 0.07) -> Tensor:
    """Gradient of the summed loss through attention with values = keys: `(sum_j p_ij k_j - k_i) / T`. No loss value."""
    q, k = queries.detach()[None, None], keys.detach()[None, None]
    return (F.scaled_dot_product_attention(q, k, k, scale=1.0 / temperature)[0, 0] - keys) / temperature


def linear_cross_entropy(queries: Tensor, keys: Tensor, temperature: float = 0.07) -> Tensor:
    """PyTorch's chunked linear + cross-entropy (2.13 and later) with the keys as weight. Returns the mean."""
    target = torch.arange(len(keys), device=keys.device)
    options = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(queries / temperature, keys.detach(), target, options=options)


def project(
    maps: Sequence[Tensor], ids: Sequence[Tensor], mlps: Sequence[tuple[Tensor, Tensor, Tensor, Tensor]]
) -> list[Tensor]:
    """CUT's sampling and projection: permute the whole map to channels-last, index, MLP, divide by norm + 1e-7."""
    rows = []
    for feature_map, chosen, (weight1, bias1, weight2, bias2) in zip(maps, ids, mlps, strict=True):
        x = feature_map.permute(0, 2, 3, 1).flatten(1, 2)[:, chosen].flatten(0, 1)
        x = F.linear(F.relu(F.linear(x, weight1, bias1)), weight2, bias2)
        rows.append(x / (x.pow(2).sum(1, keepdim=True).sqrt() + 1e-7))
    return rows


def chain(query_maps, key_maps, mlps, *, patches: int = 256, temperature: float = 0.07, loss=cut_loss) -> Tensor:
    """Sampling, projection and CUT's loss over all layers: maps in, scalar out. Locations are drawn on the device."""
    ids = [torch.randperm(m.shape[2] * m.shape[3], device=m.device)[:patches] for m in key_maps]
    keys = project(key_maps, ids, mlps)
    queries = project(query_maps, ids, mlps)
    images = query_maps[0].shape[0]
    layers = [loss(q, k, images, temperature).mean() for q, k in zip(queries, keys, strict=True)]
    return torch.stack(layers).mean()


Loss = Callable[[Tensor, Tensor], Tensor]
"""Loss of unit queries and constant unit keys (rows, dim): a scalar, or one value per row."""


@dataclass(frozen=True)
class Library:
    """A loss of another library: `make(module, temperature)` returns it, called as its documentation says."""

    name: str
    module: str
    make: Callable[[Any, float], Loss]
    linear_memory: bool = False
    note: str = ""


def _row_indices(queries: Tensor) -> Tensor:
    return torch.arange(len(queries), device=queries.device)


def _nt_xent(module: Any, temperature: float) -> Loss:
    metric = module.NTXentLoss(temperature=temperature)
    return lambda q, k: metric(q, _row_indices(q), ref_emb=k, ref_labels=_row_indices(q))


def _inf_cl(module: Any, temperature: float) -> Loss:
    # their kernels split rows into heads of `head_dim`, which must be a power of two
    return lambda q, k: module.cal_flash_loss(q, k, scale=1.0 / temperature, head_dim=min(256, q.shape[1]))


def _memeff(module: Any, temperature: float) -> Loss:
    # queries against frozen documents; a margin of 2 turns the mask of false negatives off
    options = {"margin": 2.0, "normalized_inputs": True, "stable": False}
    return module.MemoryEfficientLiTQwen3Loss(temperature=temperature, **options)


LIBRARIES = (
    Library(
        "info-nce-pytorch",
        "info_nce",
        lambda module, t: lambda q, k: module.info_nce(q, k, temperature=t),
        note="normalises again",
    ),
    Library("pytorch-metric-learning NTXentLoss", "pytorch_metric_learning.losses", _nt_xent),
    Library(
        "cut-cross-entropy",
        "cut_cross_entropy",
        lambda module, t: lambda q, k: module.linear_cross_entropy(q / t, k, _row_indices(q)),
        linear_memory=True,
        note="drops gradients below its threshold",
    ),
    Library("Inf-CL", "inf_cl", _inf_cl, linear_memory=True, note="forms the keys' gradient too; float32 inside"),
    Library("MemoryEfficientCLIP", "memeff", _memeff, linear_memory=True, note="MemoryEfficientLiTQwen3Loss"),
)
