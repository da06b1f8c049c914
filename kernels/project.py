"""Patch rows of unit length from feature maps: gather, project and normalise, for all layers and sides in one launch.

`project_kernel` reads only the sampled locations, through the map's own strides. It runs Linear-ReLU-Linear in chunks
of hidden units: a chunk of the first product is multiplied into the second immediately, so the hidden rows are written
only if the backward needs them. The projection stays in float32 until it has unit length, because it can be as short as
1e-6.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import chosen
from .common import architecture, block_dim, bound, dot, fields_of, launch, long_dot, narrow, number_of, precision
from .planes import map_strides
from .planned import planned

NORM_EPS = tl.constexpr(1e-7)

TRITON_DTYPE = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


def gradient_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the products: bfloat16 for float16 rows, because 1 / |x| of a short row exceeds float16's range."""
    return torch.bfloat16 if dtype == torch.float16 else dtype


class FeatureMap(NamedTuple):
    """A map (or its gradient) with its own dtype, strides and alignment, and the bias that its values lack."""

    map: Tensor  # (images, channels, height, width)
    m_image: int
    m_channel: int
    m_y: int
    m_x: int
    width: int
    bias: Tensor  # (channels,), any floating dtype; not read for a map without bias


class Layer(NamedTuple):
    """What else `project_kernel` needs of one map; tensors become pointers inside the kernel."""

    ids: Tensor  # int64, (sets, patches): each set is for `share` images
    weight1: Tensor  # (hidden, channels)
    bias1: Tensor
    weight2: Tensor  # (dim, hidden)
    bias2: Tensor
    unit: Tensor  # (images * patches, dim), contiguous
    i_set: int
    i_patch: int
    share: int
    locations: int
    patches: int
    rows: int
    channels: int
    dim: int
    first_block: int
    first_row: int
    first_x: int


@triton.jit
def row_numbers(one, block, BM: tl.constexpr):
    """The rows of a block within its layer, in 32 bits: a division of 64-bit numbers takes a hundred instructions."""
    return (block - one.first_block).to(tl.int32) * BM + tl.arange(0, BM)


