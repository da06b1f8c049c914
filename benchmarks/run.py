"""Run every benchmark that this machine can, and write what it gives.

python benchmarks/run.py --out benchmarks/results/h200-2026-11-23 --published ../published
python benchmarks/run.py --list
python benchmarks/run.py --out DIR --quick --only chain

Each part runs in a process of its own under a time limit; after each, `results.csv` and `results.json` in DIR hold what
there is so far. A part that fails or hangs costs nobody else's figures, and is named last. `--published` takes unpacked
checkouts of CUT, DCLGAN or DCD-GAN, or folders that hold some; without it our own writing of the same mathematics
stands in, and the results say so.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))  # started as a script: the repository is not on the path yet

import torch  # noqa: E402

from benchmarks.measure import Context, Row  # noqa: E402
from benchmarks.published import find_checkouts  # noqa: E402


@dataclass(frozen=True)
class Part:
    """A function of a module here, `(Context) -> Iterator[Row]`, and the seconds that it may take."""

    name: str
    module: str
    function: str
    seconds: int


PARTS = [
    Part("patchnce", "benchmarks.loss", "patchnce", 90),
    Part("chain", "benchmarks.loss", "chain", 120),
    Part("infonce", "benchmarks.loss", "infonce", 120),
    Part("cut", "benchmarks.step", "cut", 180),
    Part("dual", "benchmarks.step", "dual", 180),
]
CPU_PATIENCE = 4
"""A CPU takes seconds for what a GPU does in milliseconds: its limits are longer."""

MACHINE = Part("machine", "benchmarks.machine", "describe", 60)
MACHINE_COLUMNS = ("device", "driver", "torch", "triton", "python", "fastnce", "commit", "date")


def main(argv: Sequence[str] | None = None) -> int:
    """0 when every part ran to its end, 1 when one did not, 2 for a wrong command."""
    options = _parse(argv)
    if options.list:
        for part in PARTS:
            print(f"{part.name:12} {part.seconds:4} s at most   {_summary(part)}")
        return 0
    if options.part:
        return _run_part(options)
    return _run_all(options)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks/run.py", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, metavar="DIR", help="where results.csv, results.json and plots go")
    parser.add_argument("--published", type=Path, nargs="+", default=[], metavar="DIR", help="unpacked checkouts")
    parser.add_argument("--only", nargs="+", choices=[p.name for p in PARTS], metavar="NAME", help="these parts only")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does everything run?")
    parser.add_argument("--device", default=None, help="cpu, cuda, ...; default the accelerator if there is one")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads; default PyTorch's choice")
    parser.add_argument("--list", action="store_true", help="name the parts and stop")
    parser.add_argument("--part", help=argparse.SUPPRESS)  # the process of one part is started with it
    options = parser.parse_args(argv)
    if not options.list and options.out is None:
        parser.error("--out DIR is needed: where shall the results go?")
    try:
        options.checkouts = find_checkouts(options.published)
    except ValueError as error:
        parser.error(str(error))
    return options


def default_device(name: str | None) -> torch.device:
    if name is not None:
        return torch.device(name)
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return accelerator or torch.device("cpu")


def _summary(part: Part) -> str:
    function = getattr(importlib.import_module(part.module), part.function)
    return (function.__doc__ or "").split("\n")[0]


# --- the process of one part -------------------------------------------------------------------------------------


def _run_part(options: argparse.Namespace) -> int:
    """Write each row as soon as it is there, so that a time limit loses only what was not measured yet."""
    torch.manual_seed(0)
    if options.threads:
        torch.set_num_threads(options.threads)
    device = default_device(options.device)
    if options.part == MACHINE.name:
        from benchmarks import machine

        facts = machine.describe(device, options.quick)
        (options.out / "machine.json").write_text(json.dumps(facts, indent=1) + "\n")
        return 0
    part = next(p for p in PARTS if p.name == options.part)
    facts = json.loads((options.out / "machine.json").read_text())
    context = Context(device, options.quick, options.checkouts, facts)
    with (options.out / f"{part.name}.jsonl").open("w") as lines:
        for row in getattr(importlib.import_module(part.module), part.function)(context):
            lines.write(json.dumps(asdict(row)) + "\n")
            lines.flush()
    return 0


# --- the process that starts them --------------------------------------------------------------------------------


def _run_all(options: argparse.Namespace) -> int:
    options.out.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    parts = [p for p in PARTS if not options.only or p.name in options.only]
    (options.out / "machine.json").unlink(missing_ok=True)
    failed = {}
    trouble = _start(MACHINE, options)
    machine: dict[str, Any] = {}
    if trouble is None:
        machine = json.loads((options.out / "machine.json").read_text())
    else:  # without ceilings there are no floors; times are times all the same
        failed["machine"] = trouble
    machine["command"] = _command(options)
    machine["published"] = [checkout.name for checkout in options.checkouts]
    (options.out / "machine.json").write_text(json.dumps(machine, indent=1) + "\n")
    rows: list[dict[str, Any]] = []
    status: dict[str, str] = {}
    for part in parts:
        lines = options.out / f"{part.name}.jsonl"
        lines.unlink(missing_ok=True)
        started = time.monotonic()
        trouble = _start(part, options)
        status[part.name] = trouble or f"ran in {time.monotonic() - started:.0f} s"
        if trouble is not None:
            failed[part.name] = trouble
        if lines.exists():
            rows += [json.loads(line) for line in lines.read_text().splitlines()]
            lines.unlink()
        write_results(options.out, rows, machine, status)
        print(f"{part.name}: {status[part.name]}", file=sys.stderr, flush=True)
    (options.out / "machine.json").unlink()  # results.json holds it
    print(table(rows, machine))
    _plots(options.out, rows)
    print(f"\n{len(rows)} rows in {time.monotonic() - began:.0f} s: {options.out / 'results.csv'}")
    if machine.get("device") == "CPU":
        print("No accelerator: the eager implementation was measured, on the CPU.")
    load = (machine.get("load_average") or [0.0])[0]
    if machine.get("device") == "CPU" and load > machine["cpu_cores"]:
        print(f"The machine was busy (load {load:.1f}): times beside each other hold, floors and single times do not.")
    for name, trouble in failed.items():
        print(f"part {name} failed: {trouble}", file=sys.stderr)
    return 1 if failed else 0


def _start(part: Part, options: argparse.Namespace) -> str | None:
    """Run one part; None, or what went wrong."""
    command = [sys.executable, __file__, "--part", part.name, "--out", str(options.out)]
    if options.published:
        command += ["--published", *map(str, options.published)]
    if options.device:
        command += ["--device", options.device]
    if options.threads:
        command += ["--threads", str(options.threads)]
    if options.quick:
        command.append("--quick")
    limit = part.seconds
    if not options.quick and default_device(options.device).type == "cpu":
        limit *= CPU_PATIENCE
    try:
        finished = subprocess.run(command, timeout=limit, stderr=subprocess.PIPE, text=True)
    except subprocess.TimeoutExpired:
        return f"stopped at its limit of {limit} s; what it had measured by then is kept"
    if finished.returncode == 0:
        return None
    lines = finished.stderr.strip().splitlines()
    return f"exit code {finished.returncode}: {lines[-1] if lines else 'it said nothing'}"


def _command(options: argparse.Namespace) -> str:
    """The command, without the folders of this one machine."""
    words = ["python benchmarks/run.py", "--out DIR"]
    if options.published:
        words += ["--published", *(checkout.name for checkout in options.checkouts)]
    words += ["--only", *options.only] if options.only else []
    words += ["--quick"] if options.quick else []
    words += ["--threads", str(options.threads)] if options.threads else []
    return " ".join(words + (["--device", options.device] if options.device else []))


def write_results(out: Path, rows: list[dict[str, Any]], machine: dict[str, Any], status: dict[str, str]) -> None:
    """results.csv (a line a row, empty where not measured) and results.json (the same, with the machine)."""
    columns = [f.name for f in fields(Row)]
    with (out / "results.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*columns, *MACHINE_COLUMNS])
        for row in rows:
            writer.writerow([row[name] for name in columns] + [machine.get(name) for name in MACHINE_COLUMNS])
    results = {"machine": machine, "parts": status, "rows": rows}
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")


def table(rows: list[dict[str, Any]], machine: dict[str, Any]) -> str:
    """Results for reading: medians, beside ours of the same case."""
    counted = "operators" if machine.get("device") == "CPU" else "launches"
    header = ["benchmark", "images x rows", "provider", "mode", "ms", "20..80 %", "x ours", "peak MiB", counted]
    header += ["J", "of floor", "note"]
    ours = {_case(r): r["p50_ms"] for r in reversed(rows) if r["provider"] == "fastnce" and r["mode"] == "eager"}
    lines = []
    for row in rows:
        p50, own = row["p50_ms"], ours.get(_case(row))
        lines.append(
            [
                row["benchmark"],
                f"{row['images']} x {row['patches']}",
                row["provider"],
                row["mode"],
                "" if p50 is None else f"{p50:.3f}",
                "" if p50 is None else f"{row['p20_ms']:.3f}..{row['p80_ms']:.3f}",
                "" if p50 is None or not own else f"{p50 / own:.2f}",
                "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:.1f}",
                "" if row["launches"] is None else str(row["launches"]),
                "" if row["joules"] is None else f"{row['joules']:.3g}",
                "" if row["floor_fraction"] is None else f"{row['floor_fraction']:.0%}",
                row["note"],
            ]
        )
    widths = [max(len(line[i]) for line in [header, *lines]) for i in range(len(header))]
    return "\n".join(
        "  ".join(f"{cell:{w}}" for cell, w in zip(line, widths, strict=True)) for line in [header, *lines]
    )


def _case(row: dict[str, Any]) -> tuple:
    return tuple(row[name] for name in ("benchmark", "images", "patches", "dim", "layers", "dtype"))


def _plots(out: Path, rows: list[dict[str, Any]]) -> None:
    from benchmarks import plot

    for line in plot.growth(rows):
        print(line)
    print(plot.draw(out, rows))


if __name__ == "__main__":
    sys.exit(main())
