"""What a kernel is compiled for: few forms, so that new sizes of images do not compile it again.

Triton compiles a kernel anew when an integer argument becomes 1 or a multiple of 16. That helps where the integer is a
stride or the length of a row, because loads can then be wide. It is wasted on counts such as the height of an image.
`specialised` replaces each integer, for the compilation only, by a number that stands for what the kernel may rely on:
1, 16, or `ANY`. A launch passes the real numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

ANY = 7
"""Stands for an integer of which nothing is promised."""
BEYOND_32_BITS = 2**40

COUNTS = {
    "locations", "share", "direction", "parts", "joins", "each", "span", "images", "blocks", "programs",
    "length", "places", "front", "sets", "side", "frequencies", "last", "place",
}  # fmt: skip
"""Names of arguments and fields of which a kernel needs only the value."""

LOOPS = {"tiles"}
"""Names of numbers of passes of a loop. A single pass is a form of its own: it needs fewer registers."""

SIZES = {"height", "width", "out_height", "out_width", "pixels"}
"""Names of the sizes of a plane. Their multiples of 16 help where loads run along the pixels: without channels-last."""

JOINT = {
    "rows", "key_rows", "patches", "extras", "per_direction", "i_set", "first_block", "first_row", "first_x",
    "first_id", "first_d_out", "first_input", "first_out",
}  # fmt: skip
"""Names of fields that are multiples of 16 in all problems of a launch, or count as multiples in none."""

STRIDES = {"image", "channel", "y", "x", "m_image", "m_channel", "m_y", "m_x"}
"""Names of the strides of a map. Except for 1, they are multiples of 16 together or not at all."""


class Address:
    """Stands for a tensor in a compilation."""

    def __init__(self, dtype: Any, aligned: bool) -> None:
        self.dtype = dtype
        self._address = 0 if aligned else 1

    def data_ptr(self) -> int:
        return self._address

    def ptr_range(self) -> int:
        """The bytes behind the address: more than 32 bits can count."""
        return BEYOND_32_BITS


def specialised(kernel: Any, arguments: Sequence[Any], aligned: Callable[[Tensor], bool]) -> list[Any]:
    """Return the arguments of a launch, each integer and tensor replaced by what stands for it.

    Args:
        kernel: a Triton kernel; its arguments are tensors, numbers, named tuples of both, and tuples of these.
        aligned: says whether the address of a tensor is a multiple of 16.
    """
    named = list(zip(kernel.arg_names, arguments, strict=False))
    wide = any(_along_pixels(value) for _, value in named)
    wide = wide and all(value % 16 == 0 for name, value in named if name in SIZES)

    def number(name: str, value: int, even: bool) -> int:
        """`even`: the fields of the same kind are multiples of 16 too."""
        large = BEYOND_32_BITS if value >= 2**31 else 0
        if name in LOOPS and value == 1:
            return 1
        if name in COUNTS or name in LOOPS or (name in SIZES and not wide):
            return ANY + large
        if name in JOINT:
            return (16 if even else ANY) + large
        if name in STRIDES:
            return 1 if value == 1 else (16 if even else ANY) + large
        return 1 if value == 1 else (16 if value % 16 == 0 else ANY) + large

    def stand_in(name: str, value: Any, even: Callable[[str], bool]) -> Any:
        if isinstance(value, Tensor):
            return Address(value.dtype, aligned(value))
        if isinstance(value, bool) or not isinstance(value, int | tuple):
            return value
        if isinstance(value, int):
            return number(name, value, even(name))
        names = getattr(value, "_fields", None)
        if names is None:  # problems, or numbers of a layer each
            return tuple(stand_in(name, item, lambda field: _all_even(value, field)) for item in value)
        if STRIDES & {n for n, v in zip(names, value, strict=True) if isinstance(v, int)}:
            together = _strides_even(names, value)
            return type(value)(*(stand_in(n, v, lambda _: together) for n, v in zip(names, value, strict=True)))
        return type(value)(*(stand_in(n, v, even) for n, v in zip(names, value, strict=True)))

    return [stand_in(name, value, lambda _: False) for name, value in named]


def _along_pixels(value: Any) -> bool:
    """Whether an argument is a map whose pixels are adjacent in memory."""
    x = getattr(value, "x", None)
    return isinstance(x, int) and x == 1


def _all_even(problems: tuple[Any, ...], field: str) -> bool:
    return all(getattr(problem, field, 1) % 16 == 0 for problem in problems)


def _strides_even(names: Sequence[str], value: tuple[Any, ...]) -> bool:
    return all(v % 16 == 0 for n, v in zip(names, value, strict=True) if n in STRIDES and v != 1)
