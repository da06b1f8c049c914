"""InfoNCE: loss, logsumexp, positive logit and query gradient of every row in one pass, for a list of problems.

The keys are constants of the loss, so dL_i/dq_i = (sum_j p_ij k_j - k_i) / T: attention's forward with values = keys. A
block of query rows stays on chip while the keys stream past it once, and no logit reaches memory.

The positive stays out of the 16-bit product: with negatives alone in the sum, loss = softplus(lse_negatives - positive)
and p_negatives * k_i is subtracted in float32, which keeps the digits of confident rows. Rows of unit length bound the
logits by 1/T, so exp2(s - ceil(c)) needs no running maximum while 2c stays inside float32's exponent
(`UNIT_TEMPERATURE`).
float16 keeps the running maximum even so, and its exponentials are scaled by 2^15 (SHIFT): its exponent has five bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .common import LN2, LN2_HIGH, LN2_LOW, LOG2E, architecture, block_dim, dense_rows, dot, launch, narrow

UNIT_TEMPERATURE = 0.023
"""Above this temperature rows of unit length need no running maximum: exp2(-2 log2(e) / T) is a normal float32."""


class Problem(NamedTuple):
    """One set of groups for the query pass; tensors become pointers inside the kernel."""

    queries: Tensor  # (groups, rows, dim)
    keys: Tensor  # (groups, rows, dim)
    extra: Tensor  # (groups, extras, dim)
    log_weight: Tensor  # (groups, rows, rows)
    pair_weight: Tensor  # (groups, rows, rows)
    gradient: Tensor  # (groups, rows, dim), contiguous
    q_group: int
    q_row: int
    k_group: int
    k_row: int
    e_group: int
    e_row: int
    l_group: int
    l_row: int
    l_col: int
    w_group: int
    w_row: int
    w_col: int
    rows: int
    dim: int
    extras: int
    scale: float  # 1 / T
    first_block: int
    first_row: int  # where this problem's rows begin in the outputs


class KeyProblem(NamedTuple):
    """One set of groups for the key pass: `keys` stay on chip and the queries stream."""

    keys: Tensor  # (groups, count, dim)
    queries: Tensor  # (groups, rows, dim)
    log_weight: Tensor
    pair_weight: Tensor
    gradient: Tensor  # (groups, count, dim), contiguous
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
    count: int
    rows: int
    dim: int
    scale: float
    first_block: int
    first_row: int


@triton.jit
def _absorb(s, k, weight, total, top, acc, shift, SHIFT: tl.constexpr, ONLINE: tl.constexpr, GRADIENT: tl.constexpr,
            WEIGHTED: tl.constexpr):  # fmt: skip
    """Take one block of logits (base 2, -inf where there is no negative) into the running sums."""
    if ONLINE:
        new = tl.maximum(top, tl.ceil(tl.max(s, 1)))
        safe = tl.where(new == float("-inf"), 0.0, new)
        decay = tl.exp2(top - safe)
        p = tl.exp2(s - (safe - SHIFT)[:, None])  # [BM, BN]
        total = total * decay + tl.sum(p, 1)
        top = new
        if GRADIENT:
            acc = acc * decay[:, None]
    else:
        p = tl.exp2(s - shift)
        total += tl.sum(p, 1)
    if GRADIENT:
        if WEIGHTED:
            p *= weight
        acc = dot(narrow(p, k.dtype), k, acc)
    return total, top, acc


@triton.jit
def _log1p(x):
    """log(1 + x) for 0 <= x <= 1 by the series of atanh: the device's logarithm loses the digits of a small x."""
    z = x / (2.0 + x)
    y = z * z
    odd = 1.0 + y * (1 / 3 + y * (1 / 5 + y * (1 / 7 + y * (1 / 9 + y * (1 / 11 + y * (1 / 13 + y * (1 / 15)))))))
    return 2.0 * z * odd


