"""Convolutions with few output channels, as the last one of a generator: 16-bit maps in, float32 out.

One matrix product per tap would read x kernel^2 times and leave most columns of the matrix unit empty. Here the columns
of one product are all taps of a row of the kernel, times four outputs, so x is read once per row of the kernel:

    Y[p, tap, o] = sum over rows i and channels c of x[p + row i, c] w[o, c, i, tap]
    out[p, o] = sum over taps of Y[p + tap, tap, o]

Pixels are numbered row by row in the padded image, `span` per row, so the next pixel of a row has the next number.
Positions beyond the end of a row belong to no output. A program computes OUT outputs.

Weights are not rounded to 16 bits. They are split into two bfloat16 numbers, w = high + low, exact to 2^-17. Both are
columns of the same product, so x is read once and used as it is in memory. (TF32 is exact to 2^-11, takes as much time,
and needs x widened in registers.) x of float16 is also split into two bfloat16 numbers, without any error. Float32 maps
are multiplied exactly, or in TF32 if PyTorch may use it, rounded to nearest: the matrix unit itself would truncate.

An infinity in a 16-bit map becomes NaN in the outputs that read it, because the low part of a weight may be zero.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import chosen, configs
from .common import architecture, dot, launch, narrow, precision
from .planes import as_map, check_plane, is_channels_last
from .planned import planned

OUT: tl.constexpr = tl.constexpr(4)
"""Output channels per program: with both parts of a bfloat16 pair they are one load of 16 bytes."""
MOST_OUTPUTS = 16
MOST_TAPS = 7


class Geometry(NamedTuple):
    """Sizes of a convolution of stride 1, and how its pixels are numbered."""

    kernel: int
    padding: int
    channels: int
    outputs: int
    height: int
    width: int

    @property
    def span(self) -> int:
        """Pixels per padded row."""
        return self.width + 2 * self.padding

    @property
    def rows(self) -> int:
        return self.height + 2 * self.padding

    @property
    def out_height(self) -> int:
        return self.rows - self.kernel + 1

    @property
    def out_width(self) -> int:
        return self.span - self.kernel + 1

    @property
    def blocks(self) -> int:
        """The number of blocks of OUT outputs."""
        return triton.cdiv(self.outputs, OUT.value)


def obstacle(outputs: int, channels: int, kernel: int, width: int) -> str | None:
    """Why the kernels do not support weights of this shape, or None if they do."""
    if 1 <= outputs <= MOST_OUTPUTS and channels >= 1 and kernel == width and kernel % 2 and kernel <= MOST_TAPS:
        return None
    return (
        f"weights are (outputs, channels, kernel, kernel) with at most {MOST_OUTPUTS} outputs and an odd kernel of at "
        f"most {MOST_TAPS}, not {(outputs, channels, kernel, width)}"
    )


def geometry(x: Tensor, weight: Tensor, padding: int) -> Geometry:
    """The sizes of a convolution. Raises ValueError if the kernels cannot compute it."""
    if (why := obstacle(*weight.shape)) is not None:
        raise ValueError(why)
    outputs, channels, kernel, _ = weight.shape
    if x.shape[1] != channels:
        raise ValueError(f"the map has {x.shape[1]} channels, but the weights are for {channels}")
    found = Geometry(kernel, padding, channels, outputs, x.shape[2], x.shape[3])
    if padding < 0 or found.out_height < 1 or found.out_width < 1:
        raise ValueError(
            f"padding {padding} and a kernel of {kernel} leave no output of {x.shape[2]}x{x.shape[3]} pixels"
        )
    return found


def is_pair(dtype: torch.dtype) -> bool:
    """Whether the float32 factors of such maps are split into pairs of bfloat16."""
    return dtype != torch.float32


def padded_taps(kernel: int, pair: bool) -> int:
    """Taps per row of the kernel, padded to a power of two and, with the outputs, to at least 16 columns."""
    return triton.next_power_of_2(max(kernel, 16 // (OUT.value * (1 + pair))))


def channel_block(channels: int) -> int:
    """Channels that a program multiplies at once."""
    return min(configs.FEW_OUTPUTS_CHANNELS, max(16, triton.next_power_of_2(channels)))


def reads_lines(x: Tensor) -> bool:
    """Whether the channels of a pixel can be read 16 bytes at a time."""
    return x.stride(1) == 1 and x.shape[1] % 16 == 0


@triton.jit
def to_tf32(x):
    """x rounded to nearest with TF32's 10 bits. NaN is kept: its bits could overflow to zero."""
    bits = (x.to(tl.uint32, bitcast=True) + 0x1000) & 0xFFFFE000
    return tl.where(x == x, bits.to(tl.float32, bitcast=True), x)


