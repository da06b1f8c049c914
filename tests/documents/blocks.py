"""Blocks of Python in the documents that run.

A fenced block runs if the line directly above its fence is a marker:

    <!-- runs -->
    <!-- runs: SETUP -->

SETUP names a fixture of `tests/documents/conftest.py`. The blocks of a page run in order, in one namespace and one
folder.
"""

from __future__ import annotations

import re
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MARKER = re.compile(r"<!-- runs(?:: (\w+))? -->")
ALMOST = re.compile(r"\s*<!--\s*runs?\b", re.IGNORECASE)
FENCE = re.compile(r"\s*(`{3,}|~{3,})")


@dataclass
class Block:
    """A block of code: the page, the line of its first statement counted from 1, and what its marker names."""

    page: str
    line: int
    code: str
    setup: str = ""


def blocks(text: str, page: str) -> list[Block]:
    """Return the marked blocks of a page in order.

    Raises:
        ValueError: a marker is misspelt, or no Python fence follows directly; the message has the page and the line.
    """
    lines = text.split("\n")
    found = []
    at = 0
    while at < len(lines):
        if fence := FENCE.match(lines[at]):
            at = _end(lines, at, fence[1]) + 1
        elif ALMOST.match(lines[at]):
            marker = MARKER.fullmatch(lines[at])
            if not marker:
                raise ValueError(f"{page}:{at + 1}: {lines[at].strip()!r} is not <!-- runs --> or <!-- runs: SETUP -->")
            if lines[at + 1 : at + 2] != ["```python"]:
                raise ValueError(f"{page}:{at + 1}: the line after the marker must be ```python")
            end = _end(lines, at + 1, "```")
            found.append(Block(page, at + 3, "\n".join(lines[at + 2 : end]), marker[1] or ""))
            at = end + 1
        else:
            at += 1
    return found


def _end(lines: list[str], start: int, fence: str) -> int:
    """Return the line that closes the fence of line `start`, or the end of the page."""
    closing = (i for i in range(start + 1, len(lines)) if lines[i].strip() == fence)
    return next(closing, len(lines))


def run(block: Block, names: dict[str, Any]) -> None:
    """Run a block. `names` are its variables, and hold those that it defines afterwards.

    Raises:
        AssertionError: the block fails; the message has the page, the line and the error.
    """
    try:
        code = compile("\n" * (block.line - 1) + block.code, block.page, "exec")
        exec(code, names)
    except (Exception, SystemExit) as error:
        last = error.lineno if isinstance(error, SyntaxError) and error.filename == block.page else None
        inside = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == block.page]
        line = last or (inside[-1] if inside else block.line)
        raise AssertionError(f"{block.page}:{line}: {type(error).__name__}: {error}") from error


def pages(root: Path) -> list[Path]:
    """Return the documents of the repository."""
    return [root / "README.md", root / "CONTRIBUTING.md", *sorted((root / "docs").rglob("*.md"))]
