"""Run every benchmark that this machine can, in a given time, and write what it gives.

python benchmarks/run.py --out benchmarks/results/h200-2026-11-23 --published ../published
python benchmarks/run.py --list
python benchmarks/run.py --out DIR --quick --only chain
python benchmarks/run.py --out DIR --minutes 30          # a CPU takes seconds for what a GPU does in milliseconds

Each part runs in a process of its own. The time is shared out over the parts in the order of `--list`; what one leaves
goes to those after it. After each part `results.csv` and `results.json` in DIR hold what there is so far. A part, or
one of those that it measures, that fails or hangs costs nobody else's figures: it is named last, and what it said is in
DIR/logs.txt. `--published` takes unpacked checkouts of CUT, DCLGAN or DCD-GAN, or folders that hold some; without it
our own writing of the same mathematics stands in, and the results say so.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import gc
import importlib
import itertools
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))  # started as a script: the repository is not on the path yet

import torch  # noqa: E402

from benchmarks import plot, watch  # noqa: E402
from benchmarks.cases import Context, Row  # noqa: E402
from benchmarks.count import Counts  # noqa: E402
from benchmarks.measure import ALONE, OVER, measure_rest  # noqa: E402
from benchmarks.published import find_checkouts  # noqa: E402
from benchmarks.table import table  # noqa: E402
from fastnce.common.timing import default_device  # noqa: E402


@dataclass(frozen=True)
class Part:
    """A function of a module here, `(Context) -> Iterator[Row]`, and its share of the time, in seconds of a GPU."""

    name: str
    module: str
    function: str
    seconds: int


# the most important first: what is cut off is what comes last, and the compiler takes whatever it is given
PARTS = [
    Part("chain", "benchmarks.chain", "chain", 40),
    Part("infonce", "benchmarks.loss", "infonce", 30),
    Part("cut", "benchmarks.step", "cut", 100),
    Part("dual", "benchmarks.step", "dual", 130),
    Part("fastcut", "benchmarks.step", "fastcut", 25),
    Part("waterfall", "benchmarks.waterfall", "waterfall", 45),
    Part("cudnn", "benchmarks.waterfall", "cudnn", 20),
    Part("data", "benchmarks.data", "data", 12),
    Part("growth", "benchmarks.step", "growth", 15),
    Part("patchnce", "benchmarks.loss", "patchnce", 10),
    Part("compiled", "benchmarks.compiled", "compiled", 150),
]
SHORT = [
    Part("loss", "benchmarks.short", "loss", 55),
    Part("steps", "benchmarks.short", "steps", 110),
    Part("fall", "benchmarks.short", "waterfall", 60),
    Part("grow", "benchmarks.short", "growth", 22),
    Part("one compiled", "benchmarks.short", "compiled", 60),
]
"""What `check.py` measures besides."""
MACHINE = Part("machine", "benchmarks.machine", "describe", 30)
MINUTES = 9.0
LAST_SECONDS = 8.0
"""Kept for the table and the plot."""
LEAST_SECONDS = 6.0
"""A part that would get less is not begun."""
GPU_PATIENCE = 120.0
"""Seconds after which the first calls of a provider count as hung on an accelerator; a CPU's step may take as long."""
FACTS = "machine.json"
COUNTS = "counts.json"
LOGS = "logs.txt"
MACHINE_COLUMNS = ("device", "driver", "torch", "triton", "python", "fastnce", "commit", "date")


def main(argv: Sequence[str] | None = None) -> int:
    """0 when every part ran to its end, 1 when one did not, 2 for a wrong command."""
    options = parse(argv)
    if options.list:
        for part in PARTS:
            print(f"{part.name:12} {_summary(part)}")
        return 0
    if options.part:
        part = next(p for p in [MACHINE, *PARTS, *SHORT] if p.name == options.part)
        return _run_part(options, part, options.seconds)
    return _run_all(options)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks/run.py", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, metavar="DIR", help="where results.csv, results.json and plots go")
    parser.add_argument("--published", type=Path, nargs="+", default=[], metavar="DIR", help="unpacked checkouts")
    parser.add_argument("--only", nargs="+", choices=[p.name for p in PARTS], metavar="NAME", help="these parts only")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="for everything together; default %(default)s")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does everything run?")
    parser.add_argument("--device", default=None, help="cpu, cuda, ...; default the accelerator if there is one")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads; default PyTorch's choice")
    parser.add_argument("--side", type=int, default=None, help="of the pictures of steps; default 256")
    parser.add_argument("--list", action="store_true", help="name the parts and stop")
    parser.add_argument("--part", help=argparse.SUPPRESS)  # for a process that could not be forked
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    options.words = list(sys.argv[1:] if argv is None else argv)
    if not options.list and options.out is None:
        parser.error("--out DIR is needed: where shall the results go?")
    if not options.minutes > 0:
        parser.error(f"--minutes must be above 0, not {options.minutes:g}")
    if options.side is not None and (options.side < 32 or options.side % 4):
        parser.error(f"--side must be a multiple of 4 and at least 32, not {options.side}")
    try:
        options.checkouts = find_checkouts(options.published)
    except ValueError as error:
        parser.error(str(error))
    return options


