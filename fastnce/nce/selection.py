"""Which locations are contrasted: QS-Attn's choice, or all of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import checks
from .impl.rows import similarity, widened


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
    features = widened(feature_map.flatten(2).transpose(1, 2))  # (images, locations, channels)
    logits = similarity(features, features)
    attention = logits.softmax(2)
    entropy = -(attention * logits.log_softmax(2)).sum(2)
    ids = entropy.topk(min(patches, entropy.shape[1]), dim=1, largest=False, sorted=True).indices
    return ids, attention.gather(1, ids[:, :, None].expand(-1, -1, attention.shape[2]))


def dense_patch_ids(maps: Sequence[Tensor]) -> list[Tensor]:
    """Every location of every map, (locations,) a layer: dense PatchNCE. The cost grows with locations squared."""
    checks.maps("maps", maps)
    return [torch.arange(m.shape[2] * m.shape[3], device=m.device) for m in maps]
