"""Patch rows of unit length from feature maps: draw, gather, project, normalise, for all layers and sides at once.

`project_kernel` reads only the sampled locations, through the map's own strides, and runs Linear-ReLU-Linear in chunks
of hidden units: a chunk of the first product feeds the second at once, so the hidden rows cross memory only when the
backward asks for them. The projection itself stays in float32 until it has unit length: it can be as short as 1e-6.

`project_backward_kernel` does the same in reverse and writes the map's gradient by plain stores; rows of the same
location are added by `merge_kernel` first. `weight_gradient_kernel` sums over rows in a fixed order. No atomics: the
same input gives the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .common import architecture, block_dim, dense_rows, dot, launch, narrow

NORM_EPS = tl.constexpr(1e-7)
ROUNDS = tl.constexpr(8)


class Draw(NamedTuple):
    """One layer of `draw_kernel`."""

    locations: int
    side: int  # ceil(sqrt(locations))
    patches: int
    first_block: int
    first_id: int


class Layer(NamedTuple):
    """One map of `project_kernel`; tensors become pointers inside the kernel."""

    map: Tensor  # (images, channels, height, width)
    ids: Tensor  # int64, (sets, patches): each set serves `share` images
    weight1: Tensor  # (hidden, channels)
    bias1: Tensor
    weight2: Tensor  # (dim, hidden)
    bias2: Tensor
    unit: Tensor  # (images * patches, dim), contiguous
    m_image: int
    m_channel: int
    m_y: int
    m_x: int
    i_set: int
    i_patch: int
    share: int
    width: int
    locations: int
    patches: int
    rows: int
    channels: int
    dim: int
    first_block: int
    first_row: int
    first_x: int


class LayerGradient(NamedTuple):
    """One map of `project_backward_kernel` and `merge_kernel`."""

    map: Tensor  # gradient, laid out as the map
    ids: Tensor
    weight1: Tensor
    weight2: Tensor
    unit: Tensor
    d_unit: Tensor  # (images * patches, dim)
    m_image: int
    m_channel: int
    m_y: int
    m_x: int
    i_set: int
    i_patch: int
    share: int
    d_row: int
    width: int
    locations: int
    patches: int
    rows: int
    channels: int
    dim: int
    weight: float  # of each row's upstream gradient
    per_direction: int
    first_block: int
    first_row: int
    first_x: int


@triton.jit
def draw_kernel(layers, seeds, ids, sets, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """Distinct locations, uniform: the first `patches` values of a random permutation of the locations.

    The permutation is a Feistel network on pairs (a, b) below `side`, walked on until it lands below `locations`
    (Black and Rogaway, CT-RSA 2002); its round function is Philox.
    """
    block = tl.program_id(0)
    locations, side, patches, first_block, first_id = layers[0]
    layer = 0
    for i in tl.static_range(1, COUNT):
        here = block >= layers[i].first_block
        locations = tl.where(here, layers[i].locations, locations)
        side = tl.where(here, layers[i].side, side)
        patches = tl.where(here, layers[i].patches, patches)
        first_block = tl.where(here, layers[i].first_block, first_block)
        first_id = tl.where(here, layers[i].first_id, first_id)
        layer = tl.where(here, i, layer)
    block -= first_block
    blocks = tl.cdiv(patches, BLOCK)
    chosen = block // blocks
    o_p = (block % blocks) * BLOCK + tl.arange(0, BLOCK)
    m_p = o_p < patches
    seed = tl.load(seeds + layer * sets + chosen)
    value = tl.where(m_p, o_p, 0)
    going = m_p
    while tl.sum(going.to(tl.int32)) > 0:
        a = value // side
        b = value % side
        for r in tl.static_range(ROUNDS):
            drawn = tl.randint(seed, b * ROUNDS + r).to(tl.int32) & 0x7FFFFFFF
            mixed = (a + drawn % side) % side
            a = b
            b = mixed
        value = tl.where(going, a * side + b, value)
        going = going & (value >= locations)
    tl.store(ids + first_id + chosen.to(tl.int64) * patches + o_p, value.to(tl.int64), mask=m_p)


@triton.jit
def project_kernel(
    layers,
    length,
    x_saved,
    h_saved,
    hidden,
    COUNT: tl.constexpr,
    SAVED: tl.constexpr,
    MLP: tl.constexpr,
    DTYPE: tl.constexpr,
    BM: tl.constexpr,
    BC: tl.constexpr,
    BH: tl.constexpr,
    BD: tl.constexpr,
):
    """Rows of the first SAVED layers also leave their length, sampled and hidden values for the backward."""
    block = tl.program_id(0).to(tl.int64)
    first = layers[0]
    ids, unit, i_set, i_patch, share = first.ids, first.unit, first.i_set, first.i_patch, first.share
    locations, patches, rows, channels, dim = first.locations, first.patches, first.rows, first.channels, first.dim
    first_block, first_row, first_x = first.first_block, first.first_row, first.first_x
    weight1, bias1, weight2, bias2 = first.weight1, first.bias1, first.weight2, first.bias2
    layer = tl.program_id(0) * 0
    for i in tl.static_range(1, COUNT):
        here = block >= layers[i].first_block
        layer = tl.where(here, i, layer)
        ids = tl.where(here, layers[i].ids, ids)
        unit = tl.where(here, layers[i].unit, unit)
        i_set = tl.where(here, layers[i].i_set, i_set)
        i_patch = tl.where(here, layers[i].i_patch, i_patch)
        share = tl.where(here, layers[i].share, share)
        locations = tl.where(here, layers[i].locations, locations)
        patches = tl.where(here, layers[i].patches, patches)
        rows = tl.where(here, layers[i].rows, rows)
        channels = tl.where(here, layers[i].channels, channels)
        dim = tl.where(here, layers[i].dim, dim)
        first_block = tl.where(here, layers[i].first_block, first_block)
        first_row = tl.where(here, layers[i].first_row, first_row)
        first_x = tl.where(here, layers[i].first_x, first_x)
        if MLP:
            weight1 = tl.where(here, layers[i].weight1, weight1)
            bias1 = tl.where(here, layers[i].bias1, bias1)
            weight2 = tl.where(here, layers[i].weight2, weight2)
            bias2 = tl.where(here, layers[i].bias2, bias2)

    o_r = (block - first_block) * BM + tl.arange(0, BM)
    m_r = o_r < rows
    image = o_r // patches
    patch = tl.load(ids + (image // share) * i_set + (o_r % patches) * i_patch, mask=m_r, other=0)
    m_in = m_r & (patch >= 0) & (patch < locations)
    o_c = tl.arange(0, BC)
    m_c = o_c < channels
    x = tl.zeros([BM, BC], DTYPE)
    for i in tl.static_range(COUNT):  # each map with its own dtype, strides and alignment
        if layer == i:
            one = layers[i]
            offset = image * one.m_image + (patch // one.width) * one.m_y + (patch % one.width) * one.m_x
            p_x = one.map + offset[:, None] + o_c.to(tl.int64)[None, :] * one.m_channel
            x = narrow(tl.load(p_x, mask=m_in[:, None] & m_c[None, :], other=0.0), DTYPE)
    m_saved = (m_r & (layer < SAVED))[:, None]
    if SAVED > 0:
        tl.store(x_saved + first_x + o_r[:, None] * channels + o_c[None, :], x, mask=m_saved & m_c[None, :])

    o_d = tl.arange(0, BD)
    m_d = o_d < dim
    if MLP:
        z = tl.zeros([BM, BD], tl.float32)
        for h in range(0, hidden, BH):
            o_h = h + tl.arange(0, BH)
            m_h = o_h < hidden
            p_w = weight1 + o_h[None, :] * channels + o_c[:, None]
            w = tl.load(p_w, mask=m_c[:, None] & m_h[None, :], other=0.0)  # [BC, BH]
            unit_h = dot(x, narrow(w, DTYPE), tl.zeros([BM, BH], tl.float32))
            unit_h += tl.load(bias1 + o_h, mask=m_h, other=0.0).to(tl.float32)[None, :]
            unit_h = narrow(tl.where(unit_h < 0, 0.0, unit_h), DTYPE)
            if SAVED > 0:
                p_h = h_saved + (first_row + o_r)[:, None] * hidden + o_h[None, :]
                tl.store(p_h, unit_h, mask=m_saved & m_h[None, :])
            p_w = weight2 + o_d[None, :] * hidden + o_h[:, None]
            w = tl.load(p_w, mask=m_h[:, None] & m_d[None, :], other=0.0)  # [BH, BD]
            z = dot(unit_h, narrow(w, DTYPE), z)
        z += tl.load(bias2 + o_d, mask=m_d, other=0.0).to(tl.float32)[None, :]
    else:
        z = x.to(tl.float32)
    size = tl.sqrt(tl.sum(z * z, 1))
    size = tl.where(m_r & (m_in == 0), float("nan"), size)  # a location outside of the map makes its row NaN
    z *= tl.where(size == 0, 0.0, 1.0 / (size + NORM_EPS))[:, None]
    p_u = unit + o_r[:, None] * dim + o_d[None, :]
    tl.store(p_u, narrow(z, DTYPE), mask=m_r[:, None] & m_d[None, :])
    if SAVED > 0:
        tl.store(length + first_row + o_r, size, mask=m_r & (layer < SAVED))


@triton.jit
def project_backward_kernel(
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
    DTYPE: tl.constexpr,
    BM: tl.constexpr,
    BC: tl.constexpr,
    BH: tl.constexpr,
    BD: tl.constexpr,
):
    """From the gradient of unit rows to those of the projection, the hidden rows and the map (or sampled rows)."""
    block = tl.program_id(0).to(tl.int64)
    first = layers[0]
    ids, unit, d_unit, d_row = first.ids, first.unit, first.d_unit, first.d_row
    i_set, i_patch, share, weight1, weight2 = first.i_set, first.i_patch, first.share, first.weight1, first.weight2
    locations, patches, rows, channels, dim = first.locations, first.patches, first.rows, first.channels, first.dim
    weight, per_direction = first.weight, first.per_direction
    first_block, first_row, first_x = first.first_block, first.first_row, first.first_x
    layer = tl.program_id(0) * 0
    for i in tl.static_range(1, COUNT):
        here = block >= layers[i].first_block
        layer = tl.where(here, i, layer)
        ids = tl.where(here, layers[i].ids, ids)
        unit = tl.where(here, layers[i].unit, unit)
        d_unit = tl.where(here, layers[i].d_unit, d_unit)
        d_row = tl.where(here, layers[i].d_row, d_row)
        i_set = tl.where(here, layers[i].i_set, i_set)
        i_patch = tl.where(here, layers[i].i_patch, i_patch)
        share = tl.where(here, layers[i].share, share)
        locations = tl.where(here, layers[i].locations, locations)
        patches = tl.where(here, layers[i].patches, patches)
        rows = tl.where(here, layers[i].rows, rows)
        channels = tl.where(here, layers[i].channels, channels)
        dim = tl.where(here, layers[i].dim, dim)
        weight = tl.where(here, layers[i].weight, weight)
        per_direction = tl.where(here, layers[i].per_direction, per_direction)
        first_block = tl.where(here, layers[i].first_block, first_block)
        first_row = tl.where(here, layers[i].first_row, first_row)
        first_x = tl.where(here, layers[i].first_x, first_x)
        if MLP:
            weight1 = tl.where(here, layers[i].weight1, weight1)
            weight2 = tl.where(here, layers[i].weight2, weight2)

    o_r = (block - first_block) * BM + tl.arange(0, BM)
    m_r = o_r < rows
    o_d = tl.arange(0, BD)
    m_rd = m_r[:, None] & (o_d < dim)[None, :]
    u = tl.load(unit + o_r[:, None] * dim + o_d[None, :], mask=m_rd, other=0.0).to(tl.float32)  # [BM, BD]
    d_u = tl.load(d_unit + o_r[:, None] * d_row + o_d[None, :], mask=m_rd, other=0.0).to(tl.float32)
    if UPSTREAM:
        p_up = upstream + o_r // per_direction * upstream_stride
        d_u *= (tl.load(p_up, mask=m_r, other=0.0).to(tl.float32) * weight)[:, None]
    size = tl.load(length + first_row + o_r, mask=m_r, other=0.0)
    inverse = tl.where(size == 0, 0.0, 1.0 / tl.where(size == 0, 1.0, size))
    shrunk = tl.where(size == 0, 0.0, 1.0 / (size + NORM_EPS))
    z = d_u * shrunk[:, None] - u * (tl.sum(u * d_u, 1) * inverse)[:, None]  # d(x / (|x| + eps))
    o_c = tl.arange(0, BC)
    m_c = o_c < channels
    if MLP:
        z16 = narrow(z, DTYPE)
        tl.store(d_z + (first_row + o_r)[:, None] * dim + o_d[None, :], z16, mask=m_rd)
        x = tl.zeros([BM, BC], tl.float32)
        for h in range(0, hidden, BH):
            o_h = h + tl.arange(0, BH)
            m_h = o_h < hidden
            m_rh = m_r[:, None] & m_h[None, :]
            p_w = weight2 + o_d[:, None] * hidden + o_h[None, :]
            w = tl.load(p_w, mask=(o_d < dim)[:, None] & m_h[None, :], other=0.0)  # [BD, BH]
            g = dot(z16, narrow(w, DTYPE), tl.zeros([BM, BH], tl.float32))
            o_rh = (first_row + o_r)[:, None] * hidden + o_h[None, :]
            g = narrow(tl.where(tl.load(h_saved + o_rh, mask=m_rh, other=0.0).to(tl.float32) > 0, g, 0.0), DTYPE)
            tl.store(d_h + o_rh, g, mask=m_rh)
            p_w = weight1 + o_h[:, None] * channels + o_c[None, :]
            w = tl.load(p_w, mask=m_h[:, None] & m_c[None, :], other=0.0)  # [BH, BC]
            x = dot(g, narrow(w, DTYPE), x)
    else:
        x = z
    m_rc = m_r[:, None] & m_c[None, :]
    if DISTINCT:
        image = o_r // patches
        patch = tl.load(ids + (image // share) * i_set + (o_r % patches) * i_patch, mask=m_r, other=0)
        m_rc = m_rc & ((patch >= 0) & (patch < locations))[:, None]
        for i in tl.static_range(COUNT):
            if layer == i:
                one = layers[i]
                offset = image * one.m_image + (patch // one.width) * one.m_y + (patch % one.width) * one.m_x
                p_m = one.map + offset[:, None] + o_c.to(tl.int64)[None, :] * one.m_channel
                tl.store(p_m, narrow(x, one.map.dtype.element_ty), mask=m_rc)
    else:
        tl.store(d_x + first_x + o_r[:, None] * channels + o_c[None, :], narrow(x, DTYPE), mask=m_rc)


@triton.jit
def merge_kernel(layers, d_x, COUNT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr):
    """The map's gradient where locations may repeat: every row stores the sum over the rows of its location.

    Rows of one location store the same bits to the same place, so that their order does not matter.
    """
    block = tl.program_id(0).to(tl.int64)
    first = layers[0]
    ids, i_set, i_patch, share, locations = first.ids, first.i_set, first.i_patch, first.share, first.locations
    patches, channels, first_block, first_x = first.patches, first.channels, first.first_block, first.first_x
    layer = tl.program_id(0) * 0
    for i in tl.static_range(1, COUNT):
        here = block >= layers[i].first_block
        layer = tl.where(here, i, layer)
        ids = tl.where(here, layers[i].ids, ids)
        i_set = tl.where(here, layers[i].i_set, i_set)
        i_patch = tl.where(here, layers[i].i_patch, i_patch)
        share = tl.where(here, layers[i].share, share)
        locations = tl.where(here, layers[i].locations, locations)
        patches = tl.where(here, layers[i].patches, patches)
        channels = tl.where(here, layers[i].channels, channels)
        first_block = tl.where(here, layers[i].first_block, first_block)
        first_x = tl.where(here, layers[i].first_x, first_x)
    block -= first_block
    blocks = tl.cdiv(patches, BM)
    image = block // blocks
    o_m = (block % blocks) * BM + tl.arange(0, BM)
    m_m = o_m < patches
    ids += (image // share) * i_set
    own = tl.load(ids + o_m * i_patch, mask=m_m, other=-1)
    o_c = tl.arange(0, BC)
    m_c = o_c < channels
    acc = tl.zeros([BM, BC], tl.float32)
    for n in range(0, patches, BN):
        o_n = (n + tl.arange(0, BN)).to(tl.int64)
        m_n = o_n < patches
        other = tl.load(ids + o_n * i_patch, mask=m_n, other=-2)
        same = (own[:, None] == other[None, :]).to(tl.int32)  # [BM, BN]
        if tl.max(tl.max(same, 1), 0) > 0:
            p_x = d_x + first_x + (image * patches + o_n)[:, None] * channels + o_c[None, :]
            x = tl.load(p_x, mask=m_n[:, None] & m_c[None, :], other=0.0)
            acc = dot(narrow(same.to(tl.float32), x.dtype), x, acc)
    m_mc = (m_m & (own >= 0) & (own < locations))[:, None] & m_c[None, :]
    for i in tl.static_range(COUNT):
        if layer == i:
            one = layers[i]
            offset = image * one.m_image + (own // one.width) * one.m_y + (own % one.width) * one.m_x
            p_m = one.map + offset[:, None] + o_c.to(tl.int64)[None, :] * one.m_channel
            tl.store(p_m, narrow(acc, one.map.dtype.element_ty), mask=m_mc)


class WeightGradient(NamedTuple):
    """One layer of `weight_gradient_kernel`: the gradients of weight2, bias2, weight1, bias1, one after another."""

    rows: int
    channels: int
    first_block: int
    first_row: int
    first_x: int
    first_out: int


@triton.jit
def weight_gradient_kernel(
    layers, d_z, d_h, h, x, out, hidden, dim,
    COUNT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """d_weight2 = d_z^T h and d_weight1 = d_h^T x with the sums of d_z and d_h, by tiles, rows in a fixed order."""
    block = tl.program_id(0).to(tl.int64)
    rows, channels, first_block, first_row, first_x, first_out = layers[0]
    for i in tl.static_range(1, COUNT):
        here = block >= layers[i].first_block
        rows = tl.where(here, layers[i].rows, rows)
        channels = tl.where(here, layers[i].channels, channels)
        first_block = tl.where(here, layers[i].first_block, first_block)
        first_row = tl.where(here, layers[i].first_row, first_row)
        first_x = tl.where(here, layers[i].first_x, first_x)
        first_out = tl.where(here, layers[i].first_out, first_out)
    block -= first_block
    tiles2 = tl.cdiv(dim, BM) * tl.cdiv(hidden, BN)
    second = block < tiles2
    tile = tl.where(second, block, block - tiles2)
    left = tl.where(second, d_z + first_row * dim, d_h + first_row * hidden)
    right = tl.where(second, h + first_row * hidden, x + first_x)
    size_m = tl.where(second, dim, hidden)
    size_n = tl.where(second, hidden, channels)
    out += first_out + tl.where(second, 0, dim * hidden + dim)
    across = tl.cdiv(size_n, BN)
    o_m = (tile // across) * BM + tl.arange(0, BM)
    o_n = (tile % across) * BN + tl.arange(0, BN)
    m_m = o_m < size_m
    m_n = o_n < size_n
    acc = tl.zeros([BM, BN], tl.float32)
    total = tl.zeros([BM], tl.float32)
    for r in range(0, rows, BK):
        o_r = (r + tl.arange(0, BK)).to(tl.int64)
        m_r = o_r < rows
        a = tl.load(left + o_r[:, None] * size_m + o_m[None, :], mask=m_r[:, None] & m_m[None, :], other=0.0)
        b = tl.load(right + o_r[:, None] * size_n + o_n[None, :], mask=m_r[:, None] & m_n[None, :], other=0.0)
        if b.dtype != a.dtype:
            b = narrow(b, a.dtype)
        acc = dot(tl.trans(a), b, acc)
        total += tl.sum(a.to(tl.float32), 0)
    tl.store(out + o_m[:, None] * size_n + o_n[None, :], acc, mask=m_m[:, None] & m_n[None, :])
    tl.store(out + size_m * size_n + o_m, total, mask=m_m & (tile % across == 0))


@triton.jit
def mean_kernel(loss, out, layers, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """Mean over the rows of a direction, then over layers: one program a direction, in a fixed order."""
    direction = tl.program_id(0).to(tl.int64)
    mean = 0.0
    for i in tl.static_range(COUNT):
        per_direction = layers[i][1]
        total = tl.zeros([BLOCK], tl.float32)
        for n in range(0, per_direction, BLOCK):
            o_n = n + tl.arange(0, BLOCK)
            p_l = loss + layers[i][0] + direction * per_direction + o_n
            total += tl.load(p_l, mask=o_n < per_direction, other=0.0)
        mean += tl.sum(total, 0) / per_direction
    tl.store(out + direction, mean / COUNT)


def gradient_dtype(dtype: torch.dtype) -> torch.dtype:
    """float16 rows have their gradients multiplied in bfloat16: 1 / |x| of a short row leaves float16's range."""
    return torch.bfloat16 if dtype == torch.float16 else dtype


