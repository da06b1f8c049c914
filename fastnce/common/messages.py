"""Values in words, for messages."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

from torch import Tensor


def brief(value: Any) -> str:
    """Shorten a value's `repr` for use in a sentence."""
    try:
        text = repr(value)
    except ValueError:  # Python does not print whole numbers of more than 4,300 digits
        return "a number of thousands of digits"
    return text if len(text) <= 60 else f"{text[:50]}..."


def shown(value: Any) -> str:
    """Describe a value of any type in a sentence: numbers and text by `brief`, others by their type and size."""
    if isinstance(value, Tensor):
        return f"a {value.dtype} tensor of shape {tuple(value.shape)} on {value.device}"
    if value is None or isinstance(value, bool | int | float | complex | str):
        return brief(value)
    if type(value) in (dict, list, tuple):
        kind = type(value).__name__
        return f"a {kind} of {len(value)}" if value else f"an empty {kind}"
    return f"a {type(value).__module__.split('.')[0]}.{type(value).__name__}".replace(" builtins.", " ")


def counted(number: int, noun: str) -> str:
    """Return a number and its noun: "1 picture", "2 pictures", "1,000 pictures"."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def nearest(name: Any, known: Iterable[str]) -> str:
    """Suggest the known name that is most like a wrong one, to end a sentence: "; did you mean 'cut'?".

    Case, hyphens and underscores do not count: FastCUT is like fastcut, and unet256 like unet_256. A name that begins
    with the wrong one comes first. Empty if no known name is like it.
    """
    plain: dict[str, str] = {}
    for one in known:
        plain.setdefault(_plain(one), one)
    wanted = _plain(str(name))
    longer = [one for one in plain if one.startswith(wanted)]
    close = difflib.get_close_matches(wanted, longer, n=1, cutoff=0.5)
    close = close or difflib.get_close_matches(wanted, plain, n=1, cutoff=0.5)
    return f"; did you mean {plain[close[0]]!r}?" if close else ""


def _plain(name: str) -> str:
    return name[:200].lower().replace("_", "").replace("-", "")
