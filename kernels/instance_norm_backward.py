"""The gradient of `instance_norm.py`, through its pad or blur, its activation and its norm.

For the gradient g of y and normalised values n: d_x = (g' - mean(g') - n * mean(g' n)) / deviation, g' = act'(n) g. A
plane of at most 4096 pixels takes one launch (`norm_whole.py`), unless it was blurred up. Other planes take two:
`sums_kernel` sums g' and g' n over the parts of a plane, and every program of `gradient_kernel` joins the parts of its
plane and writes its tiles. Both recompute n and the activation's mask from x, the mean and 1 / deviation.

Pads need no gather for the sums: each pixel of the padded gradient is multiplied by the n that it is a copy of. A blur
gathers g from up to 16 pixels. Where that many are read, the first kernel writes g and the second reads it, in float32:
the sum of many taps has a large mean, which is subtracted, and rounding g before would leave its error.

Reads + writes per element of x: 4 + 1. (Separate norm, ReLU and pad move 2 + 3 + 5.)
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import norm_tiles, norm_whole
from .common import architecture, launch
from .norm_parts import (
    BACK,
    KINDS,
    TAPS,
    Tiling,
    adjoint_tile,
    check_form,
    joined_block,
    joined_parts,
    through_activation,
)
from .planes import (
    as_map,
    check_plane,
    empty_like,
    is_channels_last,
    is_near,
    load_tile,
    pixels_from,
    place,
    reflected,
    rows_join,
    store_tile,
)
from .planned import planned


@triton.jit
def sums_kernel(
    x, gradient, inner, ready, statistics, out, channels, height, width, out_height, out_width, pixels, parts, tiles,
    SLOPE: tl.constexpr, INNER: tl.constexpr, WRITE: tl.constexpr, MARGIN: tl.constexpr, KIND: tl.constexpr,
    TAPS: tl.constexpr, FLAT: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Sums of g' and of g' * n over `tiles` tiles. `out` is float32 (images, parts, 2, channels).

    `pixels` counts those of the padded map with a margin, else those of x. With WRITE, g is stored in `ready`.
    """
    image, part, first_c = place(channels, parts, BC)
    o_c = first_c + tl.arange(0, BC)
    m_c = o_c < channels
    p_s = statistics + image * 2 * channels + o_c
    mean = tl.load(p_s, mask=m_c, other=0.0)[None, :]
    scale = tl.load(p_s + channels, mask=m_c, other=0.0)[None, :]
    total = tl.zeros([BM, BC], tl.float32)
    product = tl.zeros([BM, BC], tl.float32)
    for t in range(tiles):
        start = (part * tiles + t) * BM
        m_p = start + tl.arange(0, BM) < pixels
        if MARGIN > 0:
            row, column = pixels_from(start, out_width, FLAT, BM)
            arriving = load_tile(gradient, image, row, column, m_p, o_c, m_c)
            row, column = row - MARGIN, column - MARGIN
            if INNER:
                inside = m_p & (row >= 0) & (row < height) & (column >= 0) & (column < width)
                arriving += load_tile(inner, image, row, column, inside, o_c, m_c)
            row, column = reflected(row, height), reflected(column, width)
        else:
            row, column = pixels_from(start, width, FLAT, BM)
            arriving = adjoint_tile(
                gradient, inner, image, start, row, column, m_p, o_c, m_c, height, width, out_height, out_width,
                INNER, 0, KIND, TAPS, BM, BC,
            )  # fmt: skip
            if WRITE:
                store_tile(ready, arriving, image, row, column, m_p, o_c, m_c)
        normal = (load_tile(x, image, row, column, m_p, o_c, m_c) - mean) * scale
        arriving = through_activation(arriving, normal, SLOPE)
        total += arriving  # 0 where masked
        product += arriving * normal
    p_o = out + (image * parts + part) * 2 * channels + o_c
    tl.store(p_o, tl.sum(total, 0), mask=m_c)
    tl.store(p_o + channels, tl.sum(product, 0), mask=m_c)


