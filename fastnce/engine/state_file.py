"""`state.json` of a checkpoint: written with a digest of its own, and checked before its values are used."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

FORMAT = 2
"""The version of the format. Version 1 had no digest of its own."""
FILES = ("generator.safetensors", "training.safetensors")
LARGEST = 16 * 2**20
"""Bytes. A larger state.json is not read."""


def _count(least: int) -> Callable[[Any], bool]:
    return lambda value: type(value) is int and least <= value < 2**63


def _names(value: Any) -> bool:
    fit = isinstance(value, list) and all(isinstance(name, str) and name.isidentifier() for name in value)
    return fit and 0 < len(set(value)) == len(value)


def _digests(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and set(value) == set(FILES)
        and all(isinstance(text, str) and re.fullmatch("[0-9a-f]{64}", text) for text in value.values())
    )


def _config(value: Any) -> bool:
    kinds = {"method": str}
    return isinstance(value, dict) and all(isinstance(part, kinds.get(key, dict)) for key, part in value.items())


def _progress(value: Any) -> bool:
    least = {"batch": 1, "ranks": 1, "epoch": 0, "pictures": 0, "seen": 0}
    return isinstance(value, dict) and all(_count(low)(value.get(key)) for key, low in least.items())


def _validation(value: Any) -> bool:
    texts = ("pairs", "run.best", "run.metric")  # run.metric: the name of run.best in older versions
    if not isinstance(value, dict) or not isinstance(value.get("pairs"), str):
        return False
    numbers = [number for key, number in value.items() if key not in texts]
    return (
        all(isinstance(value.get(key, ""), str) for key in texts)
        and all(isinstance(number, float | int) for number in numbers)
        and len(numbers) > 0
    )


_NEEDED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "step": (_count(0), "a whole number of at least 0"),
    "sha256": (_digests, f"the digests of {' and '.join(FILES)}"),
    "generators": (_names, "a list of generators such as G"),
}
_OPTIONAL: dict[str, tuple[Callable[[Any], bool], str]] = {
    "config": (_config, "a table of the method and its sections"),
    "progress": (_progress, "a table of batch, ranks, epoch, pictures and seen"),
    "validation": (_validation, "a table of the pairs' digest, the metric's path and numbers"),
    "data": (lambda value: isinstance(value, str), "a text"),
    "finite": (lambda value: isinstance(value, bool), "true or false, whether the generators' numbers are finite"),
    "sound": (lambda value: isinstance(value, bool), "true or false, whether all numbers are finite and the step good"),
}


def sealed(state: dict[str, Any]) -> str:
    """The text of state.json, with its format and a digest of its content."""
    state = {**state, "format": FORMAT}
    return json.dumps({**state, "digest": _digest(state)}, indent=1)


def read(file: Path, step: int | None) -> dict[str, Any]:
    """Read and check a state.json; a file of format 1 has no digest to check.

    Args:
        step: the step in the folder's name; None if it names none.

    Raises:
        ValueError: the file is not as it was written. The message names the key, not the folder.
        OSError: the file cannot be read.
    """
    if file.exists() and not file.is_file():
        raise ValueError(f"{file.name} is no regular file")
    with file.open("rb") as opened:
        content = opened.read(LARGEST + 1)
    if len(content) > LARGEST:
        raise ValueError(f"{file.name} has more than {LARGEST:,} bytes, far more than were ever written")
    try:
        state = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        reason = str(error) if isinstance(error, ValueError) else "nested too deeply"
        raise ValueError(f"{file.name} is no JSON: {reason}") from None
    if not isinstance(state, dict):
        raise ValueError(f"{file.name} should hold a table, not {type(state).__name__}")
    if "format" in state or "digest" in state:
        digest = state.pop("digest", None)
        if state.get("format") == FORMAT and digest != _digest(state):
            raise ValueError(f"{file.name} is not what was written")
        if state.pop("format", None) != FORMAT:
            raise ValueError(f"{file.name} is of a newer fastnce, or not what was written")
    for key, (fits, wanted) in (_NEEDED | _OPTIONAL).items():
        if (key in state or key in _NEEDED) and not fits(state.get(key)):
            raise ValueError(f"{file.name} should hold {key}, {wanted}")
    if step is not None and state["step"] != step:
        raise ValueError(f"{file.name} is of step {state['step']}, and the folder of step {step}")
    return state


def _digest(state: dict[str, Any]) -> str:
    """The digest of the content, independent of spaces and order."""
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()
