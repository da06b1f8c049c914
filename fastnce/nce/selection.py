"""Choose the locations that are contrasted: QS-Attn's selection, or all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import unfold

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


Attention = Literal["global", "local", "local_global"]
Windows = Literal["released", "paper"]
SIDE = 7
"""Side of the windows of local attention."""


def _windows(feature_map: Tensor) -> Tensor:
    """Return the window around each location, with zeros outside the map: (images, channels * SIDE^2, locations)."""
    return unfold(feature_map, SIDE, padding=SIDE // 2)


def _local_logits(windows: Tensor, features: Tensor, reading: Windows) -> Tensor:
    """Return the products of locations with their windows, (images, locations, SIDE^2).

    Args:
        windows: (images, channels * SIDE^2, locations), as `_windows` returns, of these locations.
        features: (images, channels, locations).
    """
    images, channels, locations = features.shape
    if reading == "paper":
        return (windows.view(images, channels, SIDE**2, locations) * features[:, :, None]).sum(1).transpose(1, 2)
    # the released code takes SIDE^2 groups of `channels` values in the order of `unfold`, where channels come first
    groups = windows.transpose(1, 2).unflatten(2, (SIDE**2, channels))
    return (groups * features.transpose(1, 2)[:, :, None]).sum(3)


def _at(values: Tensor, ids: Tensor) -> Tensor:
    """Return the columns (images, width, patches) of values (images, width, locations) at ids (images, patches)."""
    return values.gather(2, ids[:, None, :].expand(-1, values.shape[1], -1))


def query_attention(
    source: Tensor, patches: int, kind: Attention = "global", windows: Windows = "released"
) -> tuple[Tensor, Tensor]:
    """Select queries as QS-Attn does, and return the attention that routes the features of both sides.

    Hu et al., QS-Attn (CVPR 2022), and its code. Attention is the softmax of f_i.f_j over all j ("global"), or
    over the 7x7 window around i ("local"). The locations of least entropy are selected. "local_global" selects by
    local entropy and routes by global attention. The entropies of "global" take locations^2 values per image.

    Args:
        source: (images, channels, height, width), any floating dtype, of the source image.
        patches: number of locations to select, at least 1; all of them if there are fewer.
        kind: "global", "local" or "local_global".
        windows: how local windows are read: "released" takes their values in the order of the released code, which
            mixes channels with places; "paper" takes the features of the places.

    Returns:
        ids (images, patches), least entropy first, and attention (images, patches, locations or 49), float32 or
        float64, which passes a gradient to `source`.
    """
    checks.maps("source", [source])
    patches = checks.count("patches", patches)
    source = widened(source)
    features = source.flatten(2)  # (images, channels, locations)
    rows = features.transpose(1, 2)
    with torch.no_grad():
        logits = similarity(rows, rows) if kind == "global" else _local_logits(_windows(source), features, windows)
        entropy = -(logits.softmax(2) * logits.log_softmax(2)).sum(2)
        ids = entropy.topk(min(patches, entropy.shape[1]), dim=1, largest=False, sorted=True).indices
    chosen = _at(features, ids)
    if kind == "local":
        return ids, _local_logits(_at(_windows(source), ids), chosen, windows).softmax(2)
    return ids, similarity(chosen.transpose(1, 2), rows).softmax(2)


def route(
    feature_map: Tensor, ids: Tensor, attention: Tensor, kind: Attention = "global", windows: Windows = "released"
) -> Tensor:
    """Return features averaged with the attention of `query_attention`: a map (images, channels, patches, 1).

    The arguments are those of `query_attention` and what it returned; `feature_map` is of either side.
    """
    with torch.autocast(feature_map.device.type, enabled=False):
        wide = widened(feature_map)
        if kind != "local":
            routed = torch.bmm(wide.flatten(2), attention.transpose(1, 2))  # (images, channels, patches)
        else:
            images, channels, patches = *wide.shape[:2], ids.shape[1]
            chosen = _at(_windows(wide), ids)
            if windows == "paper":
                values = chosen.view(images, channels, SIDE**2, patches).permute(0, 3, 2, 1)
            else:
                values = chosen.reshape(images, patches, SIDE**2, channels)
            routed = (attention[:, :, :, None] * values).sum(2).transpose(1, 2)
    return routed[:, :, :, None].to(feature_map.dtype)
