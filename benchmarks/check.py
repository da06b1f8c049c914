"""Check and measure a GPU: a program of ten minutes, and a second one of four.

python benchmarks/check.py --out DIR --published fetched/cut fetched/dclgan fetched/dcdgan --cache fetched/triton.tar.xz
python benchmarks/check.py --second --out DIR --data fetched/horse2zebra      # parity, more tests, a training
python benchmarks/check.py --list

Each stage runs in its own process group with its own time limit, so a stage that fails or hangs does not affect the
others. After each stage DIR holds the results so far: results.json, results.csv, profile.csv, summary.txt, logs.txt.
The summary is printed last. The exit code is 0 even if stages fail, and 2 for a wrong command.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

BEGAN = time.monotonic()
"""The start time, before the import of PyTorch, which may be slow from a cold disk."""
ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))  # when started as a script

from benchmarks import brief, outcomes, profiled, run, triton_cache, watch  # noqa: E402
from benchmarks.device_tests import pytest_command  # noqa: E402
from benchmarks.published import find_checkouts  # noqa: E402
from fastnce.commands.demo import write_folders  # noqa: E402

MINUTES, MINUTES_SECOND = 9.5, 4.0
LAST_SECONDS = 10.0
"""Reserved for the summary."""
LEAST_SECONDS = 6.0
OUTCOMES = "outcomes.jsonl"
LOG_BYTES = 1_500_000
"""The end of each stage's output that is kept."""


@dataclass(frozen=True)
class Stage:
    """One stage of the check, and its time in seconds.

    A stage may also use half of the time that earlier stages left over. The last stage uses all of it.

    Args:
        part: a part of `run.py`, which produces rows.
        command: otherwise, a function from the options to the command to execute.
    """

    name: str
    seconds: float
    part: run.Part | None = None
    command: Callable[[argparse.Namespace], list[str]] | None = None


def _module(name: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", f"benchmarks.{name}", *arguments]


def _parity(options: argparse.Namespace) -> list[str]:
    program = [sys.executable, str(ROOT / "experiments" / "parity.py"), "--device", "cuda", "--steps", "2000"]
    data = ["--data", str(options.data)] if options.data else []
    return [*program, *data, "--minutes", f"{1.4 * options.slower:g}", "--out", str(options.out / "parity")]


def _training(options: argparse.Namespace) -> list[str]:
    """Train FastCUT until the time is over, uncompiled, because compiling would use up all the time."""
    data = options.data
    if data is None:
        data = options.work / "pictures"
        write_folders(data, side=286)
    folders = ["--data", str(data), "--out", str(options.work / "training")]
    minutes = max(0.1, (options.left() - LAST_SECONDS - 25.0) / 60)  # excludes decoding before and saving after
    settings = {
        "data.cache_dir": options.work / "cache",
        "run.compile": "false",
        "run.minutes": f"{minutes:.2f}",
        "run.sample_every": 500,
        "run.log_every": 200,
    }
    return [sys.executable, "-m", "fastnce", "train", "fastcut", *folders, *(f"{k}={v}" for k, v in settings.items())]


def _part(name: str) -> run.Part:
    return next(part for part in [run.MACHINE, *run.SHORT, *run.PARTS] if part.name == name)


FIRST = [
    Stage("smoke", 25, command=lambda o: _module("smoke", str(o.work / "smoke.json"))),
    Stage("tests", 110, command=lambda o: pytest_command(second=False)),
    Stage("ceilings", 15, _part("machine")),
    Stage("loss", 55, _part("short loss")),
    Stage("steps", 110, _part("short steps")),
    Stage("profile", 45, command=lambda o: _module("profiled", str(o.out / "profile.csv"))),
    Stage("waterfall", 60, _part("short waterfall")),
    Stage("growth", 22, _part("short growth")),
    Stage("data", 13, _part("data")),
    Stage("compiled", 60, _part("short compiled")),
]
SECOND = [
    Stage("ceilings", 15, _part("machine")),
    Stage("parity", 110, command=_parity),
    Stage("tests", 45, command=lambda o: pytest_command(second=True)),
    Stage("training", 55, command=_training),
]


def main(argv: Sequence[str] | None = None) -> int:
    """Return 0 at the end, whatever the stages found, and 2 for a wrong command."""
    options = _parse(argv)
    options.began = BEGAN if argv is None else time.monotonic()
    plan = SECOND if options.second else FIRST
    if options.list:
        for stage in plan:
            print(f"{stage.name:10} {stage.seconds:4.0f} s")
        print(f"{'':10} {sum(stage.seconds for stage in plan):4.0f} s of {60 * options.minutes:.0f}")
        return 0
    with tempfile.TemporaryDirectory(prefix="fastnce-check-", ignore_cleanup_errors=True) as folder:
        options.work = Path(folder)
        plan = [replace(stage, seconds=options.slower * stage.seconds) for stage in plan]
        return _check(options, [stage for stage in plan if not options.only or stage.name in options.only])


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks/check.py", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the results")
    parser.add_argument("--published", nargs="+", default=[], metavar="DIR", help="unpacked published repositories")
    parser.add_argument("--cache", type=Path, metavar="FILE", help="kernels packed by benchmarks.triton_cache")
    parser.add_argument("--second", action="store_true", help="the second program: parity, more tests, a training")
    parser.add_argument("--data", type=Path, metavar="DIR", help="trainA and trainB for --second; default photographs")
    parser.add_argument("--only", nargs="+", metavar="STAGE", help="run only these stages")
    parser.add_argument("--minutes", type=float, help=f"total time; default {MINUTES}, with --second {MINUTES_SECOND}")
    parser.add_argument("--slower", type=float, default=1.0, metavar="TIMES", help="multiply the time of each stage")
    parser.add_argument("--device", help="cpu, cuda, ...; default the accelerator if there is one")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to test that everything runs")
    parser.add_argument("--list", action="store_true", help="list the stages and exit")
    options = parser.parse_args(argv)
    names = {stage.name for stage in (SECOND if options.second else FIRST)}
    if unknown := sorted(set(options.only or []) - names):
        parser.error(f"--only takes {', '.join(sorted(names))}, not {', '.join(unknown)}")
    if not options.list and options.out is None:
        parser.error("--out DIR is required: the folder of the results")
    if options.out is not None and options.out.exists() and not options.out.is_dir():
        parser.error(f"--out {options.out} is a file: give a folder for the results")
    for name in ("minutes", "slower"):
        if getattr(options, name) is not None and not getattr(options, name) > 0:
            parser.error(f"--{name} must be above 0, not {getattr(options, name):g}")
    for name in ("out", "cache", "data"):  # stages run in the repository's root, not in the current folder
        if getattr(options, name) is not None:
            setattr(options, name, getattr(options, name).absolute())
    if options.data is not None and not (options.data / "trainA").is_dir():
        print(f"warning: {options.data} has no folder trainA: using the demo's photographs", file=sys.stderr)
        options.data = None
    options.minutes = options.minutes or options.slower * (MINUTES_SECOND if options.second else MINUTES)
    return options


