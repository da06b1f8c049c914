"""Adds the gradients of sampled rows to the gradient of the map that they were sampled from.

The dense gradient of a sampled map is zero almost everywhere: at 256x256, 256 rows stand for 65,536 locations. Where
another gradient of the map exists anyway, its few rows are added in place. The sum over all rows is the gradient of the
bias that the map lacks. Rows of one call have distinct locations, so that a load, an addition and a store suffice: the
same input gives the same bits.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .common import architecture, bound, launch, narrow
from .planes import as_map
from .planned import planned


@triton.jit
def add_rows_kernel(
    target,
    rows,
    ids,
    d_bias,
    i_set,
    i_patch,
    share,
    locations,
    patches,
    length,
    channels,
    width,
    MORE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """All rows of BN channels. MORE adds to the sum of an earlier call."""
    o_c = tl.program_id(0) * BN + tl.arange(0, BN)
    m_c = o_c < channels
    acc = tl.zeros([BM, BN], tl.float32)
    for start in range(0, bound(length), BM):
        o_r = start + tl.arange(0, BM)
        m_r = o_r < length
        image = o_r // patches
        p_i = ids + (image // share).to(tl.int64) * i_set + (o_r % patches).to(tl.int64) * i_patch
        patch = tl.load(p_i, mask=m_r, other=0)
        m_x = (m_r & (patch >= 0) & (patch < locations))[:, None] & m_c[None, :]
        x = tl.load(rows + o_r.to(tl.int64)[:, None] * channels + o_c[None, :], mask=m_x, other=0.0)
        at = tl.where(m_r & (patch >= 0) & (patch < locations), patch, 0).to(tl.int32)
        y = (at // width).to(tl.int64) * target.y + (at % width).to(tl.int64) * target.x
        p_t = target.data + (image.to(tl.int64) * target.image + y)[:, None]
        p_t += o_c.to(tl.int64)[None, :] * target.channel  # [BM, BN]
        sum = tl.load(p_t, mask=m_x, other=0.0).to(tl.float32) + x
        tl.store(p_t, narrow(sum, target.data.dtype.element_ty), mask=m_x)
        acc += x
    total = tl.sum(acc, 0)
    if MORE:
        total += tl.load(d_bias + o_c, mask=m_c, other=0.0).to(tl.float32)
    tl.store(d_bias + o_c, narrow(total, d_bias.dtype.element_ty), mask=m_c)


@planned
def add_rows(target: Tensor, rows: Tensor, ids: Tensor, d_bias: Tensor, *, more: bool = False) -> None:
    """Add rows to a map in place, and write their sum to `d_bias`, in one launch.

    Args:
        target: (images, channels, height, width), bfloat16, float16 or float32, any strides. The sum of a value and its
            row is rounded once to its dtype.
        rows: float32 (images * patches, channels), contiguous.
        ids: int64 (sets, patches); each set is for the same number of consecutive images. Within an image, no location
            occurs twice. Rows of locations outside the map are left out.
        d_bias: (channels,), bfloat16, float16 or float32.
        more: add to `d_bias` instead.
    """
    arch = architecture(target.device)
    images, channels, height, width = target.shape
    tile = configs.find_tile("add_rows", arch)
    launch(
        add_rows_kernel, triton.cdiv(channels, tile.block_n), target, as_map(target), rows, ids, d_bias,
        ids.stride(0), ids.stride(1), images // ids.shape[0], height * width, ids.shape[1], images * ids.shape[1],
        channels, width, MORE=more, BM=tile.block_m, BN=tile.block_n, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
