"""InfoNCE: loss, logsumexp, positive logit and query gradient of every row in one pass, for a list of problems.

The keys are constants of the loss, so dL_i/dq_i = (sum_j p_ij k_j - k_i) / T: attention's forward with values = keys. A
block of query rows stays on chip while the keys stream past it once. No logit is written to memory.

The positive is not part of the 16-bit product. The sum contains the negatives alone, the loss is
softplus(lse_negatives - positive), and p_negatives * k_i is subtracted in float32. This keeps the digits of confident
rows.

For rows of unit length, 1/T bounds the logits, so exp2(s - ceil(c)) needs no running maximum while 2c fits into
float32's exponent (`UNIT_TEMPERATURE`). A block first assumes unit rows and checks their sums at the end. If a sum is
out of range, the rows were longer, and the block streams the keys again with a running maximum. float16 uses the
running maximum from the start and scales its exponentials by 2^15 (SHIFT), because its exponent has only five bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import chosen, configs
from .common import (
    LN2,
    LN2_HIGH,
    LN2_LOW,
    LOG2E,
    architecture,
    block_dim,
    bound,
    dense_rows,
    fields_of,
    launch,
    narrow,
    precision,
)
from .nce_stream import HIGHEST_TOTAL, LOWEST_TOTAL, log1p, stream
from .planned import planned

UNIT_TEMPERATURE = 0.023
"""Above this temperature, rows of unit length need no running maximum: exp2(-2 log2(e) / T) is a normal float32."""

LARGEST_STRIDE = 2**23
"""Below this stride between rows, the offsets inside a block of up to 128 rows fit into 32 bits."""

PEELED_KEYS = 2048
"""From this number of keys per group, most blocks of keys have none of the rows of a block."""


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
    scale: float | Tensor  # 1 / T; with LEARNED a float32 tensor, of which the first element is read
    first_block: int
    first_row: int  # of this problem in the outputs


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
    CHECKED: tl.constexpr,
    EXTRA: tl.constexpr,
    LOG_WEIGHT: tl.constexpr,
    PAIR_WEIGHT: tl.constexpr,
    DECOUPLED: tl.constexpr,
    LEARNED: tl.constexpr,
    EVEN: tl.constexpr,
    PEELED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64)
    one = Problem(*fields_of(problems, block, COUNT))
    rows, dim = one.rows, one.dim
    scale = tl.load(one.scale) if LEARNED else one.scale
    block -= one.first_block
    blocks = tl.cdiv(rows, BM)
    group = block // blocks
    m = (block % blocks) * BM
    o_m = m + tl.arange(0, BM)
    o_d = tl.arange(0, BD)
    m_m = o_m < rows
    m_d = o_d < dim
    m_md = m_m[:, None] & m_d[None, :]
    c = scale * LOG2E
    queries = one.queries + group * one.q_group
    keys = one.keys + group * one.k_group

    # in chunks, so that registers never hold a block of queries and a block of keys at the same time
    pos = tl.zeros([BM], tl.float32)
    CHUNK: tl.constexpr = min(BD, 64)
    o_c = tl.arange(0, CHUNK)
    for d in range(0, bound(dim), CHUNK):
        m_mc = m_m[:, None] & (d + o_c < dim)[None, :]
        q_c = tl.load(queries + o_m[:, None] * one.q_row + (d + o_c)[None, :], mask=m_mc, other=0.0)
        k_c = tl.load(keys + o_m[:, None] * one.k_row + (d + o_c)[None, :], mask=m_mc, other=0.0)
        pos += tl.sum(q_c.to(tl.float32) * k_c.to(tl.float32), 1)
    pos *= scale
    q = tl.load(queries + o_m[:, None] * one.q_row + o_d[None, :], mask=m_md, other=0.0)  # [BM, BD]

    shift = tl.ceil(c) - SHIFT
    total, offset, acc = stream(
        one, group, q, m, o_m, m_m, c, shift,
        ONLINE, SHIFT, GRADIENT, EXTRA, LOG_WEIGHT, PAIR_WEIGHT, EVEN, PEELED, PRECISION, BM, BN, BD,
    )  # fmt: skip
    if CHECKED:
        safe = (total > LOWEST_TOTAL) & (total < HIGHEST_TOTAL)  # false for NaN
        if tl.min(safe.to(tl.int32), 0) == 0:
            total, offset, acc = stream(
                one, group, q, m, o_m, m_m, c, shift,
                True, SHIFT, GRADIENT, EXTRA, LOG_WEIGHT, PAIR_WEIGHT, EVEN, False, PRECISION, BM, BN, BD,
            )  # fmt: skip

    none = total == 0  # a row may have no negative at all
    # the shift is an integer and log(2) has two parts, so that it cancels exactly against the positive
    log_total = tl.where(none, float("-inf"), tl.log2(tl.where(none, 1.0, total)) * LN2 + offset * LN2_LOW)
    neg = offset * LN2_HIGH + log_total
    margin = (offset * LN2_HIGH - pos) + log_total
    # softplus, and the share of the row's probability that its negatives have, without overflow
    small = tl.exp2(-tl.abs(margin) * LOG2E)
    if DECOUPLED:
        row_loss = margin
        share = tl.full([BM], 1.0, tl.float32)
    else:
        row_loss = tl.where(margin < 0, 0.0, margin) + log1p(small)
        share = tl.where(margin > 0, 1.0, small) / (1.0 + small)
    o_row = one.first_row + group * rows + o_m
    tl.store(negative + o_row, neg, mask=m_m)
    tl.store(positive + o_row, pos, mask=m_m)
    tl.store(loss + o_row, row_loss, mask=m_m)  # last: all three are one tensor if only the loss is wanted
    if GRADIENT:
        own = tl.load(keys + o_m[:, None] * one.k_row + o_d[None, :], mask=m_md, other=0.0).to(tl.float32)
        pull = acc * tl.where(none, 0.0, 1.0 / tl.where(none, 1.0, total))[:, None]
        d_q = (pull - own) * (share * scale)[:, None]
        p_d = one.gradient + (group * rows + o_m)[:, None] * dim + o_d[None, :]
        tl.store(p_d, narrow(d_q, one.gradient.dtype.element_ty), mask=m_md)  # type: ignore[attr-defined]


def weight_strides(weights: Sequence[Tensor], index: int) -> tuple[int, int, int]:
    """The strides of one problem's weights, or zeros if there are none."""
    if not weights:
        return 0, 0, 0
    group, row, column = weights[index].stride()
    return group, row, column


