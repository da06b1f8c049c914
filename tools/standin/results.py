"""Write the results of a run, with versions, commit and command."""

from __future__ import annotations

import csv
import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

from tools.standin import install
from tools.standin.cases import CASES
from tools.standin.matrix import Outcome

COLUMNS = (
    *("case", "outcome", "captures", "graph_launches", "replays", "syncs", "seconds", "first_step_s", "step_ms"),
    *("falls_back", "problems"),
)
WARM_UP = 3
"""Steps of each kind before the capture: `fastnce.engine.cudagraph.WARM_UP`, which needs PyTorch."""


def facts(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Return what decides the outcomes: versions, commit, and the command."""
    ran = next((outcome for outcome in outcomes if outcome.torch), None)
    return {
        "device": "stand-in CUDA libraries (no kernel computes anything)",
        "python": platform.python_version(),
        "torch": ran.torch if ran else "",
        "triton": ran.triton if ran else "",
        "packages": install.pinned(),
        "cpu_cores": os.cpu_count(),
        "load_average": list(os.getloadavg()),
        "commit": _commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python -m tools.standin", *sys.argv[1:]]),
    }


def _commit() -> str:
    """Return git's HEAD, with a plus sign if a file of the package or of the tool differs from it."""

    def git(*arguments: str) -> str:
        run = subprocess.run(["git", *arguments], cwd=install.ROOT, capture_output=True, text=True)
        return run.stdout.strip()

    commit = git("rev-parse", "--short=12", "HEAD")
    changed = git("status", "--porcelain", "--", "fastnce", "kernels", "benchmarks/step.py", "tools")
    return commit + ("+" if commit and changed else "")


def row(outcome: Outcome) -> dict[str, Any]:
    """Return a case as a row: without its launches, which are in the launch table.

    first_step_s: the first step, with compiling. step_ms: the median of the others that ran launch by launch, which is
    the host's time alone, because nothing takes time on the stand-in device. Both depend on what else the machine does.
    """
    found = {key: value for key, value in asdict(outcome).items() if key not in ("tree", "launches", "step_seconds")}
    first, warm = outcome.step_seconds[:1], outcome.step_seconds[outcome.captures : WARM_UP * outcome.captures]
    found["first_step_s"] = first[0] if first else None
    found["step_ms"] = round(1000 * median(warm), 1) if warm else None
    return found


def write(outcomes: Sequence[Outcome], folder: Path) -> None:
    """Write results.json, with versions and command, and results.csv, with a row per case."""
    folder.mkdir(parents=True, exist_ok=True)
    failed = sum(outcome.outcome != "passed" for outcome in outcomes)
    summary = {
        "cases": len(outcomes),
        "cases in the matrix": len(CASES),
        "passed": len(outcomes) - failed,
        "failed": failed,
        "fall back": sum(bool(outcome.falls_back) for outcome in outcomes),
        "seconds": round(sum(outcome.seconds for outcome in outcomes), 1),
    }
    rows = [row(outcome) for outcome in outcomes]
    everything = {"machine": facts(outcomes), "summary": summary, "rows": rows}
    (folder / "results.json").write_text(json.dumps(everything, indent=1) + "\n")
    with (folder / "results.csv").open("w", newline="") as text:
        table = csv.writer(text, lineterminator="\n")
        table.writerow(COLUMNS)
        for each in rows:
            table.writerow([" | ".join(each[key]) if key == "problems" else each[key] for key in COLUMNS])
