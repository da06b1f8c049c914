"""Values of options as text: parse them from the command line, and format them for TOML files."""

from __future__ import annotations

import json
import tomllib
from typing import Any

SWITCHES = {"true": "true", "false": "false", "yes": "true", "no": "false", "on": "true", "off": "false"}
"""Words for true and false on a command line, in lower case."""


def parse_value(text: str, old: Any) -> Any:
    """Parse a value from the command line: TOML, but text needs no quotes and a list needs no brackets.

    Args:
        old: the present value of the option, whose type decides between text and other values.

    Returns:
        the value; the text itself if it is not valid TOML, so that the check of the option can refuse it.
    """
    if isinstance(old, str):
        return text.strip("\"'")
    if isinstance(old, list) and not text.startswith("["):
        text = f"[{text}]"
    if "#" in text or "\n" in text:  # a comment, or a second key
        return text
    try:
        return tomllib.loads(f"value = {SWITCHES.get(text.lower(), text)}")["value"]
    except (ValueError, RecursionError):
        return text


def format_value(value: Any) -> str:
    """Format a value as TOML."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")  # TOML must escape it, JSON need not
    if isinstance(value, list | tuple):
        return f"[{', '.join(format_value(v) for v in value)}]"
    return repr(value)
