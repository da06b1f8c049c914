"""Gradients of the projectors' weights and biases for all layers in one launch; rows are summed in a fixed order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .common import architecture, bound, dot, fields_of, launch, narrow, precision
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


@triton.jit
def weight_gradient_kernel(
    weights, out, COUNT: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr
):
    """d_weight = d_out^T inputs, and the sums of d_out, by tiles; rows in a fixed order."""
    tile = tl.program_id(0).to(tl.int64)
    one = WeightGradient(*fields_of(weights, tile, COUNT))
    rows, size_m, size_n = one.rows, one.size_m, one.size_n
    tile -= one.first_block
    d_out = one.d_out + one.first_d_out
    inputs = one.inputs + one.first_input
    out += one.first_out
    across = tl.cdiv(size_n, BN)
    o_m = (tile // across) * BM + tl.arange(0, BM)
    o_n = (tile % across) * BN + tl.arange(0, BN)
    m_m = o_m < size_m
    m_n = o_n < size_n
    acc = tl.zeros([BM, BN], tl.float32)
    total = tl.zeros([BM], tl.float32)
    for r in range(0, bound(rows), BK):
        o_r = (r + tl.arange(0, BK)).to(tl.int64)
        m_r = o_r < rows
        a = tl.load(d_out + o_r[:, None] * size_m + o_m[None, :], mask=m_r[:, None] & m_m[None, :], other=0.0)
        b = tl.load(inputs + o_r[:, None] * size_n + o_n[None, :], mask=m_r[:, None] & m_n[None, :], other=0.0)
        if b.dtype != a.dtype:
            b = narrow(b, a.dtype)
        acc = dot(tl.trans(a), b, acc, PRECISION)
        total += tl.sum(a.to(tl.float32), 0)
    tl.store(out + o_m[:, None] * size_n + o_n[None, :], acc, mask=m_m[:, None] & m_n[None, :])
    tl.store(out + size_m * size_n + o_m, total, mask=m_m & (tile % across == 0))


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
    tile = configs.weight_gradient_tile(arch, d_z.dtype, product == "tf32")
    out = torch.empty(sum(shape.numel() for shape in shapes), dtype=torch.float32, device=d_z.device)
    weights: list[WeightGradient] = []
    block = at = row = x = 0
    for count, (units, channels), (dim, _) in zip(rows, shapes[::4], shapes[2::4], strict=True):
        for d_out, inputs, m, n, first in ((d_h, sampled, units, channels, x), (d_z, hidden, dim, units, row * units)):
            weights.append(WeightGradient(d_out, inputs, count, m, n, block, row * m, first, at))
            block += triton.cdiv(m, tile.block_m) * triton.cdiv(n, tile.block_n)
            at += m * (n + 1)
        row += count
        x += count * channels
    launch(
        weight_gradient_kernel, block, out, tuple(weights), out, COUNT=len(weights), PRECISION=product,
        BM=tile.block_m, BN=tile.block_n, BK=configs.WEIGHT_GRADIENT_ROWS, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out


def weight_views(flat: Tensor, mlp: Sequence[Tensor]) -> list[Tensor]:
    """Views of the gradient of each weight and bias in the flat tensor."""
    parts = flat.split([weight.numel() for weight in mlp]) if mlp else []
    return [part.view(weight.shape) for part, weight in zip(parts, mlp, strict=True)]
