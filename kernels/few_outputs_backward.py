"""Gradients of `few_outputs.py`: of the map, the weights and the bias. Without atomics, so results repeat to the bit.

The gradient g of the outputs is small, so it is copied once into the layout that both products need: four outputs
adjacent, rows as long as the padded rows of x, zeros around them. Then the values of all taps of a kernel row that read
a pixel, G[p, tap, o] = g[p + tap, o], are consecutive in memory: a row of the matrix G is a slice of the buffer that
begins one pixel after the previous row. With the kernel rotated by 180 degrees (ky', kx'):

    d_x[p, c] = sum over ky', kx', o of G[p + ky' span, kx', o] w[o, ky', kx', c]
    d_w[o, ky', kx', c] = sum over p of G[p + ky' span, kx', o] x[p, c]

For 16-bit maps the first product always uses TF32, its factors rounded to nearest, because its result is rounded to 16
bits. For float32 maps it is exact unless PyTorch may use TF32. In the second product, g is split into two bfloat16
numbers, exact to 2^-17, and x is used as it is in memory. Sums over pixels are split into parts, which a second launch
adds in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import chosen, configs
from .common import architecture, bound, dot, launch, narrow, precision
from .few_outputs import (
    OUT,
    Geometry,
    channel_block,
    geometry,
    is_pair,
    padded_taps,
    pair_of,
    product,
    reads_lines,
    to_tf32,
)
from .planes import as_map, check_plane, empty_like, rows_join
from .planned import planned


@triton.jit
def pack_gradient_kernel(
    gradient, wide, pairs, totals, images, outputs, out_height, out_width, span, front, length, parts, tiles,
    WIDE: tl.constexpr, PAIRS: tl.constexpr, TOTALS: tl.constexpr, TF32: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """g as (blocks of outputs, images, length, OUT) in float32 and as pairs, and its sums, one row per program."""
    program = tl.program_id(0)
    part = program % parts
    image = (program // parts % images).to(tl.int64)
    block = (program // parts // images).to(tl.int64)
    o_o = tl.arange(0, OUT)
    o = block * OUT + o_o
    total = tl.zeros([OUT], tl.float32)
    p_g = gradient.data + image * gradient.image + (o * gradient.channel)[None, :]
    first = (block * images + image) * length
    for t in range(bound(tiles)):
        o_j = (part * tiles + t) * BM + tl.arange(0, BM)
        m_j = (o_j < length)[:, None] & (o_o < OUT)[None, :]
        o_p = tl.maximum(o_j - front, 0)
        row, column = o_p // span, o_p % span
        inside = (o_j >= front) & (row < out_height) & (column < out_width)
        offset = row.to(tl.int64) * gradient.y + column.to(tl.int64) * gradient.x
        mask = inside[:, None] & (o < outputs)[None, :]
        value = tl.load(p_g + offset[:, None], mask=mask, other=0.0).to(tl.float32)  # [BM, OUT]
        total += tl.sum(value, 0)
        at = (first + o_j)[:, None]
        if WIDE:
            tl.store(wide + at * OUT + o_o[None, :], to_tf32(value) if TF32 else value, mask=m_j)
        if PAIRS:
            high, low = pair_of(value)
            tl.store(pairs + at * (2 * OUT) + o_o[None, :], high, mask=m_j)
            tl.store(pairs + at * (2 * OUT) + OUT + o_o[None, :], low, mask=m_j)
    if TOTALS:
        tl.store(totals + program.to(tl.int64) * OUT + o_o, total)


@triton.jit
def map_gradient_kernel(
    wide, weight, out, images, channels, outputs, height, width, span, pixels, length, parts, blocks, K: tl.constexpr,
    KX: tl.constexpr, PADDING: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """BM pixels of the padded image by BC channels; pixels of the padding are dropped."""
    block = tl.program_id(0)
    across = tl.cdiv(channels, BC)
    part = block // across % parts
    image = (block // across // parts).to(tl.int64)
    o_c = block % across * BC + tl.arange(0, BC)
    m_c = o_c < channels
    o_p = part * BM + tl.arange(0, BM)
    m_p = o_p < pixels
    o_n = tl.arange(0, KX * OUT)
    tap = o_n // OUT
    p_g = wide + (image * length + o_p)[:, None] * OUT + o_n[None, :]
    p_w = weight.data + (o_n % OUT).to(tl.int64)[:, None] * weight.image + o_c.to(tl.int64)[None, :] * weight.channel
    p_w += (K - 1 - tap).to(tl.int64)[:, None] * weight.x
    acc = tl.zeros([BM, BC], tl.float32)
    for step in range(bound(blocks) * K):
        i = step % K  # a row of the rotated kernel
        b = step // K
        b_g = tl.load(p_g + (b * tl.cast(images, tl.int64) * length + i * span) * OUT, mask=m_p[:, None], other=0.0)
        m_w = (tap < K) & (b * OUT + o_n % OUT < outputs)
        at = b * OUT * tl.cast(weight.image, tl.int64) + (K - 1 - i) * tl.cast(weight.y, tl.int64)
        b_w = tl.load(p_w + at, mask=m_w[:, None] & m_c[None, :], other=0.0).to(tl.float32)
        if PRECISION == "tf32":
            b_w = to_tf32(b_w)
        acc = dot(b_g, b_w, acc, PRECISION)
    row, column = o_p // span - PADDING, o_p % span - PADDING
    inside = m_p & (row >= 0) & (row < height) & (column >= 0) & (column < width)
    p_o = out.data + image * out.image + (row.to(tl.int64) * out.y + column.to(tl.int64) * out.x)[:, None]
    p_o += o_c.to(tl.int64)[None, :] * out.channel
    tl.store(p_o, narrow(acc, out.data.dtype.element_ty), mask=inside[:, None] & m_c[None, :])


@triton.jit
def few_outputs_sums_kernel(
    x, packed, partial, images, channels, outputs, height, width, span, pixels, length, columns, tiles, each,
    K: tl.constexpr, KX: tl.constexpr, PARTS: tl.constexpr, PADDING: tl.constexpr, FLAT: tl.constexpr,
    PRECISION: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """A part of the pixels of all images, BC channels by BN columns of G.

    `partial` is (parts, outputs, K, K, channels). An image has `tiles` tiles of BK pixels, a part has `each` tiles.
    Programs that read the same pixels are adjacent.
    """
    LINE: tl.constexpr = KX * PARTS * OUT
    block = tl.program_id(0)
    along = tl.cdiv(columns, BN)
    across = tl.cdiv(channels, BC)
    part = block // along // across
    o_c = block // along % across * BC + tl.arange(0, BC)
    m_c = o_c < channels
    o_n = block % along * BN + tl.arange(0, BN)
    m_n = o_n < columns
    b = (o_n // (LINE * K)).to(tl.int64)
    i = o_n // LINE % K
    p_g = packed + (b * images * length + i * span) * (PARTS * OUT) + o_n % LINE
    p_x = x.data + o_c.to(tl.int64) * x.channel
    acc = tl.zeros([BC, BN], tl.float32)
    for t in range(bound(each)):
        tile = part * each + t
        image = (tile // tiles).to(tl.int64)
        o_p = tile % tiles * BK + tl.arange(0, BK)
        m_p = (o_p < pixels) & (image < images)
        b_g = tl.load(
            p_g[None, :] + ((image * length + o_p) * (PARTS * OUT))[:, None],
            mask=m_p[:, None] & m_n[None, :],
            other=0.0,
        )
        if FLAT:
            offset = image * x.image + o_p.to(tl.int64) * x.x
        else:
            row, column = o_p // span - PADDING, o_p % span - PADDING
            m_p = m_p & (row >= 0) & (row < height) & (column >= 0) & (column < width)
            offset = image * x.image + row.to(tl.int64) * x.y + column.to(tl.int64) * x.x
        b_x = tl.load(p_x[None, :] + offset[:, None], mask=m_p[:, None] & m_c[None, :], other=0.0)  # [BK, BC]
        acc = product(tl.trans(b_x), b_g, acc, PRECISION)
    acc = tl.sum(tl.reshape(acc, [BC, BN // (PARTS * OUT), PARTS, OUT]), 2)
    acc = tl.reshape(acc, [BC, BN // PARTS])
    o_n = block % along * (BN // PARTS) + tl.arange(0, BN // PARTS)
    o = o_n // (KX * OUT * K) * OUT + o_n % OUT
    y = K - 1 - o_n // (KX * OUT) % K
    tap = o_n // OUT % KX
    mask = m_c[:, None] & ((tap < K) & (o < outputs))[None, :]
    p_o = partial + part.to(tl.int64) * outputs * K * K * channels
    tl.store(p_o + (((o * K + y) * K + K - 1 - tap) * channels)[None, :] + o_c[:, None], acc, mask=mask)


@triton.jit
def few_outputs_join_kernel(
    partial, totals, d_weight, d_bias, channels, outputs, elements, parts, rows, programs, K: tl.constexpr,
    BS: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """Sums of all parts in a fixed order: weights in the first `programs` programs, biases in the others."""
    block = tl.program_id(0)
    o_s = tl.arange(0, BS)
    o_e = block * BE + tl.arange(0, BE)
    if block < programs:
        total = tl.zeros([BE], tl.float32)
        for s in range(0, bound(parts), BS):
            mask = (s + o_s < parts)[:, None] & (o_e < elements)[None, :]
            p_p = partial + (s + o_s).to(tl.int64)[:, None] * elements + o_e[None, :]
            total += tl.sum(tl.load(p_p, mask=mask, other=0.0), 0)
        c = (o_e % channels).to(tl.int64)
        x = (o_e // channels % K).to(tl.int64)
        y = (o_e // channels // K % K).to(tl.int64)
        o = (o_e // channels // (K * K)).to(tl.int64)
        p_w = d_weight.data + o * d_weight.image + c * d_weight.channel + y * d_weight.y + x * d_weight.x
        tl.store(p_w, total, mask=o_e < elements)
    else:
        o_o = tl.arange(0, OUT)
        b = (block - programs).to(tl.int64)
        summed = tl.zeros([OUT], tl.float32)
        for r in range(0, bound(rows), BS):
            p_t = totals + (b * rows + r + o_s)[:, None] * OUT + o_o[None, :]
            summed += tl.sum(tl.load(p_t, mask=(r + o_s < rows)[:, None] & (o_o < OUT)[None, :], other=0.0), 0)
        tl.store(d_bias + b * OUT + o_o, summed, mask=b * OUT + o_o < outputs)


def _packed_gradient(
    gradient: Tensor, size: Geometry, wide: bool, pairs: bool, totals: bool, tf32: bool, margin: int
) -> tuple[Tensor, Tensor, Tensor, int]:
    """(float32, pairs, sums (blocks, rows, OUT), length per image). Results that are not wanted are empty."""
    images = gradient.shape[0]
    front = (size.kernel - 1) * (size.span + 1)
    length = front + size.span * size.rows + margin
    tile = chosen.few_outputs_pack_tile(arch := architecture(gradient.device))
    tiles = triton.cdiv(length, tile.block_m)
    parts = chosen.layer_splits(arch, images * size.blocks, tiles)
    each = triton.cdiv(tiles, parts)
    parts = triton.cdiv(tiles, each)

    def empty(wanted: bool, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape if wanted else (0,), dtype=dtype, device=gradient.device)

    whole = empty(wide, size.blocks, images, length, OUT.value)
    halves = empty(pairs, size.blocks, images, length, 2 * OUT.value, dtype=torch.bfloat16)
    sums = empty(totals, size.blocks, images * parts, OUT.value)
    launch(
        pack_gradient_kernel, size.blocks * images * parts, gradient, as_map(gradient), whole, halves, sums, images,
        size.outputs, size.out_height, size.out_width, size.span, front, length, parts, each,
        WIDE=wide, PAIRS=pairs, TOTALS=totals, TF32=tf32, BM=tile.block_m, num_warps=tile.warps,
    )  # fmt: skip
    return whole, halves, sums, length


def _map_gradient(
    wide: Tensor, x: Tensor, weight: Tensor, out: Tensor, size: Geometry, length: int, multiply: str
) -> None:
    tile = chosen.few_outputs_tile(architecture(x.device), x.dtype, "map", multiply == "tf32", reads_lines(x))
    block = min(tile.block_n, channel_block(size.channels))
    pixels = size.span * size.rows
    parts = triton.cdiv(pixels, tile.block_m)
    launch(
        map_gradient_kernel, x.shape[0] * parts * triton.cdiv(size.channels, block), x, wide, as_map(weight),
        as_map(out), x.shape[0], size.channels, size.outputs, size.height, size.width, size.span, pixels, length, parts,
        size.blocks, K=size.kernel, KX=padded_taps(size.kernel, False), PADDING=size.padding, PRECISION=multiply,
        BM=tile.block_m, BC=block, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def _weight_sums(packed: Tensor, x: Tensor, size: Geometry, length: int, multiply: str) -> Tensor:
    """The gradient of the weights in parts: float32 (parts, outputs, kernel, kernel, channels)."""
    arch = architecture(x.device)
    pair = is_pair(x.dtype)
    tile = chosen.few_outputs_tile(arch, x.dtype, "weight", multiply == "tf32", reads_lines(x))
    taps, block = padded_taps(size.kernel, pair), channel_block(size.channels)
    columns = size.blocks * size.kernel * taps * (1 + pair) * OUT.value
    width = min(tile.block_n, triton.next_power_of_2(columns))
    pixels = size.span * size.rows
    tiles = triton.cdiv(pixels, tile.block_m)
    programs = triton.cdiv(columns, width) * triton.cdiv(size.channels, block)
    every = tiles * x.shape[0]
    each = max(1, triton.cdiv(every, chosen.layer_splits(arch, programs, every)))  # no images: no parts
    parts = triton.cdiv(every, each)
    partial = torch.empty(
        parts, size.outputs, size.kernel, size.kernel, size.channels, dtype=torch.float32, device=x.device
    )
    launch(
        few_outputs_sums_kernel, programs * parts, x, as_map(x), packed, partial, x.shape[0], size.channels,
        size.outputs, size.height, size.width, size.span, pixels, length, columns, tiles, each,
        K=size.kernel, KX=taps, PARTS=1 + pair, PADDING=size.padding, FLAT=size.padding == 0 and rows_join(x),
        PRECISION=multiply, BN=width, BC=block, BK=tile.block_m, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return partial


def empty_gradients(
    x: Tensor, weight: Tensor, of_x: bool, of_weight: bool, of_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Empty gradients of x, weight and bias; those that are not wanted have no elements."""
    return (
        empty_like(x, x.shape[2], x.shape[3]) if of_x else x.new_empty(0),
        torch.empty_like(weight, dtype=torch.float32) if of_weight else weight.new_empty(0, dtype=torch.float32),
        x.new_empty(weight.shape[0] if of_bias else 0, dtype=torch.float32),
    )


