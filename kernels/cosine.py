"""Rows divided by their length, and the gradient of that: what cosine similarity adds to InfoNCE.

`cosine_kernel` writes the unit rows of a list of problems in one launch. `row_gradient_kernel` turns the query
gradients of InfoNCE into gradients of the original rows: it multiplies by the upstream gradient of their direction and
differentiates the division.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import chosen
from .common import architecture, block_dim, dense_rows, fields_of, launch, narrow
from .planned import planned

SHORTEST = tl.constexpr(1e-8)
"""Shorter rows are divided by this, as in `F.cosine_similarity`, so that rows of zeros stay zero."""


class Rows(NamedTuple):
    """One problem of `cosine_kernel`."""

    x: Tensor  # (rows, dim)
    unit: Tensor  # (rows, dim), contiguous
    row: int
    rows: int
    dim: int
    first_block: int


class RowGradient(NamedTuple):
    """One problem of `row_gradient_kernel`."""

    x: Tensor  # (rows, dim)
    d_unit: Tensor  # (rows, dim), contiguous, as `gradient`
    gradient: Tensor
    row: int
    rows: int
    dim: int
    direction: int
    weight: float
    first_block: int


@triton.jit
def cosine_kernel(problems, COUNT: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr):
    block = tl.program_id(0).to(tl.int64)
    one = Rows(*fields_of(problems, block, COUNT))
    o_m = (block - one.first_block) * BM + tl.arange(0, BM)
    o_d = tl.arange(0, BD)
    m_md = (o_m < one.rows)[:, None] & (o_d < one.dim)[None, :]
    x = tl.load(one.x + o_m[:, None] * one.row + o_d[None, :], mask=m_md, other=0.0).to(tl.float32)  # [BM, BD]
    length = tl.sqrt(tl.sum(x * x, 1))
    x /= tl.where(length < SHORTEST, SHORTEST, length)[:, None]
    tl.store(one.unit + o_m[:, None] * one.dim + o_d[None, :], narrow(x, one.unit.dtype.element_ty), mask=m_md)  # type: ignore[attr-defined]


@triton.jit
def row_gradient_kernel(
    problems, upstream, stride, COUNT: tl.constexpr, COSINE: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr
):
    block = tl.program_id(0).to(tl.int64)
    one = RowGradient(*fields_of(problems, block, COUNT))
    o_m = (block - one.first_block) * BM + tl.arange(0, BM)
    o_d = tl.arange(0, BD)
    m_md = (o_m < one.rows)[:, None] & (o_d < one.dim)[None, :]
    o_md = o_m[:, None] * one.dim + o_d[None, :]
    d = tl.load(one.d_unit + o_md, mask=m_md, other=0.0).to(tl.float32)  # [BM, BD]
    d *= tl.load(upstream + one.direction.to(tl.int64) * stride).to(tl.float32) * one.weight  # type: ignore[attr-defined]
    if COSINE:
        x = tl.load(one.x + o_m[:, None] * one.row + o_d[None, :], mask=m_md, other=0.0).to(tl.float32)
        length = tl.sqrt(tl.sum(x * x, 1))
        short = length < SHORTEST  # then the divisor is a constant
        # a row of zeros would get a slope of 1e8, beyond float16; after `project` its gradient is zero as well
        inverse = tl.where(length == 0, 0.0, 1.0 / tl.where(short, SHORTEST, length))
        x *= inverse[:, None]
        d = (d - x * tl.where(short, 0.0, tl.sum(x * d, 1))[:, None]) * inverse[:, None]
    tl.store(one.gradient + o_md, narrow(d, one.gradient.dtype.element_ty), mask=m_md)  # type: ignore[attr-defined]


@planned
def cosine(rows: Sequence[Tensor]) -> list[Tensor]:
    """rows / max(|rows|, 1e-8) for a list of (count, dim), in their dtype, in one launch. Lengths are float32."""
    rows = [dense_rows(r) for r in rows]
    units = [torch.empty(r.shape, dtype=r.dtype, device=r.device) for r in rows]
    widest = block_dim(max(r.shape[1] for r in rows))
    tile = chosen.rows_tile(architecture(rows[0].device), widest)
    problems: list[Rows] = []
    block = 0
    for r, unit in zip(rows, units, strict=True):
        count, dim = r.shape
        problems.append(Rows(r, unit, r.stride(0), count, dim, block))
        block += triton.cdiv(r.shape[0], tile.block_m)
    launch(
        cosine_kernel, block, rows[0], tuple(problems), COUNT=len(rows), BM=tile.block_m, BD=widest,
        num_warps=tile.warps,
    )  # fmt: skip
    return units


@planned
def row_gradients(
    rows: Sequence[Tensor], d_units: Sequence[Tensor], upstream: Tensor, *, divided: bool
) -> list[Tensor]:
    """The gradients of the rows of a mean over rows, then over layers: in their dtype, in one launch.

    Args:
        rows: (count, dim) per problem; the directions of a layer are consecutive problems.
        d_units: the gradient of each row's own loss, from `nce_forward`.
        upstream: (directions,), the gradients of the means.
        divided: `d_units` are gradients of the unit rows that `cosine` returned.
    """
    rows = [dense_rows(r) for r in rows]
    gradients = [torch.empty(r.shape, dtype=r.dtype, device=r.device) for r in rows]
    widest = block_dim(max(r.shape[1] for r in rows))
    tile = chosen.rows_tile(architecture(rows[0].device), widest)
    directions = upstream.shape[0]
    problems: list[RowGradient] = []
    block = 0
    for i, (r, d, gradient) in enumerate(zip(rows, d_units, gradients, strict=True)):
        count, dim = r.shape
        weight = directions / (len(rows) * count)
        problems.append(RowGradient(r, d, gradient, r.stride(0), count, dim, i % directions, weight, block))
        block += triton.cdiv(r.shape[0], tile.block_m)
    launch(
        row_gradient_kernel, block, rows[0], tuple(problems), upstream, upstream.stride(0), COUNT=len(rows),
        COSINE=divided, BM=tile.block_m, BD=widest, num_warps=tile.warps,
    )  # fmt: skip
    return gradients
