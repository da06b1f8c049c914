"""The backward of `project`: from the gradients of unit rows to the gradients of maps and MLPs.

`project_backward_kernel` writes the gradient of a map with plain stores if no location repeats. Otherwise
`merge_kernel` adds the rows of each location. No atomics are used: the same input gives the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import chosen
from .common import (
    architecture,
    block_dim,
    bound,
    dense_rows,
    dot,
    fields_of,
    launch,
    long_dot,
    narrow,
    number_of,
    precision,
)
from .map_layout import MapLayout, map_views
from .planes import map_strides
from .planned import planned
from .project import (
    NORM_EPS,
    TRITON_DTYPE,
    FeatureMap,
    gradient_dtype,
    groups_of_four,
    locations_of,
    places_of,
    row_numbers,
    tile_widths,
)
from .weight_gradient import weight_gradients


class LayerGradient(NamedTuple):
    """One map of `project_backward_kernel` and `merge_kernel`, without its gradient (see `FeatureMap`)."""

    ids: Tensor
    weight1: Tensor
    weight2: Tensor
    unit: Tensor
    d_unit: Tensor  # (images * patches, dim)
    i_set: int
    i_patch: int
    share: int
    d_row: int
    locations: int
    patches: int
    rows: int
    channels: int
    dim: int
    weight: float  # factor of each row's upstream gradient
    per_direction: int
    first_block: int
    first_row: int
    first_x: int


@triton.jit
def backward_rows(
    maps,
    layers,
    block,
    length,
    h_saved,
    upstream,
    upstream_stride,
    d_z,
    d_h,
    d_x,
    hidden,
    COUNT: tl.constexpr,
    MLP: tl.constexpr,
    UPSTREAM: tl.constexpr,
    DISTINCT: tl.constexpr,
    SAMPLED: tl.constexpr,
    ODD: tl.constexpr,
    WIDE: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BC: tl.constexpr,
    BH: tl.constexpr,
    BD: tl.constexpr,
):
    """`project_backward_kernel` for a block of a layer whose channels are (WIDE) or are not a multiple of 16."""
    one = LayerGradient(*fields_of(layers, block, COUNT))
    rows, first_row = one.rows, one.first_row.to(tl.int64)  # type: ignore[attr-defined]
    channels = one.channels // 16 * 16 if WIDE else one.channels  # as in `project_rows`
    dim = one.dim if MLP else channels
    o_r = row_numbers(one, block, BM)
    o_r64 = o_r.to(tl.int64)
    m_r = o_r < rows
    o_d = tl.arange(0, BD)
    m_rd = m_r[:, None] & (o_d < dim)[None, :]
    u = tl.load(one.unit + o_r64[:, None] * dim + o_d[None, :], mask=m_rd, other=0.0).to(tl.float32)  # [BM, BD]
    d_u = tl.load(one.d_unit + o_r64[:, None] * one.d_row + o_d[None, :], mask=m_rd, other=0.0).to(tl.float32)
    if UPSTREAM:
        p_up = upstream + o_r // one.per_direction * upstream_stride
        d_u *= (tl.load(p_up, mask=m_r, other=0.0).to(tl.float32) * one.weight)[:, None]
    size = tl.load(length + first_row + o_r, mask=m_r, other=0.0)
    inverse = tl.where(size == 0, 0.0, 1.0 / tl.where(size == 0, 1.0, size))
    shrunk = tl.where(size == 0, 0.0, 1.0 / (size + NORM_EPS))
    z = d_u * shrunk[:, None] - u * (tl.sum(u * d_u, 1) * inverse)[:, None]  # d(x / (|x| + eps))
    o_c = tl.arange(0, BC)
    m_c = o_c < channels
    if MLP:
        z16 = narrow(z, DTYPE)
        tl.store(d_z + (first_row + o_r64)[:, None] * dim + o_d[None, :], z16, mask=m_rd)
        x = tl.zeros([BM, BC], tl.float32)
        for h in range(0, bound(hidden), BH):
            o_h = h + tl.arange(0, BH)
            m_h = o_h < hidden
            m_rh = m_r[:, None] & m_h[None, :]
            o_rh = (first_row + o_r64)[:, None] * hidden + o_h[None, :]
            if tl.float32 != DTYPE:  # which needs the registers
                kept = tl.load(h_saved + o_rh, mask=m_rh, other=0.0) > 0  # ready when the product is
            p_w = one.weight2 + o_d[:, None] * hidden + o_h[None, :]
            w = tl.load(p_w, mask=(o_d < dim)[:, None] & m_h[None, :], other=0.0)  # [BD, BH]
            g = long_dot(z16, narrow(w, DTYPE), tl.zeros([BM, BH], tl.float32), PRECISION)
            if tl.float32 == DTYPE:
                kept = tl.load(h_saved + o_rh, mask=m_rh, other=0.0) > 0
            g = narrow(tl.where(kept, g, 0.0), DTYPE)
            tl.store(d_h + o_rh, g, mask=m_rh)
            p_w = one.weight1 + o_h[:, None] * channels + o_c[None, :]
            w = tl.load(p_w, mask=m_h[:, None] & m_c[None, :], other=0.0)  # [BH, BC]
            x = dot(g, narrow(w, DTYPE), x, PRECISION)
    else:
        x = z
    if DISTINCT:
        patch = locations_of(one, o_r, m_r)
        m_in = m_r & (patch >= 0) & (patch < one.locations)
        at = tl.where(m_in, patch, 0).to(tl.int32)
        number = number_of(layers, block, COUNT)
        for i in tl.static_range(COUNT):
            if ((ODD >> i) & 1 == 0) == WIDE:  # noqa: SIM102 - known to the compiler
                if number == i:
                    if (SAMPLED >> i) & 1:
                        p_m = maps[i].map + o_r64[:, None] * channels + o_c[None, :]
                        tl.store(p_m, x, mask=m_r[:, None] & m_c[None, :])
                    else:
                        p_m = places_of(maps[i], o_r // one.patches, at, o_c)
                        tl.store(p_m, narrow(x, maps[i].map.dtype.element_ty), mask=m_in[:, None] & m_c[None, :])
    else:
        p_x = d_x + one.first_x + o_r64[:, None] * channels + o_c[None, :]
        tl.store(p_x, narrow(x, DTYPE), mask=m_r[:, None] & m_c[None, :])


@triton.jit
def project_backward_kernel(
    maps,
    layers,
    length,
    h_saved,
    upstream,
    upstream_stride,
    d_z,
    d_h,
    d_x,
    hidden,
    COUNT: tl.constexpr,
    MLP: tl.constexpr,
    UPSTREAM: tl.constexpr,
    DISTINCT: tl.constexpr,
    SAMPLED: tl.constexpr,
    ODD: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BC: tl.constexpr,
    BO: tl.constexpr,
    BH: tl.constexpr,
    BD: tl.constexpr,
):
    """From the gradient of unit rows to those of the projection, the hidden rows, and the map or the sampled rows.

    BC, BO, BD and ODD are as in `project_kernel`. The bits of SAMPLED are set for layers whose rows are stored as rows.
    """
    block = tl.program_id(0).to(tl.int64)
    odd = (ODD >> number_of(layers, block, COUNT)) & 1
    if BC > 0:  # noqa: SIM102 - known to the compiler
        if BO == 0 or odd == 0:
            backward_rows(
                maps, layers, block, length, h_saved, upstream, upstream_stride, d_z, d_h, d_x, hidden,
                COUNT, MLP, UPSTREAM, DISTINCT, SAMPLED, ODD, True, DTYPE, PRECISION, BM, BC, BH, BD if MLP else BC,
            )  # fmt: skip
    if BO > 0:  # noqa: SIM102
        if BC == 0 or odd == 1:
            backward_rows(
                maps, layers, block, length, h_saved, upstream, upstream_stride, d_z, d_h, d_x, hidden,
                COUNT, MLP, UPSTREAM, DISTINCT, SAMPLED, ODD, False, DTYPE, PRECISION, BM, BO, BH, BD if MLP else BO,
            )  # fmt: skip


@triton.jit
def merge_kernel(maps, layers, d_x, COUNT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr):
    """The gradient of the map if locations may repeat: every row stores the sum over the rows of its location.

    Rows of the same location store the same bits at the same address, so their order does not matter.
    """
    block = tl.program_id(0).to(tl.int64)
    one = LayerGradient(*fields_of(layers, block, COUNT))
    number = number_of(layers, block, COUNT)
    patches, channels = one.patches, one.channels
    within = (block - one.first_block).to(tl.int32)
    blocks = tl.cdiv(patches, BM)
    image = within // blocks
    o_m = (within % blocks) * BM + tl.arange(0, BM)
    m_m = o_m < patches
    ids = one.ids + (image // one.share).to(tl.int64) * one.i_set
    own = tl.load(ids + o_m.to(tl.int64) * one.i_patch, mask=m_m, other=-1)
    o_c = tl.arange(0, BC)
    m_c = o_c < channels
    acc = tl.zeros([BM, BC], tl.float32)
    for n in range(0, bound(patches), BN):
        o_n = (n + tl.arange(0, BN)).to(tl.int64)
        m_n = o_n < patches
        other = tl.load(ids + o_n * one.i_patch, mask=m_n, other=-2)
        same = (own[:, None] == other[None, :]).to(tl.int32)  # [BM, BN]
        if tl.max(tl.max(same, 1), 0) > 0:
            p_x = d_x + one.first_x + (image.to(tl.int64) * patches + o_n)[:, None] * channels + o_c[None, :]
            x = tl.load(p_x, mask=m_n[:, None] & m_c[None, :], other=0.0)
            acc = dot(narrow(same.to(tl.float32), x.dtype), x, acc, "ieee")  # a sum of rows as they are
    m_in = m_m & (own >= 0) & (own < one.locations)
    at = own.to(tl.int32)  # nothing is stored at a location outside the map
    for i in tl.static_range(COUNT):
        if number == i:
            m_x = m_in[:, None] & (o_c < layers[i].channels)[None, :]
            tl.store(places_of(maps[i], image, at, o_c), narrow(acc, maps[i].map.dtype.element_ty), mask=m_x)


def project_backward(
    d_units: Sequence[Tensor],
    upstream: Tensor | None,
    directions: int,
    maps: Sequence[MapLayout],
    ids: Sequence[Tensor],
    mlp: Sequence[Tensor],
    units: Sequence[Tensor],
    length: Tensor,
    x_saved: Tensor,
    h_saved: Tensor,
    *,
    distinct: bool,
    wanted: Sequence[bool],
    weights_wanted: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of the maps (bytes, see `map_views`) and of the MLPs (float32, see `weight_views`).

    Args:
        d_units: (rows, dim) per layer, the gradient of the unit rows. With `upstream`, it is multiplied by
            upstream[direction] / (rows per direction * layers); the rows are split into `directions` equal parts.
        distinct: no location appears twice in an image.
        wanted: which maps need a gradient.
        weights_wanted: compute the gradients of the MLPs; otherwise they are empty.
    """
    size = sum(m.bytes() for m, want in zip(maps, wanted, strict=True) if want)
    buffer = torch.zeros(size, dtype=torch.uint8, device=units[0].device)
    flat = into_buffer(
        buffer, [dense_rows(d) for d in d_units], upstream, directions, maps, ids, mlp, units, length, x_saved, h_saved,
        distinct=distinct, wanted=tuple(wanted), weights_wanted=weights_wanted,
    )  # fmt: skip
    return buffer, flat


