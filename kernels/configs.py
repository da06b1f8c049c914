"""Tile sizes of every kernel: a table of rows, each with a kernel, a tile and the case that the tile is for.

The first row that fits is used; nothing is tuned at run time. To tune a kernel for a listed GPU, insert one row above
those that it replaces. `benchmarks/tiles.py` measures candidates.

A GPU of another architecture needs one row, `Row(..., arch="sm_110", ...)`, anywhere in the table. The row applies to
its own cases. All other cases keep the tiles of the nearest listed architecture. Add the new architecture to
`ARCHITECTURES` only when every kernel is tuned for it: it then shares no tiles any more.

`python -m benchmarks.aot` compiles every tile for each architecture in `SHARED_MEMORY`: none may spill
(`tests/kernels/test_aot.py`). Only this check needs the shared memory of a new architecture.
"""

from __future__ import annotations

import warnings
from typing import NamedTuple

from .lookup import Form, Kernel, Row, Tile, cached, first_row, nearest

ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942")
"""The architectures for which every kernel is tuned. The others share the tiles of one of these."""

SHARED_MEMORY = {
    "sm_80": 163 * 1024,
    "sm_86": 99 * 1024,
    "sm_89": 99 * 1024,
    "sm_90": 227 * 1024,
    "sm_100": 227 * 1024,
    "sm_120": 99 * 1024,
    "gfx942": 64 * 1024,
}
"""The bytes of shared memory that one block may use, for each architecture that `benchmarks/aot.py` compiles for."""

RELATIVES = {"sm_87": "sm_80", "sm_103": "sm_100", "sm_121": "sm_120"}
"""Architectures with the registers and the shared memory of a listed one, whose tiles they share."""

MANY_ROWS = 8192
"""From this number of rows, blocks of 64 rows and more fill the processors of a large device."""

FLOAT32 = ("float32", "tf32")
BITS_16 = ("bfloat16", "float16")
REGULAR: tuple[Form, ...] = ("unit", "checked", "online", "unit, extra", "checked, extra", "online, extra")
"""Every form but "any"."""
UP_TO_128, UP_TO_2048, BELOW_512, FROM_512 = range(129), range(2049), range(512), range(512, 2**31)
SMALL_MEMORY = tuple(arch for arch in ARCHITECTURES if SHARED_MEMORY[arch] < 128 * 1024)
WARP_PRODUCTS = ("sm_80", "sm_86", "sm_89", "sm_120")
"""NVIDIA architectures whose matrix unit multiplies for one warp, not for several."""

