"""The largest picture that is read. A small file may claim more pixels than memory holds."""

import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

VARIABLE = "FASTNCE_MAX_PIXELS"
RGB = 3  # bytes of a decoded pixel
DECODING = 5 * RGB  # bytes of a pixel at most while a PNG or JPEG is decoded and turned; measured 4.7 times RGB


class DataError(ValueError):
    """A picture, a folder or a setting cannot be used. The message says which, why, and what would be right."""


@dataclass(frozen=True, eq=False)
class _Accepted:
    pixels: int
    option: str


_accepted: list[_Accepted] = []
_usual: list[int | None] = []
"""PIL's own limit while another one is in force; empty otherwise."""
_lock = threading.Lock()


@contextmanager
def accepting(pixels: int, option: str) -> Iterator[None]:
    """Within: pictures of up to `pixels` pixels are read, by every thread of this process.

    Args:
        pixels: 0 leaves the usual limit. Where several limits are in force, the largest counts.
        option: what a user writes to set another limit, with {} for the number, such as "--max-pixels {}". The message
            about a larger picture names it.
    """
    mine = _Accepted(pixels, option)
    with _lock:
        _accepted.append(mine)
        if pixels and not _usual:
            _usual.append(Image.MAX_IMAGE_PIXELS)
    try:
        yield
    finally:
        with _lock:
            _accepted.remove(mine)
            if _usual and not any(other.pixels for other in _accepted):
                Image.MAX_IMAGE_PIXELS = _usual.pop()


def pixel_limit() -> int | None:
    """Return the largest accepted number of pixels; None for no limit.

    It is that of `accepting`, else the environment variable FASTNCE_MAX_PIXELS, else twice PIL's own limit. The first
    two also set PIL's limit, the variable for the rest of the process.
    """
    given = max((accepted.pixels for accepted in _accepted), default=0)
    text = os.environ.get(VARIABLE, "")
    if not given and text:
        if not text.isdecimal() or int(text) == 0:
            raise DataError(f"{VARIABLE}={text!r} should be a whole number of pixels above 0")
        given = int(text)
    if given:
        Image.MAX_IMAGE_PIXELS = (given + 1) // 2  # PIL refuses more than twice this number
    if not any(entry[2] is Image.DecompressionBombWarning for entry in warnings.filters):
        # PIL warns above half of the limit. A filter that the user has set takes precedence.
        warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning, append=True)
    return None if Image.MAX_IMAGE_PIXELS is None else 2 * Image.MAX_IMAGE_PIXELS


def too_large(path: Path, pixels: int) -> str:
    """Say that a picture exceeds the limit, what it would take to read it, and how to allow that."""
    option = _accepted[-1].option if _accepted else f"the environment variable {VARIABLE}={{}}"
    return (
        f"{path} is too large: {pixels:,} pixels exceed the limit of {pixel_limit():,}; make it smaller, or accept it "
        f"with {option.format(pixels)} (as RGB it takes {_size(RGB * pixels)}, and decoding it about "
        f"{_size(DECODING * pixels)} of memory)"
    )


def _size(number: int) -> str:
    return f"{number / 2**30:,.1f} GiB" if number >= 2**30 else f"{number / 2**20:,.1f} MiB"
