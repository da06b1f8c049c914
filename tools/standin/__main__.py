"""Capture and replay every preset without a GPU, and check what was launched.

python -m tools.standin                        # or: make capture
python -m tools.standin --list
python -m tools.standin --only cut "*/bf16/eager"
python -m tools.standin --write                # renew the launch table

The exit code is 0 if every case passed, 1 if one failed, 2 if the machine lacks something.
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from tools.standin import install, launches, matrix, results
from tools.standin.cases import CASES, Case, select


def parser() -> argparse.ArgumentParser:
    summary, _, more = (__doc__ or "").partition("\n\n")
    made = argparse.ArgumentParser(
        prog="python -m tools.standin",
        description=summary,
        epilog=more,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument(
        "--only",
        nargs="+",
        default=[],
        metavar="PATTERN",
        help="run these cases alone: a preset, a precision, a form, or preset/precision/form with wildcards",
    )
    made.add_argument("--list", action="store_true", help="print the cases and stop")
    made.add_argument("--fresh", action="store_true", help="run cases again that the journal already has")
    made.add_argument("--write", action="store_true", help="renew the launch table from these cases")
    made.add_argument("--results", type=Path, metavar="DIR", help="write results.json and results.csv into this folder")
    made.add_argument("--install", action="store_true", help="install what is needed and stop")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    try:
        cases = select(options.only)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    if options.list:
        print("\n".join(case.name for case in cases))
        return 0
    try:
        with install.locked(install.FOLDER):
            install.install(install.FOLDER)
            if options.install:
                return 0
            if broken := matrix.check_rules(install.FOLDER):
                print(*broken, sep="\n", file=sys.stderr)
                return 1
            return run(cases, options)
    except install.MissingError as error:
        print(error, file=sys.stderr)
        return 2
    except subprocess.CalledProcessError as error:
        print(f"the installation failed at: {' '.join(map(str, error.cmd))[:300]}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: the same command continues", file=sys.stderr)
        return 130


def run(cases: Sequence[Case], options: argparse.Namespace) -> int:
    """Run the cases, and write what the options ask for; return the exit code."""
    tables = launches.read()
    outcomes = matrix.run(cases, install.FOLDER, None if options.write else tables, options.fresh, show)
    if options.write:
        passed = [outcome for outcome in outcomes if outcome.outcome == matrix.PASSED]
        launches.write(tables | {outcome.case: Counter(outcome.launches) for outcome in passed})
        print(f"wrote the launches of {len(passed)} cases into {launches.FILE.relative_to(install.ROOT)}")
    if options.results:
        results.write(outcomes, options.results)
    failed = [outcome.case for outcome in outcomes if outcome.outcome != matrix.PASSED]
    left = "" if len(cases) == len(CASES) else f" (of {len(CASES)} in the matrix)"
    print(f"{len(outcomes) - len(failed)} of {len(outcomes)} cases passed{left}", *failed, sep="\n  failed: ")
    return 1 if failed else 0


def show(outcome: matrix.Outcome, ran: bool) -> None:
    """Print one line per case, and one per problem."""
    time = f"{outcome.seconds:6.0f} s" if ran else "  before"
    work = f"{outcome.graph_launches:5} launches, {outcome.syncs} waits"
    print(f"{outcome.outcome}  {outcome.case:32} {time}  {work}", flush=True)
    if outcome.falls_back:
        print(f"        falls back: {outcome.falls_back}", flush=True)
    for problem in outcome.problems:
        print(f"        {problem}", flush=True)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that it ends the process of the case too
    sys.exit(main())