# Tile(block_m, block_n, warps, stages)
TABLE: tuple[Row, ...] = (
    # InfoNCE and its key pass, `nce.py` and `nce_keys.py`: block_m rows against block_n rows
    Row("nce", Tile(128, 128, 4, 1), arch="interpreter"),
    # exact products on the vector unit: larger tiles spill
    Row("nce", Tile(16, 16, 4, 1), arch="gfx942", dtype="float32"),
    Row("nce", Tile(16, 16, 8, 1), dtype="float32", width=128),
    Row("nce", Tile(16, 16, 4, 1), dtype="float32"),
    # TF32 keeps each block of keys in shared memory twice: the second product needs it transposed
    Row("nce", Tile(32, 64, 8, 2), arch="sm_90", dtype="tf32", width=256),
    Row("nce", Tile(32, 32, 8, 2), arch="sm_100", dtype="tf32", width=128, form="any"),
    Row("nce", Tile(32, 64, 8, 2), arch="sm_100", dtype="tf32", width=(128, 256)),
    Row("nce", Tile(16, 16, 8, 1), arch="sm_100", dtype="tf32", width=512),
    Row("nce", Tile(32, 64, 8, 2), arch="sm_120", dtype="tf32", width=128),
    Row("nce", Tile(16, 32, 8, 2), arch="sm_120", dtype="tf32", width=256, form="any"),
    Row("nce", Tile(16, 32, 4, 2), arch=SMALL_MEMORY, dtype="tf32", width=256),
    Row("nce", Tile(16, 16, 8, 1), arch=SMALL_MEMORY, dtype="tf32", width=512),
    Row("nce", Tile(64, 32, 8, 2), arch=SMALL_MEMORY, dtype="tf32"),
    Row("nce", Tile(16, 64, 4, 2), dtype="tf32", width=256),
    Row("nce", Tile(16, 32, 4, 2), dtype="tf32", width=512),
    Row("nce", Tile(64, 64, 8, 2), dtype="tf32"),
    # four warps of 64 threads may have 512 registers per thread, eight only 256
    Row("nce", Tile(32, 32, 4, 1), arch="gfx942", width=UP_TO_128),
    Row("nce", Tile(32, 32, 4, 1), arch="gfx942", width=256, many_rows=True, form=REGULAR),
    Row("nce", Tile(16, 64, 4, 1), arch="gfx942", width=256, form=REGULAR),
    Row("nce", Tile(16, 32, 4, 1), arch="gfx942"),
    Row("nce", Tile(128, 64, 8, 3), arch="sm_90", width=(64, 128), many_rows=True, form=REGULAR),
    Row("nce", Tile(128, 64, 8, 3), arch="sm_90", width=256, many_rows=True, form="checked", ragged=True),
    Row("nce", Tile(128, 64, 8, 2), arch="sm_90", width=256, many_rows=True, form=("checked", "unit, extra")),
    Row("nce", Tile(128, 32, 8, 3), arch="sm_90", width=256, many_rows=True, form=("checked, extra", "online, extra")),
    Row("nce", Tile(128, 64, 8, 3), arch="sm_90", width=256, many_rows=True, form=REGULAR),
    Row("nce", Tile(16, 64, 8, 2), arch="sm_90", width=64, many_rows=False, form="checked"),
    Row("nce", Tile(16, 64, 4, 2), arch="sm_90", width=(64, 128), many_rows=False, form=REGULAR),
    Row("nce", Tile(32, 64, 4, 3), arch="sm_90", width=256, many_rows=False, form="unit"),
    Row("nce", Tile(16, 64, 8, 2), arch="sm_90", width=256, many_rows=False, form="checked", ragged=True),
    Row("nce", Tile(16, 64, 4, 3), arch="sm_90", width=256, many_rows=False, form="checked"),
    # with two stages, Triton 3.6 spills where the temperature is read from memory
    Row("nce", Tile(16, 64, 4, 3), arch="sm_90", width=256, many_rows=False, form="online", ragged=True),
    Row("nce", Tile(16, 64, 4, 2), arch="sm_90", width=256, many_rows=False, form="online"),
    Row("nce", Tile(128, 64, 8, 3), arch="sm_100", width=64, many_rows=True, form="unit"),
    Row("nce", Tile(32, 64, 8, 2), arch="sm_100", width=64, many_rows=True, form="checked, extra"),
    Row("nce", Tile(128, 64, 8, 3), arch="sm_100", width=128, many_rows=True, form=REGULAR),
    Row("nce", Tile(64, 32, 8, 2), arch="sm_100", width=256, many_rows=True, form="checked, extra"),
    Row("nce", Tile(16, 64, 8, 2), arch="sm_100", width=256, many_rows=False, form="online"),
    Row("nce", Tile(64, 32, 8, 2), arch="sm_120", width=256, many_rows=True, form=("checked", "online")),
    Row("nce", Tile(32, 64, 8, 2), arch="sm_120", width=256, many_rows=True, form=("checked, extra", "online, extra")),
    Row("nce", Tile(32, 64, 8, 2), arch="sm_120", width=64, many_rows=True, form="any"),
    Row("nce", Tile(32, 64, 8, 2), arch="sm_80", width=256, many_rows=True, form="checked, extra"),
    Row("nce", Tile(32, 64, 8, 2), arch="sm_80", width=128, many_rows=True, form=("unit", "unit, extra", "any")),
    Row("nce", Tile(32, 64, 8, 2), arch=("sm_86", "sm_89"), width=64, many_rows=True, form="any"),
    Row("nce", Tile(32, 64, 8, 2), arch=("sm_86", "sm_89"), width=128, many_rows=True),
    Row("nce", Tile(16, 64, 8, 2), arch=("sm_86", "sm_89"), width=512, many_rows=True, form="checked, extra"),
    Row("nce", Tile(16, 32, 4, 2), arch=("sm_86", "sm_89"), width=512, form=REGULAR),
    Row("nce", Tile(16, 64, 8, 2), arch=WARP_PRODUCTS, width=256, many_rows=False, form="checked"),
    Row("nce", Tile(16, 64, 8, 2), arch=("sm_86", "sm_89"), width=256, many_rows=False, form="online", ragged=True),
    Row("nce", Tile(32, 32, 8, 2), width=FROM_512),
    Row("nce", Tile(32, 32, 4, 2), width=256, form="any"),
    Row("nce", Tile(64, 64, 8, 2), many_rows=True),
    Row("nce", Tile(32, 64, 8, 2)),
    # means of the loss: block_m rows at a time
    Row("mean", Tile(1024, 1, 4, 1)),
    # terms of a loss, `loss_terms.py`: block_m elements at a time
    Row("terms", Tile(1024, 1, 8, 1)),
    # rows divided by their length, `cosine.py`: block_m * block_n elements
    Row("rows", Tile(64, 64, 4, 1)),
    # sampling and projection, `project.py` and `project_backward.py`: block_m rows, block_n hidden units at a time
    Row("project", Tile(64, 64, 4, 1), arch="interpreter"),
    Row("project", Tile(16, 16, 4, 1), arch="gfx942", dtype=FLOAT32),
    Row("project", Tile(16, 16, 4, 1), arch="gfx942", width=FROM_512),
    Row("project", Tile(16, 32, 4, 1), arch="gfx942"),  # four warps for their registers
    Row("project", Tile(16, 32, 8, 1), dtype="tf32", width=BELOW_512),
    Row("project", Tile(16, 16, 4, 1), dtype="tf32"),
    Row("project", Tile(16, 16, 16, 1), arch=("sm_90", "sm_120"), dtype="float32", width=BELOW_512),
    Row("project", Tile(16, 16, 8, 1), dtype="float32"),
    # 16-bit weights go from memory to the matrix unit without registers between
    Row("project", Tile(128, 64, 8, 2), arch="sm_100", dtype=BITS_16, width=BELOW_512, many_rows=True),
    Row("project", Tile(64, 64, 8, 2), arch=("sm_90", "sm_100"), dtype=BITS_16, width=BELOW_512),
    Row("project", Tile(32, 32, 8, 2), arch=("sm_80", "sm_90", "sm_100"), dtype=BITS_16, width=FROM_512),
    Row("project", Tile(32, 16, 8, 2), arch=("sm_86", "sm_89", "sm_120"), dtype=BITS_16, width=FROM_512),
    Row("project", Tile(64, 32, 8, 3), arch="sm_80", dtype=BITS_16, width=BELOW_512),
    Row("project", Tile(64, 32, 8, 2), arch=("sm_86", "sm_89", "sm_120"), dtype=BITS_16, width=BELOW_512),
    Row("project", Tile(32, 64, 8, 1), arch="sm_90", width=256, many_rows=False),
    Row("project", Tile(16, 32, 8, 1), arch=("sm_86", "sm_89")),
    Row("project", Tile(32, 32, 8, 1), width=BELOW_512, many_rows=True),
    Row("project", Tile(16, 32, 8, 1)),
    # rows of one location, summed: block_m rows against block_n rows
    Row("merge", Tile(16, 16, 8, 1), arch="sm_90", dtype="float32", width=BELOW_512),
    Row("merge", Tile(16, 16, 4, 1), dtype="float32"),
    Row("merge", Tile(16, 32, 8, 1), width=FROM_512),
    Row("merge", Tile(32, 32, 8, 1)),
    # gradients of sampled rows, added to that of their map, `add_rows.py`: block_m rows of block_n channels
    Row("add_rows", Tile(256, 16, 8, 1)),
    # gradients of the projectors: block_m outputs by block_n inputs
    Row("weight_gradient", Tile(64, 64, 8, 2), arch="sm_90", dtype="tf32"),
    Row("weight_gradient", Tile(32, 64, 8, 2), arch="sm_120", dtype="tf32"),
    Row("weight_gradient", Tile(32, 64, 4, 2), dtype="tf32"),
    Row("weight_gradient", Tile(32, 32, 8, 1), dtype="float32"),
    Row("weight_gradient", Tile(64, 64, 8, 2), arch="gfx942"),
    Row("weight_gradient", Tile(64, 64, 4, 3), arch="sm_100"),
    Row("weight_gradient", Tile(128, 128, 8, 3), many_rows=True),
    Row("weight_gradient", Tile(64, 64, 4, 3)),
    # their parts, added: block_m numbers
    Row("weight_join", Tile(1024, 1, 4, 1)),
    # locations of patches: block_m of them
    Row("draw", Tile(256, 1, 4, 1)),
    # `blur.py`, `reflect_pad.py` and some norms: block_m pixels by at most block_n channels; more of narrow maps.
    # Whole lines of memory along the channels (64 of 16 bits are 128 bytes), or along the pixels of plain maps. Fewer
    # elements where each needs many reads, or where no load takes several at once.
    Row("layer", Tile(128, 64, 4, 1), arch="interpreter", channels_last=True),  # fewer, larger operations
    Row("layer", Tile(2048, 4, 4, 1), arch="interpreter"),
    Row("layer", Tile(128, 32, 4, 1), arch="sm_90", wide_loads=True, reads=(1, 2)),  # sm_90: measured on an H100
    Row("layer", Tile(64, 32, 4, 1), arch="sm_90", wide_loads=True, reads=3),
    Row("layer", Tile(32, 64, 4, 1), arch="sm_90", wide_loads=True, reads=4),
    Row("layer", Tile(16, 64, 8, 1), arch="sm_90", wide_loads=True, reads=9),
    Row("layer", Tile(64, 64, 4, 1), wide_loads=True, reads=1),
    Row("layer", Tile(32, 64, 8, 1), wide_loads=True),
    Row("layer", Tile(32, 32, 4, 1), arch="sm_90", channels_last=True, reads=(1, 2)),
    Row("layer", Tile(16, 32, 4, 1), arch="sm_90", channels_last=True, reads=3),
    Row("layer", Tile(16, 64, 4, 1), channels_last=True, reads=(1, 2)),
    Row("layer", Tile(8, 64, 4, 1), channels_last=True, reads=range(3, 10)),
    Row("layer", Tile(4, 64, 4, 1), channels_last=True),
    Row("layer", Tile(256, 4, 4, 1), reads=(1, 2)),
    Row("layer", Tile(128, 4, 4, 1), reads=range(3, 10)),
    Row("layer", Tile(64, 4, 4, 1)),
    # `instance_norm.py`, its gradient and `activate.py` where loads are wide: 16 channels of 16 bits are one sector
    Row("norm", Tile(512, 16, 8, 1), reads=range(1, 4)),
    Row("norm", Tile(64, 16, 4, 1), arch=("sm_86", "sm_89"), dtype=("bfloat16", "float16"), reads=range(4, 10)),
    Row("norm", Tile(256, 16, 8, 1), reads=range(4, 10)),
    Row("norm", Tile(64, 16, 4, 1), wide_loads=True),
    Row("norm", Tile(32, 16, 4, 1)),
    # `norm_whole.py`: planes of at most block_m pixels by block_n channels, in loads of 16 bytes
    Row("norm_whole", Tile(4096, 64, 4, 1), arch="interpreter", channels_last=True),
    Row("norm_whole", Tile(4096, 4, 4, 1), arch="interpreter"),
    Row("norm_whole", Tile(4096, 8, 16, 1), dtype=("bfloat16", "float16"), wide_loads=True, form="forward"),
    Row("norm_whole", Tile(4096, 8, 16, 1), dtype=("bfloat16", "float16"), wide_loads=True, width=UP_TO_2048),
    Row("norm_whole", Tile(4096, 2, 16, 1), arch=("sm_80", "sm_100"), dtype="float32", channels_last=True),
    # with four channels, Triton 3.6 spills 8 bytes
    Row("norm_whole", Tile(4096, 2, 16, 1), arch="sm_90", dtype="float32", channels_last=True, form="backward"),
    Row("norm_whole", Tile(4096, 4, 16, 1), channels_last=True),
    Row("norm_whole", Tile(4096, 1, 8, 1)),
    # parts of a bias's gradient, joined: block_m parts at a time by block_n channels
    Row("bias_join", Tile(64, 16, 4, 1)),
    # `few_outputs.py` and `few_outputs_backward.py`. Weights laid out: block_m of them
    Row("pack_weight", Tile(1024, 1, 4, 1)),
    # block_m pixels in each of block_n rows of outputs, which share the rows of x that they read
    Row("few_outputs_forward", Tile(128, 2, 4, 1), arch="interpreter"),
    Row("few_outputs_forward", Tile(32, 1, 4, 1), dtype="float32", wide_loads=True),
    Row("few_outputs_forward", Tile(32, 1, 8, 1), dtype="float32"),
    Row("few_outputs_forward", Tile(32, 1, 4, 1), wide_loads=False),
    Row("few_outputs_forward", Tile(128, 1, 4, 1), arch="gfx942"),
    Row("few_outputs_forward", Tile(128, 1, 8, 3), arch="sm_120"),
    Row("few_outputs_forward", Tile(128, 1, 4, 3)),
    # the gradient laid out: block_m pixels at a time
    Row("pack_gradient", Tile(8192, 1, 4, 1), arch="interpreter"),
    Row("pack_gradient", Tile(256, 1, 4, 1)),
    # block_m pixels by at most block_n channels
    Row("few_outputs_map", Tile(256, 64, 4, 1), arch="interpreter"),
    Row("few_outputs_map", Tile(32, 64, 4, 1), dtype="float32"),
    Row("few_outputs_map", Tile(64, 32, 4, 1), wide_loads=False),
    Row("few_outputs_map", Tile(128, 64, 4, 1), arch="gfx942"),
    Row("few_outputs_map", Tile(64, 64, 8, 3), arch=("sm_100", "sm_120")),
    Row("few_outputs_map", Tile(128, 64, 4, 3)),
    # block_m pixels at a time, at most block_n columns; with two stages all programs of two images are resident at once
    Row("few_outputs_weight", Tile(256, 512, 4, 1), arch="interpreter"),
    Row("few_outputs_weight", Tile(32, 32, 4, 1), dtype="float32"),
    Row("few_outputs_weight", Tile(64, 128, 4, 1), wide_loads=False),
    Row("few_outputs_weight", Tile(64, 128, 4, 1), arch="gfx942"),
    Row("few_outputs_weight", Tile(64, 64, 4, 2), arch=("sm_86", "sm_89"), dtype="float16"),
    Row("few_outputs_weight", Tile(64, 128, 4, 2)),
    # parts of the sums, joined: block_m parts at a time by block_n weights
    Row("few_outputs_join", Tile(64, 64, 4, 1)),
)


