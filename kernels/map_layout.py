"""The layouts of the maps' gradients, and their places in one zeroed buffer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class MapLayout(NamedTuple):
    """What the backward needs to know of a map; the values of the map need not be kept."""

    images: int
    channels: int
    height: int
    width: int
    channels_last: bool
    dtype: torch.dtype
    sampled: bool = False
    """The gradient is that of the sampled rows, (images, channels, patches, 1), and not of the whole map."""

    def strides(self) -> tuple[int, int, int, int]:
        _, c, h, w, channels_last, *_ = self
        return (c * h * w, 1, w * c, c) if channels_last else (c * h * w, h * w, w, 1)

    def numel(self) -> int:
        return self.images * self.channels * self.height * self.width

    def bytes(self) -> int:
        """Bytes of the gradient in the common zeroed buffer of all maps."""
        return (self.numel() * self.dtype.itemsize + 255) // 256 * 256


def map_layout(feature_map: Tensor) -> MapLayout:
    """The layout of the gradient of a map: channels-last if the map is, else contiguous."""
    channels_last = feature_map.is_contiguous(memory_format=torch.channels_last) and not feature_map.is_contiguous()
    images, channels, height, width = feature_map.shape
    return MapLayout(images, channels, height, width, channels_last, feature_map.dtype)


def rows_layout(feature_map: Tensor, patches: int) -> MapLayout:
    """The layout of the gradient of so many sampled rows per image: float32, the channels of a row adjacent."""
    images, channels = feature_map.shape[:2]
    return MapLayout(images, channels, patches, 1, True, torch.float32, sampled=True)


def map_views(buffer: Tensor, maps: Sequence[MapLayout], wanted: Sequence[bool]) -> list[Tensor | None]:
    """Views of the gradients of the wanted maps in the buffer; None for the other maps."""
    views: list[Tensor | None] = []
    start = 0
    for m, want in zip(maps, wanted, strict=True):
        if not want:
            views.append(None)
            continue
        # not `as_strided`: its offset counts from the storage, in which a compiler may place the buffer anywhere
        images, channels, height, width, channels_last, dtype, _ = m
        flat = buffer.narrow(0, start, m.numel() * dtype.itemsize).view(dtype)
        if channels_last:
            views.append(flat.view(images, height, width, channels).permute(0, 3, 1, 2))
        else:
            views.append(flat.view(images, channels, height, width))
        start += m.bytes()
    return views
