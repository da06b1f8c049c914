"""Everything worth measuring on a GPU within ten minutes, and a second program of four.

python benchmarks/check.py --out DIR --published fetched/cut fetched/dclgan fetched/dcdgan --cache fetched/triton.tar.xz
python benchmarks/check.py --second --out DIR --data fetched/horse2zebra      # parity, more tests, a training
python benchmarks/check.py --list

Each stage is a process group of its own with a time of its own; one that fails or hangs costs no other. What was found
is in DIR after every stage: results.json and results.csv, profile.csv, summary.txt, logs.txt. The last thing printed is
the summary. Exit code 0 whatever the stages found, 2 for a wrong command.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
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
"""Before PyTorch is imported, which may take its time from a cold disk."""
ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))  # started as a script: the repository is not on the path yet

from benchmarks import brief, outcomes, profiled, run, triton_cache, watch  # noqa: E402
from benchmarks.published import find_checkouts  # noqa: E402

MINUTES, MINUTES_SECOND = 9.5, 4.0
LAST_SECONDS = 10.0
"""Kept for the summary."""
LEAST_SECONDS = 6.0
OUTCOMES = "outcomes.jsonl"
LOG_BYTES = 1_500_000
"""Of each stage's words, the last ones are kept."""

FIRST_TESTS = ("kernels_gpu", "layers_gpu", "weights", "data", "inference", "engine_gpu")
OF_THE_ENGINE = "(bf16 and (cut or dcdgan)) or random or failed or finite"
"""Tests of the engine in the first call; the second call has the others, and whole runs."""


@dataclass(frozen=True)
class Stage:
    """Something to find out, and its share of the time in seconds.

    It may also take half of what the stages before it have left; the last one of a plan takes all that is left.

    part: of `run.py`'s, which leaves rows; else command: what to execute, given the options.
    """

    name: str
    seconds: float
    part: run.Part | None = None
    command: Callable[[argparse.Namespace], list[str]] | None = None


