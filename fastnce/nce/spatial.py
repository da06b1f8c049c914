"""Self-similarity of feature maps, and losses between two of them: F-LSeSim's spatially-correlative loss.

Zheng et al., The Spatially-Correlative Loss for Various Image Translation Tasks (CVPR 2021), and its code.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .impl.rows import similarity, widened

SpatialLoss = Literal["cos", "l1"]
KEPT = 4
"""The loss compares the largest similarities, one in so many."""


def self_similarity(feature_map: Tensor, ids: Tensor, window: int, normalised: bool = False) -> Tensor:
    """Return how similar the features at some locations are to those around them.

    The mean over the map is subtracted from the features. The similarity is tanh(q.k / (10 * channels)), or the cosine.

    Args:
        feature_map: (images, channels, height, width), any floating dtype.
        ids: (patches,), locations, row by row.
        window: side of the window of keys around each location, moved into the map at its edges; if it is not smaller
            than both sides of the map, the keys are the whole map.
        normalised: take the cosine (published use_norm).

    Returns:
        (images, patches, keys), float32, or float64 for float64.
    """
    x = widened(feature_map)
    height, width = x.shape[2:]
    x = (x - x.mean((2, 3), keepdim=True)).flatten(2)  # (images, channels, locations)
    x = F.normalize(x, dim=1) if normalised else x / x.shape[1] ** 0.5
    rows = x.transpose(1, 2)
    found = similarity(rows.index_select(1, ids), rows)
    if window < height and window < width:
        top = (ids // width - window // 2).clamp(0, height - window)
        left = (ids % width - window // 2).clamp(0, width - window)
        steps = torch.arange(window, device=ids.device)
        places = (
            (top[:, None, None] + steps[:, None]) * width + left[:, None, None] + steps
        )  # (patches, window, window)
        found = found.gather(2, places.flatten(1).expand(len(found), -1, -1))
    return found if normalised else torch.tanh(found / 10)


def spatial_loss(source: Tensor, target: Tensor, kind: SpatialLoss = "cos", normalised: bool = False) -> Tensor:
    """Return the distance between two self-similarities where those of the target are largest.

    Args:
        source, target: as `self_similarity` returns, of one shape.
        kind: "cos": 1 minus the cosine of each location; "l1": the differences, scaled by keys / kept keys.
        normalised: take absolute differences; otherwise those that are squared below 1 (smooth L1), as released.

    Returns:
        a scalar.
    """
    keys = source.shape[2]
    kept = max(keys // KEPT, 1)
    least = target.detach().topk(min(kept + 1, keys), dim=2).values[:, :, -1:]
    zero = target.new_zeros(())
    source, target = (torch.where(target.detach() < least, zero, x) for x in (source, target))
    distance = F.l1_loss if normalised else F.smooth_l1_loss
    if kind == "l1":
        return distance(keys / kept * source, keys / kept * target)
    cosine = F.cosine_similarity(source, target, dim=2)
    return distance(torch.ones_like(cosine), cosine)


def contrast_similarity(source: Tensor, target: Tensor, other: Tensor, temperature: float = 0.07) -> Tensor:
    """Return the loss that learned self-similarities are trained by: each location of the source finds its target.

    The negatives are the other locations of the target, and the locations of another image, which are compared with
    the source and with the target.

    Args:
        source, target, other: (images, patches, keys), of one shape.
        temperature: divides the cosines.

    Returns:
        a scalar.
    """
    s, t, o = (F.normalize(x, dim=2) for x in (source, target, other))
    logits = torch.cat([similarity(s, t), similarity(s, o), similarity(t, o)], dim=2) / temperature
    return (logits.logsumexp(2) - logits.diagonal(dim1=1, dim2=2)).mean()