def _summary(part: Part) -> str:
    function = getattr(importlib.import_module(part.module), part.function)
    return (function.__doc__ or "").split("\n")[0]


# --- the process of one part -------------------------------------------------------------------------------------


def _run_part(options: argparse.Namespace, part: Part, seconds: float) -> int:
    """Write each row as soon as it is there, so that a time limit loses only what was not measured yet."""
    until = time.monotonic() + seconds
    if torch.cuda._is_in_bad_fork():  # something used CUDA before this process was forked: begin from nothing
        command = [sys.executable, str(Path(__file__).resolve()), *options.words]
        more = ["--part", part.name, "--seconds", f"{seconds:.1f}", "--work", str(options.work)]
        os.execv(sys.executable, command + more)
    gc.freeze()  # what was imported stays; collecting before each measurement need not look at it
    # the profiler counts launches of graphs: its library must not be taken down and started again between two of them
    os.environ.setdefault("DISABLE_CUPTI_LAZY_REINIT", "1")
    os.environ.setdefault("TEARDOWN_CUPTI", "0")
    torch.manual_seed(0)
    if options.threads:
        torch.set_num_threads(options.threads)
    device = default_device(options.device)
    if part is MACHINE:
        from benchmarks import machine

        def tell(found: dict[str, Any]) -> None:
            (options.work / FACTS).write_text(json.dumps(found))

        tell(machine.describe(device, options.quick, tell))
        return 0
    facts = json.loads((options.work / FACTS).read_text())
    path = options.work / f"{part.name}.jsonl"
    earlier = watch.Journal.read(path)
    with path.open("a") as lines:

        def journal(event: dict[str, Any]) -> None:
            lines.write(json.dumps(event) + "\n")
            lines.flush()

        context = Context(
            device,
            options.quick,
            options.checkouts,
            facts,
            until=until,
            journal=journal,
            refused=earlier.refused,
            done=set(earlier.rows),
            side=options.side,
            counts=Counts(options.work / COUNTS),
            patience=float("inf") if device.type == "cpu" else GPU_PATIENCE,
        )
        function = getattr(importlib.import_module(part.module), part.function)
        for row in itertools.chain(function(context), measure_rest(context)):
            journal({"row": asdict(row), "key": row.key()})
    return 0


# --- the process that starts them --------------------------------------------------------------------------------


def _run_all(options: argparse.Namespace) -> int:
    with tempfile.TemporaryDirectory(prefix="fastnce-benchmarks-") as folder:
        options.work = Path(folder)  # journals and what parts tell each other; --out holds results alone
        return _run_in(options)


