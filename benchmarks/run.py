"""Run every benchmark that this machine supports within a given time, and write the results.

python benchmarks/run.py --out benchmarks/results/h200-2026-11-23 --published ../published
python benchmarks/run.py --list
python benchmarks/run.py --out DIR --quick --only chain
python benchmarks/run.py --out DIR --minutes 30          # a CPU needs seconds for milliseconds of a GPU

Each part runs in its own process. The parts share the time in the order of `--list`; later parts get the time that a
part leaves over. After each part `results.csv` and `results.json` in DIR hold the results so far. A part or a provider
that fails or hangs does not affect the others: it is reported at the end, with its output in DIR/logs.txt.
`--published` takes unpacked checkouts of CUT, DCLGAN or DCD-GAN, or folders that contain some. Without it, our own
version of the same mathematics stands in, and the results say so.
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
    sys.path.insert(0, str(ROOT))  # when started as a script

import torch  # noqa: E402

from benchmarks import machine, plot, step, watch  # noqa: E402
from benchmarks.cases import Context, Row  # noqa: E402
from benchmarks.measure import ALONE, OVER, measure_rest  # noqa: E402
from benchmarks.published import find_checkouts  # noqa: E402
from benchmarks.step_costs import Counts  # noqa: E402
from benchmarks.table import table  # noqa: E402
from fastnce.common.timing import default_device  # noqa: E402


@dataclass(frozen=True)
class Part:
    """A function `(Context) -> Iterator[Row]` of a module, and its share of the time in seconds on a GPU."""

    name: str
    module: str
    function: str
    seconds: int


# the most important first: a lack of time affects the last, and the compiler uses all the time that it gets
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
    Part("short loss", "benchmarks.short", "loss", 55),
    Part("short steps", "benchmarks.short", "steps", 110),
    Part("short waterfall", "benchmarks.short", "waterfall", 60),
    Part("short growth", "benchmarks.short", "growth", 22),
    Part("short compiled", "benchmarks.short", "compiled", 60),
]
"""Shorter parts for `check.py`."""
MACHINE = Part("machine", "benchmarks.machine", "describe", 30)
MINUTES = 9.0
LAST_SECONDS = 8.0
"""Reserved for the table and the plot."""
LEAST_SECONDS = 6.0
"""A part that would get less time is not started."""
GPU_PATIENCE = 120.0
"""Seconds after which a provider's first calls on an accelerator count as hung. No limit on a CPU."""
FACTS = "machine.json"
COUNTS = "counts.json"
LOGS = "logs.txt"
MACHINE_COLUMNS = ("device", "driver", "torch", "triton", "python", "fastnce", "commit", "date")


def main(argv: Sequence[str] | None = None) -> int:
    """Return 0 if all parts finished, 1 if one did not, 2 for a wrong command."""
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
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of results.csv, results.json and plots")
    parser.add_argument("--published", type=Path, nargs="+", default=[], metavar="DIR", help="unpacked checkouts")
    parser.add_argument("--only", nargs="+", choices=[p.name for p in PARTS], metavar="NAME", help="only these parts")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="total time; default %(default)s")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to test that everything runs")
    parser.add_argument("--device", default=None, help="cpu, cuda, ...; default the accelerator if there is one")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads; default PyTorch's choice")
    parser.add_argument("--side", type=int, default=None, help="of the images of steps; default 256")
    parser.add_argument("--list", action="store_true", help="list the parts and exit")
    parser.add_argument("--part", help=argparse.SUPPRESS)  # for a process that cannot be forked
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    options.arguments = list(sys.argv[1:] if argv is None else argv)
    if not options.list and options.out is None:
        parser.error("--out DIR is required: the folder of the results")
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
    """Run a part and write each row as soon as it is measured, so that a time limit loses no finished row."""
    until = time.monotonic() + seconds
    if torch.cuda._is_in_bad_fork():  # CUDA was used before the fork: start a new process
        command = [sys.executable, str(Path(__file__).resolve()), *options.arguments]
        more = ["--part", part.name, "--seconds", f"{seconds:.1f}", "--work", str(options.work)]
        os.execv(sys.executable, command + more)
    gc.freeze()  # imported objects stay alive: exempt them from the collection before each measurement
    # counting the launches of graphs fails if the profiler's library is shut down and restarted in between
    os.environ.setdefault("DISABLE_CUPTI_LAZY_REINIT", "1")
    os.environ.setdefault("TEARDOWN_CUPTI", "0")
    torch.manual_seed(0)
    if options.threads:
        torch.set_num_threads(options.threads)
    device = default_device(options.device)
    if part is MACHINE:

        def save(found: dict[str, Any]) -> None:
            (options.work / FACTS).write_text(json.dumps(found))

        save(machine.describe(device, options.quick, save))
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
        options.work = Path(folder)  # journals, and files that pass data between parts
        return _run_in(options)


