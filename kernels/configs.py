"""Tile sizes by (architecture, dtype, width, rows): a table, no tuning at run time.

Every entry compiles without spills for its architecture (`tests/kernels/test_aot.py`); `python -m benchmarks.aot`
prints the registers and the shared memory of each.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

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


Form = Literal["unit", "checked", "online", "unit, extra", "checked, extra", "online, extra", "any"]
"""Of `nce.py`: rows promised to have unit length, checked, or any; with extra keys; "any" is what needs most registers:
pair weights, the key pass, and rows whose length is no multiple of 16, which no wide load takes."""


def _nce_default(width: int, many: bool, form: Form) -> Tile:
    if width >= 512:
        return Tile(32, 32, 8, 2)
    if width == 256 and form == "any":
        return Tile(32, 32, 4, 2)
    return Tile(64, 64, 8, 2) if many else Tile(32, 64, 8, 2)


def _nce_amd(width: int, many: bool, form: Form) -> Tile:
    """Four warps of 64 threads may have 512 registers each, eight only 256."""
    if width <= 128:
        return Tile(32, 32, 4, 1)
    if width == 256 and form != "any":
        return Tile(32, 32, 4, 1) if many else Tile(16, 64, 4, 1)
    return Tile(16, 32, 4, 1)


_NCE: dict[tuple[str, int, bool, Form | None], Tile] = {
    # (architecture, width, many rows, form; None: every form but "any"): where the default does not fit, or a larger
    # tile does
    ("sm_90", 256, True, None): Tile(128, 64, 8, 3),
    ("sm_90", 256, True, "checked"): Tile(128, 64, 8, 2),
    ("sm_90", 256, True, "unit, extra"): Tile(128, 64, 8, 2),
    ("sm_90", 256, True, "online, extra"): Tile(128, 32, 8, 3),
    ("sm_90", 256, True, "checked, extra"): Tile(128, 32, 8, 3),
    ("sm_90", 128, True, None): Tile(128, 64, 8, 3),
    ("sm_90", 64, True, None): Tile(128, 64, 8, 3),
    ("sm_90", 256, False, "unit"): Tile(32, 64, 4, 3),
    ("sm_90", 256, False, "checked"): Tile(16, 64, 4, 3),
    ("sm_90", 256, False, "online"): Tile(16, 64, 4, 2),
    ("sm_90", 256, False, "checked, extra"): Tile(32, 64, 8, 2),
    ("sm_90", 256, False, "unit, extra"): Tile(32, 64, 8, 2),
    ("sm_90", 256, False, "online, extra"): Tile(32, 64, 8, 2),
    ("sm_90", 128, False, None): Tile(16, 64, 4, 2),
    ("sm_90", 64, False, None): Tile(16, 64, 4, 2),
    ("sm_90", 64, False, "checked"): Tile(16, 64, 8, 2),
    ("sm_100", 128, True, None): Tile(128, 64, 8, 3),
    ("sm_100", 64, True, "unit"): Tile(128, 64, 8, 3),
    ("sm_100", 64, True, "checked, extra"): Tile(32, 64, 8, 2),
    ("sm_100", 256, True, "checked, extra"): Tile(64, 32, 8, 2),
    ("sm_100", 256, False, "online"): Tile(16, 64, 8, 2),
    ("sm_80", 256, True, "checked, extra"): Tile(32, 64, 8, 2),
    ("sm_80", 256, False, "checked"): Tile(16, 64, 8, 2),
    ("sm_80", 128, True, "unit, extra"): Tile(32, 64, 8, 2),
    ("sm_80", 128, True, "any"): Tile(32, 64, 8, 2),
    ("sm_86", 256, False, "checked"): Tile(16, 64, 8, 2),
    ("sm_89", 256, False, "checked"): Tile(16, 64, 8, 2),
    ("sm_86", 64, True, "any"): Tile(32, 64, 8, 2),
    ("sm_89", 64, True, "any"): Tile(32, 64, 8, 2),
    ("sm_86", 128, True, "any"): Tile(32, 64, 8, 2),
    ("sm_89", 128, True, "any"): Tile(32, 64, 8, 2),
    ("sm_86", 128, True, None): Tile(32, 64, 8, 2),
    ("sm_89", 128, True, None): Tile(32, 64, 8, 2),
    ("sm_86", 512, True, None): Tile(16, 32, 4, 2),
    ("sm_86", 512, True, "checked, extra"): Tile(16, 64, 8, 2),
    ("sm_86", 512, False, None): Tile(16, 32, 4, 2),
    ("sm_89", 512, True, None): Tile(16, 32, 4, 2),
    ("sm_89", 512, True, "checked, extra"): Tile(16, 64, 8, 2),
    ("sm_89", 512, False, None): Tile(16, 32, 4, 2),
    ("sm_120", 256, True, "checked"): Tile(64, 32, 8, 2),
    ("sm_120", 256, True, "online"): Tile(64, 32, 8, 2),
    ("sm_120", 256, True, "checked, extra"): Tile(32, 64, 8, 2),
    ("sm_120", 256, True, "online, extra"): Tile(32, 64, 8, 2),
    ("sm_120", 256, False, "checked"): Tile(16, 64, 8, 2),
    ("sm_120", 64, True, "any"): Tile(32, 64, 8, 2),
}

_NCE_RAGGED = {
    ("sm_90", 256, True, "checked"): Tile(128, 64, 8, 3),
    ("sm_90", 256, False, "checked"): Tile(16, 64, 8, 2),
}
"""Where masks of keys that do not fill their blocks leave no registers: the same blocks, by other warps or stages."""

MANY_ROWS = 8192
"""From here on the blocks of 64 rows and more fill the processors of a large device."""


_NCE_TF32 = {
    # (architecture, width), for every form
    ("sm_90", 256): Tile(32, 64, 8, 2),
    ("sm_100", 128): Tile(32, 64, 8, 2),
    ("sm_100", 256): Tile(32, 64, 8, 2),
    ("sm_120", 128): Tile(32, 64, 8, 2),
    ("sm_100", 512): Tile(16, 16, 8, 1),
}


def _nce_tf32(arch: str, width: int) -> Tile:
    """Blocks of keys lie in shared memory twice: the second product wants them transposed."""
    if (arch, width) in _NCE_TF32:
        return _NCE_TF32[arch, width]
    if SHARED_MEMORY[arch] < 128 * 1024:
        return {256: Tile(16, 32, 4, 2), 512: Tile(16, 16, 8, 1)}.get(width, Tile(64, 32, 8, 2))
    return {256: Tile(16, 64, 4, 2), 512: Tile(16, 32, 4, 2)}.get(width, Tile(64, 64, 8, 2))


def nce_tile(
    arch: str, dtype: torch.dtype, width: int, rows: int, form: Form, tf32: bool = False, ragged: bool = False
) -> Tile:
    """For the kernels of `nce.py` and `nce_keys.py`.

    Args:
        width: the padded dim.
        rows: all resident rows of the launch.
        tf32: float32 on the matrix unit.
        ragged: keys are loaded with masks; blocks have the same sizes either way.
    """
    if arch == "interpreter":
        return Tile(128, 128, 4, 1)
    if dtype == torch.float32 and not tf32:  # exact products on the vector unit: larger tiles spill
        return Tile(16, 16, 8 if width == 128 and not arch.startswith("gfx") else 4, 1)
    if tf32:
        return _nce_tf32(arch, width)
    many = rows >= MANY_ROWS
    if arch.startswith("gfx"):
        return _nce_amd(width, many, form)
    tile = _NCE_RAGGED.get((arch, width, many, form)) if ragged else None
    tile = tile or _NCE.get((arch, width, many, form))
    if tile is None and form != "any":
        tile = _NCE.get((arch, width, many, None))
    return tile or _nce_default(width, many, form)


def project_tile(arch: str, dtype: torch.dtype, width: int, rows: int, tf32: bool = False) -> Tile:
    """For `project_kernel` and its backward: block_m rows, block_n hidden units at a time.

    `width` is the padded number of channels or dims, whichever is larger.
    """
    if arch == "interpreter":
        return Tile(64, 64, 4, 1)
    if arch.startswith("gfx"):  # four warps for their registers, see `_nce_amd`
        return Tile(16, 16, 4, 1) if width >= 512 or dtype == torch.float32 else Tile(16, 32, 4, 1)
    if tf32:
        return Tile(16, 32, 8, 1) if width < 512 else Tile(16, 16, 4, 1)
    if dtype == torch.float32:
        return Tile(16, 16, 16 if arch in ("sm_90", "sm_120") and width < 512 else 8, 1)
    if arch == "sm_90" and width == 256 and rows < MANY_ROWS:
        return Tile(32, 64, 8, 1)
    small = width >= 512 or rows < MANY_ROWS or arch in ("sm_86", "sm_89")
    return Tile(16, 32, 8, 1) if small else Tile(32, 32, 8, 1)


def merge_tile(arch: str, dtype: torch.dtype, width: int) -> Tile:
    """For `merge_kernel`: block_m rows against block_n rows."""
    if dtype == torch.float32:
        return Tile(16, 16, 8 if arch == "sm_90" and width < 512 else 4, 1)
    return Tile(16, 32, 8, 1) if width >= 512 else Tile(32, 32, 8, 1)


def weight_gradient_tile(arch: str, dtype: torch.dtype, tf32: bool = False) -> Tile:
    """For `weight_gradient_kernel`: tiles of block_m x block_n weights."""
    if tf32:
        return Tile(64, 64, 8, 2) if arch == "sm_90" else Tile(32, 64, 4, 2)
    if dtype == torch.float32:
        return Tile(32, 32, 8, 1)
    # four warps: measured on sm_90; on sm_120 eight would spill
    return Tile(64, 64, 4 if arch in ("sm_90", "sm_120") else 8, 2)


LAYER_PROGRAMS = 512
"""As many programs as a reduction over pixels is split into where the maps are large enough: a few a processor."""
LAYER_SPLITS = 256
"""The most parts of one plane: a second, small launch joins them."""


_LAYER_SM_90 = {1: (4096, 32, 4), 2: (4096, 32, 4), 3: (2048, 32, 4), 4: (2048, 64, 4), 9: (1024, 64, 8)}
"""Elements, channels and warps of a tile by `reads`, measured on an H100."""


def layer_tile(arch: str, channels: int, channels_last: bool, reads: int = 1) -> Tile:
    """For the kernels of `instance_norm.py`, `blur.py` and `reflect_pad.py`: block_m pixels by block_n channels.

    Whole lines of memory along the channels (64 of 16 bits are 128 bytes), or along the pixels of plain maps; fewer
    elements where each is put together from many reads, or where no read takes several at once.

    Args:
        reads: of each element; 3 where it is one, and near a border up to nine.
    """
    elements, widest, warps = (4096, 64, 4) if reads == 1 else (2048, 64, 8)
    if arch == "sm_90":
        elements, widest, warps = _LAYER_SM_90.get(reads, (elements, widest, warps))
    block_n = 1
    while block_n < min(channels, widest if channels_last else 4):
        block_n *= 2
    if arch == "interpreter":  # its time goes by operations: few large programs
        return Tile(8192 // block_n, block_n, 4, 1)
    if channels % 16 or not channels_last:
        elements, warps = 1024 if reads <= 2 else 512 if reads <= 9 else 256, 4
    return Tile(elements // block_n, block_n, warps, 1)


def layer_splits(arch: str, programs: int, tiles: int) -> int:
    """Into how many parts to split a reduction over `tiles` tiles, when there are `programs` of them side by side."""
    wanted = 4 if arch == "interpreter" else LAYER_PROGRAMS
    return max(1, min(LAYER_SPLITS, tiles, wanted // max(programs, 1)))


def few_outputs_tile(
    arch: str, dtype: torch.dtype, kernel: Literal["forward", "map", "weight"], tf32: bool = False, lines: bool = True
) -> Tile:
    """For the products of `few_outputs.py` and `few_outputs_backward.py`.

    "forward": block_m pixels in each of block_n rows of outputs, which share the rows of x that they read; "map":
    block_m pixels by at most block_n channels; "weight": block_m pixels at a time, at most block_n columns.

    Args:
        dtype: of the map.
        tf32: a float32 map on the matrix unit.
        lines: a pixel's channels can be read 16 bytes at a time.
    """
    if arch == "interpreter":
        return {"forward": Tile(128, 2, 4, 1), "map": Tile(256, 64, 4, 1), "weight": Tile(256, 512, 4, 1)}[kernel]
    if dtype == torch.float32 and not tf32:
        warps = 4 if lines else 8
        return {"forward": Tile(32, 1, warps, 1), "map": Tile(32, 64, 4, 1), "weight": Tile(32, 32, 4, 1)}[kernel]
    if not lines:
        return {"forward": Tile(32, 1, 4, 1), "map": Tile(64, 32, 4, 1), "weight": Tile(64, 128, 4, 1)}[kernel]
    stages = 1 if arch.startswith("gfx") else 3
    if kernel == "forward":
        return Tile(128, 1, 8 if arch == "sm_120" else 4, stages)
    if kernel == "map":
        return Tile(64, 64, 8, stages) if arch in ("sm_100", "sm_120") else Tile(128, 64, 4, stages)
    # with two stages in shared memory all programs of two pictures are there at once
    return Tile(64, 64 if dtype == torch.float16 and arch in ("sm_86", "sm_89") else 128, 4, min(stages, 2))


def few_outputs_pack_tile(arch: str) -> Tile:
    """For `pack_gradient_kernel`: block_m pixels at a time."""
    return Tile(8192 if arch == "interpreter" else 256, 1, 4, 1)