@triton.jit
def nce_kernel(
    problems,
    loss,
    negative,
    positive,
    COUNT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    SHIFT: tl.constexpr,
    GRADIENT: tl.constexpr,
    ONLINE: tl.constexpr,
    EXTRA: tl.constexpr,
    LOG_WEIGHT: tl.constexpr,
    PAIR_WEIGHT: tl.constexpr,
    DECOUPLED: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64)
    (queries, keys, extra, log_weight, pair_weight, gradient, q_group, q_row, k_group, k_row, e_group, e_row, l_group,
     l_row, l_col, w_group, w_row, w_col, rows, dim, extras, scale, first_block, first_row) = problems[0]  # fmt: skip
    for i in tl.static_range(1, COUNT):
        here = block >= problems[i].first_block
        queries = tl.where(here, problems[i].queries, queries)
        keys = tl.where(here, problems[i].keys, keys)
        gradient = tl.where(here, problems[i].gradient, gradient)
        q_group = tl.where(here, problems[i].q_group, q_group)
        q_row = tl.where(here, problems[i].q_row, q_row)
        k_group = tl.where(here, problems[i].k_group, k_group)
        k_row = tl.where(here, problems[i].k_row, k_row)
        rows = tl.where(here, problems[i].rows, rows)
        dim = tl.where(here, problems[i].dim, dim)
        scale = tl.where(here, problems[i].scale, scale)
        first_block = tl.where(here, problems[i].first_block, first_block)
        first_row = tl.where(here, problems[i].first_row, first_row)
        if EXTRA:
            extra = tl.where(here, problems[i].extra, extra)
            e_group = tl.where(here, problems[i].e_group, e_group)
            e_row = tl.where(here, problems[i].e_row, e_row)
            extras = tl.where(here, problems[i].extras, extras)
        if LOG_WEIGHT:
            log_weight = tl.where(here, problems[i].log_weight, log_weight)
            l_group = tl.where(here, problems[i].l_group, l_group)
            l_row = tl.where(here, problems[i].l_row, l_row)
            l_col = tl.where(here, problems[i].l_col, l_col)
        if PAIR_WEIGHT:
            pair_weight = tl.where(here, problems[i].pair_weight, pair_weight)
            w_group = tl.where(here, problems[i].w_group, w_group)
            w_row = tl.where(here, problems[i].w_row, w_row)
            w_col = tl.where(here, problems[i].w_col, w_col)

    block -= first_block
    blocks = tl.cdiv(rows, BM)
    group = block // blocks
    o_m = (block % blocks) * BM + tl.arange(0, BM)
    o_n = tl.arange(0, BN)
    o_d = tl.arange(0, BD)
    m_m = o_m < rows
    m_d = o_d < dim
    m_md = m_m[:, None] & m_d[None, :]
    c = scale * LOG2E
    queries += group * q_group
    keys += group * k_group

    # by chunks, so that a block of queries and one of keys are not held at the same time
    pos = tl.zeros([BM], tl.float32)
    CHUNK: tl.constexpr = min(BD, 64)
    o_c = tl.arange(0, CHUNK)
    for d in range(0, dim, CHUNK):
        m_mc = m_m[:, None] & (d + o_c < dim)[None, :]
        q_c = tl.load(queries + o_m[:, None] * q_row + (d + o_c)[None, :], mask=m_mc, other=0.0)
        k_c = tl.load(keys + o_m[:, None] * k_row + (d + o_c)[None, :], mask=m_mc, other=0.0)
        pos += tl.sum(q_c.to(tl.float32) * k_c.to(tl.float32), 1)
    pos *= scale
    q = tl.load(queries + o_m[:, None] * q_row + o_d[None, :], mask=m_md, other=0.0)  # [BM, BD]

    shift = tl.ceil(c) - SHIFT
    total = tl.zeros([BM], tl.float32)
    top = tl.full([BM], float("-inf"), tl.float32)
    acc = tl.zeros([BM, BD], tl.float32)
    for n in range(0, rows, BN):
        m_n = n + o_n < rows
        p_k = keys + (n + o_n).to(tl.int64)[:, None] * k_row + o_d[None, :]
        k = tl.load(p_k, mask=m_n[:, None] & m_d[None, :], other=0.0)  # [BN, BD]
        s = dot(q, tl.trans(k), tl.zeros([BM, BN], tl.float32)) * c
        m_mn = m_m[:, None] & m_n[None, :]
        if PAIR_WEIGHT:
            p_w = pair_weight + group * w_group + o_m[:, None] * w_row + (n + o_n).to(tl.int64)[None, :] * w_col
            weight = tl.load(p_w, mask=m_mn, other=0.0).to(tl.float32)
            s *= weight
        else:
            weight = s
        if LOG_WEIGHT:
            p_l = log_weight + group * l_group + o_m[:, None] * l_row + (n + o_n).to(tl.int64)[None, :] * l_col
            s += tl.load(p_l, mask=m_mn, other=0.0).to(tl.float32) * LOG2E
        s = tl.where(m_n[None, :] & (o_m[:, None] != n + o_n[None, :]), s, float("-inf"))
        total, top, acc = _absorb(s, k, weight, total, top, acc, shift, SHIFT, ONLINE, GRADIENT, PAIR_WEIGHT)
    if EXTRA:
        extra += group * e_group
        for n in range(0, extras, BN):
            m_n = n + o_n < extras
            p_k = extra + (n + o_n).to(tl.int64)[:, None] * e_row + o_d[None, :]
            k = tl.load(p_k, mask=m_n[:, None] & m_d[None, :], other=0.0)
            s = dot(q, tl.trans(k), tl.zeros([BM, BN], tl.float32)) * c
            s = tl.where(m_n[None, :], s, float("-inf"))
            total, top, acc = _absorb(s, k, s, total, top, acc, shift, SHIFT, ONLINE, GRADIENT, False)

    if ONLINE:
        offset = tl.where(top == float("-inf"), 0.0, top) - SHIFT
    else:
        offset = tl.zeros([BM], tl.float32) + shift
    none = total == 0  # a row may have no negative at all
    # the shift is a whole number, and log(2) comes in two parts: it cancels against the positive without a trace
    log_total = tl.where(none, float("-inf"), tl.log2(tl.where(none, 1.0, total)) * LN2 + offset * LN2_LOW)
    neg = offset * LN2_HIGH + log_total
    margin = (offset * LN2_HIGH - pos) + log_total
    # softplus and the share of the row's probability that lies on its negatives, without overflow
    small = tl.exp2(-tl.abs(margin) * LOG2E)
    if DECOUPLED:
        row_loss = margin
        share = tl.full([BM], 1.0, tl.float32)
    else:
        row_loss = tl.where(margin < 0, 0.0, margin) + _log1p(small)
        share = tl.where(margin > 0, 1.0, small) / (1.0 + small)
    o_row = first_row + group * rows + o_m
    tl.store(loss + o_row, row_loss, mask=m_m)
    tl.store(negative + o_row, neg, mask=m_m)
    tl.store(positive + o_row, pos, mask=m_m)
    if GRADIENT:
        own = tl.load(keys + o_m[:, None] * k_row + o_d[None, :], mask=m_md, other=0.0).to(tl.float32)
        pull = acc * tl.where(none, 0.0, 1.0 / tl.where(none, 1.0, total))[:, None]
        d_q = (pull - own) * (share * scale)[:, None]
        p_d = gradient + (group * rows + o_m)[:, None] * dim + o_d[None, :]
        tl.store(p_d, narrow(d_q, gradient.dtype.element_ty), mask=m_md)


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
):
    """dk_j = sum_i c_i w_ij q_i, less the positive's part: BM keys stay on chip, BN queries stream.

    The coefficients c_i come divided by their largest (`peak`), and the products carry a factor 2^15, so that float16
    neither overflows nor goes subnormal.
    """
    block = tl.program_id(0).to(tl.int64)
    (keys, queries, log_weight, pair_weight, gradient, k_group, k_row, q_group, q_row, l_group, l_row, l_col, w_group,
     w_row, w_col, count, rows, dim, scale, first_block, first_row) = problems[0]  # fmt: skip
    for i in tl.static_range(1, COUNT):
        here = block >= problems[i].first_block
        keys = tl.where(here, problems[i].keys, keys)
        queries = tl.where(here, problems[i].queries, queries)
        gradient = tl.where(here, problems[i].gradient, gradient)
        k_group = tl.where(here, problems[i].k_group, k_group)
        k_row = tl.where(here, problems[i].k_row, k_row)
        q_group = tl.where(here, problems[i].q_group, q_group)
        q_row = tl.where(here, problems[i].q_row, q_row)
        count = tl.where(here, problems[i].count, count)
        rows = tl.where(here, problems[i].rows, rows)
        dim = tl.where(here, problems[i].dim, dim)
        scale = tl.where(here, problems[i].scale, scale)
        first_block = tl.where(here, problems[i].first_block, first_block)
        first_row = tl.where(here, problems[i].first_row, first_row)
        if LOG_WEIGHT:
            log_weight = tl.where(here, problems[i].log_weight, log_weight)
            l_group = tl.where(here, problems[i].l_group, l_group)
            l_row = tl.where(here, problems[i].l_row, l_row)
            l_col = tl.where(here, problems[i].l_col, l_col)
        if PAIR_WEIGHT:
            pair_weight = tl.where(here, problems[i].pair_weight, pair_weight)
            w_group = tl.where(here, problems[i].w_group, w_group)
            w_row = tl.where(here, problems[i].w_row, w_row)
            w_col = tl.where(here, problems[i].w_col, w_col)

    block -= first_block
    blocks = tl.cdiv(count, BM)
    group = block // blocks
    o_m = (block % blocks) * BM + tl.arange(0, BM)  # keys
    o_n = tl.arange(0, BN)  # queries
    o_d = tl.arange(0, BD)
    m_m = o_m < count
    m_d = o_d < dim
    m_md = m_m[:, None] & m_d[None, :]
    c = scale * LOG2E
    k = tl.load(keys + group * k_group + o_m[:, None] * k_row + o_d[None, :], mask=m_md, other=0.0)  # [BM, BD]
    acc = tl.zeros([BM, BD], tl.float32)
    queries += group * q_group
    first_row += group * rows
    for n in range(0, rows, BN):
        o_q = (n + o_n).to(tl.int64)
        m_n = o_q < rows
        q = tl.load(queries + o_q[:, None] * q_row + o_d[None, :], mask=m_n[:, None] & m_d[None, :], other=0.0)
        s = dot(k, tl.trans(q), tl.zeros([BM, BN], tl.float32)) * c
        m_mn = m_m[:, None] & m_n[None, :]
        if PAIR_WEIGHT:
            p_w = pair_weight + group * w_group + o_q[None, :] * w_row + o_m[:, None] * w_col
            weight = tl.load(p_w, mask=m_mn, other=0.0).to(tl.float32)
            s *= weight
        if LOG_WEIGHT:
            p_l = log_weight + group * l_group + o_q[None, :] * l_row + o_m[:, None] * l_col
            s += tl.load(p_l, mask=m_mn, other=0.0).to(tl.float32) * LOG2E
        lse = tl.load(negative + first_row + o_q, mask=m_n, other=0.0)
        lse = tl.where(lse == float("-inf"), float("inf"), lse * LOG2E)  # no negatives: weights of zero
        coef = tl.load(coefficient + first_row + o_q, mask=m_n, other=0.0)
        if not EXTRA:
            m_mn = m_mn & (o_m[:, None] != o_q[None, :])
        w = tl.exp2(tl.where(m_mn, s - lse[None, :], float("-inf")) + 15.0) * coef[None, :]
        if PAIR_WEIGHT:
            w *= weight
        acc = dot(narrow(w, q.dtype), q, acc)
    factor = tl.load(peak) * scale
    acc *= factor * (1.0 / 32768.0)
    if not EXTRA:
        own = tl.load(queries + o_m[:, None] * q_row + o_d[None, :], mask=m_md, other=0.0).to(tl.float32)
        acc -= own * (tl.load(coefficient + first_row + o_m, mask=m_m, other=0.0) * factor)[:, None]
    p_d = gradient + (group * count + o_m)[:, None] * dim + o_d[None, :]
    tl.store(p_d, narrow(acc, gradient.dtype.element_ty), mask=m_md)