@triton.jit
def locations_of(one, o_r, m_r):
    """The location of each row of a layer."""
    ids = one.ids + (o_r // one.patches // one.share).to(tl.int64) * one.i_set
    return tl.load(ids + (o_r % one.patches) * one.i_patch, mask=m_r, other=0)


@triton.jit
def places_of(one, image, patch, o_c):
    """Pointers to the channels of a map at the given locations (32 bits) of the given images."""
    y, x = (patch // one.width).to(tl.int64), (patch % one.width).to(tl.int64)
    offset = image.to(tl.int64) * one.m_image + y * one.m_y + x * one.m_x
    return one.map + offset[:, None] + o_c.to(tl.int64)[None, :] * one.m_channel  # [BM, BC]


@triton.jit
def project_rows(
    maps,
    layers,
    block,
    length,
    x_saved,
    h_saved,
    hidden,
    COUNT: tl.constexpr,
    SAVED: tl.constexpr,
    MLP: tl.constexpr,
    BIASED: tl.constexpr,
    ODD: tl.constexpr,
    WIDE: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BC: tl.constexpr,
    BH: tl.constexpr,
    BD: tl.constexpr,
):
    """`project_kernel` for a block of a layer whose channels are (WIDE) or are not a multiple of 16."""
    number = number_of(layers, block, COUNT)
    one = Layer(*fields_of(layers, block, COUNT))
    rows, dim, first_row = one.rows, one.dim, one.first_row
    channels = one.channels // 16 * 16 if WIDE else one.channels  # tells the compiler that loads can be wide
    o_r = row_numbers(one, block, BM)
    o_r64 = o_r.to(tl.int64)
    m_r = o_r < rows
    patch = locations_of(one, o_r, m_r)
    m_in = m_r & (patch >= 0) & (patch < one.locations)
    at = tl.where(m_in, patch, 0).to(tl.int32)
    o_c = tl.arange(0, BC)
    m_c = o_c < channels
    x = tl.zeros([BM, BC], DTYPE)
    for i in tl.static_range(COUNT):
        if ((ODD >> i) & 1 == 0) == WIDE:  # noqa: SIM102 - known to the compiler
            if number == i:
                p_x = places_of(maps[i], o_r // one.patches, at, o_c)
                m_x = m_in[:, None] & m_c[None, :]
                value = tl.load(p_x, mask=m_x, other=0.0)
                if (BIASED >> i) & 1:
                    bias = tl.load(maps[i].bias + o_c, mask=m_c, other=0.0).to(tl.float32)
                    value = value.to(tl.float32) + bias[None, :]
                x = narrow(value, DTYPE)
    m_saved = (m_r & (number < SAVED))[:, None]
    if SAVED > 0:
        tl.store(x_saved + one.first_x + o_r64[:, None] * channels + o_c[None, :], x, mask=m_saved & m_c[None, :])

    o_d = tl.arange(0, BD)
    if MLP:
        m_d = o_d < dim
        z = tl.zeros([BM, BD], tl.float32)
        for h in range(0, bound(hidden), BH):
            o_h = h + tl.arange(0, BH)
            m_h = o_h < hidden
            bias = tl.load(one.bias1 + o_h, mask=m_h, other=0.0).to(tl.float32)  # ready when the product is
            p_w = one.weight1 + o_h[None, :] * channels + o_c[:, None]
            w = tl.load(p_w, mask=m_c[:, None] & m_h[None, :], other=0.0)  # [BC, BH]
            unit_h = long_dot(x, narrow(w, DTYPE), tl.zeros([BM, BH], tl.float32), PRECISION)
            unit_h += bias[None, :]
            unit_h = narrow(tl.where(unit_h < 0, 0.0, unit_h), DTYPE)
            if SAVED > 0:
                p_h = h_saved + (first_row + o_r64)[:, None] * hidden + o_h[None, :]
                tl.store(p_h, unit_h, mask=m_saved & m_h[None, :])
            p_w = one.weight2 + o_d[None, :] * hidden + o_h[:, None]
            w = tl.load(p_w, mask=m_h[:, None] & m_d[None, :], other=0.0)  # [BH, BD]
            z = dot(unit_h, narrow(w, DTYPE), z, PRECISION)
        z += tl.load(one.bias2 + o_d, mask=m_d, other=0.0).to(tl.float32)[None, :]
    else:
        dim, m_d, z = channels, m_c, x.to(tl.float32)
    size = tl.sqrt(tl.sum(z * z, 1))
    size = tl.where(m_r & (m_in == 0), float("nan"), size)  # a location outside the map makes its row NaN
    z *= tl.where(size == 0, 0.0, 1.0 / (size + NORM_EPS))[:, None]
    p_u = one.unit + o_r64[:, None] * dim + o_d[None, :]
    tl.store(p_u, narrow(z, DTYPE), mask=m_r[:, None] & m_d[None, :])
    if SAVED > 0:
        tl.store(length + first_row + o_r, size, mask=m_r & (number < SAVED))


@triton.jit
def project_kernel(
    maps,
    layers,
    length,
    x_saved,
    h_saved,
    hidden,
    COUNT: tl.constexpr,
    SAVED: tl.constexpr,
    MLP: tl.constexpr,
    BIASED: tl.constexpr,
    ODD: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BC: tl.constexpr,
    BO: tl.constexpr,
    BH: tl.constexpr,
    BD: tl.constexpr,
):
    """Write unit rows. The first SAVED layers also save lengths, sampled values and hidden values for the backward.

    BC is the width of a tile for layers whose channels are a multiple of 16, and BO for the others, whose bits are set
    in ODD; 0 if there are none. BD is that of the projection; without an MLP it is BC or BO. The bits of BIASED are set
    for maps with a bias.
    """
    block = tl.program_id(0).to(tl.int64)
    odd = (ODD >> number_of(layers, block, COUNT)) & 1
    if BC > 0:  # noqa: SIM102 - known to the compiler
        if BO == 0 or odd == 0:
            project_rows(
                maps, layers, block, length, x_saved, h_saved, hidden,
                COUNT, SAVED, MLP, BIASED, ODD, True, DTYPE, PRECISION, BM, BC, BH, BD if MLP else BC,
            )  # fmt: skip
    if BO > 0:  # noqa: SIM102
        if BC == 0 or odd == 1:
            project_rows(
                maps, layers, block, length, x_saved, h_saved, hidden,
                COUNT, SAVED, MLP, BIASED, ODD, False, DTYPE, PRECISION, BM, BO, BH, BD if MLP else BO,
            )  # fmt: skip


class Widths(NamedTuple):
    """The widths of tiles for layers whose channels are a multiple of 16, and for the others; 0 if there are none."""

    even: int
    odd: int
    odd_layers: int  # bits


def tile_widths(channels: Sequence[int]) -> Widths:
    """One layer with three channels must not make the loads of all others narrow, nor multiply as many as these."""
    even = [c for c in channels if c % 16 == 0]
    odd = max([c for c in channels if c % 16], default=0)
    bits = sum(1 << i for i, c in enumerate(channels) if c % 16)
    return Widths(block_dim(max(even)) if even else 0, 16 if 0 < odd < 16 else block_dim(odd) if odd else 0, bits)


Weights = tuple[Tensor, Tensor, Tensor, Tensor]
"""weight1, bias1, weight2, bias2 of one layer."""


def groups_of_four(mlp: Sequence[Tensor], layers: int) -> list[Weights] | list[None]:
    """The weights of each layer, or None per layer without an MLP."""
    if not mlp:
        return [None] * layers
    return [(mlp[i], mlp[i + 1], mlp[i + 2], mlp[i + 3]) for i in range(0, 4 * layers, 4)]


@planned(products="matmul")
def project(
    maps: Sequence[Tensor],
    ids: Sequence[Tensor],
    mlp: Sequence[Tensor],
    dtype: torch.dtype,
    saved: int,
    biases: Sequence[Tensor | None] = (),
) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    """Unit rows of all layers, and what the backward of the first `saved` layers needs, in one launch.

    Args:
        maps: (images, channels, height, width) per map, any strides and floating dtype.
        ids: int64 (sets, patches) per map; every set is for the same number of consecutive images.
        mlp: none, or weight1, bias1, weight2, bias2 of each map in turn, contiguous and of one dtype.
        dtype: of the products and of the rows.
        saved: the number of layers, from the first, to save for the backward.
        biases: none, or one (channels,) or None per map, which is added in float32 to the values of the map.

    Returns:
        [(images * patches, dim)], float32 lengths, sampled rows, hidden rows (the last three flat, over all layers).
    """
    first = maps[0]
    arch = architecture(first.device)
    hidden = mlp[0].shape[0] if mlp else 1
    widths = tile_widths([m.shape[1] for m in maps])
    widest_c = max(widths.even, widths.odd)
    dims = [mlp[2].shape[0] if mlp else m.shape[1] for m in maps]
    all_rows = [m.shape[0] * i.shape[-1] for m, i in zip(maps, ids, strict=True)]
    product = precision(arch, dtype)
    width, kind = max(widest_c, block_dim(max(dims))), mlp[0].dtype if mlp else None
    tile = chosen.project_tile(arch, dtype, width, sum(all_rows), product == "tf32", kind)
    biased = sum(1 << i for i, bias in enumerate(biases) if bias is not None)
    biases = biases or [None] * len(maps)
    places, layers, units, block, row, x = [], [], [], 0, 0, 0
    sources = zip(maps, ids, groups_of_four(mlp, len(maps)), dims, all_rows, strict=True)
    for bias, (m, i, weights, dim, rows) in zip(biases, sources, strict=True):
        unit = torch.empty(rows, dim, dtype=dtype, device=m.device)
        units.append(unit)
        places.append(FeatureMap(m, *map_strides(m.shape, m.stride()), m.shape[3], m if bias is None else bias))
        layers.append(
            Layer(
                i, *(weights or (unit, unit, unit, unit)), unit, i.stride(0), i.stride(1), m.shape[0] // i.shape[0],
                m.shape[2] * m.shape[3], i.shape[1], rows, m.shape[1], dim, block, row, x,
            )
        )  # fmt: skip
        block += triton.cdiv(rows, tile.block_m)
        row += rows
        x += rows * m.shape[1]
    kept_x = sum(r * m.shape[1] for r, m in zip(all_rows[:saved], maps, strict=False))
    kept_rows = sum(all_rows[:saved])
    length = torch.empty(kept_rows, dtype=torch.float32, device=first.device)
    x_saved = torch.empty(kept_x, dtype=dtype, device=first.device)
    h_saved = torch.empty(kept_rows * hidden if mlp else 0, dtype=dtype, device=first.device)
    launch(
        project_kernel, block, first, tuple(places), tuple(layers), length, x_saved, h_saved, hidden,
        COUNT=len(layers), SAVED=saved, MLP=bool(mlp), BIASED=biased, ODD=widths.odd_layers, DTYPE=TRITON_DTYPE[dtype],
        PRECISION=product, BM=tile.block_m, BC=widths.even, BO=widths.odd, BH=tile.block_n, BD=block_dim(max(dims)),
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return units, length, x_saved, h_saved
