"""Functions that all implementations share: sampling, projection and normalisation of rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...common.agreement import exact_device

NORM_EPS = 1e-7
"""Added to the length of a row before dividing by it (published `Normalize`). It matters at initialisation, when
projected rows are as short as 1e-6."""


def normalize_rows(rows: Tensor) -> Tensor:
    """Return `x / (|x| + 1e-7)` over the last dimension.

    The gradient at a row of zeros is 0; in the published code it is NaN (the derivative of a length at 0).
    """
    length = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    scale = torch.where(length > 0, 1.0 / (length + NORM_EPS), 0.0)
    return rows * scale


def gather_patches(feature_map: Tensor, patch_ids: Tensor) -> Tensor:
    """Gather rows of a map (images, channels, height, width) at `patch_ids`, as (images, patches, channels).

    `patch_ids` number locations row by row (y * width + x): (patches,) for all images, or (images, patches).
    """
    # Index along the dimension that is dense in memory: only the sampled rows are read, not the whole map, and the
    # gradient has the layout of the map.
    channels = feature_map.shape[1]
    channels_last = feature_map.stride(1) == 1 and channels > 1
    flat = feature_map.permute(0, 2, 3, 1).flatten(1, 2) if channels_last else feature_map.flatten(2)
    dim = 1 if channels_last else 2
    if patch_ids.dim() == 1:
        sampled = flat.index_select(dim, patch_ids)
    else:
        sampled = flat.gather(
            dim, patch_ids.unsqueeze(3 - dim).expand(*_with_size(flat.shape, dim, patch_ids.shape[1]))
        )
    return sampled if channels_last else sampled.transpose(1, 2)


def _with_size(shape: torch.Size, dim: int, size: int) -> list[int]:
    """Return the shape with the size of one dimension replaced."""
    return [size if axis == dim else length for axis, length in enumerate(shape)]


def mlp(rows: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """Apply Linear, ReLU, Linear, with (weight1, bias1, weight2, bias2) as in `nn.Linear`."""
    weight1, bias1, weight2, bias2 = weights
    hidden = torch.relu(torch.nn.functional.linear(rows, weight1, bias1))
    return torch.nn.functional.linear(hidden, weight2, bias2)


def widened(x: Tensor) -> Tensor:
    """Return x in float32, or unchanged if it is float64."""
    return x if x.dtype == torch.float64 else x.float()


def similarity(x: Tensor, y: Tensor) -> Tensor:
    """Return all products of rows, (groups, rows, rows), in the precision of x, also under autocast."""
    with torch.autocast(x.device.type, enabled=False):
        return torch.bmm(x, y.transpose(1, 2))


def near_the_corner(feature_map: Tensor, *first: Tensor) -> Tensor:
    """Return the locations, () bool each, where rounding may move a hidden unit to the other side of the ReLU's corner.

    Args:
        first: weight and bias of the first layer; none without an MLP.
    """
    wide = exact_device(feature_map.device)
    rows = feature_map.to(wide, torch.float64).flatten(2).transpose(1, 2)  # (images, locations, channels)
    if not first:
        return torch.zeros(rows.shape[1], dtype=torch.bool, device=feature_map.device)
    weight, bias = (w.detach().to(wide, torch.float64) for w in first)
    return ((rows @ weight.T + bias).abs() < 1e-5).any(2).any(0).to(feature_map.device)
