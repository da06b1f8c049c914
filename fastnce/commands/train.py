"""The command `fastnce train`."""

from __future__ import annotations

import os
from pathlib import Path

from ..common.streams import discard_stdout, flush_stdout, write_out
from ..config import resolve
from ..config.build import plan
from ..config.check import check
from ..engine.launch import launched, processes, start, watch_launcher, without
from ..methods.presets import PRESETS
from ..training import train_run
from ..training.checks import check_code, check_place, check_same_run
from ..training.run import hold_run
from .parsing import command_parser

DATA_HELP = (
    "folder with trainA, trainB (testA, testB); with data.dataset it is optional, and only its pairs in test are read, "
    "for run.validate_every"
)


def main(arguments: list[str]) -> int:
    """Train a method on DIR/trainA and DIR/trainB; the same command continues a run."""
    parser = command_parser("train", main)
    parser.add_argument("method", metavar="METHOD", help=f"{', '.join(PRESETS)}, or your own: mypaper.py:MyMethod")
    parser.add_argument("--data", type=Path, metavar="DIR", help=DATA_HELP)
    parser.add_argument("--out", type=Path, metavar="RUN", help="folder of the run: checkpoints, samples, metrics")
    parser.add_argument("--config", type=Path, metavar="FILE", help="TOML file with sections data, network, loss, ...")
    parser.add_argument("--dry-run", action="store_true", help="print the resolved configuration and stop")
    parser.add_argument("--nproc", default="1", metavar="N|auto", help="number of processes; auto: one per accelerator")
    parser.add_argument("--quiet", action="store_true", help="print nothing; log.txt has all lines")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="e.g. data.batch=4 optim.lr=1e-4")
    args = parser.parse_intermixed_args(arguments)
    config = resolve(args.method, args.config, args.overrides)
    if args.data is not None:
        if any(text.startswith("data.dir=") for text in args.overrides) and config.data.dir != str(args.data):
            raise ValueError(f"--data {args.data} and data.dir={config.data.dir} differ: give one of them")
        config.data.dir = str(args.data)
        check(config)
    if args.dry_run:
        plan(config)
        check_code(config)
        write_out(config.as_toml())
        return 0
    without_data = not (config.data.dir or config.data.dataset)
    if without_data or args.out is None:
        missing = "--data DIR" if without_data else "--out RUN"
        raise ValueError(f"fastnce train needs {missing} (or --dry-run)")
    number = 1 if launched() else processes(args.nproc, config.run.device)
    if launched() and args.nproc not in ("1", world := os.environ["WORLD_SIZE"]):
        raise ValueError(
            f"--nproc {args.nproc} starts processes, but WORLD_SIZE={world} shows that a launcher started this one: "
            f"leave --nproc out, or unset WORLD_SIZE"
        )
    if number > 1:
        plan(config)  # here, so that an error is reported once and not by every process
        check_code(config)
        check_place(config, args.out)
        with hold_run(args.out):
            check_same_run(config, args.out, number)
        return start(number, ["train", *without(arguments, "--nproc")])
    watch_launcher()
    try:
        train_run(config, args.out, quiet=args.quiet)
    finally:
        if not flush_stdout():  # log.txt has all lines, and the exit code describes the run
            discard_stdout()
    return 0