def _run_in(options: argparse.Namespace) -> int:
    began = time.monotonic()
    end = began + 60 * options.minutes - LAST_SECONDS
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / LOGS).unlink(missing_ok=True)
    parts = [p for p in PARTS if not options.only or p.name in options.only]
    failed = {}
    outcome = start(MACHINE, options, min(60.0, (end - began) / 3))
    facts: dict[str, Any] = {}
    with contextlib.suppress(OSError, ValueError):
        facts = json.loads((options.work / FACTS).read_text())
    if outcome.trouble is not None:  # the results then have times, but no floors
        failed["machine"] = outcome.trouble
    facts["command"] = _command(options)
    facts["published"] = [checkout.name for checkout in options.checkouts]
    (options.work / FACTS).write_text(json.dumps(facts))
    counting: int | None = None
    if facts.get("device", "CPU") != "CPU" and not options.quick:
        # in parallel with the first parts; on a CPU it would disturb the timings
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
                status[part.name] += f"; restarted after {'; '.join(outcome.restarts)}"
            late = sum(OVER in row["note"] for row in outcome.rows)
            alone = sum(ALONE in row["note"] for row in outcome.rows)
            for number, what in ((late, OVER), (alone, ALONE)):
                status[part.name] += f"; {number} of {len(outcome.rows)} rows {what}" if number else ""
            if outcome.trouble is not None or late or alone:
                failed[part.name] = status[part.name]
            rows += outcome.rows
        write_results(options.out, rows, facts, status)
        print(f"{part.name}: {status[part.name]}", file=sys.stderr, flush=True)
    if counting is not None:
        watch.end(counting)
    print(table(rows, facts))
    for line in (*plot.growth(rows), *plot.step_growth(rows)):
        print(line)
    try:
        print(plot.draw(options.out, rows))
    except Exception as error:  # the results do not depend on the plot
        print(f"no plot: {type(error).__name__}: {error}")
    print(f"\n{len(rows)} rows in {time.monotonic() - began:.0f} s: {options.out / 'results.csv'}")
    if "nvml" in facts:
        print(facts["nvml"])
    if facts.get("device") == "CPU":
        print("No accelerator: the eager implementation was measured, on the CPU.")
    load = (facts.get("load_average") or [0.0])[0]
    if facts.get("device") == "CPU" and load > facts["cpu_cores"]:
        print(f"The machine was busy (load {load:.1f}): ratios of times are valid, floors and single times are not.")
    for name, trouble in failed.items():
        print(f"part {name} failed: {trouble}", file=sys.stderr)
    return 1 if failed else 0


def count(options: argparse.Namespace) -> int:
    """Count the cost of the steps in advance, for the parts that report it."""
    counts = Counts(options.work / COUNTS)
    for name, images in step.COUNTED:
        for precision in ("bf16", "fp32"):
            counts.get(name, images, options.side or 256, precision)
    return 0


def start(part: Part, options: argparse.Namespace, seconds: float) -> watch.Outcome:
    """Run one part. Append its output to the log file if something failed.

    Args:
        options: the result of `parse` with `work`, a folder for journals and for data that parts share.
    """

    def work(left: float) -> int:
        return _run_part(options, part, left)

    journal, log = options.work / f"{part.name}.jsonl", options.work / f"{part.name}.log"
    outcome = watch.supervise(work, journal, log, seconds)
    if outcome.trouble or outcome.restarts or any("did not run" in row["note"] for row in outcome.rows):
        output = log.read_text(errors="replace") if log.exists() else ""
        with (options.out / LOGS).open("a") as file:
            file.write(f"===== {part.name}: {outcome.trouble or 'finished'} =====\n\n{output}\n")
    return outcome


def _command(options: argparse.Namespace) -> str:
    """Return the command without the folders of this machine."""
    parts = ["python benchmarks/run.py", "--out DIR"]
    if options.published:
        parts += ["--published", *(checkout.name for checkout in options.checkouts)]
    parts += ["--only", *options.only] if options.only else []
    parts += ["--quick"] if options.quick else []
    parts += [f"--minutes {options.minutes:g}"] if options.minutes != MINUTES else []
    for name in ("threads", "side", "device"):
        parts += [f"--{name}", str(getattr(options, name))] if getattr(options, name) else []
    return " ".join(parts)


def write_results(
    out: Path, rows: list[dict[str, Any]], facts: dict[str, Any], status: dict[str, str], **more: Any
) -> None:
    """Write results.json with the machine's facts and `more`, and results.csv if there are rows.

    A field that was not measured is empty in results.csv. Each file is replaced at once, so an aborted process leaves
    either the old or the new file.
    """
    columns = [f.name for f in fields(Row)]
    if rows:
        with (out / "results.csv.part").open("w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow([*columns, *MACHINE_COLUMNS])
            for row in rows:
                writer.writerow([row[name] for name in columns] + [facts.get(name) for name in MACHINE_COLUMNS])
        (out / "results.csv.part").replace(out / "results.csv")
    results = {"machine": facts, "parts": status, "rows": rows, **more}
    (out / "results.json.part").write_text(json.dumps(results, indent=1) + "\n")
    (out / "results.json.part").replace(out / "results.json")


if __name__ == "__main__":
    sys.exit(main())