_TRITON_DTYPE = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


class MapLayout(NamedTuple):
    """All that the backward needs to know of a map, so that its values need not be kept."""

    images: int
    channels: int
    height: int
    width: int
    channels_last: bool
    dtype: torch.dtype

    def strides(self) -> tuple[int, int, int, int]:
        _, c, h, w, channels_last, _ = self
        return (c * h * w, 1, w * c, c) if channels_last else (c * h * w, h * w, w, 1)

    def bytes(self) -> int:
        """Room for the gradient in the one zeroed buffer of all maps."""
        used = self.images * self.channels * self.height * self.width * self.dtype.itemsize
        return (used + 255) // 256 * 256


def map_layout(feature_map: Tensor) -> MapLayout:
    """Channels-last where the map is, else contiguous."""
    channels_last = feature_map.is_contiguous(memory_format=torch.channels_last) and not feature_map.is_contiguous()
    return MapLayout(*feature_map.shape, channels_last, feature_map.dtype)


def map_views(buffer: Tensor, maps: Sequence[MapLayout], wanted: Sequence[bool]) -> list[Tensor | None]:
    """The gradients of the wanted maps inside the buffer."""
    views: list[Tensor | None] = []
    start = 0
    for m, want in zip(maps, wanted, strict=True):
        if not want:
            views.append(None)
            continue
        typed = buffer.narrow(0, start, m.bytes()).view(m.dtype)
        views.append(typed.as_strided(m[:4], m.strides(), start // m.dtype.itemsize))
        start += m.bytes()
    return views


def _groups_of_four(mlp: Sequence[Tensor], layers: int) -> list[Sequence[Tensor]]:
    return [mlp[4 * i : 4 * i + 4] for i in range(layers)] if mlp else [()] * layers


def draw_ids(seeds: Tensor, locations: Sequence[int], patches: int) -> Tensor:
    """int64 (sum of sets * min(patches, locations),): layer after layer, set after set, distinct within a set.

    Args:
        seeds: int64 (layers, sets), random.
    """
    sets = seeds.shape[1]
    layers, block, total = [], 0, 0
    for count in locations:
        taken = min(patches, count)
        side = int(count**0.5)
        side += side * side < count
        layers.append(Draw(count, side, taken, block, total))
        block += sets * triton.cdiv(taken, 256)
        total += sets * taken
    ids = torch.empty(total, dtype=torch.int64, device=seeds.device)
    launch(draw_kernel, block, seeds, tuple(layers), seeds, ids, sets, COUNT=len(layers), BLOCK=256, num_warps=4)
    return ids


def project(
    maps: Sequence[Tensor], ids: Sequence[Tensor], mlp: Sequence[Tensor], dtype: torch.dtype, saved: int
) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    """All layers in one launch: unit rows, and what the backward of the first `saved` layers needs.

    Args:
        maps: (images, channels, height, width) each, any strides and floating dtype.
        ids: int64 (sets, patches) a map; the images share the sets equally, in order.
        mlp: none, or weight1, bias1, weight2, bias2 of each map in turn, contiguous and of one dtype.
        dtype: of the products and of the rows.

    Returns:
        [(images * patches, dim)], float32 lengths, sampled rows, hidden rows (the last three flat, over all layers).
    """
    first = maps[0]
    arch = architecture(first.device)
    hidden = mlp[0].shape[0] if mlp else 1
    widest_c = block_dim(max(m.shape[1] for m in maps))
    dims = [mlp[2].shape[0] if mlp else m.shape[1] for m in maps]
    all_rows = [m.shape[0] * i.shape[-1] for m, i in zip(maps, ids, strict=True)]
    tile = configs.project_tile(arch, dtype, max(widest_c, block_dim(max(dims))), sum(all_rows))
    layers, units, block, row, x = [], [], 0, 0, 0
    for m, i, weights, dim, rows in zip(maps, ids, _groups_of_four(mlp, len(maps)), dims, all_rows, strict=True):
        unit = torch.empty(rows, dim, dtype=dtype, device=m.device)
        units.append(unit)
        layers.append(
            Layer(
                m, i, *(weights or (m, m, m, m)), unit, *m.stride(),
                *i.stride(), m.shape[0] // i.shape[0], m.shape[3], m.shape[2] * m.shape[3], i.shape[1],
                rows, m.shape[1], dim, block, row, x,
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
        project_kernel, block, first, tuple(layers), length, x_saved, h_saved, hidden,
        COUNT=len(layers), SAVED=saved, MLP=bool(mlp), DTYPE=_TRITON_DTYPE[dtype], BM=tile.block_m, BC=widest_c,
        BH=tile.block_n, BD=block_dim(max(dims)) if mlp else widest_c, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return units, length, x_saved, h_saved


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
        d_units: (rows, dim) a layer, the gradient of the unit rows; with `upstream` times upstream[direction] over
            (rows of a direction * layers), the rows being divided among `directions` in order.
        distinct: no location appears twice in a picture.
        wanted: which maps need a gradient.
    """
    first = units[0]
    arch = architecture(first.device)
    d_units = [dense_rows(d) for d in d_units]
    dtype = gradient_dtype(units[0].dtype)
    hidden = mlp[0].shape[0] if mlp else 1
    widest_c = block_dim(max(m.channels for m in maps))
    widest_d = block_dim(max(u.shape[1] for u in units))
    total = sum(u.shape[0] for u in units)
    tile = configs.project_tile(arch, dtype, max(widest_c, widest_d), total)
    merge = configs.merge_tile(arch, dtype, widest_c)
    buffer = torch.zeros(
        sum(m.bytes() for m, want in zip(maps, wanted, strict=True) if want), dtype=torch.uint8, device=first.device
    )
    gradients = map_views(buffer, maps, wanted)
    layers, merges, weights, block, merge_block, row, x = [], [], [], 0, 0, 0, 0
    weight_block = out = 0
    fine = configs.weight_gradient_tile(arch, dtype)
    for k, (m, i, w) in enumerate(zip(maps, ids, _groups_of_four(mlp, len(maps)), strict=True)):
        d_map, unit = gradients[k], units[k]
        rows, channels = unit.shape[0], m.channels
        fields = LayerGradient(
            unit if d_map is None else d_map, i, w[0] if w else unit, w[2] if w else unit, unit, d_units[k],
            *m.strides(), *i.stride(), m.images // i.shape[0], d_units[k].stride(0),
            m.width, 0 if d_map is None else m.height * m.width,  # a map of no locations takes no store
            i.shape[1], rows, channels, unit.shape[1], directions / (rows * len(maps)), rows // directions,
            block, row, x,
        )  # fmt: skip
        layers.append(fields)
        merges.append(fields._replace(first_block=merge_block))
        weights.append(WeightGradient(rows, channels, weight_block, row, x, out))
        block += triton.cdiv(rows, tile.block_m)
        merge_block += m.images * triton.cdiv(i.shape[1], merge.block_m)
        if mlp:
            out += unit.shape[1] * (hidden + 1) + hidden * (channels + 1)
            across = triton.cdiv(unit.shape[1], fine.block_m) * triton.cdiv(hidden, fine.block_n)
            weight_block += across + triton.cdiv(hidden, fine.block_m) * triton.cdiv(channels, fine.block_n)
        row += rows
        x += rows * channels
    d_z = torch.empty(total * units[0].shape[1] if mlp else 0, dtype=dtype, device=first.device)
    d_h = torch.empty(total * hidden if mlp else 0, dtype=dtype, device=first.device)
    d_x = torch.empty(0 if distinct else x_saved.numel(), dtype=dtype, device=first.device)
    flat = torch.empty(out if weights_wanted else 0, dtype=torch.float32, device=first.device)
    launch(
        project_backward_kernel, block, first, tuple(layers), length, h_saved,
        length if upstream is None else upstream, 0 if upstream is None else upstream.stride(0), d_z, d_h, d_x, hidden,
        COUNT=len(layers), MLP=bool(mlp), UPSTREAM=upstream is not None, DISTINCT=distinct,
        DTYPE=_TRITON_DTYPE[dtype], BM=tile.block_m, BC=widest_c, BH=tile.block_n, BD=widest_d,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    if not distinct and any(wanted):
        launch(
            merge_kernel, merge_block, first, tuple(merges), d_x, COUNT=len(merges), BM=merge.block_m,
            BN=merge.block_n, BC=widest_c, num_warps=merge.warps, num_stages=merge.stages,
        )  # fmt: skip
    if mlp and weights_wanted:
        launch(
            weight_gradient_kernel, weight_block, first, tuple(weights), d_z, d_h, h_saved, x_saved, flat, hidden,
            units[0].shape[1], COUNT=len(weights), BM=fine.block_m, BN=fine.block_n, BK=32,
            num_warps=fine.warps, num_stages=fine.stages,
        )  # fmt: skip
    return buffer, flat


def weight_views(flat: Tensor, mlp: Sequence[Tensor]) -> list[Tensor]:
    """weight1, bias1, weight2, bias2 of each layer inside the flat gradient."""
    views, start = [], 0
    for i in range(0, len(mlp), 4):
        parts = {}
        for k in (2, 3, 0, 1):  # the order in which the kernel writes
            parts[k] = flat.narrow(0, start, mlp[i + k].numel()).view(mlp[i + k].shape)
            start += mlp[i + k].numel()
        views += [parts[k] for k in range(4)]
    return views


def mean_by_direction(loss: Tensor, rows: Sequence[int], directions: int) -> Tensor:
    """float32 (directions,): mean over the rows of a direction, then over layers; `rows` of each layer in `loss`."""
    out = torch.empty(directions, dtype=torch.float32, device=loss.device)
    starts = [sum(rows[:i]) for i in range(len(rows))]
    layers = tuple((start, count // directions) for start, count in zip(starts, rows, strict=True))
    launch(mean_kernel, directions, loss, loss, out, layers, COUNT=len(rows), BLOCK=1024, num_warps=4)
    return out
