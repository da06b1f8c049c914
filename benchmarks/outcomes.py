"""A pytest plugin: writes how each test ended as soon as it has, a JSON line each. Whatever ends pytest loses none.

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
"""Set in the processes of pytest-xdist, which hand their reports to the one that writes."""


def pytest_runtest_logreport(report: Any) -> None:
    """Of a test: its own outcome, or that of a fixture that failed or skipped it."""
    if WORKER in os.environ or (report.when != "call" and report.outcome == "passed"):
        return
    crash = getattr(report.longrepr, "reprcrash", None)
    why = " ".join(str(crash.message if crash else "" if report.outcome == "passed" else report.longrepr).split())
    line = {"name": report.nodeid, "outcome": report.outcome, "why": why[:200]}
    with open(os.environ[FILE], "a") as file:
        file.write(json.dumps(line | {"seconds": round(report.duration, 1)}) + "\n")


def read(file: Path) -> list[dict[str, Any]]:
    """The last word on each test; none where there is no file."""
    found = {}
    for words in file.read_text().splitlines() if file.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):  # a line that a killed process did not finish
            line = json.loads(words)
            found[line["name"]] = line
    return list(found.values())
