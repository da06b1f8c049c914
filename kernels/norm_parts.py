"""Parts that the kernels of norms and activations share: a tile of the output, a tile of the gradient, joined parts.

A layer is y = act(norm(x)) [+ residual], then padded by reflection, blurred down or up, or left as it is. The norm of a
channel is (x - mean) * scale. A layer without a norm has scale 1 and the negative bias as its mean.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import norm_tiles
from .blur import DOWN, DOWN_BACK, UP, UP_BACK, tap_of
from .planes import is_channels_last, load_folded, load_tile, reflected

KINDS = (None, DOWN.value, UP.value)
"""The kind of blur for the arguments `blur` 0, 1 and 2."""
BACK = {DOWN.value: DOWN_BACK.value, UP.value: UP_BACK.value, None: None}
TAPS = {None: 1, DOWN.value: 3, DOWN_BACK.value: 2, UP.value: 2, UP_BACK.value: 4}
"""Taps along each axis."""


def out_size(height: int, width: int, margin: int, blur: int) -> tuple[int, int]:
    """Height and width of a layer's output: padded, halved (blur 1) or doubled (blur 2)."""
    if blur == 1:
        return (height + 1) // 2, (width + 1) // 2
    scale = 2 if blur == 2 else 1
    return scale * height + 2 * margin, scale * width + 2 * margin


def check_form(margin: int, blur: int) -> None:
    if blur not in (0, 1, 2) or (margin and blur):
        raise ValueError(f"blur is 0, 1 (down) or 2 (up), and 0 with a margin: blur {blur}, margin {margin}")


class Tiling:
    """How the pixels of a plane are divided among programs.

    `tile` has the sizes of a block, `side` programs are side by side (images and blocks of channels), and each of the
    `parts` of a plane consists of `each` tiles.
    """

    def __init__(self, x: Tensor, arch: str, pixels: int, reads: int, *, reduction: bool) -> None:
        self.tile = norm_tiles.norm_tile(arch, x.shape[1], is_channels_last(x), reads, x.dtype)
        tiles = triton.cdiv(pixels, self.tile.block_m)
        self.side = x.shape[0] * triton.cdiv(x.shape[1], self.tile.block_n)
        parts = norm_tiles.norm_splits(arch, self.side, tiles, reduction)
        self.each = max(1, triton.cdiv(tiles, parts))
        self.parts = triton.cdiv(tiles, self.each)
        self.span = self.each * self.tile.block_m
        self.programs = self.side * self.parts
        self.options = {"BM": self.tile.block_m, "BC": self.tile.block_n, "num_warps": self.tile.warps}


def joined_block(parts: int) -> int:
    """The number of parts that a program loads at once: one of two, so that there are few forms to compile."""
    return 16 if parts <= 16 else triton.next_power_of_2(max(parts, norm_tiles.NORM_PARTS))


@triton.jit
def joined(mean, squares, count, total):
    """Mean and sum of squared deviations of parts, joined along axis 0. `count` is [parts, 1]."""
    centre = tl.sum(mean * count, 0) / total
    centre += tl.sum((mean - centre[None, :]) * count, 0) / total  # corrects the rounding
    apart = mean - centre[None, :]
    return centre, tl.sum(squares + apart * apart * count, 0)


@triton.jit
def joined_parts(
    partial, image, channels, o_c, m_c, pixels, joins, span, eps, MOMENTS: tl.constexpr, BS: tl.constexpr
):  # fmt: skip
    """Join a plane's parts of float32 (images, joins, 2, channels): mean and 1 / deviation if MOMENTS, else mean sums.

    A part has `span` pixels; the last one may have fewer.
    """
    o_s = tl.arange(0, BS)
    mask = (o_s < joins)[:, None] & m_c[None, :]
    p_p = partial + (image * joins + o_s[:, None]) * 2 * channels + o_c[None, :]
    one = tl.load(p_p, mask=mask, other=0.0)  # [BS, BC]
    other = tl.load(p_p + channels, mask=mask, other=0.0)
    total = tl.cast(pixels, tl.float32)  # `pixels` of 1 is a constant, which has no method `to`
    if MOMENTS:
        rest = pixels - tl.minimum(o_s, joins - 1) * span
        count = tl.where(o_s < joins, tl.minimum(rest, span), 0).to(tl.float32)[:, None]
        first, deviations = joined(one, other, count, total)
        second = 1.0 / tl.sqrt(deviations / total + eps)
    else:
        first = tl.sum(one, 0) / total
        second = tl.sum(other, 0) / total
    return first, second


