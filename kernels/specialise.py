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

COUNTS = frozenset(
    [
        "rows",
        "key_rows",
        "patches",
        "locations",
        "share",
        "extras",
        "parts",
        "tiles",
        "each",
        "span",
        "images",
        "blocks",
        "programs",
        "length",
        "places",
        "front",
        "sets",
        "side",
        "per_direction",
        "direction",
        "layers",
        "i_set",
        "first_block",
        "first_row",
        "first_id",
    ]
)
"""Names of arguments and fields of which a kernel needs only the value."""

SIZES = frozenset(("height", "width", "out_height", "out_width", "pixels"))
"""Names of the sizes of a plane. Their multiples of 16 help where loads run along the pixels: without channels-last."""

STRIDES = frozenset(["image", "channel", "y", "x", "m_image", "m_channel", "m_y", "m_x"])
"""Names of the strides of a map."""


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
        kernel: a Triton kernel; its arguments are tensors, numbers, and (tuples of) named tuples of both.
        aligned: says whether the address of a tensor is a multiple of 16.
    """
    named = list(zip(kernel.arg_names, arguments, strict=False))
    sizes = [value for name, value in named if name in SIZES]
    wide = any(_along_pixels(value) for _, value in named) and all(size % 16 == 0 for size in sizes)

    def stand_in(name: str, value: Any, promise: bool | None = None) -> Any:
        if isinstance(value, Tensor):
            return Address(value.dtype, aligned(value))
        if isinstance(value, tuple):
            return _fields(name, value, stand_in)
        if isinstance(value, bool) or not isinstance(value, int):
            return value
        if promise is None:
            promise = value == 1 or value % 16 == 0
        if name in COUNTS or (name in SIZES and not wide):
            promise = False
        return _number(value, promise)

    return [stand_in(name, value) for name, value in named]


def _along_pixels(value: Any) -> bool:
    """Whether an argument is a map whose pixels are adjacent in memory."""
    return getattr(value, "x", None) == 1


def _number(value: int, promise: bool) -> int:
    if promise and value == 1:
        return 1
    return (16 if promise else ANY) + (BEYOND_32_BITS if value >= 2**31 else 0)


def _fields(name: str, value: tuple, stand_in: Callable) -> tuple:
    """Stand-ins of the fields of a named tuple, or of the named tuples of a tuple.

    The strides of a map are multiples of 16 together or not at all: several maps would otherwise have too many forms.
    """
    names = getattr(value, "_fields", None)
    if names is None:
        return tuple(stand_in(name, item) for item in value)
    strides = [v for n, v in zip(names, value, strict=True) if n in STRIDES and v != 1]
    even = all(stride % 16 == 0 for stride in strides)
    return type(value)(
        *(stand_in(n, v, v == 1 or even if n in STRIDES else None) for n, v in zip(names, value, strict=True))
    )
