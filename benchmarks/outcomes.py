"""A pytest plugin that writes each outcome as a JSON line when the test ends, so that a crash of pytest loses none.

FASTNCE_OUTCOMES=FILE.jsonl python -m pytest -p benchmarks.outcomes tests
"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

FILE = "FASTNCE_OUTCOMES"
WORKER = "PYTEST_XDIST_WORKER"
"""Set in the workers of pytest-xdist, which send their reports to the process that writes."""


def pytest_runtest_logreport(report: Any) -> None:
    """Write the outcome of a test, or of a fixture that failed or skipped it."""
    if WORKER in os.environ or (report.when != "call" and report.outcome == "passed"):
        return
    crash = getattr(report.longrepr, "reprcrash", None)
    why = " ".join(str(crash.message if crash else "" if report.outcome == "passed" else report.longrepr).split())
    line = {"name": report.nodeid, "outcome": report.outcome, "why": why[:200]}
    with open(os.environ[FILE], "a") as file:
        file.write(json.dumps(line | {"seconds": round(report.duration, 1)}) + "\n")


def read(file: Path) -> list[dict[str, Any]]:
    """Return the last outcome of each test; empty if the file does not exist."""
    found = {}
    for text in file.read_text().splitlines() if file.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):  # a killed process may leave an unfinished line
            line = json.loads(text)
            found[line["name"]] = line
    return list(found.values())
