"""The tile of each kernel, from the table in `configs.py`."""

from __future__ import annotations

from typing import Literal, cast

import torch

from . import configs
from .lookup import Form, Kernel, Tile, cached


def _products(dtype: torch.dtype, tf32: bool) -> str:
    return "tf32" if tf32 and dtype == torch.float32 else str(dtype).removeprefix("torch.")


@cached
def nce_tile(
    arch: str, dtype: torch.dtype, width: int, rows: int, form: Form, tf32: bool = False, ragged: bool = False
) -> Tile:
    """The tile of the kernels of `nce.py` and `nce_keys.py`.

    Args:
        width: the padded dim.
        rows: all resident rows of the launch.
        tf32: float32 is multiplied on the matrix unit.
        ragged: keys are loaded with masks. The block sizes are the same either way.
    """
    many_rows = rows >= configs.MANY_ROWS
    return configs.find_tile(
        "nce", arch, dtype=_products(dtype, tf32), width=width, many_rows=many_rows, form=form, ragged=ragged
    )


@cached
def rows_tile(arch: str, width: int) -> Tile:
    """The tile of the kernels of `cosine.py`: block_m whole rows of the padded dim `width`."""
    tile = configs.find_tile("rows", arch)
    return Tile(max(1, tile.block_m * tile.block_n // width), width, tile.warps, tile.stages)


@cached
def project_tile(
    arch: str, dtype: torch.dtype, width: int, rows: int, tf32: bool = False, weights: torch.dtype | None = None
) -> Tile:
    """The tile of `project_kernel` and its backward: block_m rows, block_n hidden units at a time.

    `width` is the padded number of channels or dims, whichever is larger, and `weights` the dtype of the MLPs, if any.
    """
    products = "mixed" if weights not in (None, dtype) else _products(dtype, tf32)
    return configs.find_tile("project", arch, dtype=products, width=width, many_rows=rows >= configs.MANY_ROWS)


@cached
def merge_tile(arch: str, dtype: torch.dtype, width: int) -> Tile:
    """The tile of `merge_kernel`: block_m rows against block_n rows."""
    return configs.find_tile("merge", arch, dtype=_products(dtype, False), width=width)


@cached
def weight_gradient_tile(arch: str, dtype: torch.dtype, rows: int, tf32: bool = False) -> Tile:
    """The tile of `weight_gradient_kernel`: block_m x block_n weights. `rows`: of all layers."""
    return configs.find_tile("weight_gradient", arch, dtype=_products(dtype, tf32), many_rows=rows >= configs.MANY_ROWS)


@cached
def layer_tile(arch: str, channels: int, channels_last: bool, reads: int = 1) -> Tile:
    """The tile of the kernels of `blur.py` and `reflect_pad.py`: block_m pixels, block_n channels.

    Args:
        reads: of each element; 3 where it is one, and up to nine near a border.
    """
    wide_loads = channels_last and channels % 16 == 0
    tile = configs.find_tile("layer", arch, channels_last=channels_last, wide_loads=wide_loads, reads=reads)
    block_n = 1
    while block_n < min(channels, tile.block_n):
        block_n *= 2
    return Tile(tile.block_m * tile.block_n // block_n, block_n, tile.warps, tile.stages)


@cached
def layer_splits(arch: str, programs: int, tiles: int) -> int:
    """The number of parts of a reduction over `tiles` tiles, of which there are `programs` side by side."""
    split = next(split for split in configs.SPLITS if split.arch in (None, arch))
    return max(1, min(split.parts, tiles, split.programs // max(programs, 1)))


@cached
def few_outputs_tile(
    arch: str, dtype: torch.dtype, kernel: Literal["forward", "map", "weight"], tf32: bool = False, lines: bool = True
) -> Tile:
    """The tile of a product of `few_outputs.py` ("forward") or `few_outputs_backward.py` ("map", "weight").

    Args:
        dtype: of the map.
        tf32: a float32 map is multiplied on the matrix unit.
        lines: the channels of a pixel can be read 16 bytes at a time.
    """
    name = cast(Kernel, f"few_outputs_{kernel}")
    return configs.find_tile(name, arch, dtype=_products(dtype, tf32), wide_loads=lines)


def few_outputs_pack_tile(arch: str) -> Tile:
    """The tile of `pack_gradient_kernel`: block_m pixels at a time."""
    return configs.find_tile("pack_gradient", arch)
