"""Tiles of the kernels of norms and activations, from the table in `configs.py`, and how planes are divided."""

from __future__ import annotations

import torch
import triton

from . import chosen, configs
from .lookup import Tile

NORM_PARTS = 64
"""The most parts of a plane whose sums a norm's second launch joins.

Each of its programs reads all parts of its channels: 64 parts of 16 channels are 8 KiB, beside tiles of 32 KiB that it
reads and writes. All programs of the first launch are resident at once: 64 channels of 256x256 are 4 x 64 programs of 8
warps, two for each of the 132 processors of an H100."""

PROGRAMS = 512
"""The most programs of a second launch: about four for each processor, so that the parts are joined only that often."""


def norm_tile(
    arch: str, channels: int, channels_last: bool, reads: int = 1, dtype: torch.dtype = torch.bfloat16
) -> Tile:
    """The tile of the kernels of `instance_norm.py`, its gradient and `activate.py`: block_m pixels, block_n channels.

    Args:
        reads: of each element.
    """
    if arch == "interpreter" or not channels_last or channels % 16:
        if channels_last and channels > 16 and reads >= 9 and arch != "interpreter":
            return configs.find_tile("norm", arch, channels_last=True, reads=16)  # 64 channels would spill
        return chosen.layer_tile(arch, channels, channels_last, min(reads, 16))
    name = str(dtype).removeprefix("torch.")
    return configs.find_tile("norm", arch, dtype=name, channels_last=True, wide_loads=True, reads=reads)


def norm_splits(arch: str, programs: int, tiles: int, reduction: bool) -> int:
    """The number of parts of a plane of `tiles` tiles; of a reduction at most NORM_PARTS.

    Args:
        programs: side by side, for images and blocks of channels.
    """
    if reduction:
        return min(NORM_PARTS, chosen.layer_splits(arch, programs, tiles))
    return max(1, min(tiles, PROGRAMS // max(programs, 1)))


def whole_tile(
    arch: str, channels: int, channels_last: bool, dtype: torch.dtype, pixels: int, backward: bool = False
) -> Tile | None:
    """The tile of `norm_whole.py` for planes of `pixels` pixels, which it contains; None if they are too large.

    A thread has at least 16 values, so that small planes take few warps.
    """
    wide_loads = channels_last and channels % 16 == 0
    name = str(dtype).removeprefix("torch.")
    block_m = max(16, triton.next_power_of_2(pixels))
    tile = configs.find_tile(
        "norm_whole", arch, dtype=name, channels_last=channels_last, wide_loads=wide_loads, width=block_m,
        form="backward" if backward else "forward",
    )  # fmt: skip
    if pixels > tile.block_m:
        return None
    block_n = min(tile.block_n, triton.next_power_of_2(channels))
    warps = triton.next_power_of_2(triton.cdiv(block_m * block_n, 512))
    return Tile(block_m, block_n, min(max(warps, 4), tile.warps), tile.stages)
