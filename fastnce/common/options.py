"""Options as dataclasses whose fields carry a help text and the accepted values."""

from __future__ import annotations

import functools
import math
from dataclasses import MISSING, dataclass, field, fields
from types import UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from .imports import is_import_path
from .messages import brief, nearest

BITS_64 = 2**63 - 1
"""The largest whole number that an option takes by default: tensors and TOML hold no larger ones."""


@dataclass(frozen=True)
class Accepts:
    """The values that an option accepts, within its type. For a list, the limits hold for each element.

    Args:
        low, high: inclusive limits.
        below: exclusive upper limit.
        choices: accepted texts.
        ascending: a list of at least one element, each larger than the one before.
        anything: every value of the type is accepted.
        imports: beside the choices, an import path such as mycode.py:Name.
    """

    low: float | None = None
    high: float | None = None
    below: float | None = None
    choices: tuple[str, ...] = ()
    ascending: bool = False
    anything: bool = False
    imports: bool = False


def option(default: Any, consequence: str, **accepts: Any) -> Any:
    """Define a dataclass field with a help text (`consequence`: what the option changes) and limits (see `Accepts`)."""
    metadata = {"help": consequence, "accepts": Accepts(**accepts)}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def describe(options: Any) -> dict[str, tuple[Any, str]]:
    """Map each option's name to (value, help text)."""
    return {f.name: (getattr(options, f.name), f.metadata.get("help", "")) for f in fields(options)}


def kinds(options: Any) -> dict[str, tuple[Any, Accepts]]:
    """Map each option's name to (type, accepted values). A `Literal` becomes str with its choices."""
    kind: Any = type(options)
    return _kinds(kind)


@functools.cache
def _kinds(options: Any) -> dict[str, tuple[Any, Accepts]]:
    hints, found = get_type_hints(options), {}
    for f in fields(options):
        hint, accepts = hints[f.name], f.metadata.get("accepts", Accepts())
        if get_origin(hint) is Literal:
            hint, accepts = str, Accepts(choices=get_args(hint))
        found[f.name] = hint, accepts
    return found


def check_kinds(options: type, name: str) -> None:
    """Refuse an options dataclass with a field of a type that no option has, or without a default.

    Raises:
        ValueError: the first such field.
    """
    for f in fields(options):
        if not f.name.isascii():
            raise ValueError(f"{name}.{f.name} must have a name in ASCII, for TOML files")
        if f.default is MISSING and f.default_factory is MISSING:
            raise ValueError(f"{name}.{f.name} needs a default")
    for key, (hint, _) in kinds(options()).items():
        if hint not in (bool, int, float, str, list[int], list[float], int | list[int]):
            kind = getattr(hint, "__name__", hint)
            raise ValueError(
                f"{name}.{key} is of type {kind}: options are bool, int, float, str, Literal of texts, list[int] or "
                f"list[float]"
            )


def check(options: Any, section: str) -> None:
    """Check that every value has the right type and lies within its limits.

    Raises:
        ValueError: names the first wrong value as `section`.key.
    """
    for key in kinds(options):
        check_value(options, key, getattr(options, key), f"{section}.{key}")


def check_value(options: Any, key: str, value: Any, name: str, shown: str = "") -> None:
    """Check one key's value; `name` and `shown` stand for the key and the value in the message."""
    hint, accepts = kinds(options)[key]
    if not _fits(hint, accepts, value):
        meant = nearest(value, accepts.choices) if isinstance(value, str) else ""
        raise ValueError(f"{name} must be {wanted(options, key)}, not {shown or brief(value)}{meant}")


def converted(options: Any, key: str, value: Any) -> Any:
    """Convert a value from a file or a command line to the option's type.

    3.0 becomes 3 for a whole number, 1 becomes 1.0 for a float, and true becomes "true" if that is one of the choices.
    Any other value is returned unchanged.
    """
    hint, accepts = kinds(options)[key]
    if isinstance(value, list):
        element = float if hint == list[float] else int
        return [_number(element, one) for one in value]
    if isinstance(value, bool):
        text = "true" if value else "false"
        return text if text in accepts.choices else value
    return _number(float if hint is float else int, value) if hint is not str else value


def wanted(options: Any, key: str) -> str:
    """Describe the values that a key accepts, to end a sentence: "a whole number from 1 to 1,024"."""
    hint, accepts = kinds(options)[key]
    if accepts.choices:
        own = ", or an import path such as mycode.py:Name" if accepts.imports else ""
        return "one of " + ", ".join(f'"{choice}"' for choice in accepts.choices) + own
    names: dict[Any, str] = {bool: "true or false", int: "a whole number", float: "a number", str: "text in UTF-8"}
    names |= {list[int]: "a list of whole numbers", list[float]: "a list of numbers"}
    kind = names.get(hint, "a whole number or [height, width], each")
    end = ", each larger than the one before" if accepts.ascending else ""
    example = getattr(type(options)(), key) if get_origin(hint) is list else []
    return f"{kind}{_bounds(accepts)}{end}{f', like {example}' if example else ''}"


def range_of(options: Any, key: str) -> str:
    """Describe a key's limits for lists of options: "1 to 1,024". Empty if the help text names all the choices."""
    _, accepts = kinds(options)[key]
    consequence = describe(options)[key][1]
    if accepts.choices:
        return "" if all(choice in consequence for choice in accepts.choices) else ", ".join(accepts.choices)
    return _bounds(accepts).strip().removeprefix("from ").removeprefix("of ")


def _fits(hint: Any, accepts: Accepts, value: Any) -> bool:
    if hint is bool:
        return isinstance(value, bool)
    if hint is str:
        known = not accepts.choices or value in accepts.choices or (accepts.imports and is_import_path(value))
        return isinstance(value, str) and _writable(value) and known
    if hint is int:
        whole = isinstance(value, int) and not isinstance(value, bool)
        return whole and (accepts.high is not None or value <= BITS_64) and _in(accepts, value)
    if hint is float:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return number and _finite(value) and _in(accepts, value)
    if isinstance(hint, UnionType):  # int | list[int]: one side or two
        sides = value if isinstance(value, list | tuple) else [value, value]
        return len(sides) == 2 and all(_fits(int, accepts, one) for one in sides)
    (element,) = get_args(hint)
    if not isinstance(value, list | tuple) or not all(_fits(element, accepts, one) for one in value):
        return False
    return not accepts.ascending or (len(value) > 0 and list(value) == sorted(set(value)))


def _in(accepts: Accepts, value: float) -> bool:
    return (
        (accepts.low is None or value >= accepts.low)
        and (accepts.high is None or value <= accepts.high)
        and (accepts.below is None or value < accepts.below)
    )


def _finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number larger than every float
        return False


def _writable(text: str) -> bool:
    """Whether a configuration file can hold this text. A file name that is not UTF-8 cannot be written."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return "\0" not in text


def _number(kind: type, value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | float) or not _finite(value):
        return value
    if kind is float:
        return float(value)
    return int(value) if value == int(value) else value


def _bounds(accepts: Accepts) -> str:
    low, high, below = (
        "" if bound is None else f"{bound:,}" if isinstance(bound, int) else f"{bound:,.10g}"
        for bound in (accepts.low, accepts.high, accepts.below)
    )
    if not low:
        return ""
    return f" from {low} to {high}" if high else f" from {low} to below {below}" if below else f" of at least {low}"
