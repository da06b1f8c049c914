"""The command `fastnce train`."""

from __future__ import annotations

import os
from argparse import Namespace
from pathlib import Path

from ..common.imports import is_import_path
from ..common.streams import discard_stdout, flush_stdout, write_out
from ..config import Config, resolve
from ..config.check import check
from ..engine.launch import launched, processes, start, watch_launcher, without
from ..methods.presets import PRESETS
from ..training import train_run
from ..training.checks import check_code, check_place, check_plan, check_same_run
from ..training.continuing import apply_changes, continue_config
from ..training.run import hold_run
from ..training.starting import plan_start
from .parsing import TRUST_HELP, command_parser

DATA_HELP = (
    "folder with trainA, trainB (testA, testB); with data.dataset it is optional, and only its pairs in test are read, "
    "for run.validate_every"
)


CHANGE_HELP = "continue the run in RUN with other values, which its history records, e.g. --change optim.lr=1e-4"


def main(arguments: list[str]) -> int:
    """Train a method on DIR/trainA and DIR/trainB; the same command, or --out RUN alone, continues a run."""
    parser = command_parser("train", main)
    methods = f"{', '.join(PRESETS)}, or your own: mypaper.py:MyMethod; without it, the run in RUN continues"
    parser.add_argument("method", nargs="?", default="", metavar="METHOD", help=methods)
    parser.add_argument("--data", type=Path, metavar="DIR", help=DATA_HELP)
    parser.add_argument("--out", type=Path, metavar="RUN", help="folder of the run: checkpoints, samples, metrics")
    parser.add_argument("--config", type=Path, metavar="FILE", help="TOML file with sections data, network, loss, ...")
    parser.add_argument("--change", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help=CHANGE_HELP)
    parser.add_argument("--dry-run", action="store_true", help="print the resolved configuration and stop")
    parser.add_argument("--nproc", default="1", metavar="N|auto", help="number of processes; auto: one per accelerator")
    parser.add_argument("--quiet", action="store_true", help="print nothing; log.txt has all lines")
    parser.add_argument("--trust-code", action="store_true", help=TRUST_HELP)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="e.g. data.batch=4 optim.lr=1e-4")
    parser.check_words(arguments)
    args = parser.parse_intermixed_args(arguments)
    _give_back_method(args)
    if _is_override(args.method):
        args.method, args.overrides = "", [args.method, *args.overrides]
    config, changes = _configured(args)
    if args.dry_run:
        if args.out is not None and args.change:
            check_same_run(config, args.out, 1, changes)
        begun = plan_start(config, check_plan(config))
        check_code(config)
        write_out(config.as_toml())
        write_out("".join(f"# {line}\n" for line in begun.lines) if begun is not None else "")
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
        check_code(config)  # here, so that an error is reported once and not by every process
        check_place(config, args.out)
        planned = check_plan(config)
        with hold_run(args.out):
            if check_same_run(config, args.out, number, changes) is None:
                plan_start(config, planned)
        return start(number, ["train", *without(arguments, "--nproc")])
    watch_launcher()
    try:
        train_run(config, args.out, quiet=args.quiet, changes=changes, warnings_to_log=True)
    finally:
        if not flush_stdout():  # log.txt has all lines, and the exit code describes the run
            discard_stdout()
    return 0


def _give_back_method(args: Namespace) -> None:
    """Take METHOD out of the words after --change, which takes all that follow it."""
    if not args.method:
        words = [word for word in args.change if word in PRESETS or ("=" not in word and is_import_path(word))]
        if len(words) == 1:
            args.method = words[0]
            args.change.remove(args.method)


def _is_override(word: str) -> bool:
    """Whether the first word is section.key=value and not a method, which may be left out."""
    name, equals, _ = word.partition("=")
    known = name.partition(".")[0] in Config.SECTIONS
    return (known and bool(equals)) or (not is_import_path(word) and (known or bool(equals)))


def _configured(args: Namespace) -> tuple[Config, list[str]]:
    """The configuration that the command line names, and the keys that it changes in a run."""
    if args.change and args.out is None:
        raise ValueError("--change continues a run with other values: add --out RUN")
    if not (args.method or args.config):
        if args.out is None:
            raise ValueError(
                "fastnce train needs METHOD, --data DIR and --out RUN, such as: fastnce train fastcut --data DIR --out "
                "runs/mine (`fastnce methods` lists the methods; --out RUN alone continues a run)"
            )
        moved = [f"data.dir={args.data}"] if args.data is not None else []
        return continue_config(args.out, args.change, [*args.overrides, *moved], trust_code=args.trust_code)
    config = resolve(args.method, args.config, args.overrides)
    if args.data is not None:
        if any(text.startswith("data.dir=") for text in args.overrides) and config.data.dir != str(args.data):
            raise ValueError(f"--data {args.data} and data.dir={config.data.dir} differ: give one of them")
        config.data.dir = str(args.data)
        check(config)
    return config, apply_changes(config, args.out, args.change) if args.change else []