def _check(options: argparse.Namespace, plan: list[Stage]) -> int:
    end = options.began + 60 * options.minutes
    options.left = lambda: end - time.monotonic()
    options.out.mkdir(parents=True, exist_ok=True)
    for old in ("results.json", "results.csv", "profile.csv", "summary.txt", run.LOGS):
        (options.out / old).unlink(missing_ok=True)
    report = brief.Report()
    _environment(options, report)
    options.run = _run_options(options)
    counting = None
    if not (options.second or options.quick or options.device == "cpu"):  # counting would disturb timings on a CPU
        counting = watch.fork(lambda: run.count(options.run), options.work / "count.log")
    for index, stage in enumerate(plan):
        left = options.left() - LAST_SECONDS
        spare = left - sum(s.seconds for s in plan[index:])
        seconds = left if stage is plan[-1] else min(left, stage.seconds + 0.5 * max(0.0, spare))
        began = time.monotonic()
        if seconds < LEAST_SECONDS:
            outcome = brief.Outcome(stage.name, seconds, 0.0, "not started: the time is over")
        else:
            try:
                outcome = _run(stage, options, report, seconds)
            except Exception as error:  # a fault of this program must not stop the other stages
                traceback.print_exc()
                outcome = brief.Outcome(stage.name, seconds, 0.0, f"{type(error).__name__}: {error}")
        outcome.seconds = time.monotonic() - began
        report.stages.append(outcome)
        try:
            _write(options.out, report)
        except Exception:  # such as a full disk: print the summary nevertheless
            traceback.print_exc()
        line = f"{stage.name}: {outcome.seconds:.0f} of {outcome.share:.0f} s {outcome.trouble or 'finished'}"
        print(line, file=sys.stderr, flush=True)
    if counting is not None:
        watch.end(counting)
    print("\n".join(brief.summary(report)), flush=True)
    return 0


def _environment(options: argparse.Namespace, report: brief.Report) -> None:
    """Set environment variables for all stages: the path of the package and the folder of compiled kernels."""
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH", ""))))
    os.environ["PYTHONUNBUFFERED"] = "1"
    os.environ[outcomes.FILE] = str(options.work / OUTCOMES)
    if options.cache is not None:
        folder = options.work / "triton"
        try:
            report.machine["carried_kernels"] = triton_cache.unpack(options.cache, folder)
            os.environ["TRITON_CACHE_DIR"] = str(folder)
        except ValueError as error:
            print(f"warning: {error}: kernels are compiled when they are first used", file=sys.stderr)


