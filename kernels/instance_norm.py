"""Instance norm without parameters, fused with what surrounds it.

y = act(norm(x)) [+ residual], then a reflection pad, a blur down or up, or y itself. A plane of up to 4096 pixels takes
one launch (`norm_whole.py`), unless it is blurred up. Other planes take two: `moments_kernel` writes the moments of the
parts of a plane, and every program of `normalise_kernel` joins the parts of its plane, always in the same order, before
it writes its tiles. The first program of a plane writes the joined moments for the gradient.

Reads + writes per element of x: 2 + 1, with a residual 3 + 1. (Separate norm, ReLU and pad move 3 + 2 + 2.) A map that
stays in the cache between two launches is read from memory once, so the minimum is 1 + 1.

Means and squared deviations are updated value by value (Welford, 1962) and the parts are joined (Chan et al., 1979).
So a flat image of millions of pixels keeps its digits, which sums of squares in float32 would lose. Sums run in a fixed
order without atomics: the same input gives the same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import norm_tiles, norm_whole
from .common import architecture, launch
from .norm_parts import KINDS, TAPS, Tiling, check_form, joined, joined_block, joined_parts, out_size, output_tile
from .planes import (
    as_map,
    check_plane,
    empty_like,
    is_channels_last,
    is_near,
    load_tile,
    pixels_from,
    place,
    rows_join,
    store_tile,
)
from .planned import planned


@triton.jit
def moments_kernel(
    x, out, channels, width, pixels, parts, tiles, FLAT: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr
):
    """Mean and sum of squared deviations of `tiles` tiles of a plane. `out` is float32 (images, parts, 2, channels)."""
    image, part, first_c = place(channels, parts, BC)
    o_c = first_c + tl.arange(0, BC)
    m_c = o_c < channels
    first = part * tiles * BM
    last = tl.minimum(pixels - first, tiles * BM)  # pixels of this part
    mean = tl.zeros([BM, BC], tl.float32)
    squares = tl.zeros([BM, BC], tl.float32)
    for t in range(tiles):
        start = first + t * BM
        row, column = pixels_from(start, width, FLAT, BM)
        m_p = start + tl.arange(0, BM) < pixels
        value = load_tile(x, image, row, column, m_p, o_c, m_c)
        apart = tl.where(m_p[:, None], value - mean, 0.0)
        mean += apart * (1.0 / (t + 1))
        squares += apart * (value - mean)
    count = ((last - tl.arange(0, BM) + BM - 1) // BM).to(tl.float32)[:, None]  # values per row of the tile
    centre, deviations = joined(mean, squares, tl.maximum(count, 0.0), last.to(tl.float32))
    p_o = out + (image * parts + part) * 2 * channels + o_c
    tl.store(p_o, centre, mask=m_c)
    tl.store(p_o + channels, deviations, mask=m_c)


@triton.jit
def normalise_kernel(
    x, residual, out, partial, statistics, channels, height, width, out_height, out_width, pixels, parts, tiles,
    joins, span, eps, SLOPE: tl.constexpr, RESIDUAL: tl.constexpr, MARGIN: tl.constexpr, KIND: tl.constexpr,
    TAPS: tl.constexpr, FLAT: tl.constexpr, BS: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """`tiles` tiles of output pixels. `pixels` counts those of the output."""
    image, part, first_c = place(channels, parts, BC)
    o_c = first_c + tl.arange(0, BC)
    m_c = o_c < channels
    mean, scale = joined_parts(partial, image, channels, o_c, m_c, height * width, joins, span, eps, True, BS)
    if part == 0:
        p_s = statistics + image * 2 * channels + o_c
        tl.store(p_s, mean, mask=m_c)
        tl.store(p_s + channels, scale, mask=m_c)
    for t in range(tiles):
        start = (part * tiles + t) * BM
        row, column = pixels_from(start, out_width, FLAT, BM)
        m_p = start + tl.arange(0, BM) < pixels
        value = output_tile(
            x, residual, image, row, column, m_p, o_c, m_c, mean, scale, height, width, out_height, out_width,
            SLOPE, RESIDUAL, MARGIN, KIND, TAPS, BM, BC,
        )  # fmt: skip
        store_tile(out, value, image, row, column, m_p, o_c, m_c)


@planned
def instance_norm(
    x: Tensor, residual: Tensor | None, eps: float, slope: float, margin: int, blur: int = 0
) -> tuple[Tensor, Tensor]:
    """Normalise each plane to mean 0 and variance 1, activate, add a residual, and pad or blur: one or two launches.

    Args:
        x: (images, channels, height, width), float32, bfloat16 or float16, any strides.
        residual: added after the activation and before a pad or blur, of x's shape, any strides.
        slope: of the activation for negative values: 1 for none, 0 for ReLU, between them for leaky ReLU.
        margin: of the reflection pad, smaller than height and width; 0 with a blur.
        blur: 0 for none, 1 for down (half the size, rounded up; at least 2x2 pixels), 2 for up (twice the size).

    Returns:
        the result in x's dtype and layout, and float32 (images, 2, channels): the mean of each plane and
        1 / sqrt(variance + eps).
    """
    check_form(margin, blur)
    images, channels, height, width = x.shape
    out = empty_like(x, *out_size(height, width, margin, blur))
    check_plane(x, out)
    statistics = torch.empty(images, 2, channels, dtype=torch.float32, device=x.device)
    added = x if residual is None else residual
    kind, plain = KINDS[blur], margin == 0 and blur == 0
    form = {"SLOPE": slope, "RESIDUAL": residual is not None, "MARGIN": margin, "KIND": kind, "TAPS": TAPS[kind]}
    arch, pixels = architecture(x.device), height * width
    whole = None if blur == 2 else norm_tiles.whole_tile(arch, channels, is_channels_last(x), x.dtype, pixels)
    if whole is not None and is_near(x, added, out):
        norm_whole.forward(whole, x, added, out, statistics, eps, form)
        return out, statistics
    split = Tiling(x, arch, pixels, 1, reduction=True)
    partial = torch.empty(images, split.parts, 2, channels, dtype=torch.float32, device=x.device)
    launch(
        moments_kernel, split.programs, x, as_map(x), partial, channels, width, pixels, split.parts, split.each,
        FLAT=rows_join(x), **split.options,
    )  # fmt: skip
    out_height, out_width = out.shape[2:]
    reads = TAPS[kind] ** 2 * (2 if residual is not None else 1)
    over = Tiling(x, arch, out_height * out_width, reads, reduction=False)
    launch(
        normalise_kernel, over.programs, x, as_map(x), as_map(added), as_map(out), partial, statistics, channels,
        height, width, out_height, out_width, out_height * out_width, over.parts, over.each, split.parts, split.span,
        eps, **form, FLAT=plain and rows_join(x, added, out), BS=joined_block(split.parts), **over.options,
    )  # fmt: skip
    return out, statistics
