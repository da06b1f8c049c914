"""The loops of `nce_kernel`: a block of query rows accumulates the keys that stream past it.

There are two forms. The bounded form subtracts one constant from every logit, so its partial sums add up. The online
form subtracts each row's running maximum and rescales the sums whenever it grows. That is correct for rows of any
length, but needs more registers and more work per logit.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import configs
from .common import LOG2E, bound, dot, narrow

OWN_STAGES = tl.constexpr(configs.OWN_KEYS_STAGES)

LOWEST_TOTAL = tl.constexpr(2.0**-64)
HIGHEST_TOTAL = tl.constexpr(2.0**32)
"""A row's bounded sum between these limits is accurate: each term that underflowed is below 2^-62 of it, and its
products with keys from 2^-38 to 2^95 stay in float32's range. The sum of a unit row is at most its number of keys."""


@triton.jit
def absorb(s, k, weight, total, top, acc, shift, SHIFT: tl.constexpr, ONLINE: tl.constexpr, GRADIENT: tl.constexpr,
           WEIGHTED: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Add one block of logits (base 2, -inf where there is no negative) to the running sums."""
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
        acc = dot(narrow(p, k.dtype), k, acc, PRECISION)
    return total, top, acc


@triton.jit
def load_keys(keys, n, count, stride, o_n, o_d, m_d, EVEN: tl.constexpr):
    """Keys n, n + 1, ... of `count`: [BN, BD].

    EVEN: every block is full and every key is as long as the tile is wide, so loads need no masks. Offsets inside a
    block fit into 32 bits, which takes half the registers.
    """
    if EVEN:
        k = tl.load(keys + tl.cast(n, tl.int64) * stride + (o_n[:, None] * stride + o_d[None, :]))
    else:
        o_k = (n + o_n).to(tl.int64)
        mask = (n + o_n < count)[:, None] & m_d[None, :]
        k = tl.load(keys + o_k[:, None] * stride + o_d[None, :], mask=mask, other=0.0)
    return k


@triton.jit
def stream(one, group, q, m, o_m, m_m, c, shift, ONLINE: tl.constexpr, SHIFT: tl.constexpr, GRADIENT: tl.constexpr,
           EXTRA: tl.constexpr, LOG_WEIGHT: tl.constexpr, PAIR_WEIGHT: tl.constexpr, EVEN: tl.constexpr,
           PEELED: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
           BD: tl.constexpr):  # fmt: skip
    """Sums over all negatives of the rows `o_m` (m, m + 1, ...) of a group; `c` is log2(e) / T.

    PEELED: the keys of all other rows stream first, in a loop that neither compares rows with keys nor masks. The keys
    of the rows themselves follow. It needs EVEN, blocks of rows that are a multiple of the blocks of keys, and no
    weights.

    Returns the sum of the exponentials, the shift of each row's logits, and the sum of the keys times their
    exponentials.
    """
    o_n = tl.arange(0, BN)
    o_d = tl.arange(0, BD)
    m_d = o_d < one.dim
    # compared with every key: 64 bits would take twice the instructions. With masks the code then spills on sm_90
    own = o_m.to(tl.int32) if EVEN else o_m
    keys = one.keys + group * one.k_group
    log_weight = one.log_weight + group * one.l_group
    pair_weight = one.pair_weight + group * one.w_group
    total = tl.zeros([BM], tl.float32)
    top = tl.full([BM], float("-inf"), tl.float32)
    acc = tl.zeros([BM, BD], tl.float32)
    end = one.rows
    if PEELED:
        start = m.to(tl.int32)  # the keys of the rows themselves: start to end
        end = tl.minimum(start + BM, one.rows)
        for i in range(0, bound(one.rows - (end - start)), BN):
            n = tl.where(i < start, i, i + (end - start))
            k = load_keys(keys, n, one.rows, one.k_row, o_n, o_d, m_d, EVEN)
            s = dot(q, tl.trans(k), tl.zeros([BM, BN], tl.float32), PRECISION) * c
            total, top, acc = absorb(s, k, s, total, top, acc, shift, SHIFT, ONLINE, GRADIENT, False, PRECISION)
    for n in tl.range(bound(start) if PEELED else 0, bound(end), BN, num_stages=OWN_STAGES if PEELED else None):
        m_n = n + o_n < one.rows
        k = load_keys(keys, n, one.rows, one.k_row, o_n, o_d, m_d, EVEN)
        s = dot(q, tl.trans(k), tl.zeros([BM, BN], tl.float32), PRECISION) * c
        o_k = (n + o_n).to(tl.int64)
        m_mn = m_m[:, None] & m_n[None, :]
        if PAIR_WEIGHT:
            p_w = pair_weight + o_m[:, None] * one.w_row + o_k[None, :] * one.w_col
            weight = tl.load(p_w, mask=m_mn, other=0.0).to(tl.float32)
            s *= weight
        else:
            weight = s
        if LOG_WEIGHT:
            p_l = log_weight + o_m[:, None] * one.l_row + o_k[None, :] * one.l_col
            s += tl.load(p_l, mask=m_mn, other=0.0).to(tl.float32) * LOG2E
        negative = own[:, None] != n + o_n[None, :]
        s = tl.where(negative if EVEN else m_n[None, :] & negative, s, float("-inf"))
        total, top, acc = absorb(s, k, weight, total, top, acc, shift, SHIFT, ONLINE, GRADIENT, PAIR_WEIGHT, PRECISION)
    if EXTRA:
        extra = one.extra + group * one.e_group
        for n in range(0, bound(one.extras), BN):
            m_n = n + o_n < one.extras
            k = load_keys(extra, n, one.extras, one.e_row, o_n, o_d, m_d, EVEN)
            s = dot(q, tl.trans(k), tl.zeros([BM, BN], tl.float32), PRECISION) * c
            if not EVEN:
                s = tl.where(m_n[None, :], s, float("-inf"))
            total, top, acc = absorb(s, k, s, total, top, acc, shift, SHIFT, ONLINE, GRADIENT, False, PRECISION)
    if ONLINE:
        offset = tl.where(top == float("-inf"), 0.0, top) - SHIFT
    else:
        offset = tl.zeros([BM], tl.float32) + shift
    return total, offset, acc


@triton.jit
def log1p(x):
    """log(1 + x) for 0 <= x <= 1, by the series of atanh: the device's logarithm loses the digits of a small x."""
    z = x / (2.0 + x)
    y = z * z
    odd = 1.0 + y * (1 / 3 + y * (1 / 5 + y * (1 / 7 + y * (1 / 9 + y * (1 / 11 + y * (1 / 13 + y * (1 / 15)))))))
    return 2.0 * z * odd