@planned(products="conv")
def few_outputs_backward(
    gradient: Tensor, x: Tensor, weight: Tensor, padding: int, of_x: bool, of_weight: bool, of_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, in its dtype and layout, of the weight, float32 in its layout, and of the bias, float32.

    Takes four launches, or fewer if not all gradients are wanted; those that are not wanted are empty. `gradient` is
    the gradient of the output, of any dtype and strides.
    """
    size = geometry(x, weight, padding)
    check_plane(x, gradient)
    arch = architecture(x.device)
    pair = is_pair(x.dtype)
    multiply = precision(arch, x.dtype, convolution=True)
    narrow_result = "tf32" if pair and arch.startswith("sm_") else multiply
    taps = max(padded_taps(size.kernel, False), padded_taps(size.kernel, pair))
    wide, pairs, totals, length = _packed_gradient(
        gradient, size, of_x or (of_weight and not pair), of_weight and pair, of_bias, narrow_result == "tf32", taps
    )
    d_x, d_weight, d_bias = empty_gradients(x, weight, of_x, of_weight, of_bias)
    if of_x:
        _map_gradient(wide, x, weight, d_x, size, length, narrow_result)
    if not (of_weight or of_bias):
        return d_x, d_weight, d_bias
    partial = _weight_sums(pairs if pair else wide, x, size, length, multiply) if of_weight else totals
    elements = weight.numel() if of_weight else 0
    tile = configs.find_tile("few_outputs_join", arch)
    programs = triton.cdiv(elements, tile.block_n)
    launch(
        few_outputs_join_kernel, programs + (size.blocks if of_bias else 0), x, partial, totals,
        as_map(d_weight if of_weight else weight), d_bias, size.channels, size.outputs, elements, partial.shape[0],
        totals.shape[1] if of_bias else 0, programs, K=size.kernel, BS=tile.block_m, BE=tile.block_n,
        num_warps=tile.warps,
    )  # fmt: skip
    return d_x, d_weight, d_bias
