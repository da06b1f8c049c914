"""The command `fastnce runs`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from ..common.streams import write_out
from ..training.listing import Listed, describe, find_runs
from .parsing import command_parser

HEADINGS = ("run", "method", "step", "best", "state", "last written", "last change")


def main(arguments: list[str]) -> int:
    """List the runs below a folder: method, step, best value and state of each."""
    parser = command_parser("runs", main)
    parser.add_argument("folder", type=Path, nargs="?", default=Path("runs"), metavar="DIR", help="default: runs")
    parser.add_argument("--json", action="store_true", help="print a JSON list with all that is known of each run")
    args = parser.parse_args(arguments)
    if not args.folder.is_dir():
        problem = "a file, and a folder is needed" if args.folder.exists() else "no such folder"
        raise ValueError(f"{args.folder}: {problem}")
    found = [describe(run, _name(run, args.folder)) for run in find_runs(args.folder)]
    if args.json:
        write_out(json.dumps([asdict(run) for run in found], indent=1, ensure_ascii=False) + "\n")
    elif not found:
        write_out(f"no runs below {args.folder}\n")
    else:
        write_out(table([HEADINGS, *map(row, found)]))
    return 0


def _name(run: Path, root: Path) -> str:
    name = str(run.relative_to(root))
    return (run.resolve().name or str(run)) if name == "." else name


def row(run: Listed) -> tuple[str, ...]:
    """The cells of a run, as `HEADINGS` names them."""
    total = "?" if run.total is None else f"{run.total:,}"
    best = "" if run.best is None else f"{run.measure} {run.best:.4g} at {run.best_step:,}"
    state = f"{run.state}: {run.reason}" if run.reason and run.state in ("failed", "damaged") else run.state
    change = "" if run.changed_at is None else f"{'; '.join(run.changes)} (step {run.changed_at:,})"
    cells = run.name, run.method or "?", f"{run.step:,}/{total}", best, state, run.used[:16].replace("T", " "), change
    return tuple("".join(c if c.isprintable() else repr(c)[1:-1] for c in cell) for cell in cells)


def table(rows: list[tuple[str, ...]]) -> str:
    """Lay out rows in columns, separated by two spaces."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)
    return "".join(f"{line}\n" for line in lines)
