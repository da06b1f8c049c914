"""Choose the locations that are contrasted: QS-Attn's selection, or all."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import checks
from .impl.rows import similarity, widened


@torch.no_grad()
def attention_patch_ids(feature_map: Tensor, patches: int) -> tuple[Tensor, Tensor]:
    """Select queries as QS-Attn does: the locations whose attention over the map has the least entropy.

    Hu et al., QS-Attn: Query-Selected Attention for Contrastive Learning in I2I Translation (CVPR 2022), and its code
    (global attention). Attention is the softmax over locations of f_i.f_j. It has (locations, locations) values per
    image, so use it for deep layers.

    Args:
        feature_map: (images, channels, height, width), any floating dtype, of the *source* image. f_i.f_j must be
            within the range of float32 (of float64 for float64).
        patches: number of locations to select, at least 1; all of them if there are fewer.

    Returns:
        ids (images, patches), least entropy first, and their attention (images, patches, locations), with which QS-Attn
        also averages the features of both sides, `attention @ features`, before projecting them.

    Raises:
        ValueError: an invalid map or count.
    """
    checks.maps("feature_map", [feature_map])
    patches = checks.count("patches", patches)
    features = widened(feature_map.flatten(2).transpose(1, 2))  # (images, locations, channels)
    logits = similarity(features, features)
    attention = logits.softmax(2)
    entropy = -(attention * logits.log_softmax(2)).sum(2)
    ids = entropy.topk(min(patches, entropy.shape[1]), dim=1, largest=False, sorted=True).indices
    return ids, attention.gather(1, ids[:, :, None].expand(-1, -1, attention.shape[2]))


def pooled_maps(maps: Sequence[Tensor], side: int = 4) -> list[Tensor]:
    """Return the means over a grid of `side` x `side` cells of each map: (images, channels, side, side).

    With all 16 locations of the result and no MLP, `project_patches` returns the rows of the published projector
    "reshape" (CUT's `ReshapeF`).
    """
    checks.maps("maps", maps)
    side = checks.count("side", side)
    return [torch.nn.functional.adaptive_avg_pool2d(m, side) for m in maps]


def dense_patch_ids(maps: Sequence[Tensor]) -> list[Tensor]:
    """Return every location of each map, (locations,) per layer: dense PatchNCE. Cost grows as locations squared."""
    checks.maps("maps", maps)
    return [torch.arange(m.shape[2] * m.shape[3], device=m.device) for m in maps]
