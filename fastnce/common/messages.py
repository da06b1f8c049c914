"""Words for messages."""

from __future__ import annotations

from typing import Any

from torch import Tensor

LONGEST = 60
"""The characters of a text that a message repeats."""


def shown(value: Any) -> str:
    """Describe a value for a message: numbers and text by their repr, other values by their type."""
    if isinstance(value, Tensor):
        return f"a {value.dtype} tensor of shape {tuple(value.shape)} on {value.device}"
    if isinstance(value, str) and len(value) > LONGEST:
        return f"{value[:LONGEST]!r}..."
    if value is None or isinstance(value, bool | int | float | complex | str):
        return repr(value)
    if type(value) in (dict, list, tuple):
        kind = type(value).__name__
        return f"a {kind} of {len(value)}" if value else f"an empty {kind}"
    return f"a {type(value).__module__.split('.')[0]}.{type(value).__name__}".replace(" builtins.", " ")