class Split(NamedTuple):
    """Into how many programs a reduction over pixels is split, and the most parts of one plane."""

    programs: int
    parts: int
    arch: str | None = None


SPLITS = (
    Split(4, 256, arch="interpreter"),
    Split(512, 256),  # a few programs per processor; a second, small launch joins the parts
)

FEW_OUTPUTS_CHANNELS = 64
"""The most channels that a program of `few_outputs.py` and `few_outputs_backward.py` multiplies at once."""
EVEN_KEYS = ("sm_90", "interpreter")
"""Architectures whose `nce_kernel` loads full blocks of keys without masks in every form: measured on sm_90. On the
others most forms would need more registers than there are, so only those that `nce.peels` allows do this."""

OWN_KEYS_STAGES = 1
"""Of `nce_kernel`'s second loop, if it has one: a second pipeline would need more registers than there are."""


@cached
def tuned_architecture(arch: str) -> str:
    """The listed architecture whose tiles `arch` uses: itself, its relative, or the nearest one.

    Warns once per architecture that is not listed and has no relative.
    """
    if arch == "interpreter" or arch in ARCHITECTURES:
        return arch
    if arch in RELATIVES:
        return RELATIVES[arch]
    used = nearest(arch, ARCHITECTURES)
    if any(row.names(arch) for row in TABLE):
        sentence = f"only some tiles are tuned for {arch}: the others are those of {used}, see kernels/configs.py"
    else:
        sentence = f"no tiles are tuned for {arch}: those of {used} are used, see kernels/configs.py"
    warnings.warn(sentence, stacklevel=2)
    return used


@cached
def find_tile(
    kernel: Kernel, arch: str, *, dtype: str = "", width: int = 0, many_rows: bool = False, form: Form = "any",
    ragged: bool = False, channels_last: bool = False, wide_loads: bool = False, reads: int = 1,
) -> Tile:  # fmt: skip
    """The tile of the first row of TABLE that fits. An architecture that is not listed tries its own rows first."""
    case = {
        "dtype": dtype, "width": width, "many_rows": many_rows, "form": form,
        "ragged": ragged, "channels_last": channels_last, "wide_loads": wide_loads, "reads": reads,
    }  # fmt: skip
    row = first_row(TABLE, kernel, arch, tuned_architecture(arch), case)
    assert row is not None, f"no row of {kernel} fits {case} on {arch}"
    return row.tile