def pytest_command(rest: bool) -> list[str]:
    """The command of the tests on a GPU; `rest` takes the engine's others."""
    files = ("engine_gpu", "recorded_run") if rest else FIRST_TESTS
    chosen = f"not ({OF_THE_ENGINE})" if rest else f"not engine_gpu or {OF_THE_ENGINE}"
    command = [sys.executable, "-m", "pytest", "-p", "benchmarks.outcomes", "--tb=short", "-p", "no:cacheprovider"]
    if _has("xdist"):
        command += ["-n", str(max(1, min(12, 3 * (os.cpu_count() or 1) // 4)))]
    if _has("pytest_timeout"):
        command += ["--timeout", "100"]
    return [*command, "-m", "gpu and not slow", "-k", chosen, *(f"tests/test_{name}.py" for name in files)]


def _has(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _module(name: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", f"benchmarks.{name}", *arguments]


def _parity(options: argparse.Namespace) -> list[str]:
    program = [sys.executable, str(ROOT / "benchmarks" / "parity.py"), "--device", "cuda", "--steps", "2000"]
    data = ["--data", str(options.data)] if options.data else []
    return [*program, *data, "--minutes", f"{1.4 * options.slower:g}", "--out", str(options.out / "parity")]


def _training(options: argparse.Namespace) -> list[str]:
    """FastCUT until the time is over; uncompiled, for the compiler alone would take it all."""
    data = options.data
    if data is None:
        from fastnce.commands.demo import write_folders

        data = options.work / "pictures"
        write_folders(data, side=286)
    place = ["--data", str(data), "--out", str(options.work / "training")]
    minutes = max(0.1, (options.left() - LAST_SECONDS - 25.0) / 60)  # it decodes before, and saves after them
    settings = {
        "data.cache_dir": options.work / "cache",
        "run.compile": "false",
        "run.minutes": f"{minutes:.2f}",
        "run.sample_every": 500,
        "run.log_every": 200,
    }
    return [sys.executable, "-m", "fastnce", "train", "fastcut", *place, *(f"{k}={v}" for k, v in settings.items())]


def _part(name: str) -> run.Part:
    return next(part for part in [run.MACHINE, *run.SHORT, *run.PARTS] if part.name == name)


FIRST = [
    Stage("smoke", 25, command=lambda o: _module("smoke", str(o.work / "smoke.json"))),
    Stage("tests", 110, command=lambda o: pytest_command(rest=False)),
    Stage("ceilings", 15, _part("machine")),
    Stage("loss", 55, _part("loss")),
    Stage("steps", 110, _part("steps")),
    Stage("profile", 45, command=lambda o: _module("profiled", str(o.out / "profile.csv"))),
    Stage("waterfall", 60, _part("fall")),
    Stage("growth", 22, _part("grow")),
    Stage("data", 13, _part("data")),
    Stage("compiled", 60, _part("one compiled")),
]
SECOND = [
    Stage("ceilings", 15, _part("machine")),
    Stage("parity", 110, command=_parity),
    Stage("tests", 45, command=lambda o: pytest_command(rest=True)),
    Stage("training", 55, command=_training),
]


def main(argv: Sequence[str] | None = None) -> int:
    """0 when it came to its end, whatever it found; 2 for a wrong command."""
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
    parser.add_argument("--out", type=Path, metavar="DIR", help="where everything that is found goes")
    parser.add_argument("--published", nargs="+", default=[], metavar="DIR", help="unpacked checkouts")
    parser.add_argument("--cache", type=Path, metavar="FILE", help="kernels that benchmarks.triton_cache packed")
    parser.add_argument("--second", action="store_true", help="parity, the engine's other tests, a training")
    parser.add_argument("--data", type=Path, metavar="DIR", help="trainA and trainB for --second; default photographs")
    parser.add_argument("--only", nargs="+", metavar="STAGE", help="these stages alone")
    parser.add_argument("--minutes", type=float, help=f"for everything; default {MINUTES}, second {MINUTES_SECOND}")
    parser.add_argument("--slower", type=float, default=1.0, metavar="TIMES", help="each share that much longer")
    parser.add_argument("--device", help="of what is measured; default the accelerator if there is one")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does everything run?")
    parser.add_argument("--list", action="store_true", help="name the stages and stop")
    options = parser.parse_args(argv)
    names = {stage.name for stage in (SECOND if options.second else FIRST)}
    if unknown := sorted(set(options.only or []) - names):
        parser.error(f"--only takes {', '.join(sorted(names))}, not {', '.join(unknown)}")
    if not options.list and options.out is None:
        parser.error("--out DIR is needed: where shall the results go?")
    if options.out is not None and options.out.exists() and not options.out.is_dir():
        parser.error(f"--out {options.out} is a file: name a folder for the results")
    for name in ("minutes", "slower"):
        if getattr(options, name) is not None and not getattr(options, name) > 0:
            parser.error(f"--{name} must be above 0, not {getattr(options, name):g}")
    for name in ("out", "cache", "data"):  # commands run in the root, wherever this was started
        if getattr(options, name) is not None:
            setattr(options, name, getattr(options, name).absolute())
    if options.data is not None and not (options.data / "trainA").is_dir():
        print(f"warning: {options.data} has no folder trainA: done with the demo's photographs", file=sys.stderr)
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
    if not (options.second or options.quick or options.device == "cpu"):  # a CPU that is measured is left alone
        counting = watch.fork(lambda: run.count(options.run), options.work / "count.log")
    for index, stage in enumerate(plan):
        left = options.left() - LAST_SECONDS
        spare = left - sum(s.seconds for s in plan[index:])
        seconds = left if stage is plan[-1] else min(left, stage.seconds + 0.5 * max(0.0, spare))
        began = time.monotonic()
        if seconds < LEAST_SECONDS:
            outcome = brief.Outcome(stage.name, seconds, 0.0, "not begun: the time is over")
        else:
            try:
                outcome = _run(stage, options, report, seconds)
            except Exception as error:  # of this program: the other stages are worth having
                traceback.print_exc()
                outcome = brief.Outcome(stage.name, seconds, 0.0, f"{type(error).__name__}: {error}")
        outcome.seconds = time.monotonic() - began
        report.stages.append(outcome)
        try:
            _write(options.out, report)
        except Exception:  # such as a full disk: the summary is printed all the same
            traceback.print_exc()
        said = f"{stage.name}: {outcome.seconds:.0f} of {outcome.share:.0f} s {outcome.trouble or 'to its end'}"
        print(said, file=sys.stderr, flush=True)
    if counting is not None:
        watch.end(counting)
    print("\n".join(brief.summary(report)), flush=True)
    return 0


def _environment(options: argparse.Namespace, report: brief.Report) -> None:
    """Of all stages: where compiled kernels lie, and where the package is."""
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH", ""))))
    os.environ["PYTHONUNBUFFERED"] = "1"
    os.environ[outcomes.FILE] = str(options.work / OUTCOMES)
    if options.cache is not None:
        folder = options.work / "triton"
        try:
            report.machine["carried_kernels"] = triton_cache.unpack(options.cache, folder)
            os.environ["TRITON_CACHE_DIR"] = str(folder)
        except ValueError as error:
            print(f"warning: {error}: kernels are compiled as they are needed", file=sys.stderr)


def _run_options(options: argparse.Namespace) -> argparse.Namespace:
    """Those that the parts of run.py want."""
    there = [folder for folder in options.published if _checkout(folder)]
    words = ["--out", str(options.out), *(["--published", *there] if there else [])]
    words += ["--quick"] if options.quick else []
    words += ["--device", options.device] if options.device else []
    found = run.parse(words)
    found.work = options.work
    (options.work / run.FACTS).write_text("{}")  # a part wants it, whether or not the ceilings were measured
    return found


def _checkout(folder: str) -> bool:
    """Whether the folder is a checkout, or holds some; what is incomplete costs only what needs it."""
    try:
        return bool(find_checkouts([folder]))
    except ValueError as error:
        print(f"warning: {error}: measured without it", file=sys.stderr)
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
        outcome.lines += [f"begun again: {why}" for why in found.restarts]
        return outcome
    assert stage.command is not None
    log = options.work / f"{stage.name}.log"
    command = stage.command(options)

    def execute(_: float) -> int:
        os.chdir(ROOT)
        os.execv(command[0], command)

    found = watch.supervise(execute, options.work / f"{stage.name}.jsonl", log, seconds)
    outcome.trouble = found.trouble or ""
    words = log.read_text(errors="replace") if log.exists() else ""
    with (options.out / run.LOGS).open("a") as file:
        file.write(f"===== {stage.name}: {outcome.trouble or 'ran to its end'} =====\n\n{words[-LOG_BYTES:]}\n")
    _take(stage, options, report, outcome, words)
    return outcome


def _take_facts(options: argparse.Namespace, report: brief.Report) -> None:
    """The machine, with what the parts after it want to know."""
    with contextlib.suppress(OSError, ValueError):
        report.machine |= json.loads((options.work / run.FACTS).read_text())
    checkouts = [checkout.name for checkout in options.run.checkouts]
    more = ["--second"] * options.second + (["--published", *checkouts] if checkouts else [])
    more += ["--cache", "FILE"] * bool(options.cache) + (["--only", *options.only] if options.only else [])
    report.machine |= {"published": checkouts, "command": " ".join(["python benchmarks/check.py --out DIR", *more])}
    (options.work / run.FACTS).write_text(json.dumps(report.machine))


def _take(stage: Stage, options: argparse.Namespace, report: brief.Report, outcome: brief.Outcome, words: str) -> None:
    """What a command has left behind or said."""
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
        said = [line for line in words.splitlines() if line.strip()][-1:]
        outcome.lines += [line.removesuffix("; the same command continues") for line in said]
    elif stage.name == "parity":
        outcome.lines += [" ".join(line.split()) for line in words.splitlines() if line.strip()][-4:]


def _write(out: Path, report: brief.Report) -> None:
    """All that is known, so that whatever ends the check now costs only what comes after."""
    status = {stage.name: stage.trouble or f"ran in {stage.seconds:.0f} s" for stage in report.stages}
    stages = [asdict(stage) for stage in report.stages]
    run.write_results(out, report.rows, report.machine, status, stages=stages, smoke=report.smoke, tests=report.tests)
    (out / "summary.txt").write_text("\n".join(brief.summary(report)) + "\n")


if __name__ == "__main__":
    sys.exit(main())
