"""Terms of a loss that are means over elements: GAN objectives, L1 distances, and distances of spectra.

All terms of a phase are computed together. A term of many elements is first reduced by several programs, one partial
sum each. A single program then reads the partial sums and all short terms in a fixed order, and writes the value of
each term and their weighted total. The backward pass writes the gradients of all terms in one launch. In PyTorch, a
term takes three to fifteen launches each way.

Values and sums are float32; gradients have the dtype of their tensor. NaN and infinity pass as in PyTorch,
except that the slope of a distance that is NaN is NaN.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .common import LOG2E, architecture, bound, launch, narrow
from .nce_stream import log1p
from .planned import planned

SQUARE: tl.constexpr = tl.constexpr(0)  # (x - number)^2
SOFTPLUS: tl.constexpr = tl.constexpr(1)  # log(1 + exp(number * x)), number = 1 or -1
LINEAR: tl.constexpr = tl.constexpr(2)  # number * x
HINGE: tl.constexpr = tl.constexpr(3)  # max(0, 1 + number * x), number = 1 or -1
DISTANCE: tl.constexpr = tl.constexpr(4)  # |x - y|
SPECTRUM: tl.constexpr = tl.constexpr(5)  # ||x| - |y|| + |x - y| of complex numbers, for half of a spectrum
KIND_BITS = 3

SHORT = 16384
"""A term of at most this many elements has no partial sums."""
MOST_TERMS = 16


class Part(NamedTuple):
    """One term: what it computes of its elements, and its weights."""

    kind: int
    number: float
    factor: float
    """The value is this times the sum over all elements."""
    share: float
    """The total is the sum of share * value."""
    place: int
    """Among the values. Parts of one place are neighbours, and their values are added."""
    x: int
    """Which of the tensors."""
    y: int
    """The same for y; that of x where the kind has none."""
    rows: tuple[int, int] | None = None
    """The part of x along its first dimension; None: all."""
    y_rows: tuple[int, int] | None = None
    columns: int = 1
    """For SPECTRUM: of half of a spectrum. Columns other than 0 and `last` stand for two."""
    last: int = 0


class Term(NamedTuple):
    """A part as the kernels see it; tensors become pointers."""

    x: Tensor
    y: Tensor
    gradient: Tensor
    number: float
    factor: float
    share: float
    length: int
    frequencies: int
    last: int
    place: int
    first_block: int
    blocks: int


@triton.jit
def loaded(pointer, o, m):
    return tl.load(pointer + o, mask=m, other=0.0).to(tl.float32)


@triton.jit
def length_of(a, b):
    return tl.sqrt_rn(a * a + b * b)


@triton.jit
def values_of(term, o, KIND: tl.constexpr):
    """The values of the elements `o` of a term, 0 beyond its end."""
    m = o < term.length
    if KIND == SPECTRUM:
        a, b = loaded(term.x, 2 * o, m), loaded(term.x, 2 * o + 1, m)
        c, d = loaded(term.y, 2 * o, m), loaded(term.y, 2 * o + 1, m)
        value = tl.abs(length_of(a, b) - length_of(c, d)) + length_of(a - c, b - d)
        column = o % term.frequencies
        value *= tl.where((column == 0) | (column == term.last), 1.0, 2.0)
    elif KIND == DISTANCE:
        value = tl.abs(loaded(term.x, o, m) - loaded(term.y, o, m))
    elif KIND == SQUARE:
        apart = loaded(term.x, o, m) - term.number
        value = apart * apart
    else:
        z = term.number * loaded(term.x, o, m)
        if KIND == HINGE:
            value = tl.where(1.0 + z <= 0.0, 0.0, 1.0 + z)
        elif KIND == SOFTPLUS:
            value = tl.where(z <= 0.0, 0.0, z) + log1p(tl.exp2(-tl.abs(z) * LOG2E))
        else:
            value = z
    return tl.where(m, value, 0.0)


@triton.jit
def sign_of(x):
    """1, -1, 0, or NaN."""
    return tl.where(x > 0.0, 1.0, tl.where(x < 0.0, -1.0, x))


@triton.jit
def inverse(x):
    """1 / x, or 0 for 0."""
    return tl.where(x == 0.0, 0.0, 1.0 / tl.where(x == 0.0, 1.0, x))


@triton.jit
def store_slopes(term, o, scale, KIND: tl.constexpr):
    """Write scale times the derivatives with respect to the elements `o` of x."""
    m = o < term.length
    dtype: tl.constexpr = term.gradient.dtype.element_ty
    if KIND == SPECTRUM:
        # A column that stands for two is not counted twice here: the inverse transform does that.
        a, b = loaded(term.x, 2 * o, m), loaded(term.x, 2 * o + 1, m)
        c, d = loaded(term.y, 2 * o, m), loaded(term.y, 2 * o + 1, m)
        size = length_of(a, b)
        longer = sign_of(size - length_of(c, d)) * inverse(size)
        apart = inverse(length_of(a - c, b - d))
        tl.store(term.gradient + 2 * o, narrow(scale * (longer * a + apart * (a - c)), dtype), mask=m)
        tl.store(term.gradient + 2 * o + 1, narrow(scale * (longer * b + apart * (b - d)), dtype), mask=m)
    else:
        x = loaded(term.x, o, m)
        if KIND == DISTANCE:
            slope = sign_of(x - loaded(term.y, o, m))
        elif KIND == SQUARE:
            slope = 2.0 * (x - term.number)
        elif KIND == HINGE:
            slope = tl.where(1.0 + term.number * x <= 0.0, 0.0, term.number)
        elif KIND == SOFTPLUS:
            z = term.number * x
            small = tl.exp2(-tl.abs(z) * LOG2E)
            slope = term.number * tl.where(z < 0.0, small, 1.0) / (1.0 + small)
        else:
            slope = tl.zeros_like(x) + term.number
        tl.store(term.gradient + o, narrow(scale * slope, dtype), mask=m)


@triton.jit
def partial_sums_kernel(terms, partials, COUNT: tl.constexpr, KINDS: tl.constexpr, BLOCK: tl.constexpr):
    block = tl.program_id(0)
    for i in tl.static_range(COUNT):
        term = terms[i]
        own = block - term.first_block
        if (own >= 0) & (own < term.blocks):
            o = own * BLOCK + tl.arange(0, BLOCK)
            value = values_of(term, o, (KINDS >> (i * 3)) & 7)
            tl.store(partials + block, tl.sum(value, 0))


@triton.jit
def total_kernel(
    terms, values, total, COUNT: tl.constexpr, KINDS: tl.constexpr, CONTINUES: tl.constexpr, BLOCK: tl.constexpr
):
    """One program. The bit i of CONTINUES says that part i is added to the value before it."""
    result = 0.0
    value = 0.0
    for i in tl.static_range(COUNT):
        term = terms[i]
        found = tl.zeros([BLOCK], tl.float32)
        for start in range(0, bound(term.length), BLOCK):
            found += values_of(term, start + tl.arange(0, BLOCK), (KINDS >> (i * 3)) & 7)
        own = tl.sum(found, 0) * term.factor
        value = value + own if (CONTINUES >> i) & 1 else own
        result += term.share * own
        tl.store(values + term.place, value)
    tl.store(total, result)


@triton.jit
def slopes_kernel(terms, upstream, COUNT: tl.constexpr, KINDS: tl.constexpr, BLOCK: tl.constexpr):
    block = tl.program_id(0)
    for i in tl.static_range(COUNT):
        term = terms[i]
        own = block - term.first_block
        if (own >= 0) & (own < term.blocks):
            o = own * BLOCK + tl.arange(0, BLOCK)
            scale = tl.load(upstream).to(tl.float32) * (term.share * term.factor)
            store_slopes(term, o, scale, (KINDS >> (i * 3)) & 7)


def _kinds(parts: Sequence[Part]) -> int:
    return sum(part.kind << (i * KIND_BITS) for i, part in enumerate(parts))


def _length(x: Tensor, part: Part) -> int:
    return x.numel() // 2 if part.kind == SPECTRUM.value else x.numel()


def _piece(x: Tensor, rows: tuple[int, int] | None) -> Tensor:
    return x if rows is None else x[rows[0] : rows[1]]


def _terms(xs: Sequence[Tensor], ys: Sequence[Tensor], into: Sequence[Tensor], parts: Sequence[Part], block: int):
    """The terms of a launch, and the number of its programs."""
    terms, programs = [], 0
    for x, y, gradient, part in zip(xs, ys, into, parts, strict=True):
        length = _length(x, part)
        blocks = triton.cdiv(length, block)
        terms.append(
            Term(
                x, y, gradient, float(part.number), float(part.factor), float(part.share), length, part.columns,
                part.last, part.place, programs, blocks,
            )
        )  # fmt: skip
        programs += blocks
    return tuple(terms), programs


@planned
def loss_values(tensors: Sequence[Tensor], *parts: Part) -> tuple[Tensor, Tensor]:
    """Compute the values of all places and their total.

    Args:
        tensors: bfloat16, float16 or float32, dense in memory, the first dimension the outermost. Those of x and y of a
            part have one shape and layout. Spectra are float32 (..., 2).
        parts: at most `MOST_TERMS`, ordered by place.

    Returns:
        float32: values (places,) and total ().
    """
    first = tensors[0]
    tile = configs.find_tile("terms", architecture(first.device))
    values = torch.empty(parts[-1].place + 1, dtype=torch.float32, device=first.device)
    total = torch.empty((), dtype=torch.float32, device=first.device)
    xs, ys = [_piece(tensors[p.x], p.rows) for p in parts], [_piece(tensors[p.y], p.y_rows) for p in parts]
    left = list(parts)
    long = [i for i, x in enumerate(xs) if _length(x, parts[i]) > SHORT]
    if long:
        own = [parts[i] for i in long]
        terms, programs = _terms([xs[i] for i in long], [ys[i] for i in long], [xs[i] for i in long], own, tile.block_m)
        partials = torch.empty(programs, dtype=torch.float32, device=first.device)
        launch(
            partial_sums_kernel, programs, first, terms, partials,
            COUNT=len(own), KINDS=_kinds(own), BLOCK=tile.block_m, num_warps=tile.warps,
        )  # fmt: skip
        for i, term in zip(long, terms, strict=True):
            xs[i] = ys[i] = partials[term.first_block : term.first_block + term.blocks]
            left[i] = left[i]._replace(kind=LINEAR.value, number=1.0)
    terms, _ = _terms(xs, ys, xs, left, tile.block_m)
    continues = sum(1 << i for i in range(1, len(left)) if left[i].place == left[i - 1].place)
    launch(
        total_kernel, 1, first, terms, values, total,
        COUNT=len(left), KINDS=_kinds(left), CONTINUES=continues, BLOCK=tile.block_m, num_warps=tile.warps,
    )  # fmt: skip
    return values, total


@planned
def loss_slopes(upstream: Tensor, tensors: Sequence[Tensor], into: Sequence[Tensor], *parts: Part) -> None:
    """Write the gradients of the total with respect to each x.

    Args:
        upstream: (), the gradient of the total.
        tensors, parts: as `loss_values` takes them; of the parts, those whose gradient is wanted.
        into: one tensor per part of the shape and layout of the tensor that x is or is a part of; for rows, those rows
            are written. The gradient of a spectrum is the argument of an unscaled inverse transform.
    """
    tile = configs.find_tile("terms", architecture(upstream.device))
    xs, ys = [_piece(tensors[p.x], p.rows) for p in parts], [_piece(tensors[p.y], p.y_rows) for p in parts]
    gradients = [_piece(gradient, p.rows) for gradient, p in zip(into, parts, strict=True)]
    terms, programs = _terms(xs, ys, gradients, parts, tile.block_m)
    launch(
        slopes_kernel, programs, upstream, terms, upstream,
        COUNT=len(parts), KINDS=_kinds(parts), BLOCK=tile.block_m, num_warps=tile.warps,
    )  # fmt: skip
