"""The gradient of keys and extra keys that are not constants: InfoNCE's second, transposed pass.

dL/dk_j = sum_i c_i w_ij q_i, where w_ij is the share of key j among row i's negatives, recomputed from the logsumexp of
`nce_forward`. A block of keys stays on chip while the queries stream past it. The contribution of the positive is
subtracted in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import chosen
from .common import LOG2E, architecture, block_dim, bound, dense_rows, dot, fields_of, launch, narrow, precision
from .nce import weight_strides
from .planned import planned


class KeyProblem(NamedTuple):
    """One set of groups for the key pass: `keys` stay on chip, the queries stream."""

    keys: Tensor  # (groups, key_rows, dim)
    queries: Tensor  # (groups, rows, dim)
    log_weight: Tensor
    pair_weight: Tensor
    gradient: Tensor  # (groups, key_rows, dim), contiguous
    k_group: int
    k_row: int
    q_group: int
    q_row: int
    l_group: int
    l_row: int
    l_col: int
    w_group: int
    w_row: int
    w_col: int
    key_rows: int
    rows: int
    dim: int
    scale: float | Tensor  # as in `Problem`
    first_block: int
    first_row: int


@triton.jit
def nce_keys_kernel(
    problems,
    negative,
    coefficient,
    peak,
    COUNT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    EXTRA: tl.constexpr,
    LOG_WEIGHT: tl.constexpr,
    PAIR_WEIGHT: tl.constexpr,
    LEARNED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dk_j = sum_i c_i w_ij q_i minus the positive's contribution: BM keys stay on chip, BN queries stream.

    The coefficients c_i arrive divided by the largest (`peak`), and the products are scaled by 2^15, so that float16
    neither overflows nor becomes subnormal.
    """
    block = tl.program_id(0).to(tl.int64)
    one = KeyProblem(*fields_of(problems, block, COUNT))
    count, rows, dim = one.key_rows, one.rows, one.dim
    scale = tl.load(one.scale) if LEARNED else one.scale
    block -= one.first_block
    blocks = tl.cdiv(count, BM)
    group = block // blocks
    o_m = (block % blocks) * BM + tl.arange(0, BM)  # keys
    o_n = tl.arange(0, BN)  # queries
    o_d = tl.arange(0, BD)
    m_m = o_m < count
    m_d = o_d < dim
    m_md = m_m[:, None] & m_d[None, :]
    c = scale * LOG2E
    p_k = one.keys + group * one.k_group + o_m[:, None] * one.k_row + o_d[None, :]
    k = tl.load(p_k, mask=m_md, other=0.0)  # [BM, BD]
    acc = tl.zeros([BM, BD], tl.float32)
    queries = one.queries + group * one.q_group
    first_row = one.first_row + group * rows
    for n in range(0, bound(rows), BN):
        o_q = (n + o_n).to(tl.int64)
        m_n = o_q < rows
        q = tl.load(queries + o_q[:, None] * one.q_row + o_d[None, :], mask=m_n[:, None] & m_d[None, :], other=0.0)
        s = dot(k, tl.trans(q), tl.zeros([BM, BN], tl.float32), PRECISION) * c
        m_mn = m_m[:, None] & m_n[None, :]
        if PAIR_WEIGHT:
            p_w = one.pair_weight + group * one.w_group + o_q[None, :] * one.w_row + o_m[:, None] * one.w_col
            weight = tl.load(p_w, mask=m_mn, other=0.0).to(tl.float32)
            s *= weight
        if LOG_WEIGHT:
            p_l = one.log_weight + group * one.l_group + o_q[None, :] * one.l_row + o_m[:, None] * one.l_col
            s += tl.load(p_l, mask=m_mn, other=0.0).to(tl.float32) * LOG2E
        lse = tl.load(negative + first_row + o_q, mask=m_n, other=0.0)
        lse = tl.where(lse == float("-inf"), float("inf"), lse * LOG2E)  # no negatives: weights of zero
        coef = tl.load(coefficient + first_row + o_q, mask=m_n, other=0.0)
        if not EXTRA:
            m_mn = m_mn & (o_m[:, None] != o_q[None, :])
        w = tl.exp2(tl.where(m_mn, s - lse[None, :], float("-inf")) + 15.0) * coef[None, :]
        if PAIR_WEIGHT:
            w *= weight
        acc = dot(narrow(w, q.dtype), q, acc, PRECISION)
    factor = tl.load(peak) * scale
    acc *= factor * (1.0 / 32768.0)
    if not EXTRA:
        own = tl.load(queries + o_m[:, None] * one.q_row + o_d[None, :], mask=m_md, other=0.0).to(tl.float32)
        acc -= own * (tl.load(coefficient + first_row + o_m, mask=m_m, other=0.0) * factor)[:, None]
    p_d = one.gradient + (group * count + o_m)[:, None] * dim + o_d[None, :]
    tl.store(p_d, narrow(acc, one.gradient.dtype.element_ty), mask=m_md)  # type: ignore[attr-defined]


