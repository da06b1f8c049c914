"""Instance norm without parameters, fused with what follows it: a (leaky) ReLU, a reflection pad, a residual sum.

Forward: `moments_kernel` (one part of a plane per program), `join_kernel` (joins the parts of a plane), and
`normalise_kernel`, which writes the activated and padded map, or the sum with a residual. Backward: `sums_kernel`,
`join_kernel`, `gradient_kernel`. The backward recomputes the ReLU's mask and the normalised values from x, the mean and
1 / deviation.

Reads + writes per element of x: forward 2 + 1, with a residual 3 + 1; backward 4 + 1. (Separate norm, ReLU and pad move
3 + 2 + 2 forward and 2 + 3 + 5 backward.) A map that stays in the cache between two launches is read from memory once,
so the minimum is 1 + 1 forward and 2 + 1 backward.

Means and squared deviations are updated value by value (Welford, 1962) and the parts are joined (Chan et al., 1979).
So a flat image of millions of pixels keeps its digits, which sums of squares in float32 would lose. Sums run in a fixed
order without atomics: the same input gives the same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .common import architecture, launch
from .planes import (
    as_map,
    check_plane,
    empty_like,
    is_channels_last,
    load_folded,
    load_tile,
    pixels_from,
    place,
    reflected,
    rows_join,
    store_tile,
)
from .planned import planned


@triton.jit
def joined(mean, squares, count, total):
    """Mean and sum of squared deviations of parts, joined along axis 0. `count` is [parts, 1]."""
    centre = tl.sum(mean * count, 0) / total
    centre += tl.sum((mean - centre[None, :]) * count, 0) / total  # corrects the rounding
    apart = mean - centre[None, :]
    return centre, tl.sum(squares + apart * apart * count, 0)


@triton.jit
def moments_kernel(
    x, out, channels, width, pixels, parts, tiles, eps, WHOLE: tl.constexpr, FLAT: tl.constexpr, BM: tl.constexpr,
    BC: tl.constexpr,
):  # fmt: skip
    """Mean and sum of squared deviations of `tiles` tiles of a plane, or mean and 1 / deviation of a WHOLE plane.

    `out` is float32 (images, parts, 2, channels).
    """
    image, part, first_c = place(channels, parts, BC)
    o_c = first_c + tl.arange(0, BC)
    m_c = o_c < channels
    first = part * tiles * BM
    last = tl.minimum(pixels - first, tiles * BM)  # pixels of this part
    mean = tl.zeros([BM, BC], tl.float32)
    squares = tl.zeros([BM, BC], tl.float32)
    for t in range(tiles):
        start = first + t * BM
        row, column = pixels_from(start, width, FLAT, BM)
        m_p = start + tl.arange(0, BM) < pixels
        value = load_tile(x, image, row, column, m_p, o_c, m_c)
        apart = tl.where(m_p[:, None], value - mean, 0.0)
        mean += apart * (1.0 / (t + 1))
        squares += apart * (value - mean)
    count = ((last - tl.arange(0, BM) + BM - 1) // BM).to(tl.float32)[:, None]  # values per row of the tile
    total = last.to(tl.float32)
    centre, deviations = joined(mean, squares, tl.maximum(count, 0.0), total)
    if WHOLE:
        deviations = 1.0 / tl.sqrt(deviations / total + eps)
    p_o = out + (image * parts + part) * 2 * channels + o_c
    tl.store(p_o, centre, mask=m_c)
    tl.store(p_o + channels, deviations, mask=m_c)


@triton.jit
def join_kernel(
    partial, out, channels, pixels, parts, span, eps, MOMENTS: tl.constexpr, BS: tl.constexpr, BC: tl.constexpr
):
    """Join (images, parts, 2, channels) to (images, 2, channels): mean and 1 / deviation if MOMENTS, else mean sums.

    A part has `span` pixels; the last one may have fewer.
    """
    image, _, first_c = place(channels, 1, BC)
    o_c = first_c + tl.arange(0, BC)
    o_s = tl.arange(0, BS)
    mask = (o_s < parts)[:, None] & (o_c < channels)[None, :]
    p_p = partial + (image * parts + o_s[:, None]) * 2 * channels + o_c[None, :]
    one = tl.load(p_p, mask=mask, other=0.0)  # [BS, BC]
    other = tl.load(p_p + channels, mask=mask, other=0.0)
    total = tl.cast(pixels, tl.float32)  # `pixels` of 1 is a constant, which has no method `to`
    if MOMENTS:
        rest = pixels - tl.minimum(o_s, parts - 1) * span
        count = tl.where(o_s < parts, tl.minimum(rest, span), 0).to(tl.float32)[:, None]
        mean, deviations = joined(one, other, count, total)
        second = 1.0 / tl.sqrt(deviations / total + eps)
    else:
        mean = tl.sum(one, 0) / total
        second = tl.sum(other, 0) / total
    p_o = out + image * 2 * channels + o_c
    tl.store(p_o, mean, mask=o_c < channels)
    tl.store(p_o + channels, second, mask=o_c < channels)


@triton.jit
def normalise_kernel(
    x, residual, out, statistics, channels, height, width, out_width, pixels, parts, SLOPE: tl.constexpr,
    RESIDUAL: tl.constexpr, MARGIN: tl.constexpr, FLAT: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Pixels of the output, each from its source pixel in x."""
    image, part, first_c = place(channels, parts, BC)
    o_c = first_c + tl.arange(0, BC)
    m_c = o_c < channels
    p_s = statistics + image * 2 * channels + o_c
    mean = tl.load(p_s, mask=m_c, other=0.0)[None, :]
    scale = tl.load(p_s + channels, mask=m_c, other=0.0)[None, :]
    start = part * BM
    row, column = pixels_from(start, out_width, FLAT, BM)
    m_p = start + tl.arange(0, BM) < pixels
    if MARGIN > 0:
        from_row, from_column = reflected(row - MARGIN, height), reflected(column - MARGIN, width)
        value = load_tile(x, image, from_row, from_column, m_p, o_c, m_c)
    else:
        value = load_tile(x, image, row, column, m_p, o_c, m_c)
    value = (value - mean) * scale
    if SLOPE == 0.0:
        value = tl.where(value < 0, 0.0, value)  # NaN stays
    elif SLOPE != 1.0:
        value = tl.where(value < 0, SLOPE * value, value)
    if RESIDUAL:
        value += load_tile(residual, image, row, column, m_p, o_c, m_c)
    store_tile(out, value, image, row, column, m_p, o_c, m_c)


