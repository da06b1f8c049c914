"""Write the results of a run, with versions, commit and command."""

from __future__ import annotations

import csv
import json
import platform
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tools.standin import install
from tools.standin.matrix import Outcome

COLUMNS = ("case", "outcome", "captures", "graph_launches", "replays", "syncs", "seconds", "falls_back", "problems")


def facts(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Return what decides the outcomes: versions, commit, and the command."""
    ran = next((outcome for outcome in outcomes if outcome.torch), None)
    return {
        "device": "stand-in CUDA libraries (no kernel computes anything)",
        "python": platform.python_version(),
        "torch": ran.torch if ran else "",
        "triton": ran.triton if ran else "",
        "packages": install.pinned(),
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


def write(outcomes: Sequence[Outcome], folder: Path) -> None:
    """Write results.json, with everything, and results.csv, with a row per case."""
    folder.mkdir(parents=True, exist_ok=True)
    failed = sum(outcome.outcome != "passed" for outcome in outcomes)
    summary = {
        "cases": len(outcomes),
        "passed": len(outcomes) - failed,
        "failed": failed,
        "in parts instead of whole": sum(bool(outcome.falls_back) for outcome in outcomes),
        "seconds": round(sum(outcome.seconds for outcome in outcomes), 1),
    }
    rows = [{key: value for key, value in asdict(outcome).items() if key != "tree"} for outcome in outcomes]
    everything = {"machine": facts(outcomes), "summary": summary, "rows": rows}
    (folder / "results.json").write_text(json.dumps(everything, indent=1) + "\n")
    with (folder / "results.csv").open("w", newline="") as text:
        table = csv.writer(text, lineterminator="\n")
        table.writerow(COLUMNS)
        for row in rows:
            table.writerow([" | ".join(row[key]) if key == "problems" else row[key] for key in COLUMNS])
