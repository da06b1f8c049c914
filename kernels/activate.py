"""A convolution's bias, its (leaky) ReLU and the blur behind it, in one launch; the gradient in one or two.

PatchGAN's first layer has no norm. Its output is read once and the blurred map is written; the library would also write
and read the biased map and the activated one. The gradient of the bias is summed over parts of the map, and a second,
small launch joins the parts in a fixed order.

Reads + writes per element of x: 1 + 1/4 with a blur down; 1 1/4 + 1 for the gradient.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .common import architecture, launch
from .norm_parts import BACK, KINDS, TAPS, Tiling, adjoint_tile, check_form, out_size, output_tile, through_activation
from .planes import as_map, check_plane, empty_like, load_tile, pixels_from, place, rows_join, store_tile
from .planned import planned


@triton.jit
def activate_kernel(
    x, bias, out, channels, height, width, out_height, out_width, pixels, parts, tiles, SLOPE: tl.constexpr,
    BIAS: tl.constexpr, KIND: tl.constexpr, TAPS: tl.constexpr, FLAT: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """`tiles` tiles of output pixels."""
    image, part, first_c = place(channels, parts, BC)
    o_c = first_c + tl.arange(0, BC)
    m_c = o_c < channels
    one = tl.full([BC], 1.0, tl.float32)
    mean = one - one
    if BIAS:
        mean -= tl.load(bias + o_c, mask=m_c, other=0.0).to(tl.float32)
    for t in range(tiles):
        start = (part * tiles + t) * BM
        row, column = pixels_from(start, out_width, FLAT, BM)
        m_p = start + tl.arange(0, BM) < pixels
        value = output_tile(
            x, x, image, row, column, m_p, o_c, m_c, mean, one, height, width, out_height, out_width, SLOPE, False, 0,
            KIND, TAPS, BM, BC,
        )  # fmt: skip
        store_tile(out, value, image, row, column, m_p, o_c, m_c)


@triton.jit
def activate_gradient_kernel(
    x, gradient, bias, out, partial, channels, height, width, out_height, out_width, pixels, parts, tiles,
    SLOPE: tl.constexpr, BIAS: tl.constexpr, KIND: tl.constexpr, TAPS: tl.constexpr, FLAT: tl.constexpr,
    BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """`tiles` tiles of d_x, and their sum in float32 (images * parts, channels) if there is a bias."""
    image, part, first_c = place(channels, parts, BC)
    o_c = first_c + tl.arange(0, BC)
    m_c = o_c < channels
    shift = tl.zeros([BC], tl.float32)
    if BIAS:
        shift = tl.load(bias + o_c, mask=m_c, other=0.0).to(tl.float32)
    total = tl.zeros([BM, BC], tl.float32)
    for t in range(tiles):
        start = (part * tiles + t) * BM
        row, column = pixels_from(start, width, FLAT, BM)
        m_p = start + tl.arange(0, BM) < pixels
        arriving = adjoint_tile(
            gradient, gradient, image, start, row, column, m_p, o_c, m_c, height, width, out_height, out_width, False,
            0, KIND, TAPS, BM, BC,
        )  # fmt: skip
        value = load_tile(x, image, row, column, m_p, o_c, m_c) + shift[None, :]
        arriving = through_activation(arriving, value, SLOPE)
        store_tile(out, arriving, image, row, column, m_p, o_c, m_c)
        total += arriving  # 0 where masked
    if BIAS:
        tl.store(partial + (image * parts + part) * channels + o_c, tl.sum(total, 0), mask=m_c)


@triton.jit
def bias_kernel(partial, out, channels, joins, tiles, BM: tl.constexpr, BC: tl.constexpr):
    """Sums of float32 (joins, channels) along axis 0, in a fixed order."""
    o_c = tl.program_id(0) * BC + tl.arange(0, BC)
    m_c = o_c < channels
    total = tl.zeros([BM, BC], tl.float32)
    for t in range(tiles):
        o_s = t * BM + tl.arange(0, BM)
        p_p = partial + o_s.to(tl.int64)[:, None] * channels + o_c[None, :]
        total += tl.load(p_p, mask=(o_s < joins)[:, None] & m_c[None, :], other=0.0)
    tl.store(out + o_c, tl.sum(total, 0), mask=m_c)


@planned
def activate(x: Tensor, bias: Tensor | None, slope: float, blur: int = 0) -> Tensor:
    """Add a bias, activate, and blur, in one launch.

    Args:
        x: (images, channels, height, width), float32, bfloat16 or float16, any strides.
        bias: (channels,), or None.
        slope: of the activation for negative values: 0 for ReLU, between 0 and 1 for leaky ReLU.
        blur: 0 for none, 1 for down (half the size, rounded up; at least 2x2 pixels), 2 for up (twice the size).

    Returns:
        the result in x's dtype and layout.
    """
    check_form(0, blur)
    channels, height, width = x.shape[1:]
    out = empty_like(x, *out_size(height, width, 0, blur))
    check_plane(x, out)
    out_height, out_width = out.shape[2:]
    kind = KINDS[blur]
    over = Tiling(x, architecture(x.device), out_height * out_width, TAPS[kind] ** 2, reduction=False)
    launch(
        activate_kernel, over.programs, x, as_map(x), x if bias is None else bias, as_map(out), channels, height,
        width, out_height, out_width, out_height * out_width, over.parts, over.each, SLOPE=slope,
        BIAS=bias is not None, KIND=kind, TAPS=TAPS[kind], FLAT=blur == 0 and rows_join(x, out), **over.options,
    )  # fmt: skip
    return out


@planned
def activate_backward(
    gradient: Tensor, x: Tensor, bias: Tensor | None, slope: float, blur: int = 0
) -> tuple[Tensor, Tensor]:
    """The gradients of x and of the bias: two launches, or one without a bias.

    Args:
        gradient: of the output of `activate`, any strides.
        x, bias, slope, blur: as of `activate`.

    Returns:
        the gradient of x in its dtype and layout, and float32 (channels,), without elements if there is no bias.
    """
    check_form(0, blur)
    images, channels, height, width = x.shape
    check_plane(x, gradient)
    out_height, out_width = gradient.shape[2:]
    out = empty_like(x, height, width)
    biased = bias is not None
    kind = BACK[KINDS[blur]]
    over = Tiling(x, architecture(x.device), height * width, TAPS[kind] ** 2 + 1, reduction=True)
    d_bias = torch.empty(channels if biased else 0, dtype=torch.float32, device=x.device)
    joins = images * over.parts
    partial = torch.empty(joins, channels if biased else 0, dtype=torch.float32, device=x.device)
    launch(
        activate_gradient_kernel, over.programs, x, as_map(x), as_map(gradient), x if bias is None else bias,
        as_map(out), partial, channels, height, width, out_height, out_width, height * width, over.parts, over.each,
        SLOPE=slope, BIAS=biased, KIND=kind, TAPS=TAPS[kind], FLAT=blur == 0 and rows_join(x, gradient, out),
        **over.options,
    )  # fmt: skip
    if biased:
        tile = configs.find_tile("bias_join", architecture(x.device))
        launch(
            bias_kernel, triton.cdiv(channels, tile.block_n), x, partial, d_bias, channels, joins,
            triton.cdiv(joins, tile.block_m), BM=tile.block_m, BC=tile.block_n, num_warps=tile.warps,
        )  # fmt: skip
    return out, d_bias
