"""Reflection padding, and its transpose as a gather: every pixel sums its copies in a fixed order.

On a GPU, PyTorch's gradient scatters with atomic additions, which `torch.use_deterministic_algorithms(True)` refuses.
This gradient is deterministic to the bit. Each kernel reads and writes each element once, the minimum for a separate
padding. After an instance norm no separate padding is needed: `instance_norm.py` writes the padded map directly.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import chosen
from .common import architecture, launch
from .planes import (
    as_map,
    check_plane,
    empty_like,
    is_channels_last,
    load_folded,
    load_tile,
    pixels_from,
    place,
    reflected,
    store_tile,
)
from .planned import planned


@triton.jit
def reflect_pad_kernel(
    source, out, channels, height, width, out_width, pixels, parts, MARGIN: tl.constexpr, BM: tl.constexpr,
    BC: tl.constexpr,
):  # fmt: skip
    image, part, first_c = place(channels, parts, BC)
    o_c = first_c + tl.arange(0, BC)
    m_c = o_c < channels
    start = part * BM
    y, x = pixels_from(start, out_width, False, BM)
    m_p = start + tl.arange(0, BM) < pixels
    value = load_tile(source, image, reflected(y - MARGIN, height), reflected(x - MARGIN, width), m_p, o_c, m_c)
    store_tile(out, value, image, y, x, m_p, o_c, m_c)


@triton.jit
def reflect_pad_backward_kernel(
    gradient, out, channels, height, width, pixels, parts, MARGIN: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr
):
    image, part, first_c = place(channels, parts, BC)
    o_c = first_c + tl.arange(0, BC)
    m_c = o_c < channels
    start = part * BM
    y, x = pixels_from(start, width, False, BM)
    m_p = start + tl.arange(0, BM) < pixels
    value = load_folded(gradient, image, start, y, x, m_p, o_c, m_c, height, width, MARGIN, BM)
    store_tile(out, value, image, y, x, m_p, o_c, m_c)


@planned
def reflect_pad(x: Tensor, height: int, width: int) -> Tensor:
    """Pad a map (images, channels, h, w) of any strides to (images, channels, height, width), equally on all sides.

    Args:
        height, width: h + 2 * margin and w + 2 * margin, with margin < min(h, w).
    """
    check_plane(x)
    out = empty_like(x, height, width)
    check_plane(out)
    images, channels = x.shape[:2]
    tile = chosen.layer_tile(architecture(x.device), channels, is_channels_last(x))
    parts = triton.cdiv(height * width, tile.block_m)
    launch(
        reflect_pad_kernel, images * parts * triton.cdiv(channels, tile.block_n), x, as_map(x), as_map(out), channels,
        x.shape[2], x.shape[3], width, height * width, parts,
        MARGIN=(height - x.shape[2]) // 2, BM=tile.block_m, BC=tile.block_n, num_warps=tile.warps,
    )  # fmt: skip
    return out


@planned
def reflect_pad_backward(gradient: Tensor, height: int, width: int) -> Tensor:
    """The gradient of a map of `height` x `width`, from the gradient of the padded map."""
    check_plane(gradient)
    out = empty_like(gradient, height, width)
    images, channels = gradient.shape[:2]
    tile = chosen.layer_tile(architecture(gradient.device), channels, is_channels_last(gradient), reads=3)
    parts = triton.cdiv(height * width, tile.block_m)
    launch(
        reflect_pad_backward_kernel, images * parts * triton.cdiv(channels, tile.block_n), gradient, as_map(gradient),
        as_map(out), channels, height, width, height * width, parts,
        MARGIN=(gradient.shape[2] - height) // 2, BM=tile.block_m, BC=tile.block_n, num_warps=tile.warps,
    )  # fmt: skip
    return out