def nce_key_gradients(
    queries: Sequence[Tensor],
    keys: Sequence[Tensor],
    log_weight: Sequence[Tensor],
    pair_weight: Sequence[Tensor],
    temperatures: Sequence[float],
    negative: Tensor,
    coefficient: Tensor,
    scales: Sequence[Tensor] = (),
    *,
    extra: bool,
) -> list[Tensor]:
    """The gradient of every key, in its dtype, from the saved logsumexp: the transposed pass.

    Args:
        queries, keys: (groups, rows, dim) per problem; the numbers of rows may differ.
        negative: (all rows,), logsumexp of the negatives as `nce_forward` returned it.
        coefficient: float32 (all rows,), upstream gradient times the share of the row's negatives.
        scales: as `nce_forward`.
        extra: they are extra keys: none is the positive of a row.
    """
    if pair_weight and queries[0].dtype == torch.float16:  # as `nce_forward`
        q32, k32 = ([x.float() for x in xs] for xs in (queries, keys))
        gradients = nce_key_gradients(
            q32, k32, log_weight, pair_weight, temperatures, negative, coefficient, scales, extra=extra
        )
        return [g.half() for g in gradients]
    queries, keys = ([dense_rows(x) for x in xs] for xs in (queries, keys))
    peak = coefficient.abs().amax().clamp_min(torch.finfo(torch.float32).tiny)
    return _nce_key_gradients(
        queries, keys, log_weight, pair_weight, temperatures, scales, negative, coefficient / peak, peak, extra=extra
    )


@planned(products="matmul")
def _nce_key_gradients(
    queries: Sequence[Tensor],
    keys: Sequence[Tensor],
    log_weight: Sequence[Tensor],
    pair_weight: Sequence[Tensor],
    temperatures: Sequence[float],
    scales: Sequence[Tensor],
    negative: Tensor,
    coefficient: Tensor,
    peak: Tensor,
    *,
    extra: bool,
) -> list[Tensor]:
    """`nce_key_gradients` of dense rows and of coefficients of at most 1, which were divided by `peak`."""
    first = queries[0]
    widest = block_dim(max(q.shape[2] for q in queries))
    count = sum(k.shape[0] * k.shape[1] for k in keys)
    arch = architecture(first.device)
    product = precision(arch, first.dtype)
    tile = chosen.nce_tile(arch, first.dtype, widest, count, "any", product == "tf32")
    gradients = [torch.empty(k.shape, dtype=k.dtype, device=k.device) for k in keys]
    problems, block, row = [], 0, 0
    for i, (q, k) in enumerate(zip(queries, keys, strict=True)):
        problems.append(
            KeyProblem(
                k, q,
                log_weight[i] if log_weight else q,
                pair_weight[i] if pair_weight else q,
                gradients[i],
                k.stride(0), k.stride(1), q.stride(0), q.stride(1),
                *weight_strides(log_weight, i), *weight_strides(pair_weight, i),
                k.shape[1], q.shape[1], q.shape[2], scales[i] if scales else 1.0 / temperatures[i], block, row,
            )
        )  # fmt: skip
        block += k.shape[0] * triton.cdiv(k.shape[1], tile.block_m)
        row += q.shape[0] * q.shape[1]
    launch(
        nce_keys_kernel, block, first, tuple(problems), negative, coefficient, peak,
        COUNT=len(problems), BM=tile.block_m, BN=tile.block_n, BD=widest, EXTRA=extra,
        LOG_WEIGHT=bool(log_weight), PAIR_WEIGHT=bool(pair_weight), LEARNED=bool(scales),
        PRECISION=product, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return gradients
