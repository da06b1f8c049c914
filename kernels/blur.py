"""The anti-aliasing filters of the published networks, per channel, and their transposes as gathers.

Down: [1, 2, 1] / 4 along each axis at every other position, reflected at the border. Up: twice the size. The published
transposed convolution [1, 3, 3, 1] has two taps per output, 1/4 and 3/4, replicated at the border, which is bilinear
interpolation. Sums are float32, in a fixed order, without atomics.

Minimum traffic per element of the larger map: 1 read + 1/4 write down, 1/4 read + 1 write up, and the reverse for the
gradients. The kernels read each element of the larger map once from memory and again from the cache (nine reads per
output down, four up; four and sixteen for the gradients). A library's depthwise convolution also writes a padded copy.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import chosen
from .common import architecture, launch
from .planes import (
    as_map,
    check_plane,
    empty_like,
    is_channels_last,
    load_tile,
    pixels_from,
    place,
    reflected,
    store_tile,
)
from .planned import planned

DOWN, DOWN_BACK, UP, UP_BACK = (tl.constexpr(kind) for kind in range(4))


@triton.jit
def down_tap(position, size, TAP: tl.constexpr):
    """The position among `size` inputs of an axis that an output reads, and its weight."""
    weight = tl.full(position.shape, 0.5 if TAP == 1 else 0.25, tl.float32)
    return reflected(2 * position + TAP - 1, size), weight


@triton.jit
def down_back_tap(position, size, out_size, TAP: tl.constexpr):
    """One of the `size` outputs that read this one of `out_size` inputs, and its weight.

    Even inputs are the centre of one output. Odd inputs are shared by two, and those that the border reflects count
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
    """The input that contains an output (TAP 0), or that input's neighbour on the output's side, and its weight."""
    if TAP == 0:
        at = position // 2
    else:
        at = tl.minimum(tl.maximum(position // 2 + 2 * (position % 2) - 1, 0), size - 1)
    return at, tl.full(position.shape, 0.75 if TAP == 0 else 0.25, tl.float32)


@triton.jit
def up_back_tap(position, size, out_size, TAP: tl.constexpr):
    """An output that reads this one of `out_size` inputs. Inputs at the border replace their missing neighbour."""
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
    """(position to read, weight) of one tap along one axis."""
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
    """Pixels of the output, each the weighted sum of TAPS x TAPS pixels of the source."""
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


@planned
def _blur(x: Tensor, height: int, width: int, kind: int) -> Tensor:
    check_plane(x)
    out = empty_like(x, height, width)
    check_plane(out)
    images, channels = x.shape[:2]
    tile = chosen.layer_tile(architecture(x.device), channels, is_channels_last(x), reads=_TAPS[kind] ** 2)
    parts = triton.cdiv(height * width, tile.block_m)
    launch(
        blur_kernel, images * parts * triton.cdiv(channels, tile.block_n), x, as_map(x), as_map(out), channels,
        x.shape[2], x.shape[3], height, width, height * width, parts,
        KIND=kind, TAPS=_TAPS[kind], BM=tile.block_m, BC=tile.block_n, num_warps=tile.warps,
    )  # fmt: skip
    return out


def blur_down(x: Tensor, height: int, width: int) -> Tensor:
    """Halve a map (images, channels, h, w) of any strides, at least 2x2: height = ceil(h / 2), width = ceil(w / 2)."""
    return _blur(x, height, width, DOWN.value)


def blur_down_backward(gradient: Tensor, height: int, width: int) -> Tensor:
    """The gradient of a map of `height` x `width`, from the gradient of the halved map."""
    return _blur(gradient, height, width, DOWN_BACK.value)


def blur_up(x: Tensor, height: int, width: int) -> Tensor:
    """Double a map (images, channels, h, w) of any strides: height = 2 h, width = 2 w."""
    return _blur(x, height, width, UP.value)


def blur_up_backward(gradient: Tensor, height: int, width: int) -> Tensor:
    """The gradient of a map of `height` x `width`, from the gradient of the doubled map."""
    return _blur(gradient, height, width, UP_BACK.value)
