"""Distinct, uniform locations of patches, drawn on the device for all layers and sets in one launch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .common import architecture, fields_of, launch, number_of
from .planned import planned

ROUNDS = tl.constexpr(8)


class Draw(NamedTuple):
    """One layer of `draw_kernel`."""

    locations: int
    side: int  # ceil(sqrt(locations))
    patches: int
    first_block: int
    first_id: int


@triton.jit
def draw_kernel(layers, seeds, ids, sets, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """Distinct, uniform locations: the first `patches` values of a random permutation of the locations.

    The permutation is a Feistel network on pairs (a, b) below `side`, repeated until the result is below `locations`
    (Black and Rogaway, CT-RSA 2002). Its round function is Philox.
    """
    block = tl.program_id(0)
    one = Draw(*fields_of(layers, block, COUNT))
    locations, side, patches = one.locations, one.side, one.patches
    block -= one.first_block
    blocks = tl.cdiv(patches, BLOCK)
    chosen = block // blocks
    o_p = (block % blocks) * BLOCK + tl.arange(0, BLOCK)
    m_p = o_p < patches
    seed = tl.load(seeds + number_of(layers, tl.program_id(0), COUNT) * sets + chosen)
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
    tl.store(ids + one.first_id + chosen.to(tl.int64) * patches + o_p, value.to(tl.int64), mask=m_p)


@planned
def draw_ids(seeds: Tensor, locations: Sequence[int], patches: int) -> Tensor:
    """Draw locations: int64 (sum of sets * min(patches, locations),), ordered by layer, then set; distinct per set.

    Args:
        seeds: random int64 (layers, sets).
        locations: of each layer.
    """
    sets = seeds.shape[1]
    tile = configs.find_tile("draw", architecture(seeds.device))
    layers, block, total = [], 0, 0
    for count in locations:
        taken = min(patches, count)
        side = int(count**0.5)
        side += side * side < count
        layers.append(Draw(count, side, taken, block, total))
        block += sets * triton.cdiv(taken, tile.block_m)
        total += sets * taken
    ids = torch.empty(total, dtype=torch.int64, device=seeds.device)
    launch(
        draw_kernel, block, seeds, tuple(layers), seeds, ids, sets, COUNT=len(layers), BLOCK=tile.block_m,
        num_warps=tile.warps,
    )  # fmt: skip
    return ids
