"""Reads the log of a run."""

from __future__ import annotations

import re
from pathlib import Path

TIME = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  ")


def log_lines(run: Path) -> list[str]:
    """The lines of log.txt without their times."""
    return [TIME.sub("", line, count=1) for line in (run / "log.txt").read_text().splitlines()]