@triton.jit
def activated(value, SLOPE: tl.constexpr):
    if SLOPE == 0.0:
        value = tl.where(value < 0, 0.0, value)  # NaN stays
    elif SLOPE != 1.0:
        value = tl.where(value < 0, SLOPE * value, value)
    return value


@triton.jit
def through_activation(gradient, normal, SLOPE: tl.constexpr):
    """The gradient of the normalised values, from the gradient of the activated ones."""
    if SLOPE == 0.0:
        gradient = tl.where(normal > 0, gradient, 0.0)
    elif SLOPE != 1.0:
        gradient = tl.where(normal > 0, gradient, SLOPE * gradient)
    return gradient


@triton.jit
def layer_tile(
    x, residual, image, row, column, m_p, o_c, m_c, mean, scale, SLOPE: tl.constexpr, RESIDUAL: tl.constexpr,
    NEAR: tl.constexpr = False,
):  # fmt: skip
    """A tile of y at the given pixels of x, before pads and blurs."""
    value = (load_tile(x, image, row, column, m_p, o_c, m_c, NEAR) - mean[None, :]) * scale[None, :]
    value = activated(value, SLOPE)
    if RESIDUAL:
        value += load_tile(residual, image, row, column, m_p, o_c, m_c, NEAR)
    return value


@triton.jit
def output_tile(
    x, residual, image, row, column, m_p, o_c, m_c, mean, scale, height, width, out_height, out_width,
    SLOPE: tl.constexpr, RESIDUAL: tl.constexpr, MARGIN: tl.constexpr, KIND: tl.constexpr, TAPS: tl.constexpr,
    BM: tl.constexpr, BC: tl.constexpr, NEAR: tl.constexpr = False,
):  # fmt: skip
    """A tile of the output at the given pixels: padded, blurred, or y itself."""
    if KIND is not None:
        value = tl.zeros([BM, BC], tl.float32)
        for i in tl.static_range(TAPS):
            at_row, weight_row = tap_of(row, height, out_height, KIND, i)
            for j in tl.static_range(TAPS):
                at_column, weight_column = tap_of(column, width, out_width, KIND, j)
                one = layer_tile(
                    x, residual, image, at_row, at_column, m_p, o_c, m_c, mean, scale, SLOPE, RESIDUAL, NEAR
                )  # fmt: skip
                value += (weight_row * weight_column)[:, None] * one
    else:
        if MARGIN > 0:
            row, column = reflected(row - MARGIN, height), reflected(column - MARGIN, width)
        value = layer_tile(x, residual, image, row, column, m_p, o_c, m_c, mean, scale, SLOPE, RESIDUAL, NEAR)
    return value


@triton.jit
def adjoint_tile(
    gradient, inner, image, start, row, column, m_p, o_c, m_c, height, width, out_height, out_width,
    INNER: tl.constexpr, MARGIN: tl.constexpr, KIND: tl.constexpr, TAPS: tl.constexpr, BM: tl.constexpr,
    BC: tl.constexpr, NEAR: tl.constexpr = False,
):  # fmt: skip
    """The gradient of y at the given pixels: gathered from the gradient of the output, plus `inner`.

    KIND is a transposed blur. `start` is the first pixel of the tile.
    """
    if KIND is not None:
        value = tl.zeros([BM, BC], tl.float32)
        for i in tl.static_range(TAPS):
            at_row, weight_row = tap_of(row, out_height, height, KIND, i)
            for j in tl.static_range(TAPS):
                at_column, weight_column = tap_of(column, out_width, width, KIND, j)
                weight = weight_row * weight_column
                one = load_tile(gradient, image, at_row, at_column, m_p & (weight > 0), o_c, m_c, NEAR)
                value += weight[:, None] * one
    elif MARGIN == 0:
        value = load_tile(gradient, image, row, column, m_p, o_c, m_c, NEAR)
    else:
        value = load_folded(gradient, image, start, row, column, m_p, o_c, m_c, height, width, MARGIN, BM)
    if INNER:
        value += load_tile(inner, image, row, column, m_p, o_c, m_c, NEAR)
    return value