@planned(products="matmul")
def into_buffer(
    buffer: Tensor,
    d_units: Sequence[Tensor],
    upstream: Tensor | None,
    directions: int,
    maps: Sequence[MapLayout],
    ids: Sequence[Tensor],
    mlp: Sequence[Tensor],
    units: Sequence[Tensor],
    length: Tensor,
    x_saved: Tensor,
    h_saved: Tensor,
    *,
    distinct: bool,
    wanted: tuple[bool, ...],
    weights_wanted: bool,
) -> Tensor:
    """Write the gradients of the maps into a zeroed buffer; return those of the MLPs."""
    first = units[0]
    arch = architecture(first.device)
    dtype = gradient_dtype(units[0].dtype)
    hidden = mlp[0].shape[0] if mlp else 1
    widths = tile_widths([m.channels for m in maps])
    widest_c = block_dim(max(m.channels for m in maps))
    widest_d = block_dim(max(u.shape[1] for u in units))
    total = sum(u.shape[0] for u in units)
    product = precision(arch, dtype)
    kind = mlp[0].dtype if mlp else None
    tile = chosen.project_tile(arch, dtype, max(widest_c, widest_d), total, product == "tf32", kind)
    merge = chosen.merge_tile(arch, dtype, widest_c)
    gradients = map_views(buffer, maps, wanted)
    places, layers, merges, block, merge_block, row, x = [], [], [], 0, 0, 0, 0
    for k, (m, i, w) in enumerate(zip(maps, ids, groups_of_four(mlp, len(maps)), strict=True)):
        d_map, unit = gradients[k], units[k]
        rows, channels = unit.shape[0], m.channels
        target = unit if d_map is None else d_map
        places.append(FeatureMap(target, *map_strides(m[:4], m.strides()), m.width, target))
        fields = LayerGradient(
            i, w[0] if w else unit, w[2] if w else unit, unit, d_units[k], i.stride(0), i.stride(1),
            m.images // i.shape[0], d_units[k].stride(0),
            0 if d_map is None else m.height * m.width,  # a map without locations gets no stores
            i.shape[1], rows, channels, unit.shape[1], directions / (rows * len(maps)), rows // directions,
            block, row, x,
        )  # fmt: skip
        layers.append(fields)
        merges.append(fields._replace(first_block=merge_block))
        block += triton.cdiv(rows, tile.block_m)
        merge_block += m.images * triton.cdiv(i.shape[1], merge.block_m)
        row += rows
        x += rows * channels
    d_z = torch.empty(total * units[0].shape[1] if mlp else 0, dtype=dtype, device=first.device)
    d_h = torch.empty(total * hidden if mlp else 0, dtype=dtype, device=first.device)
    d_x = torch.empty(0 if distinct else x_saved.numel(), dtype=dtype, device=first.device)
    launch(
        project_backward_kernel, block, first, tuple(places), tuple(layers), length, h_saved,
        length if upstream is None else upstream, 0 if upstream is None else upstream.stride(0), d_z, d_h, d_x, hidden,
        COUNT=len(layers), MLP=bool(mlp), UPSTREAM=upstream is not None, DISTINCT=distinct,
        SAMPLED=sum(1 << k for k, m in enumerate(maps) if m.sampled and wanted[k]), ODD=widths.odd_layers,
        DTYPE=TRITON_DTYPE[dtype], PRECISION=product, BM=tile.block_m, BC=widths.even, BO=widths.odd, BH=tile.block_n,
        BD=widest_d, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    if not distinct and any(wanted):
        launch(
            merge_kernel, merge_block, first, tuple(places), tuple(merges), d_x, COUNT=len(merges), BM=merge.block_m,
            BN=merge.block_n, BC=widest_c, num_warps=merge.warps, num_stages=merge.stages,
        )  # fmt: skip
    if not (mlp and weights_wanted):
        return torch.empty(0, dtype=torch.float32, device=first.device)
    all_rows = [u.shape[0] for u in units]
    return weight_gradients(d_z, d_h, h_saved, x_saved, all_rows, [w.shape for w in mlp])
