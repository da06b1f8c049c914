"""Options as dataclasses whose fields say what they do."""

from __future__ import annotations

from dataclasses import field, fields
from typing import Any


def option(default: Any, consequence: str) -> Any:
    """A field with the sentence that tells what changes with it."""
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": consequence})
    return field(default=default, metadata={"help": consequence})


def describe(options: Any) -> dict[str, tuple[Any, str]]:
    """Name -> (value, consequence) of an options dataclass."""
    return {f.name: (getattr(options, f.name), f.metadata.get("help", "")) for f in fields(options)}
