"""Tile sizes by (architecture, dtype, width, rows): a table, no tuning at run time.

Every entry compiles without spills for its architecture (`tests/test_aot.py`); `python -m benchmarks.aot` prints the
registers and the shared memory of each.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Tile:
    """Rows kept on chip (block_m), rows or columns streamed past them (block_n), and how."""

    block_m: int
    block_n: int
    warps: int
    stages: int


ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942")

SHARED_MEMORY = {
    "sm_80": 163 * 1024,
    "sm_86": 99 * 1024,
    "sm_89": 99 * 1024,
    "sm_90": 227 * 1024,
    "sm_100": 227 * 1024,
    "sm_120": 99 * 1024,
    "gfx942": 64 * 1024,
}
"""Bytes that one block may use."""


def _nce_default(width: int, many: bool, plain: bool) -> Tile:
    if width >= 512:
        return Tile(32, 32, 8, 2)
    if width == 256 and not plain:
        return Tile(32, 32, 4, 2)
    return Tile(64, 64, 8, 2) if many else Tile(32, 64, 8, 2)


_NCE = {
    # (architecture, width, many rows, plain form): where the default does not fit or a larger tile does
    ("sm_90", 256, True, True): Tile(128, 64, 8, 3),
    ("sm_90", 128, True, True): Tile(128, 64, 8, 3),
    ("sm_90", 64, True, True): Tile(128, 64, 8, 3),
    ("sm_100", 128, True, True): Tile(128, 64, 8, 3),
    ("sm_100", 64, True, True): Tile(128, 64, 8, 3),
    ("sm_120", 64, True, False): Tile(32, 64, 8, 2),
    ("sm_86", 128, True, True): Tile(32, 64, 8, 2),
    ("sm_89", 128, True, True): Tile(32, 64, 8, 2),
    ("sm_86", 512, True, True): Tile(16, 64, 8, 2),
    ("sm_86", 512, False, True): Tile(16, 64, 8, 2),
    ("sm_89", 512, True, True): Tile(16, 64, 8, 2),
    ("sm_89", 512, False, True): Tile(16, 64, 8, 2),
    ("gfx942", 512, True, True): Tile(16, 32, 4, 1),
    ("gfx942", 512, False, True): Tile(16, 32, 4, 1),
    ("gfx942", 512, True, False): Tile(16, 32, 4, 1),
    ("gfx942", 512, False, False): Tile(16, 32, 4, 1),
    ("gfx942", 256, True, True): Tile(32, 32, 4, 1),
    ("gfx942", 256, False, True): Tile(16, 64, 4, 1),
    ("gfx942", 256, True, False): Tile(16, 32, 4, 1),
    ("gfx942", 256, False, False): Tile(16, 32, 4, 1),
}

MANY_ROWS = 8192
"""From here on the blocks of 64 rows and more fill the processors of a large device."""


def nce_tile(arch: str, dtype: torch.dtype, width: int, rows: int, plain: bool) -> Tile:
    """For the kernels of `nce.py`.

    Args:
        width: the padded dim.
        rows: all resident rows of the launch.
        plain: unit rows without extra keys and pair weights, the form that needs the fewest registers.
    """
    if arch == "interpreter":
        return Tile(128, 128, 4, 1)
    if dtype == torch.float32:  # exact products on the vector unit: larger tiles spill
        return Tile(16, 16, 4, 1)
    many = rows >= MANY_ROWS
    return _NCE.get((arch, width, many, plain), _nce_default(width, many, plain))


def project_tile(arch: str, dtype: torch.dtype, width: int, rows: int) -> Tile:
    """For `project_kernel` and its backward: block_m rows, block_n hidden units at a time.

    `width` is the padded number of channels or dims, whichever is larger.
    """
    if arch == "interpreter":
        return Tile(64, 64, 4, 1)
    if dtype == torch.float32:
        return Tile(16, 16, 4, 1)
    small = width >= 512 or rows < MANY_ROWS or arch in ("sm_86", "sm_89")
    return Tile(16, 32, 8, 1) if small else Tile(32, 32, 8, 1)


def merge_tile(arch: str, dtype: torch.dtype, width: int) -> Tile:
    """For `merge_kernel`: block_m rows against block_n rows."""
    if dtype == torch.float32:
        return Tile(16, 16, 4, 1)
    return Tile(16, 32, 8, 1) if width >= 512 else Tile(32, 32, 8, 1)


def weight_gradient_tile(arch: str, dtype: torch.dtype) -> Tile:
    """For `weight_gradient_kernel`: tiles of block_m x block_n weights."""
    if dtype == torch.float32:
        return Tile(32, 32, 8, 1)
    return Tile(64, 64, 8, 2)