def peels(arch: str, tile: configs.Tile, width: int, keys: int, problems: int) -> bool:
    """Whether unit rows take the keys of other rows in a loop of their own, without a comparison for every logit.

    Of the loop's instructions it saves 14 % on sm_90, and 24 to 28 % on other NVIDIA architectures, at width 256.

    Args:
        width: the padded dim.
        keys: of one group.
        problems: of the launch. On sm_90 the sizes of several need more registers than wide rows leave.
    """
    crowded = problems > 1 and width > 128 and configs.tuned_architecture(arch) == "sm_90"
    return keys >= PEELED_KEYS and tile.block_m % tile.block_n == 0 and not crowded and not arch.startswith("gfx")


def nce_forward(
    queries: Sequence[Tensor],
    keys: Sequence[Tensor],
    extra: Sequence[Tensor],
    log_weight: Sequence[Tensor],
    pair_weight: Sequence[Tensor],
    temperatures: Sequence[float],
    scales: Sequence[Tensor] = (),
    *,
    decoupled: bool = False,
    unit: bool = False,
    gradient: bool = True,
    statistics: bool = True,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """Loss, logsumexp of the negatives and positive logit of every row, and dq, for all problems in one launch.

    Args:
        queries, keys: (groups, rows, dim) per problem; 16-bit or float32.
        extra: none, or (groups, extras, dim) per problem; stride 0 over groups shares them.
        log_weight, pair_weight: none, or (groups, rows, rows) per problem.
        temperatures: one per problem.
        scales: none, or float32 1 / T per problem, used in place of the temperatures: the host does not know T.
        unit: the rows have unit length (up to the rounding of their dtype), so sums are not checked for their range.
        gradient: compute dq as well (else the last list is empty).
        statistics: write logsumexp and positive logit as well (else the loss is returned in their place).

    Returns:
        three float32 tensors (all rows,), ordered by problem, then group; dq in the dtype of the queries.
    """
    if pair_weight and queries[0].dtype == torch.float16:  # a weight above 2 would exceed its range
        q32, k32, e32 = ([x.float() for x in xs] for xs in (queries, keys, extra))
        loss, negative, positive, gradients = nce_forward(
            q32, k32, e32, log_weight, pair_weight, temperatures, scales, decoupled=decoupled, unit=unit,
            gradient=gradient, statistics=statistics,
        )  # fmt: skip
        return loss, negative, positive, [g.half() for g in gradients]
    queries, keys, extra = ([dense_rows(x) for x in xs] for xs in (queries, keys, extra))
    return _nce_forward(
        queries, keys, extra, log_weight, pair_weight, temperatures, scales, decoupled=decoupled, unit=unit,
        gradient=gradient, statistics=statistics,
    )  # fmt: skip


@planned(products="matmul")
def _nce_forward(
    queries: Sequence[Tensor],
    keys: Sequence[Tensor],
    extra: Sequence[Tensor],
    log_weight: Sequence[Tensor],
    pair_weight: Sequence[Tensor],
    temperatures: Sequence[float],
    scales: Sequence[Tensor],
    *,
    decoupled: bool,
    unit: bool,
    gradient: bool,
    statistics: bool,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """`nce_forward` of dense rows."""
    first = queries[0]
    dims = [q.shape[2] for q in queries]
    total = sum(q.shape[0] * q.shape[1] for q in queries)
    weighted = bool(log_weight or pair_weight)
    arch = architecture(first.device)
    product = precision(arch, first.dtype)
    # float16 cannot represent a row whose logits are all far below the bound
    online = weighted or bool(scales) or min(temperatures) <= UNIT_TEMPERATURE or first.dtype == torch.float16
    # exact products leave no registers for both forms, and take so long that a running maximum costs nothing
    exact = first.dtype == torch.float32 and product == "ieee" and arch != "interpreter"
    online = online or (exact and not unit)
    checked = not (online or unit)
    form: configs.Form = "online" if online else "checked" if checked else "unit"
    if extra:
        form = "online, extra" if online else "checked, extra" if checked else "unit, extra"
    if weighted or any(dim % 16 for dim in dims):
        form = "any"
    width = block_dim(max(dims))
    tile_of = partial(chosen.nce_tile, arch, first.dtype, width, total, form, product == "tf32")
    tile = tile_of()
    loss = first.new_empty(total, dtype=torch.float32)
    negative, positive = (torch.empty_like(loss) if statistics else loss for _ in range(2))
    gradients = [torch.empty(q.shape, dtype=q.dtype, device=q.device) for q in queries] if gradient else []
    even = first.element_size() == 2 and form != "any"
    even = even and all(
        x.shape[2] == width and x.shape[1] % tile.block_n == 0 and x.stride(1) < LARGEST_STRIDE for x in [*keys, *extra]
    )
    peeled = even and form == "unit" and peels(arch, tile, width, min(k.shape[1] for k in keys), len(keys))
    even = peeled or (even and arch in configs.EVEN_KEYS)
    tile = tile if even else tile_of(ragged=True)
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
                *weight_strides(log_weight, i), *weight_strides(pair_weight, i),
                q.shape[1], q.shape[2], e.shape[1], scales[i] if scales else 1.0 / temperatures[i], block, row,
            )
        )  # fmt: skip
        block += q.shape[0] * triton.cdiv(q.shape[1], tile.block_m)
        row += q.shape[0] * q.shape[1]
    launch(
        nce_kernel, block, first, tuple(problems), loss, negative, positive,
        COUNT=len(problems), BM=tile.block_m, BN=tile.block_n, BD=width,
        SHIFT=15.0 if first.dtype == torch.float16 else 0.0,
        GRADIENT=gradient, ONLINE=online, CHECKED=checked, EXTRA=bool(extra), LOG_WEIGHT=bool(log_weight),
        PAIR_WEIGHT=bool(pair_weight), DECOUPLED=decoupled, LEARNED=bool(scales), EVEN=even, PEELED=peeled,
        PRECISION=product, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return loss, negative, positive, gradients


@triton.jit
def mean_kernel(loss, out, layers, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """Mean over the rows of a direction, then over layers: one program per direction, in a fixed order."""
    direction = tl.program_id(0).to(tl.int64)
    mean = 0.0
    for i in tl.static_range(COUNT):
        per_direction = layers[i][1]
        total = tl.zeros([BLOCK], tl.float32)
        for n in range(0, bound(per_direction), BLOCK):
            o_n = n + tl.arange(0, BLOCK)
            p_l = loss + layers[i][0] + direction * per_direction + o_n
            total += tl.load(p_l, mask=o_n < per_direction, other=0.0)
        mean += tl.sum(total, 0) / per_direction
    tl.store(out + direction, mean / COUNT)


@planned
def mean_by_direction(loss: Tensor, rows: Sequence[int], directions: int) -> Tensor:
    """Mean over the rows of a direction, then over layers: float32 (directions,).

    `rows` is the number of rows of each layer in `loss`.
    """
    out = torch.empty(directions, dtype=torch.float32, device=loss.device)
    starts = [sum(rows[:i]) for i in range(len(rows))]
    layers = tuple((start, count // directions) for start, count in zip(starts, rows, strict=True))
    tile = configs.find_tile("mean", architecture(loss.device))
    launch(
        mean_kernel, directions, loss, loss, out, layers, COUNT=len(rows), BLOCK=tile.block_m, num_warps=tile.warps
    )  # fmt: skip
    return out
