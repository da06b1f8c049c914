"""Parts of the table in `configs.py`: rows with conditions, tiles, and the nearest architecture."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, ParamSpec, TypeVar, cast

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True)
class Tile:
    """Rows kept on chip (block_m), rows or columns streamed past them (block_n), warps and pipeline stages.

    Kernels without a pipelined loop leave the number of stages to Triton.
    """

    block_m: int
    block_n: int
    warps: int
    stages: int


Form = Literal[
    "unit", "checked", "online", "unit, extra", "checked, extra", "online, extra", "any", "forward", "backward"
]
"""Of `nce.py`: rows promised to have unit length, checked for it, or of any length; with extra keys. "any" needs most
registers: pair weights, the key pass, and rows whose length is not a multiple of 16, which wide loads cannot take. Of
`norm_whole.py`: forward or backward."""

Kernel = Literal[
    "nce", "mean", "terms", "rows", "project", "merge", "add_rows", "weight_gradient", "weight_join", "draw", "layer",
    "norm", "norm_whole", "bias_join", "pack_weight", "few_outputs_forward", "pack_gradient", "few_outputs_map",
    "few_outputs_weight", "few_outputs_join",
]  # fmt: skip


class Row(NamedTuple):
    """The tile of one kernel in one case. A condition is one value, several (a tuple or a range), or None for any."""

    kernel: Kernel
    tile: Tile
    arch: str | tuple[str, ...] | None = None
    dtype: str | tuple[str, ...] | None = None
    """bfloat16, float16, float32, tf32 for float32 on the matrix unit, or mixed for 16 bits and float32 weights."""
    width: int | tuple[int, ...] | range | None = None
    """The padded number of channels or dims."""
    many_rows: bool | None = None
    """At least `configs.MANY_ROWS`."""
    form: Form | tuple[Form, ...] | None = None
    ragged: bool | None = None
    """Keys are loaded with masks."""
    channels_last: bool | None = None
    wide_loads: bool | None = None
    """The channels of a pixel can be read 16 bytes at a time."""
    reads: int | tuple[int, ...] | range | None = None
    """Reads per element of the result."""

    def fits(self, kernel: Kernel, case: dict[str, Any]) -> bool:
        """Whether this row is for `kernel` and each condition holds in `case`."""
        conditions = zip(self._fields[2:], self[2:], strict=True)
        return self.kernel == kernel and all(_holds(wanted, case[name]) for name, wanted in conditions)

    def names(self, arch: str) -> bool:
        """Whether this row is for `arch` in particular."""
        return self.arch is not None and _holds(self.arch, arch)


def first_row(table: Sequence[Row], kernel: Kernel, arch: str, tuned: str, case: dict[str, Any]) -> Row | None:
    """The first row of `table` that fits, or None.

    Args:
        arch: the architecture of the device. If it is not `tuned`, rows for `arch` in particular precede all others.
        tuned: the architecture whose rows are used.
        case: the values of all other conditions.
    """
    if arch != tuned:
        own = [row for row in table if row.names(arch)]
        if (row := first_row(own, kernel, arch, arch, case)) is not None:
            return row
    return next((row for row in table if row.fits(kernel, case | {"arch": tuned})), None)


def _holds(wanted: object, value: object) -> bool:
    return wanted is None or (value in wanted if isinstance(wanted, (tuple, range)) else value == wanted)


def cached(function: Callable[P, R]) -> Callable[P, R]:
    """`functools.lru_cache` that keeps the types of the arguments. A launch looks up its tile each time."""
    return cast(Callable[P, R], functools.lru_cache(maxsize=4096)(function))


def _generation(arch: str) -> tuple[str, int]:
    """("sm_", 0x110) for sm_110 and ("gfx", 0x942) for gfx942: hexadecimal digits sort both by age."""
    family = "gfx" if arch.startswith("gfx") else "sm_"
    try:
        return family, int(arch.removeprefix(family), 16)
    except ValueError:  # neither an NVIDIA nor an AMD device
        return family, 0


def nearest(arch: str, tuned: Sequence[str]) -> str:
    """The newest of the `tuned` architectures of arch's family that is not newer, else the oldest of the family.

    A device that is neither NVIDIA's nor AMD's counts as older than all of NVIDIA's.
    """
    family, number = _generation(arch)
    known = sorted((_generation(name)[1], name) for name in tuned if _generation(name)[0] == family)
    return ([name for age, name in known if age <= number] or [known[0][1]])[-1]
