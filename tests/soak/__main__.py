"""Run campaigns of faults: `python -m tests.soak [NAME ...] [--seed N] [--share 0.1] [--write docs/reliability.md]`."""

from __future__ import annotations

import argparse
import os

# must be set before PyTorch is imported
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import importlib
import pkgutil
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

from . import __path__ as _package
from .common import BOUNDS, Campaign, Outcome, warm
from .table import write_results


def campaigns() -> dict[str, Campaign]:
    """Return the campaigns of all modules of this package by name."""
    found: dict[str, Campaign] = {}
    for module in sorted(info.name for info in pkgutil.iter_modules(_package) if not info.name.startswith("_")):
        names = vars(importlib.import_module(f"tests.soak.{module}"))
        for campaign in [*names.get("CAMPAIGNS", []), *filter(None, [names.get("CAMPAIGN")])]:
            found[campaign.name] = campaign
    return found


def _run(name: str, tries: int, seed: int, folder: Path) -> tuple[Outcome, float]:
    began = time.monotonic()
    place = folder / name
    place.mkdir()
    outcome = campaigns()[name].run(tries, seed, place)
    return outcome, time.monotonic() - began


def main() -> int:
    known = campaigns()
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"default all: {', '.join(known)}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, metavar="NUMBER", help="run only this try")
    parser.add_argument("--share", type=float, default=1.0, help="fraction of the tries of a full run")
    parser.add_argument("--minutes", type=float, default=0.0, help="start no try after this time; 0 sets no limit")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="number of parallel campaigns")
    parser.add_argument("--write", type=Path, metavar="FILE.md", help="write the results into the table of this file")
    parser.add_argument("--folder", type=Path, help="working folder; lost tries keep their files there")
    args = parser.parse_args()
    if unknown := set(args.names) - known.keys():
        parser.error(f"unknown campaign {', '.join(sorted(unknown))}: choose from {', '.join(known)}")
    BOUNDS.only = args.only
    if args.minutes:
        BOUNDS.until = time.monotonic() + 60 * args.minutes
    folder = args.folder or Path(tempfile.mkdtemp(prefix="fastnce-soak-"))
    folder.mkdir(parents=True, exist_ok=True)
    warm()
    outcomes: dict[str, Outcome] = {}
    with ProcessPoolExecutor(max(1, args.jobs), mp_context=get_context("fork"), max_tasks_per_child=None) as pool:
        waiting = {}
        for name in args.names or known:
            tries = max(1, round(args.share * known[name].tries))
            waiting[pool.submit(_run, name, tries, args.seed, folder)] = name
        for future in as_completed(waiting):
            name = waiting[future]
            outcome, seconds = future.result()
            outcomes[name] = outcome
            print(f"{name}: tried {outcome.tried}, lost {len(outcome.lost)}, {seconds:.0f} s", flush=True)
            for line in [*outcome.lost, *outcome.notes]:
                print(f"  {line}", flush=True)
    lost = sum(len(outcome.lost) for outcome in outcomes.values())
    if args.write is not None:
        write_results(args.write, {name: (known[name], outcome) for name, outcome in outcomes.items()}, args.seed)
    if lost:
        print(f"{lost} tries were lost; their files are in {folder}", file=sys.stderr)
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
