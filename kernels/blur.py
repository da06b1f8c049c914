"""The anti-aliasing filters of the published networks, one channel at a time, and their transposes as gathers.

Down: [1, 2, 1] / 4 along each axis at every other place, reflected at the border. Up: twice the size; the published
transposed convolution [1, 3, 3, 1] has two taps an output, 1/4 and 3/4, replicated at the border: it is bilinear
interpolation. Sums are float32, in a fixed order, without atomics.

Elements moved at least, for each element of the larger map: 1 read + 1/4 write down, 1/4 read + 1 write up, and the
reverse for the gradients. The kernels read each element of the larger map from memory once and again from the cache
(nine reads an output down, four up; for the gradients four and sixteen), where a library's depthwise convolution also
pads into a copy of its own.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .common import architecture, launch
from .planes import (
    as_map,
    check_plane,
    empty_like,
    lies_channels_last,
    load_tile,
    pixels_from,
    place,
    reflected,
    store_tile,
)

DOWN, DOWN_BACK, UP, UP_BACK = (tl.constexpr(kind) for kind in range(4))


@triton.jit
def down_tap(position, size, TAP: tl.constexpr):
    """Where, along an axis of `size` inputs, an output reads, and with which weight."""
    weight = tl.full(position.shape, 0.5 if TAP == 1 else 0.25, tl.float32)
    return reflected(2 * position + TAP - 1, size), weight


@triton.jit
def down_back_tap(position, size, out_size, TAP: tl.constexpr):
    """An output that one of `out_size` inputs went into; there are `size` outputs.

    Even inputs are in the middle of one output; odd ones stand between two, and those that the border reflects count
    twice.
    """
    at = position // 2 + TAP
    odd = position % 2 == 1
    if TAP == 0:
        weight = tl.where(odd, tl.where(position == 1, 0.5, 0.25), 0.5)
    else:
        twice = (position == out_size - 2) & (out_size % 2 == 1)
        weight = tl.where(odd & (at < size), tl.where(twice, 0.5, 0.25), 0.0)
    return at, weight


@triton.jit
def up_tap(position, size, TAP: tl.constexpr):
    """The input that an output lies in, and that input's neighbour on the output's side."""
    if TAP == 0:
        at = position // 2
    else:
        at = tl.minimum(tl.maximum(position // 2 + 2 * (position % 2) - 1, 0), size - 1)
    return at, tl.full(position.shape, 0.75 if TAP == 0 else 0.25, tl.float32)


@triton.jit
def up_back_tap(position, size, out_size, TAP: tl.constexpr):
    """An output that one of `out_size` inputs went into; inputs at the border take their missing neighbour's share."""
    at = 2 * position + TAP - 1
    if TAP == 1:
        weight = tl.where(position == 0, 1.0, 0.75)
    elif TAP == 2:
        weight = tl.where(position == out_size - 1, 1.0, 0.75)
    else:
        weight = tl.where((at >= 0) & (at < size), 0.25, 0.0)
    return at, weight


@triton.jit
def tap_of(position, size, out_size, KIND: tl.constexpr, TAP: tl.constexpr):
    if KIND == DOWN:
        return down_tap(position, size, TAP)
    elif KIND == DOWN_BACK:
        return down_back_tap(position, size, out_size, TAP)
    elif KIND == UP:
        return up_tap(position, size, TAP)
    else:
        return up_back_tap(position, size, out_size, TAP)


@triton.jit
def blur_kernel(
    source, out, channels, height, width, out_height, out_width, pixels, parts, KIND: tl.constexpr, TAPS: tl.constexpr,
    BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Pixels of the output, each the weighted sum of TAPS x TAPS of the source."""
    image, part, first_c = place(channels, parts, BC)
    o_c = first_c + tl.arange(0, BC)
    m_c = o_c < channels
    start = part * BM
    row, column = pixels_from(start, out_width, False, BM)
    m_p = start + tl.arange(0, BM) < pixels
    acc = tl.zeros([BM, BC], tl.float32)
    for i in tl.static_range(TAPS):
        at_row, weight_row = tap_of(row, height, out_height, KIND, i)
        for j in tl.static_range(TAPS):
            at_column, weight_column = tap_of(column, width, out_width, KIND, j)
            weight = weight_row * weight_column
            value = load_tile(source, image, at_row, at_column, m_p & (weight > 0), o_c, m_c)
            acc += weight[:, None] * value
    store_tile(out, acc, image, row, column, m_p, o_c, m_c)


_TAPS = {DOWN.value: 3, DOWN_BACK.value: 2, UP.value: 2, UP_BACK.value: 4}


def _blur(x: Tensor, height: int, width: int, kind: int) -> Tensor:
    check_plane(x)
    out = empty_like(x, height, width)
    check_plane(out)
    images, channels = x.shape[:2]
    tile = configs.layer_tile(architecture(x.device), channels, lies_channels_last(x), reads=_TAPS[kind] ** 2)
    parts = triton.cdiv(height * width, tile.block_m)
    launch(
        blur_kernel, images * parts * triton.cdiv(channels, tile.block_n), x, as_map(x), as_map(out), channels,
        x.shape[2], x.shape[3], height, width, height * width, parts,
        KIND=kind, TAPS=_TAPS[kind], BM=tile.block_m, BC=tile.block_n, num_warps=tile.warps,
    )  # fmt: skip
    return out


def blur_down(x: Tensor, height: int, width: int) -> Tensor:
    """(images, channels, h, w) of any strides, at least 2x2, to half the size: height = ceil(h / 2), width alike."""
    return _blur(x, height, width, DOWN.value)


def blur_down_backward(gradient: Tensor, height: int, width: int) -> Tensor:
    """The gradient of a map of `height` x `width` from that of the halved one."""
    return _blur(gradient, height, width, DOWN_BACK.value)


def blur_up(x: Tensor, height: int, width: int) -> Tensor:
    """(images, channels, h, w) of any strides to height = 2 h, width = 2 w."""
    return _blur(x, height, width, UP.value)


def blur_up_backward(gradient: Tensor, height: int, width: int) -> Tensor:
    """The gradient of a map of `height` x `width` from that of the doubled one."""
    return _blur(gradient, height, width, UP_BACK.value)
