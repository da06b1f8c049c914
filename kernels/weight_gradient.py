"""Gradients of the projectors' weights and biases for all layers in one launch; rows are summed in a fixed order.

Where rows are many and weights few, the rows are split over programs, and a second launch adds the parts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import chosen, configs
from .common import architecture, bound, dot, fields_of, launch, narrow, number_of, precision
from .planned import planned


class WeightGradient(NamedTuple):
    """One weight of `weight_gradient_kernel`. The output is its gradient, followed by the gradient of its bias."""

    d_out: Tensor  # flat, (rows, outputs) from `first_d_out` on
    inputs: Tensor  # flat, (rows, inputs) from `first_input` on
    rows: int
    size_m: int  # outputs
    size_n: int  # inputs
    first_block: int
    first_d_out: int
    first_input: int
    first_out: int


PART_ROWS = 512
"""The fewest rows of a layer that a program sums if rows are split."""


def rows_at_once(dtype: torch.dtype) -> int:
    """The rows that `weight_gradient_kernel` multiplies at once."""
    return 32 if dtype == torch.float32 else 64


def parts_of(arch: str, programs: int, rows: Sequence[int]) -> int:
    """Into how many parts the rows of each layer are split. `programs`: without a split."""
    return chosen.layer_splits(arch, programs, max(rows) // PART_ROWS) if sum(rows) >= configs.MANY_ROWS else 1


@triton.jit
def weight_tile(
    weights,
    out,
    block,
    each,
    parts,
    numbers,
    COUNT: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """`weight_gradient_kernel` for a weight whose inputs are (WIDE) or are not a multiple of 16."""
    one = WeightGradient(*fields_of(weights, block, COUNT))
    size_m = one.size_m
    size_n = one.size_n // 16 * 16 if WIDE else one.size_n  # tells the compiler that loads can be wide
    tile = (block - one.first_block).to(tl.int32)
    part = tile % parts
    tile = tile // parts
    across = tl.cdiv(size_n, BN)
    o_m = (tile // across) * BM + tl.arange(0, BM)
    o_n = (tile % across) * BN + tl.arange(0, BN)
    m_m = o_m < size_m
    m_n = o_n < size_n
    o_k = tl.arange(0, BK)
    first = part * each
    left = tl.minimum(one.rows - first, each)
    start = first.to(tl.int64)
    p_a = one.d_out + one.first_d_out + start * size_m + o_k[:, None] * size_m + o_m[None, :]
    p_b = one.inputs + one.first_input + start * size_n + o_k[:, None] * size_n + o_n[None, :]
    acc = tl.zeros([BM, BN], tl.float32)
    # 16-bit values are summed on the matrix unit too, which adds their exact products with 1 in float32
    DTYPE: tl.constexpr = one.d_out.dtype.element_ty  # type: ignore[attr-defined]
    total = tl.zeros([BM, 16], tl.float32)
    ones = narrow(tl.full([BK, 16], 1.0, tl.float32), DTYPE)
    for r in range(0, bound(left), BK):
        m_r = o_k < left - r
        a = tl.load(p_a, mask=m_r[:, None] & m_m[None, :], other=0.0)
        b = tl.load(p_b, mask=m_r[:, None] & m_n[None, :], other=0.0)
        if b.dtype != a.dtype:
            b = narrow(b, a.dtype)
        acc = dot(tl.trans(a), b, acc, PRECISION)
        if tl.float32 == DTYPE:
            total += tl.sum(a, 0)[:, None]
        else:
            total = dot(tl.trans(a), ones, total, PRECISION)
        p_a += BK * size_m
        p_b += BK * size_n
    out += part.to(tl.int64) * numbers + one.first_out
    tl.store(out + o_m[:, None] * size_n + o_n[None, :], acc, mask=m_m[:, None] & m_n[None, :])
    sums = tl.sum(tl.where((tl.arange(0, 16) == 0)[None, :], total, 0.0), 1)  # one of sixteen equal columns
    tl.store(out + size_m * size_n + o_m, sums, mask=m_m & (tile % across == 0))


@triton.jit
def weight_gradient_kernel(
    weights,
    out,
    each,
    parts,
    numbers,
    COUNT: tl.constexpr,
    ODD: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BO: tl.constexpr,
    BK: tl.constexpr,
):
    """d_weight = d_out^T inputs, and the sums of d_out, by tiles; rows in a fixed order.

    The rows of a weight are split into `parts` of `each` rows, with `numbers` results for each part. BN is
    the width of a tile where inputs are a multiple of 16, and BO where they are not (bits of ODD); 0 if there are none.
    """
    block = tl.program_id(0).to(tl.int64)
    odd = (ODD >> number_of(weights, block, COUNT)) & 1
    if BN > 0:  # noqa: SIM102 - known to the compiler
        if BO == 0 or odd == 0:
            weight_tile(weights, out, block, each, parts, numbers, COUNT, True, PRECISION, BM, BN, BK)
    if BO > 0:  # noqa: SIM102
        if BN == 0 or odd == 1:
            weight_tile(weights, out, block, each, parts, numbers, COUNT, False, PRECISION, BM, BO, BK)


@triton.jit
def weight_join_kernel(partial, out, parts, numbers, BLOCK: tl.constexpr):
    """Add the parts, in order."""
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = o < numbers
    acc = tl.load(partial + o, mask=inside, other=0.0)
    for part in range(1, bound(parts)):
        acc += tl.load(partial + part * numbers.to(tl.int64) + o, mask=inside, other=0.0)
    tl.store(out + o, acc, mask=inside)


@planned(products="matmul")
def weight_gradients(
    d_z: Tensor, d_h: Tensor, hidden: Tensor, sampled: Tensor, rows: Sequence[int], shapes: Sequence[torch.Size]
) -> Tensor:
    """The gradients of weight1, bias1, weight2, bias2 of each layer in turn: float32, flat, see `weight_views`.

    Args:
        d_z, d_h: gradients of the projections and of the hidden rows of all layers, flat, of one dtype.
        hidden, sampled: hidden rows and sampled rows of all layers, flat.
        rows: of each layer.
        shapes: of weight1, bias1, weight2, bias2 of each layer.
    """
    arch = architecture(d_z.device)
    product = precision(arch, d_z.dtype)
    tile = chosen.weight_gradient_tile(arch, d_z.dtype, sum(rows), product == "tf32")
    inputs_of = [shape[1] for shape in shapes[::2]]
    odd = max([n for n in inputs_of if n % 16], default=0)
    narrow_n = 16 if 0 < odd < 16 else tile.block_n if odd else 0
    wide_n = tile.block_n if any(n % 16 == 0 for n in inputs_of) else 0
    across = [triton.cdiv(n, narrow_n if n % 16 else wide_n) for n in inputs_of]
    tiles = [triton.cdiv(shape[0], tile.block_m) * n for shape, n in zip(shapes[::2], across, strict=True)]
    step = rows_at_once(d_z.dtype)
    parts = parts_of(arch, sum(tiles), rows)
    each = triton.cdiv(max(rows), parts * step) * step
    parts = triton.cdiv(max(rows), each)
    numbers = sum(shape.numel() for shape in shapes)
    out = torch.empty(numbers, dtype=torch.float32, device=d_z.device)
    result = torch.empty(parts * numbers, dtype=torch.float32, device=d_z.device) if parts > 1 else out
    weights: list[WeightGradient] = []
    block = at = row = x = 0
    for count, (units, channels), (dim, _) in zip(rows, shapes[::4], shapes[2::4], strict=True):
        for d_out, inputs, m, n, first in ((d_h, sampled, units, channels, x), (d_z, hidden, dim, units, row * units)):
            weights.append(WeightGradient(d_out, inputs, count, m, n, block, row * m, first, at))
            block += tiles[len(weights) - 1] * parts
            at += m * (n + 1)
        row += count
        x += count * channels
    launch(
        weight_gradient_kernel, block, out, tuple(weights), result, each, parts, numbers, COUNT=len(weights),
        ODD=sum(1 << i for i, n in enumerate(inputs_of) if n % 16), PRECISION=product, BM=tile.block_m, BN=wide_n,
        BO=narrow_n, BK=step, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    if parts > 1:
        join = configs.find_tile("weight_join", arch)
        launch(
            weight_join_kernel, triton.cdiv(numbers, join.block_m), out, result, out, parts, numbers,
            BLOCK=join.block_m, num_warps=join.warps,
        )  # fmt: skip
    return out


def weight_views(flat: Tensor, mlp: Sequence[Tensor]) -> list[Tensor]:
    """Views of the gradient of each weight and bias in the flat tensor."""
    parts = flat.split([weight.numel() for weight in mlp]) if mlp else []
    return [part.view(weight.shape) for part, weight in zip(parts, mlp, strict=True)]