def _weight_strides(weights: Sequence[Tensor], index: int) -> tuple[int, ...]:
    return weights[index].stride() if weights else (0, 0, 0)


def nce_forward(
    queries: Sequence[Tensor],
    keys: Sequence[Tensor],
    extra: Sequence[Tensor],
    log_weight: Sequence[Tensor],
    pair_weight: Sequence[Tensor],
    temperatures: Sequence[float],
    *,
    decoupled: bool = False,
    unit: bool = False,
    gradient: bool = True,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """All problems in one launch: (loss, logsumexp of the negatives, positive logit) of every row, and dq.

    Args:
        queries, keys: (groups, rows, dim) a problem, 16-bit (or float32 in the interpreter).
        extra: none, or (groups, extras, dim) a problem; stride 0 over groups shares them.
        log_weight, pair_weight: none, or (groups, rows, rows) a problem.
        temperatures: one a problem.
        unit: the rows have unit length (to the rounding of their dtype).
        gradient: form dq as well (else the last list is empty).

    Returns:
        three float32 (all rows,), problem after problem and group after group; dq in the dtype of the queries.
    """
    queries, keys, extra = ([dense_rows(x) for x in xs] for xs in (queries, keys, extra))
    first = queries[0]
    dims = [q.shape[2] for q in queries]
    total = sum(q.shape[0] * q.shape[1] for q in queries)
    bounded = unit and min(temperatures) > UNIT_TEMPERATURE and not log_weight and not pair_weight
    # float16 has no room for a row whose logits all lie far below the bound
    online = not bounded or first.dtype == torch.float16
    plain = not (online or extra)
    tile = configs.nce_tile(architecture(first.device), first.dtype, block_dim(max(dims)), total, plain)
    loss, negative, positive = (first.new_empty(total, dtype=torch.float32) for _ in range(3))
    gradients = [torch.empty(q.shape, dtype=q.dtype, device=q.device) for q in queries] if gradient else []
    problems, block, row = [], 0, 0
    for i, (q, k) in enumerate(zip(queries, keys, strict=True)):
        e = extra[i] if extra else k
        problems.append(
            Problem(
                q, k, e,
                log_weight[i] if log_weight else q,
                pair_weight[i] if pair_weight else q,
                gradients[i] if gradient else q,
                q.stride(0), q.stride(1), k.stride(0), k.stride(1), e.stride(0), e.stride(1),
                *_weight_strides(log_weight, i), *_weight_strides(pair_weight, i),
                q.shape[1], q.shape[2], e.shape[1], 1.0 / temperatures[i], block, row,
            )
        )  # fmt: skip
        block += q.shape[0] * triton.cdiv(q.shape[1], tile.block_m)
        row += q.shape[0] * q.shape[1]
    launch(
        nce_kernel, block, first, tuple(problems), loss, negative, positive,
        COUNT=len(problems), BM=tile.block_m, BN=tile.block_n, BD=block_dim(max(dims)),
        SHIFT=15.0 if first.dtype == torch.float16 else 0.0,
        GRADIENT=gradient, ONLINE=online, EXTRA=bool(extra), LOG_WEIGHT=bool(log_weight),
        PAIR_WEIGHT=bool(pair_weight), DECOUPLED=decoupled, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return loss, negative, positive, gradients


def nce_key_gradients(
    queries: Sequence[Tensor],
    keys: Sequence[Tensor],
    log_weight: Sequence[Tensor],
    pair_weight: Sequence[Tensor],
    temperatures: Sequence[float],
    negative: Tensor,
    coefficient: Tensor,
    *,
    extra: bool,
) -> list[Tensor]:
    """The transposed pass: the gradient of every key, in its dtype, from the saved logsumexp.

    Args:
        keys: (groups, count, dim) a problem. `extra` says that they are extra keys: no row is their positive.
        negative: (all rows,), logsumexp of the negatives as `nce_forward` returned it.
        coefficient: float32 (all rows,), upstream gradient times the share of the row's negatives.
    """
    queries, keys = ([dense_rows(x) for x in xs] for xs in (queries, keys))
    first = queries[0]
    widest = block_dim(max(q.shape[2] for q in queries))
    peak = coefficient.abs().amax().clamp_min(torch.finfo(torch.float32).tiny)
    coefficient = coefficient / peak
    count = sum(k.shape[0] * k.shape[1] for k in keys)
    tile = configs.nce_tile(architecture(first.device), first.dtype, widest, count, False)
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
                *_weight_strides(log_weight, i), *_weight_strides(pair_weight, i),
                k.shape[1], q.shape[1], q.shape[2], 1.0 / temperatures[i], block, row,
            )
        )  # fmt: skip
        block += k.shape[0] * triton.cdiv(k.shape[1], tile.block_m)
        row += q.shape[0] * q.shape[1]
    launch(
        nce_keys_kernel, block, first, tuple(problems), negative, coefficient, peak,
        COUNT=len(problems), BM=tile.block_m, BN=tile.block_n, BD=widest, EXTRA=extra,
        LOG_WEIGHT=bool(log_weight), PAIR_WEIGHT=bool(pair_weight), num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return gradients