@triton.jit
def pair_of(x):
    """float32 as the sum of two bfloat16 numbers."""
    high = narrow(x, tl.bfloat16)
    return high, narrow(x - high.to(tl.float32), tl.bfloat16)


@triton.jit
def pack_weight_kernel(
    weight, out, channels, outputs, total, K: tl.constexpr, KX: tl.constexpr, PAIR: tl.constexpr, ROWS: tl.constexpr,
    PADDED: tl.constexpr, TF32: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """Weights in the layout of `few_outputs_kernel`: (blocks of outputs, K + ROWS - 1, PADDED channels, columns).

    Columns are (ROWS, KX, parts of a pair, OUT). The i-th row of x that a program reads meets row i - r of the kernel
    for the r-th row of outputs. Positions without a weight are zero.
    """
    o_n = tl.program_id(0) * BM + tl.arange(0, BM)  # a position; both parts of a pair have the same one
    o = o_n % OUT
    tap = o_n // OUT % KX
    r = o_n // (OUT * KX) % ROWS
    c = o_n // (OUT * KX * ROWS) % PADDED
    i = o_n // (OUT * KX * ROWS * PADDED) % (K + ROWS - 1)
    o += o_n // (OUT * KX * ROWS * PADDED * (K + ROWS - 1)) * OUT
    mask = (tap < K) & (c < channels) & (i >= r) & (i < r + K) & (o < outputs) & (o_n < total)
    p_w = weight.data + o.to(tl.int64) * weight.image + c.to(tl.int64) * weight.channel
    p_w += (i - r).to(tl.int64) * weight.y + tap.to(tl.int64) * weight.x
    value = tl.load(p_w, mask=mask, other=0.0).to(tl.float32)
    if PAIR:
        high, low = pair_of(value)
        p_o = out + o_n // OUT * (2 * OUT) + o_n % OUT
        tl.store(p_o, high, mask=o_n < total)
        tl.store(p_o + OUT, low, mask=o_n < total)
    else:
        tl.store(out + o_n, to_tf32(value) if TF32 else value, mask=o_n < total)


@triton.jit
def product(x, other, acc, PRECISION: tl.constexpr):
    """acc + x @ other, for x in the dtype of the map, and `other` bfloat16 pairs or float32."""
    if x.dtype == tl.float16:
        high, low = pair_of(x.to(tl.float32))
        return dot(high, other, dot(low, other, acc, PRECISION), PRECISION)
    elif x.dtype == tl.float32 and PRECISION == "tf32":
        return dot(to_tf32(x), other, acc, PRECISION)
    else:
        return dot(x, other, acc, PRECISION)


@triton.jit
def few_outputs_kernel(
    x, weight, bias, out, channels, outputs, height, width, out_height, out_width, span, places, parts, blocks,
    K: tl.constexpr, KX: tl.constexpr, PARTS: tl.constexpr, ROWS: tl.constexpr, PADDING: tl.constexpr,
    CHUNKS: tl.constexpr, BIAS: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """BM - K + 1 positions in each of ROWS rows of outputs, OUT channels."""
    N: tl.constexpr = ROWS * KX * PARTS * OUT
    block = tl.program_id(0)
    part = block // blocks % parts
    image = (block // blocks // parts).to(tl.int64)
    block = block % blocks
    o_m = tl.arange(0, BM)
    o_p = part * (BM - K + 1) + o_m  # in a plane of which each row is ROWS rows of outputs
    row = o_p // span * ROWS - PADDING
    column = o_p % span - PADDING
    o_c = tl.arange(0, BC)
    o_n = tl.arange(0, N)
    p_x = x.data + image * x.image
    p_x += (row.to(tl.int64) * x.y + column.to(tl.int64) * x.x)[:, None] + o_c.to(tl.int64)[None, :] * x.channel
    p_w = weight + block * ((K + ROWS - 1) * CHUNKS * BC * N) + o_c[:, None] * N + o_n[None, :]
    m_x = (column >= 0) & (column < width) & (o_p < places)
    acc = tl.zeros([BM, N], tl.float32)
    for step in range((K + ROWS - 1) * CHUNKS):
        i = step // CHUNKS
        c = step % CHUNKS * BC
        mask = m_x & (row + i >= 0) & (row + i < height)
        at = i * tl.cast(x.y, tl.int64) + c * tl.cast(x.channel, tl.int64)
        b_x = tl.load(p_x + at, mask=mask[:, None] & (c + o_c < channels)[None, :], other=0.0)
        b_w = tl.load(p_w + step * (BC * N))
        acc = product(b_x, b_w, acc, PRECISION)
    tap = o_n // (PARTS * OUT) % KX
    moved = tl.gather(acc, tl.minimum(o_m[:, None] + tap[None, :], BM - 1), 0)
    moved = tl.where((tap < K)[None, :], moved, 0.0)
    y = tl.sum(tl.reshape(moved, [BM * ROWS, KX * PARTS, OUT]), 1)  # [BM * ROWS, OUT]
    o_r = tl.arange(0, BM * ROWS) % ROWS
    o_m = tl.arange(0, BM * ROWS) // ROWS
    o_p = part * (BM - K + 1) + o_m
    row = o_p // span * ROWS + o_r
    column = o_p % span
    o_o = block * OUT + tl.arange(0, OUT)
    if BIAS:
        y += tl.load(bias + o_o, mask=o_o < outputs, other=0.0).to(tl.float32)[None, :]
    p_o = out.data + image * out.image
    p_o += (row.to(tl.int64) * out.y + column.to(tl.int64) * out.x)[:, None]
    p_o += o_o.to(tl.int64)[None, :] * out.channel
    m_o = (o_m < BM - K + 1) & (row < out_height) & (column < out_width) & (o_p < places)
    tl.store(p_o, y, mask=m_o[:, None] & (o_o < outputs)[None, :])


def packed_weight(weight: Tensor, pair: bool, rows: int, tf32: bool) -> Tensor:
    """The weights in the flat layout of `pack_weight_kernel`."""
    outputs, channels, kernel, _ = weight.shape
    taps, block = padded_taps(kernel, pair), channel_block(channels)
    padded = triton.cdiv(channels, block) * block
    total = triton.cdiv(outputs, OUT.value) * OUT.value * (kernel + rows - 1) * padded * rows * taps
    dtype = torch.bfloat16 if pair else torch.float32
    out = torch.empty(total * (1 + pair), dtype=dtype, device=weight.device)
    tile = configs.find_tile("pack_weight", architecture(weight.device))
    launch(
        pack_weight_kernel, triton.cdiv(total, tile.block_m), out, as_map(weight), out, channels, outputs, total,
        K=kernel, KX=taps, PAIR=pair, ROWS=rows, PADDED=padded, TF32=tf32, BM=tile.block_m, num_warps=tile.warps,
    )  # fmt: skip
    return out


def empty_output(x: Tensor, size: Geometry) -> Tensor:
    """An empty float32 output: channels-last if x is, else contiguous."""
    layout = torch.channels_last if is_channels_last(x) else torch.contiguous_format
    shape = (x.shape[0], size.outputs, size.out_height, size.out_width)
    return torch.empty(shape, dtype=torch.float32, device=x.device, memory_format=layout)


@planned(products="conv")
def few_outputs(x: Tensor, weight: Tensor, bias: Tensor | None, padding: int) -> Tensor:
    """The convolution of stride 1 in float32, in two launches.

    Args:
        x: (images, channels, height, width), bfloat16, float16 or float32, any strides.
        weight: (outputs, channels, kernel, kernel), outputs <= MOST_OUTPUTS, odd kernel <= MOST_TAPS; any dtype of x.
        bias: (outputs,), or None.
        padding: zeros on each side.

    Returns:
        float32 (images, outputs, height + 2 * padding - kernel + 1, width + 2 * padding - kernel + 1), channels-last if
        x is.
    """
    size = geometry(x, weight, padding)
    check_plane(x)
    arch = architecture(x.device)
    pair = is_pair(x.dtype)
    multiply = precision(arch, x.dtype, convolution=True)
    out = empty_output(x, size)
    tile = chosen.few_outputs_tile(arch, x.dtype, "forward", multiply == "tf32", reads_lines(x))
    rows, block = tile.block_n, channel_block(size.channels)
    packed = packed_weight(weight, pair, rows, multiply == "tf32")
    places = triton.cdiv(size.out_height, rows) * size.span
    parts = triton.cdiv(places, tile.block_m - size.kernel + 1)
    launch(
        few_outputs_kernel, x.shape[0] * parts * size.blocks, x, as_map(x), packed,
        packed if bias is None else bias.contiguous(), as_map(out), size.channels, size.outputs, size.height,
        size.width, size.out_height, size.out_width, size.span, places, parts, size.blocks,
        K=size.kernel, KX=padded_taps(size.kernel, pair), PARTS=1 + pair, ROWS=rows, PADDING=padding,
        CHUNKS=triton.cdiv(size.channels, block), BIAS=bias is not None, PRECISION=multiply, BM=tile.block_m, BC=block,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out
