"""Parts that the layer kernels share: maps with their strides, tiles of pixels, and reflection at the border.

A tile is BM pixels by BC channels, [BM, BC]. Pixels of a plane are numbered row by row in 32 bits (a plane has fewer
than 2^31 of them); memory offsets have 64 bits. Channels-last maps are read and written in whole lines along the
channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import narrow

MOST_PIXELS = 2**31 - 2**16
"""The most pixels of one plane, so that the pixel numbers of the last tile fit into 32 bits."""


class Map(NamedTuple):
    """A map (images, channels, height, width) with its strides; the tensor becomes a pointer inside the kernel."""

    data: Tensor
    image: int
    channel: int
    y: int
    x: int


def map_strides(shape: Sequence[int], strides: Sequence[int]) -> tuple[int, int, int, int]:
    """The strides of a map; 0 where there is only one image, channel, row or column, whose stride may be any number."""
    image, channel, y, x = (stride if size > 1 else 0 for size, stride in zip(shape, strides, strict=True))
    return image, channel, y, x


def as_map(x: Tensor) -> Map:
    """A tensor of any strides, expanded tensors included."""
    return Map(x, *map_strides(x.shape, x.stride()))


def is_channels_last(x: Tensor) -> bool:
    """Whether the channels of a pixel are adjacent in memory. False if x is also contiguous, as with one channel."""
    return x.stride(1) == 1 and x.shape[1] > 1 and not x.is_contiguous()


def empty_like(x: Tensor, height: int, width: int) -> Tensor:
    """An empty map with x's images, channels, dtype and layout (channels-last or contiguous), and another size.

    Uses only traceable operations, so that fake operators can call it too.
    """
    layout = torch.channels_last if is_channels_last(x) else torch.contiguous_format
    return torch.empty(x.shape[0], x.shape[1], height, width, dtype=x.dtype, device=x.device, memory_format=layout)


def rows_join(*maps: Tensor) -> bool:
    """Whether, in every map, each row of pixels begins where the previous one ends: a plane is one long row."""
    return all(m.shape[2] == 1 or m.stride(2) == m.shape[3] * m.stride(3) for m in maps)


def is_near(*maps: Tensor) -> bool:
    """Whether 32 bits can count the elements between any two of an image, in every map."""
    return all(sum((m.shape[i] - 1) * m.stride(i) for i in (1, 2, 3)) < 2**31 for m in maps)


def check_plane(*maps: Tensor) -> None:
    """Raise ValueError for planes of more than MOST_PIXELS pixels."""
    for m in maps:
        if m.shape[2] * m.shape[3] > MOST_PIXELS:
            raise ValueError(f"a plane of {m.shape[2]}x{m.shape[3]} pixels is too large for the kernels: use tiles")


@triton.jit
def place(channels, parts, BC: tl.constexpr):
    """(image, part of the plane, first channel) of this program. Adjacent programs read adjacent channels."""
    block = tl.program_id(0)
    across = tl.cdiv(channels, BC)
    part = block // across
    return (part // parts).to(tl.int64), part % parts, (block % across) * BC


@triton.jit
def pixels_from(start, width, FLAT: tl.constexpr, BM: tl.constexpr):
    """Rows and columns of BM pixels. With FLAT, the plane is one long row."""
    o_p = start + tl.arange(0, BM)
    if FLAT:
        return tl.zeros([BM], tl.int32), o_p
    else:
        return o_p // width, o_p % width


@triton.jit
def address(source, image, y, x, o_c, NEAR: tl.constexpr):
    """Pointers to the given pixels and channels. NEAR: within an image they differ by less than 32 bits can count."""
    if NEAR:
        offset = (y * source.y + x * source.x)[:, None] + (o_c * source.channel)[None, :]
        return source.data + image * source.image + offset
    else:
        offset = image * source.image + y.to(tl.int64) * source.y + x.to(tl.int64) * source.x
        return source.data + offset[:, None] + o_c.to(tl.int64)[None, :] * source.channel


@triton.jit
def load_tile(source, image, y, x, m_p, o_c, m_c, NEAR: tl.constexpr = False):
    """Values at the given pixels in float32, 0 where masked: [BM, BC]."""
    p_s = address(source, image, y, x, o_c, NEAR)
    return tl.load(p_s, mask=m_p[:, None] & m_c[None, :], other=0.0).to(tl.float32)


@triton.jit
def store_tile(target, value, image, y, x, m_p, o_c, m_c, NEAR: tl.constexpr = False):
    p_t = address(target, image, y, x, o_c, NEAR)
    tl.store(p_t, narrow(value, target.data.dtype.element_ty), mask=m_p[:, None] & m_c[None, :])


@triton.jit
def reflected(position, size):
    """A position outside 0..size-1 mirrored at the border; the border pixel itself is not repeated."""
    position = tl.where(position < 0, -position, position)
    return tl.where(position >= size, 2 * (size - 1) - position, position)


@triton.jit
def load_folded(source, image, start, y, x, m_p, o_c, m_c, height, width, MARGIN: tl.constexpr, BM: tl.constexpr):
    """For each pixel, the sum of all its copies in a padded map: the transpose of reflection padding. [BM, BC]

    A pixel has one copy at its own position (side 0). Near a border it has another one above the first row (side 1) or
    below the last (side 2), and the same holds for columns: up to nine copies. Tiles away from the border detect this
    from their first and last pixel and read once.
    """
    p_s = source.data + image * source.image + (o_c.to(tl.int64) * source.channel)[None, :]
    mask = m_p[:, None] & m_c[None, :]
    offset = (y + MARGIN).to(tl.int64) * source.y + (x + MARGIN).to(tl.int64) * source.x
    acc = tl.load(p_s + offset[:, None], mask=mask, other=0.0).to(tl.float32)
    if MARGIN > 0:
        top = start // width
        bottom = (start + BM - 1) // width
        left = start % width
        whole = top != bottom  # such a tile touches both ends of a row
        for side_y in tl.static_range(3):
            near_y = bottom >= 0
            at_y = y + MARGIN
            m_y = m_p
            if side_y == 1:
                near_y = top <= MARGIN
                at_y = MARGIN - y
                m_y = m_p & (y >= 1) & (y <= MARGIN)
            if side_y == 2:
                near_y = bottom >= height - 1 - MARGIN
                at_y = 2 * (height - 1) - y + MARGIN
                m_y = m_p & (y <= height - 2) & (y >= height - 1 - MARGIN)
            for side_x in tl.static_range(3):
                if side_y + side_x > 0:
                    near = near_y
                    at_x = x + MARGIN
                    m_x = m_y
                    if side_x == 1:
                        near = near & (whole | (left <= MARGIN))
                        at_x = MARGIN - x
                        m_x = m_y & (x >= 1) & (x <= MARGIN)
                    if side_x == 2:
                        near = near & (whole | (left + BM - 1 >= width - 1 - MARGIN))
                        at_x = 2 * (width - 1) - x + MARGIN
                        m_x = m_y & (x <= width - 2) & (x >= width - 1 - MARGIN)
                    if near:
                        offset = at_y.to(tl.int64) * source.y + at_x.to(tl.int64) * source.x
                        m = m_x[:, None] & m_c[None, :]
                        acc += tl.load(p_s + offset[:, None], mask=m, other=0.0).to(tl.float32)
    return acc