def _run_in(options: argparse.Namespace) -> int:
    began = time.monotonic()
    end = began + 60 * options.minutes - LAST_SECONDS
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / LOGS).unlink(missing_ok=True)
    parts = [p for p in PARTS if not options.only or p.name in options.only]
    failed = {}
    outcome = start(MACHINE, options, min(60.0, (end - began) / 3))
    machine: dict[str, Any] = {}
    with contextlib.suppress(OSError, ValueError):
        machine = json.loads((options.work / FACTS).read_text())
    if outcome.trouble is not None:  # without ceilings there are no floors; times are times all the same
        failed["machine"] = outcome.trouble
    machine["command"] = _command(options)
    machine["published"] = [checkout.name for checkout in options.checkouts]
    (options.work / FACTS).write_text(json.dumps(machine))
    counting: int | None = None
    if machine.get("device", "CPU") != "CPU" and not options.quick:
        # beside the first parts, on another core; a CPU that is itself measured is left alone
        counting = watch.fork(lambda: count(options), options.work / "count.log")
    rows: list[dict[str, Any]] = []
    status: dict[str, str] = {}
    for index, part in enumerate(parts):
        started = time.monotonic()
        seconds = (end - started) * part.seconds / sum(p.seconds for p in parts[index:])
        if seconds < LEAST_SECONDS:
            failed[part.name] = status[part.name] = OVER
        else:
            outcome = start(part, options, seconds)
            status[part.name] = outcome.trouble or f"ran in {time.monotonic() - started:.0f} s"
            if outcome.restarts:
                status[part.name] += f"; begun again after {'; '.join(outcome.restarts)}"
            late = sum(OVER in row["note"] for row in outcome.rows)
            alone = sum(ALONE in row["note"] for row in outcome.rows)
            for count, what in ((late, OVER), (alone, ALONE)):
                status[part.name] += f"; {count} of {len(outcome.rows)} rows {what}" if count else ""
            if outcome.trouble is not None or late or alone:
                failed[part.name] = status[part.name]
            rows += outcome.rows
        write_results(options.out, rows, machine, status)
        print(f"{part.name}: {status[part.name]}", file=sys.stderr, flush=True)
    if counting is not None:
        watch.end(counting)
    print(table(rows, machine))
    for line in (*plot.growth(rows), *plot.step_growth(rows)):
        print(line)
    try:
        print(plot.draw(options.out, rows))
    except Exception as error:  # the figures are there, with or without a picture of them
        print(f"no plot: {type(error).__name__}: {error}")
    print(f"\n{len(rows)} rows in {time.monotonic() - began:.0f} s: {options.out / 'results.csv'}")
    if machine.get("device") == "CPU":
        print("No accelerator: the eager implementation was measured, on the CPU.")
    load = (machine.get("load_average") or [0.0])[0]
    if machine.get("device") == "CPU" and load > machine["cpu_cores"]:
        print(f"The machine was busy (load {load:.1f}): times beside each other hold, floors and single times do not.")
    for name, trouble in failed.items():
        print(f"part {name} failed: {trouble}", file=sys.stderr)
    return 1 if failed else 0


def count(options: argparse.Namespace) -> int:
    """Work out what the steps cost, ahead of the parts that want to know."""
    from benchmarks import step

    counts = Counts(options.work / COUNTS)
    for name, images in step.COUNTED:
        for precision in ("bf16", "fp32"):
            counts.get(name, images, options.side or 256, precision)
    return 0


def start(part: Part, options: argparse.Namespace, seconds: float) -> watch.Outcome:
    """Run one part; its log is kept only where there is something to read up.

    Args:
        options: what `parse` returned, with `work`, a folder for journals and for what parts tell each other.
    """

    def work(left: float) -> int:
        return _run_part(options, part, left)

    journal, log = options.work / f"{part.name}.jsonl", options.work / f"{part.name}.log"
    outcome = watch.supervise(work, journal, log, seconds)
    if outcome.trouble or outcome.restarts or any("did not run" in row["note"] for row in outcome.rows):
        words = log.read_text(errors="replace") if log.exists() else ""
        with (options.out / LOGS).open("a") as file:
            file.write(f"===== {part.name}: {outcome.trouble or 'ran to its end'} =====\n\n{words}\n")
    return outcome


def _command(options: argparse.Namespace) -> str:
    """The command, without the folders of this one machine."""
    words = ["python benchmarks/run.py", "--out DIR"]
    if options.published:
        words += ["--published", *(checkout.name for checkout in options.checkouts)]
    words += ["--only", *options.only] if options.only else []
    words += ["--quick"] if options.quick else []
    words += [f"--minutes {options.minutes:g}"] if options.minutes != MINUTES else []
    for name in ("threads", "side", "device"):
        words += [f"--{name}", str(getattr(options, name))] if getattr(options, name) else []
    return " ".join(words)


def write_results(
    out: Path, rows: list[dict[str, Any]], machine: dict[str, Any], status: dict[str, str], **more: Any
) -> None:
    """results.json, with the machine and `more`; results.csv, a line a row, empty where not measured, if there are any.

    Whatever ends the process meanwhile, each file is whole: as it was before, or as it is now.
    """
    columns = [f.name for f in fields(Row)]
    if rows:
        with (out / "results.csv.part").open("w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow([*columns, *MACHINE_COLUMNS])
            for row in rows:
                writer.writerow([row[name] for name in columns] + [machine.get(name) for name in MACHINE_COLUMNS])
        (out / "results.csv.part").replace(out / "results.csv")
    results = {"machine": machine, "parts": status, "rows": rows, **more}
    (out / "results.json.part").write_text(json.dumps(results, indent=1) + "\n")
    (out / "results.json.part").replace(out / "results.json")


if __name__ == "__main__":
    sys.exit(main())
