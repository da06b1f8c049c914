"""Instance norm and its gradient in one launch, for planes that a program holds in registers.

A program has a few channels of one image: 4096 pixels of 8 channels are 64 values for each of 512 threads. Mean, sum of
squared deviations and the sums of the gradient come from these registers. The gradient keeps two maps, and takes 4
channels where a plane has more than 2048 pixels. What lies at another place than its pixel is read again through the
cache by a second, small loop: the ring that a reflection pad adds, the band of pixels that have copies in the pad, and
the taps of a blur down.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .common import launch, narrow
from .lookup import Tile
from .norm_parts import activated, adjoint_tile, layer_tile, output_tile, through_activation
from .planes import as_map, load_tile, pixels_from, place, reflected, rows_join, store_tile


@triton.jit
def ring_pixels(start, out_width, height, width, MARGIN: tl.constexpr, BM: tl.constexpr):
    """Rows and columns of pixels that a reflection pad adds: first those above and below, then those at the sides."""
    o_p = start + tl.arange(0, BM)
    row = o_p // out_width
    column = o_p % out_width
    beside = o_p - 2 * MARGIN * out_width
    side = beside % (2 * MARGIN)
    row = tl.where(beside < 0, tl.where(row < MARGIN, row, row + height), MARGIN + beside // (2 * MARGIN))
    column = tl.where(beside < 0, column, tl.where(side < MARGIN, side, side + width))
    return row, column


@triton.jit
def band_pixels(start, height, width, MARGIN: tl.constexpr, BM: tl.constexpr):
    """Rows, columns and mask of the pixels within MARGIN of a border, which may have copies in a padded map."""
    o_p = start + tl.arange(0, BM)
    rows = tl.minimum(2 * MARGIN + 2, height)
    columns = tl.minimum(2 * MARGIN + 2, width)
    row = o_p // width
    beside = o_p - rows * width
    side = beside % columns
    column = tl.where(beside < 0, o_p % width, tl.where(side <= MARGIN, side, side + width - columns))
    row = tl.where(beside < 0, tl.where(row <= MARGIN, row, row + height - rows), MARGIN + 1 + beside // columns)
    return row, column, o_p < rows * width + (height - rows) * columns


@triton.jit
def load_copies(source, image, row, column, m_p, o_c, m_c, height, width, MARGIN: tl.constexpr):
    """The sum of all copies of each pixel in a padded map, in a fixed order."""
    value = load_tile(source, image, row + MARGIN, column + MARGIN, m_p, o_c, m_c, True)
    for side_y in tl.static_range(3):
        at_y, m_y = copy_of(row, height, side_y, MARGIN)
        for side_x in tl.static_range(3):
            if side_y + side_x > 0:
                at_x, m_x = copy_of(column, width, side_x, MARGIN)
                value += load_tile(source, image, at_y, at_x, m_p & m_y & m_x, o_c, m_c, True)
    return value


@triton.jit
def copy_of(position, size, SIDE: tl.constexpr, MARGIN: tl.constexpr):
    """Along one axis: where the copy on a side is in the padded map, and whether there is one."""
    if SIDE == 0:
        return position + MARGIN, position >= 0
    elif SIDE == 1:
        return MARGIN - position, (position >= 1) & (position <= MARGIN)
    else:
        return 2 * (size - 1) - position + MARGIN, (position <= size - 2) & (position >= size - 1 - MARGIN)


@triton.jit
def widened(kept, count):
    """Values of 16 bits in float32. `count` is positive, but the compiler does not know that.

    It would otherwise keep the float32 values of the first use, which need twice the registers.
    """
    if kept.dtype == tl.float32:
        return kept
    else:
        zero = (tl.cast(count, tl.int32) < 0).to(tl.int16)
        return (kept.to(tl.int16, bitcast=True) ^ zero).to(kept.dtype, bitcast=True).to(tl.float32)


@triton.jit
def whole_norm_kernel(
    x, residual, out, statistics, channels, height, width, out_height, out_width, pixels, places, tiles, eps,
    SLOPE: tl.constexpr, RESIDUAL: tl.constexpr, MARGIN: tl.constexpr, KIND: tl.constexpr, TAPS: tl.constexpr,
    FLAT: tl.constexpr, BP: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """All output pixels of a plane. `tiles` tiles of `places` pixels are in the ring of a pad, or behind a blur."""
    image, _, first_c = place(channels, 1, BC)
    o_c = first_c + tl.arange(0, BC)
    m_c = o_c < channels
    row, column = pixels_from(0, width, FLAT, BP)
    m_p = tl.arange(0, BP) < pixels
    value = load_tile(x, image, row, column, m_p, o_c, m_c, True)
    count = tl.cast(pixels, tl.float32)
    mean = tl.sum(value, 0) / count
    apart = tl.where(m_p[:, None], value - mean[None, :], 0.0)
    off = tl.sum(apart, 0) / count  # what rounding has left of the mean
    scale = 1.0 / tl.sqrt(tl.maximum(tl.sum(apart * apart, 0) / count - off * off, 0.0) + eps)
    mean += off
    p_s = statistics + image * 2 * channels + o_c
    tl.store(p_s, mean, mask=m_c)
    tl.store(p_s + channels, scale, mask=m_c)
    if KIND is None:
        value = activated((value - mean[None, :]) * scale[None, :], SLOPE)
        if RESIDUAL:
            value += load_tile(residual, image, row, column, m_p, o_c, m_c, True)
        store_tile(out, value, image, row + MARGIN, column + MARGIN, m_p, o_c, m_c, True)
        if MARGIN > 0:
            for t in range(tiles):
                to_row, to_column = ring_pixels(t * BM, out_width, height, width, MARGIN, BM)
                m_r = t * BM + tl.arange(0, BM) < places
                at_row, at_column = reflected(to_row - MARGIN, height), reflected(to_column - MARGIN, width)
                copied = layer_tile(
                    x, residual, image, at_row, at_column, m_r, o_c, m_c, mean, scale, SLOPE, RESIDUAL, True
                )  # fmt: skip
                store_tile(out, copied, image, to_row, to_column, m_r, o_c, m_c, True)
    else:
        for t in range(tiles):
            to_row, to_column = pixels_from(t * BM, out_width, False, BM)
            m_r = t * BM + tl.arange(0, BM) < places
            blurred = output_tile(
                x, residual, image, to_row, to_column, m_r, o_c, m_c, mean, scale, height, width, out_height,
                out_width, SLOPE, RESIDUAL, MARGIN, KIND, TAPS, BM, BC, True,
            )  # fmt: skip
            store_tile(out, blurred, image, to_row, to_column, m_r, o_c, m_c, True)


@triton.jit
def whole_gradient_kernel(
    x, gradient, inner, total, statistics, out, channels, height, width, out_height, out_width, pixels, places, tiles,
    each, SLOPE: tl.constexpr, INNER: tl.constexpr, TOTAL: tl.constexpr, MARGIN: tl.constexpr, KIND: tl.constexpr,
    TAPS: tl.constexpr, FLAT: tl.constexpr, BP: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """d_x of a plane; g is stored in `total` with TOTAL or behind a blur.

    `tiles` tiles of `places` pixels are in the ring of a pad, and `each` tiles in the band beside it.
    """
    image, _, first_c = place(channels, 1, BC)
    o_c = first_c + tl.arange(0, BC)
    m_c = o_c < channels
    p_s = statistics + image * 2 * channels + o_c
    mean = tl.load(p_s, mask=m_c, other=0.0)
    scale = tl.load(p_s + channels, mask=m_c, other=0.0)
    row, column = pixels_from(0, width, FLAT, BP)
    m_p = tl.arange(0, BP) < pixels
    if MARGIN > 0:
        arriving = load_tile(gradient, image, row + MARGIN, column + MARGIN, m_p, o_c, m_c, True)
        if INNER:
            arriving += load_tile(inner, image, row, column, m_p, o_c, m_c, True)
    elif KIND is not None:  # gathered pixel by pixel: all at once would need more registers than there are
        for t in range(tiles):
            at_row, at_column = pixels_from(t * BM, width, False, BM)
            m_r = t * BM + tl.arange(0, BM) < pixels
            gathered = adjoint_tile(
                gradient, inner, image, t * BM, at_row, at_column, m_r, o_c, m_c, height, width, out_height, out_width,
                INNER, 0, KIND, TAPS, BM, BC, True,
            )  # fmt: skip
            store_tile(total, gathered, image, at_row, at_column, m_r, o_c, m_c, True)
        tl.debug_barrier()
        arriving = load_tile(total, image, row, column, m_p, o_c, m_c, True)
    else:
        arriving = load_tile(gradient, image, row, column, m_p, o_c, m_c, True)
        if INNER:
            arriving += load_tile(inner, image, row, column, m_p, o_c, m_c, True)
    value = load_tile(x, image, row, column, m_p, o_c, m_c, True)
    kept_x = narrow(value, x.data.dtype.element_ty)  # half the registers
    kept = narrow(arriving, x.data.dtype.element_ty)
    normal = (value - mean[None, :]) * scale[None, :]
    arriving = through_activation(arriving, normal, SLOPE)
    of_gradient = tl.sum(arriving, 0)
    of_product = tl.sum(arriving * normal, 0)
    if MARGIN > 0:  # each pixel of the ring is a copy of a pixel of y
        for t in range(tiles):
            at_row, at_column = ring_pixels(t * BM, out_width, height, width, MARGIN, BM)
            m_r = t * BM + tl.arange(0, BM) < places
            copied = load_tile(gradient, image, at_row, at_column, m_r, o_c, m_c, True)
            at_row, at_column = reflected(at_row - MARGIN, height), reflected(at_column - MARGIN, width)
            of = (load_tile(x, image, at_row, at_column, m_r, o_c, m_c, True) - mean[None, :]) * scale[None, :]
            copied = through_activation(copied, of, SLOPE)
            of_gradient += tl.sum(copied, 0)
            of_product += tl.sum(copied * of, 0)
    count = tl.cast(pixels, tl.float32)
    of_gradient = (of_gradient / count)[None, :]
    of_product = (of_product / count)[None, :]
    if MARGIN > 0:
        away = (row > MARGIN) & (row < height - 1 - MARGIN) & (column > MARGIN) & (column < width - 1 - MARGIN)
        m_p = m_p & away
    if TOTAL and KIND is None:
        store_tile(total, kept, image, row, column, m_p, o_c, m_c, True)
    normal = (widened(kept_x, pixels) - mean[None, :]) * scale[None, :]
    arriving = through_activation(widened(kept, pixels), normal, SLOPE)
    value = (arriving - of_gradient - normal * of_product) * scale[None, :]
    store_tile(out, value, image, row, column, m_p, o_c, m_c, True)
    if MARGIN > 0:
        for t in range(each):
            at_row, at_column, m_r = band_pixels(t * BM, height, width, MARGIN, BM)
            copied = load_copies(gradient, image, at_row, at_column, m_r, o_c, m_c, height, width, MARGIN)
            if INNER:
                copied += load_tile(inner, image, at_row, at_column, m_r, o_c, m_c, True)
            if TOTAL:
                store_tile(total, copied, image, at_row, at_column, m_r, o_c, m_c, True)
            of = (load_tile(x, image, at_row, at_column, m_r, o_c, m_c, True) - mean[None, :]) * scale[None, :]
            copied = through_activation(copied, of, SLOPE)
            copied = (copied - of_gradient - of * of_product) * scale[None, :]
            store_tile(out, copied, image, at_row, at_column, m_r, o_c, m_c, True)


def _second(tile: Tile) -> int:
    """Pixels of a tile of the second loop: one for each thread."""
    return min(tile.block_m, 32 * tile.warps)


def forward(tile: Tile, x: Tensor, residual: Tensor, out: Tensor, statistics: Tensor, eps: float, form: dict) -> None:
    """Start `whole_norm_kernel`; `form` has its constants."""
    images, channels, height, width = x.shape
    out_height, out_width = out.shape[2:]
    moved = form["MARGIN"] > 0 or form["KIND"] is not None
    places = out_height * out_width - (height * width if form["KIND"] is None else 0)
    second = _second(tile)
    launch(
        whole_norm_kernel, images * triton.cdiv(channels, tile.block_n), x, as_map(x), as_map(residual), as_map(out),
        statistics, channels, height, width, out_height, out_width, height * width, places,
        triton.cdiv(places, second), eps, **form, FLAT=not moved and rows_join(x, residual, out), BP=tile.block_m,
        BM=second, BC=tile.block_n, num_warps=tile.warps,
    )  # fmt: skip


def backward(
    tile: Tile, gradient: Tensor, inner: Tensor, x: Tensor, statistics: Tensor, out: Tensor, ready: Tensor,
    form: dict[str, Any], total: bool,
) -> None:  # fmt: skip
    """Start `whole_gradient_kernel`, which writes g to `ready` if `total` or blurred; `form` has its constants."""
    images, channels, height, width = x.shape
    out_height, out_width = gradient.shape[2:]
    margin = form["MARGIN"]
    blurred = form["KIND"] is not None
    places = height * width if blurred else out_height * out_width - height * width
    rows, columns = min(2 * margin + 2, height), min(2 * margin + 2, width)
    band = rows * width + (height - rows) * columns if margin else 0
    second = _second(tile)
    flat = margin == 0 and not blurred and rows_join(x, gradient, inner, ready, out)
    launch(
        whole_gradient_kernel, images * triton.cdiv(channels, tile.block_n), x, as_map(x), as_map(gradient),
        as_map(inner), as_map(ready), statistics, as_map(out), channels, height, width, out_height, out_width,
        height * width, places, triton.cdiv(places, second), triton.cdiv(band, second), **form, TOTAL=total, FLAT=flat,
        BP=tile.block_m, BM=second, BC=tile.block_n, num_warps=tile.warps,
    )  # fmt: skip