def _run_options(options: argparse.Namespace) -> argparse.Namespace:
    """Return the options for the parts of run.py."""
    checkouts = [folder for folder in options.published if _is_checkout(folder)]
    arguments = ["--out", str(options.out), *(["--published", *checkouts] if checkouts else [])]
    arguments += ["--quick"] if options.quick else []
    arguments += ["--device", options.device] if options.device else []
    found = run.parse(arguments)
    found.work = options.work
    (options.work / run.FACTS).write_text("{}")  # parts read it even if the ceilings were not measured
    return found


def _is_checkout(folder: str) -> bool:
    """Return whether the folder is a checkout or contains some. Print a warning if it is incomplete."""
    try:
        return bool(find_checkouts([folder]))
    except ValueError as error:
        print(f"warning: {error}: measuring without it", file=sys.stderr)
        return False


def _run(stage: Stage, options: argparse.Namespace, report: brief.Report, seconds: float) -> brief.Outcome:
    outcome = brief.Outcome(stage.name, seconds, 0.0)
    if stage.part is not None:
        found = run.start(stage.part, options.run, seconds)
        if stage.part is run.MACHINE:
            _take_facts(options, report)
        report.rows += found.rows
        outcome.trouble = found.trouble or ""
        measured = sum(row["p50_ms"] is not None for row in found.rows)
        outcome.lines += [f"{measured} of {len(found.rows)} rows measured"] * bool(found.rows)
        outcome.lines += [f"restarted after {why}" for why in found.restarts]
        return outcome
    assert stage.command is not None
    log = options.work / f"{stage.name}.log"
    command = stage.command(options)

    def execute(_: float) -> int:
        os.chdir(ROOT)
        os.execv(command[0], command)

    found = watch.supervise(execute, options.work / f"{stage.name}.jsonl", log, seconds)
    outcome.trouble = found.trouble or ""
    output = log.read_text(errors="replace") if log.exists() else ""
    with (options.out / run.LOGS).open("a") as file:
        file.write(f"===== {stage.name}: {outcome.trouble or 'finished'} =====\n\n{output[-LOG_BYTES:]}\n")
    _take(stage, options, report, outcome, output)
    return outcome


def _take_facts(options: argparse.Namespace, report: brief.Report) -> None:
    """Add the machine to the report and write it to a file for the later parts."""
    with contextlib.suppress(OSError, ValueError):
        report.machine |= json.loads((options.work / run.FACTS).read_text())
    checkouts = [checkout.name for checkout in options.run.checkouts]
    more = ["--second"] * options.second + (["--published", *checkouts] if checkouts else [])
    more += ["--cache", "FILE"] * bool(options.cache) + (["--only", *options.only] if options.only else [])
    report.machine |= {"published": checkouts, "command": " ".join(["python benchmarks/check.py --out DIR", *more])}
    (options.work / run.FACTS).write_text(json.dumps(report.machine))


def _take(stage: Stage, options: argparse.Namespace, report: brief.Report, outcome: brief.Outcome, output: str) -> None:
    """Add the files and the output of a command to the report."""
    if stage.name == "smoke":
        with contextlib.suppress(OSError, ValueError):
            report.smoke = json.loads((options.work / "smoke.json").read_text())
        counted = triton_cache.Counted(**report.smoke.get("compilations", {})).sentence()
        outcome.lines += [counted] * (counted not in outcome.trouble)
    elif stage.name == "tests":
        report.tests = outcomes.read(options.work / OUTCOMES)
    elif stage.name == "profile":
        report.profile = profiled.read(options.out / "profile.csv")
    elif stage.name == "training":
        grids = sorted((options.work / "training" / "samples").glob("*.png"))
        for grid in grids[-2:]:
            shutil.copy(grid, options.out / f"fastcut-{grid.name}")
        last = [line for line in output.splitlines() if line.strip()][-1:]
        outcome.lines += [line.removesuffix("; the same command continues") for line in last]
    elif stage.name == "parity":
        outcome.lines += [" ".join(line.split()) for line in output.splitlines() if line.strip()][-4:]


def _write(out: Path, report: brief.Report) -> None:
    """Write all results so far, so that an abort of the check loses only later stages."""
    status = {stage.name: stage.trouble or f"ran in {stage.seconds:.0f} s" for stage in report.stages}
    stages = [asdict(stage) for stage in report.stages]
    run.write_results(out, report.rows, report.machine, status, stages=stages, smoke=report.smoke, tests=report.tests)
    (out / "summary.txt").write_text("\n".join(brief.summary(report)) + "\n")


if __name__ == "__main__":
    sys.exit(main())