@triton.jit
def gradient_kernel(
    x, gradient, inner, ready, total, statistics, partial, out, channels, height, width, out_height, out_width, pixels,
    parts, tiles, joins, SLOPE: tl.constexpr, INNER: tl.constexpr, READY: tl.constexpr, TOTAL: tl.constexpr,
    MARGIN: tl.constexpr, KIND: tl.constexpr, TAPS: tl.constexpr, FLAT: tl.constexpr, BS: tl.constexpr,
    BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """`tiles` tiles of d_x. With READY, `ready` contains g; with TOTAL, g is stored in `total`."""
    image, part, first_c = place(channels, parts, BC)
    o_c = first_c + tl.arange(0, BC)
    m_c = o_c < channels
    of_gradient, of_product = joined_parts(partial, image, channels, o_c, m_c, pixels, joins, 0, 0.0, False, BS)
    p_s = statistics + image * 2 * channels + o_c
    mean = tl.load(p_s, mask=m_c, other=0.0)[None, :]
    scale = tl.load(p_s + channels, mask=m_c, other=0.0)[None, :]
    for t in range(tiles):
        start = (part * tiles + t) * BM
        row, column = pixels_from(start, width, FLAT, BM)
        m_p = start + tl.arange(0, BM) < pixels
        if READY:
            arriving = load_tile(ready, image, row, column, m_p, o_c, m_c)
        else:
            arriving = adjoint_tile(
                gradient, inner, image, start, row, column, m_p, o_c, m_c, height, width, out_height, out_width,
                INNER, MARGIN, KIND, TAPS, BM, BC,
            )  # fmt: skip
        if TOTAL:
            store_tile(total, arriving, image, row, column, m_p, o_c, m_c)
        normal = (load_tile(x, image, row, column, m_p, o_c, m_c) - mean) * scale
        arriving = through_activation(arriving, normal, SLOPE)
        value = (arriving - of_gradient[None, :] - normal * of_product[None, :]) * scale
        store_tile(out, value, image, row, column, m_p, o_c, m_c)


@planned
def instance_norm_backward(
    gradient: Tensor, inner: Tensor | None, x: Tensor, statistics: Tensor, slope: float, margin: int, blur: int = 0,
    total: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The gradients of x and of the residual: one or two launches.

    Args:
        gradient: of the padded or blurred output, any strides.
        inner: another gradient, of y before the pad or blur, in x's shape; any strides.
        x, slope, margin, blur: as of `instance_norm`.
        statistics: the moments that it returned.
        total: return the gradient of the residual too.

    Returns:
        the gradient of x, and the gradient of y, which is the residual's, both in x's dtype and layout; the second has
        no elements unless `total`.
    """
    check_form(margin, blur)
    images, channels, height, width = x.shape
    check_plane(x, gradient)
    out_height, out_width = gradient.shape[2:]
    out = empty_like(x, height, width)
    kind = BACK[KINDS[blur]]
    more = x if inner is None else inner
    write = blur == 2
    form = {"SLOPE": slope, "INNER": inner is not None, "MARGIN": margin, "KIND": kind, "TAPS": TAPS[kind]}
    arch, pixels = architecture(x.device), height * width
    whole = None if blur == 2 else norm_tiles.whole_tile(arch, channels, is_channels_last(x), x.dtype, pixels, True)
    d_total = empty_like(x, height, width) if total else torch.empty(0, dtype=x.dtype, device=x.device)
    if whole is not None and is_near(x, gradient, more, out):
        ready = d_total if total else empty_like(x, height, width) if blur else out
        norm_whole.backward(whole, gradient, more, x, statistics, out, ready, form, total)
        return out, d_total
    ready = torch.empty_like(out, dtype=torch.float32) if write else out
    added = d_total if total else out
    plain = margin == 0 and blur == 0 and rows_join(x, gradient, more, added)
    reads = TAPS[kind] ** 2 + (2 if inner is not None else 1)
    shape = channels, height, width, out_height, out_width
    maps = as_map(x), as_map(gradient), as_map(more), as_map(ready)
    split = Tiling(x, arch, out_height * out_width if margin else pixels, reads, reduction=True)
    partial = torch.empty(images, split.parts, 2, channels, dtype=torch.float32, device=x.device)
    launch(
        sums_kernel, split.programs, x, *maps, statistics, partial, *shape,
        out_height * out_width if margin else pixels,
        split.parts, split.each, **form, WRITE=write, FLAT=plain, **split.options,
    )  # fmt: skip
    over = Tiling(x, arch, pixels, 2 if write else reads + 2 * (margin > 0), reduction=False)
    launch(
        gradient_kernel, over.programs, x, *maps, as_map(added), statistics, partial, as_map(out), *shape, pixels,
        over.parts, over.each, split.parts, **form, READY=write, TOTAL=total, FLAT=plain and rows_join(out),
        BS=joined_block(split.parts), **over.options,
    )  # fmt: skip
    return out, d_total