@triton.jit
def normal_and_gradient(
    x, gradient, statistics, channels, image, start, o_c, m_c, m_p, row, column, height, width,
    SLOPE: tl.constexpr, MARGIN: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """A tile of normalised values, the gradient with respect to them, and 1 / deviation."""
    p_s = statistics + image * 2 * channels + o_c
    mean = tl.load(p_s, mask=m_c, other=0.0)[None, :]
    scale = tl.load(p_s + channels, mask=m_c, other=0.0)[None, :]
    normal = (load_tile(x, image, row, column, m_p, o_c, m_c) - mean) * scale
    arriving = load_folded(gradient, image, start, row, column, m_p, o_c, m_c, height, width, MARGIN, BM)
    if SLOPE == 0.0:
        arriving = tl.where(normal > 0, arriving, 0.0)
    elif SLOPE != 1.0:
        arriving = tl.where(normal > 0, arriving, SLOPE * arriving)
    return normal, arriving, scale


@triton.jit
def sums_kernel(
    x, gradient, statistics, out, channels, height, width, pixels, parts, tiles, SLOPE: tl.constexpr,
    MARGIN: tl.constexpr, FLAT: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Sums of the gradient and of gradient * normalised value over `tiles` tiles. `out` is as in `moments_kernel`."""
    image, part, first_c = place(channels, parts, BC)
    o_c = first_c + tl.arange(0, BC)
    m_c = o_c < channels
    total = tl.zeros([BM, BC], tl.float32)
    product = tl.zeros([BM, BC], tl.float32)
    for t in range(tiles):
        start = (part * tiles + t) * BM
        row, column = pixels_from(start, width, FLAT, BM)
        m_p = start + tl.arange(0, BM) < pixels
        normal, arriving, _ = normal_and_gradient(
            x, gradient, statistics, channels, image, start, o_c, m_c, m_p, row, column, height, width,
            SLOPE, MARGIN, BM,
        )  # fmt: skip
        total += arriving  # 0 where masked
        product += arriving * normal
    p_o = out + (image * parts + part) * 2 * channels + o_c
    tl.store(p_o, tl.sum(total, 0), mask=m_c)
    tl.store(p_o + channels, tl.sum(product, 0), mask=m_c)


@triton.jit
def gradient_kernel(
    x, gradient, statistics, means, out, channels, height, width, pixels, parts, SLOPE: tl.constexpr,
    MARGIN: tl.constexpr, FLAT: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """d_x = (g - mean(g) - n * mean(g * n)) / deviation, for normalised values n and their gradient g."""
    image, part, first_c = place(channels, parts, BC)
    o_c = first_c + tl.arange(0, BC)
    m_c = o_c < channels
    start = part * BM
    row, column = pixels_from(start, width, FLAT, BM)
    m_p = start + tl.arange(0, BM) < pixels
    normal, arriving, scale = normal_and_gradient(
        x, gradient, statistics, channels, image, start, o_c, m_c, m_p, row, column, height, width, SLOPE,
        MARGIN, BM,
    )  # fmt: skip
    p_m = means + image * 2 * channels + o_c
    of_gradient = tl.load(p_m, mask=m_c, other=0.0)[None, :]
    of_product = tl.load(p_m + channels, mask=m_c, other=0.0)[None, :]
    store_tile(out, (arriving - of_gradient - normal * of_product) * scale, image, row, column, m_p, o_c, m_c)


def _split(x: Tensor, arch: str, tile: configs.Tile) -> tuple[int, int]:
    """(parts per plane, tiles per part)."""
    tiles = triton.cdiv(x.shape[2] * x.shape[3], tile.block_m)
    parts = configs.layer_splits(arch, x.shape[0] * triton.cdiv(x.shape[1], tile.block_n), tiles)
    each = triton.cdiv(tiles, parts)
    return triton.cdiv(tiles, each), each


def _join(partial: Tensor, pixels: int, span: int, eps: float, moments: bool) -> Tensor:
    images, parts, _, channels = partial.shape
    out = torch.empty(images, 2, channels, dtype=torch.float32, device=partial.device)
    tile = configs.find_tile("layer_join", architecture(partial.device))
    launch(
        join_kernel, images * triton.cdiv(channels, tile.block_n), partial, partial, out, channels, pixels, parts,
        span, eps, MOMENTS=moments, BS=triton.next_power_of_2(parts), BC=tile.block_n, num_warps=tile.warps,
    )  # fmt: skip
    return out


def moments(x: Tensor, eps: float) -> Tensor:
    """float32 (images, 2, channels): the mean of each plane, and 1 / sqrt(variance + eps)."""
    check_plane(x)
    images, channels, height, width = x.shape
    arch = architecture(x.device)
    tile = configs.layer_tile(arch, channels, is_channels_last(x))
    parts, tiles = _split(x, arch, tile)
    partial = torch.empty(images, parts, 2, channels, dtype=torch.float32, device=x.device)
    launch(
        moments_kernel, images * parts * triton.cdiv(channels, tile.block_n), x, as_map(x), partial, channels, width,
        height * width, parts, tiles, eps,
        WHOLE=parts == 1, FLAT=rows_join(x), BM=tile.block_m, BC=tile.block_n, num_warps=tile.warps,
    )  # fmt: skip
    if parts == 1:
        return partial.view(images, 2, channels)
    return _join(partial, height * width, tiles * tile.block_m, eps, True)


@planned
def instance_norm(x: Tensor, residual: Tensor | None, eps: float, slope: float, margin: int) -> tuple[Tensor, Tensor]:
    """Normalise each plane to mean 0 and variance 1, then activate and pad, or add a residual: two or three launches.

    Args:
        x: (images, channels, height, width), float32, bfloat16 or float16, any strides.
        residual: added at the end, of x's shape; cannot be combined with a margin.
        slope: of the activation for negative values: 1 for none, 0 for ReLU, between them for leaky ReLU.
        margin: of the reflection pad, smaller than height and width.

    Returns:
        the result (images, channels, height + 2 * margin, width + 2 * margin) in x's dtype and layout, and the
        `moments` of x.
    """
    statistics = moments(x, eps)
    images, channels, height, width = x.shape
    out = empty_like(x, height + 2 * margin, width + 2 * margin)
    check_plane(out)
    tile = configs.layer_tile(architecture(x.device), channels, is_channels_last(x))
    pixels = out.shape[2] * out.shape[3]
    parts = triton.cdiv(pixels, tile.block_m)
    added = x if residual is None else residual
    launch(
        normalise_kernel, images * parts * triton.cdiv(channels, tile.block_n), x, as_map(x), as_map(added),
        as_map(out), statistics, channels, height, width, out.shape[3], pixels, parts,
        SLOPE=slope, RESIDUAL=residual is not None, MARGIN=margin, FLAT=margin == 0 and rows_join(x, added, out),
        BM=tile.block_m, BC=tile.block_n, num_warps=tile.warps,
    )  # fmt: skip
    return out, statistics


@planned
def instance_norm_backward(gradient: Tensor, x: Tensor, statistics: Tensor, slope: float, margin: int) -> Tensor:
    """The gradient of x, in its dtype and layout, from the gradient of the (padded) output: two or three launches.

    The gradient of a residual is the gradient of the output.
    """
    images, channels, height, width = x.shape
    check_plane(gradient)
    arch = architecture(x.device)
    tile = configs.layer_tile(arch, channels, is_channels_last(x), reads=3 if margin else 2)
    parts, tiles = _split(x, arch, tile)
    pixels = height * width
    flat = margin == 0 and rows_join(x, gradient)
    partial = torch.empty(images, parts, 2, channels, dtype=torch.float32, device=x.device)
    maps, across = (as_map(x), as_map(gradient), statistics), triton.cdiv(channels, tile.block_n)
    launch(
        sums_kernel, images * parts * across, x, *maps, partial, channels, height, width, pixels, parts, tiles,
        SLOPE=slope, MARGIN=margin, FLAT=flat, BM=tile.block_m, BC=tile.block_n, num_warps=tile.warps,
    )  # fmt: skip
    means = _join(partial, pixels, tiles * tile.block_m, 0.0, False)
    out = empty_like(x, height, width)
    parts = triton.cdiv(pixels, tile.block_m)
    launch(
        gradient_kernel, images * parts * across, x, *maps, means, as_map(out), channels, height, width, pixels,
        parts, SLOPE=slope, MARGIN=margin, FLAT=flat and rows_join(out), BM=tile.block_m, BC=tile.block_n,
        num_warps=tile.warps,
    )  # fmt: skip
    return out
