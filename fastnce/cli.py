"""The command line: `fastnce train`, `fastnce translate` and so on.

A mistake of the user is one sentence on stderr and exit code 2; training that cannot go on is exit code 1.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

from . import __version__
from .config import check, from_dict, plan, resolve
from .data.rain import RANGES, RainOptions, join_negative, parse_range, write_rain
from .engine.checkpoint import open_checkpoint
from .engine.choices import pick_device
from .engine.distributed import RankLost
from .engine.launch import launched, processes, start, watch_launcher, without
from .engine.loop import TrainingFailed
from .engine.memory import out_of_memory
from .engine.stop import Stopped, raising
from .engine.stored import check_numbers, load_generators, read_tensors, using
from .evaluate.pairs import RAIN_SIDE_HELP, RAIN_SIDES
from .inference import load_translator, translate_files
from .methods import PRESETS
from .streams import ProgressLine, flush, give_up_stdout, open_streams, sentence_of, stdout_takes, tell
from .training import cache_run, check_place, check_same_run, hold_run, train_run

TILES_HELP = "auto: whole pictures, exact tiles where memory is too small; exact or fast: always"


def _parser(command: str, description: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(prog=f"fastnce {command}", description=description)


def train(arguments: list[str]) -> int:
    """Train a method on DIR/trainA and DIR/trainB; the same command again continues."""
    parser = _parser("train", train.__doc__ or "")
    parser.add_argument("method", metavar="METHOD", help=", ".join(PRESETS))
    parser.add_argument("--data", type=Path, metavar="DIR", help="folder with trainA, trainB (testA, testB)")
    parser.add_argument("--out", type=Path, metavar="RUN", help="folder of the run: checkpoints, samples, metrics")
    parser.add_argument("--config", type=Path, metavar="FILE", help="TOML file with sections data, network, loss, ...")
    parser.add_argument("--dry-run", action="store_true", help="print the resolved configuration and stop")
    parser.add_argument("--nproc", default="1", metavar="N|auto", help="processes; auto: one for each accelerator here")
    parser.add_argument("--quiet", action="store_true", help="nothing on the terminal; log.txt has it all")
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
        print(config.as_toml(), end="")
        return 0
    if not config.data.dir or args.out is None:
        missing = "--data DIR" if not config.data.dir else "--out RUN"
        raise ValueError(f"fastnce train needs {missing} (or --dry-run)")
    number = 1 if launched() else processes(args.nproc, config.run.device)
    if launched() and args.nproc not in ("1", world := os.environ["WORLD_SIZE"]):
        raise ValueError(
            f"--nproc {args.nproc} starts processes, but WORLD_SIZE={world} says that a launcher started this one: "
            f"leave --nproc out, or unset WORLD_SIZE"
        )
    if number > 1:
        plan(config)  # here, where what is wrong is said once
        check_place(config, args.out)
        with hold_run(args.out):
            check_same_run(config, args.out, number)
        return start(number, ["train", *without(arguments, "--nproc")])
    watch_launcher()
    try:
        train_run(config, args.out, quiet=args.quiet)
    finally:
        if not stdout_takes():  # log.txt has it all, and the exit code is about the run
            give_up_stdout()
    return 0


def translate(arguments: list[str]) -> int:
    """Translate pictures of any size with a run, a checkpoint or a published .pth file."""
    parser = _parser("translate", translate.__doc__ or "")
    parser.add_argument("model", type=Path, metavar="RUN|FILE.pth")
    parser.add_argument("source", type=Path, metavar="IMAGE|DIR")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--generator", default="", help="of a method with two: G_A (A to B, default) or G_B")
    parser.add_argument("--format", default="png", help="png, jpg, webp, bmp, tiff or npy")
    parser.add_argument("--bits", type=int, choices=(8, 16), help="of the files written; default as the source")
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="pictures of one size at once")
    parser.add_argument("--tiles", default="auto", choices=("auto", "exact", "fast"), help=TILES_HELP)
    parser.add_argument("--tile-size", type=int, default=1024, metavar="N", help="side of a tile in pixels")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ...")
    args = parser.parse_args(arguments)
    if not args.source.exists():
        raise ValueError(f"{args.source}: no such picture or folder")
    if args.format.lower() not in ("png", "jpg", "jpeg", "webp", "bmp", "tif", "tiff", "npy"):
        raise ValueError(f"--format must be png, jpg, webp, bmp, tiff or npy, not {args.format!r}")
    with ProgressLine() as line:
        how = {"tiles": args.tiles, "tile_size": args.tile_size, "say": line.say}
        translator = load_translator(args.model, pick_device(args.device), args.generator, **how)
        suffix = f".{args.format.lower()}"
        written = translate_files(
            translator, args.source, args.out, suffix, batch=args.batch, bits=args.bits, progress=line
        )
    print(f"{len(written)} {'picture' if len(written) == 1 else 'pictures'} written to {args.out}")
    return 0


def evaluate(arguments: list[str]) -> int:
    """Measure a model, or the inputs themselves, on a test set: PSNR, SSIM, FID."""
    parser = _parser("evaluate", evaluate.__doc__ or "")
    parser.add_argument("model", type=Path, nargs="?", metavar="RUN|FILE.pth")
    parser.add_argument("--data", type=Path, required=True, metavar="TEST", help="rain/ and norain/; testA and testB")
    parser.add_argument("--rain-side", default="right", choices=RAIN_SIDES, help=RAIN_SIDE_HELP)
    parser.add_argument("--inputs-only", action="store_true", help="measure the inputs, without a model")
    parser.add_argument("--generator", default="", help="of a method with two: G_A (A to B, default) or G_B")
    parser.add_argument("--fid", action="store_true", help="also FID and KID (needs the extra eval)")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--csv", type=Path, metavar="FILE")
    parser.add_argument("--sheet", type=Path, metavar="FILE.png", help="input, output, truth and difference")
    parser.add_argument("--tiles", default="auto", choices=("auto", "exact", "fast"), help=TILES_HELP)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ...")
    args = parser.parse_args(arguments)
    if (args.model is None) != args.inputs_only:
        raise ValueError("fastnce evaluate takes a model or --inputs-only, one of the two")
    from .evaluate.report import evaluate as measure

    with ProgressLine() as line:
        device = pick_device(args.device)
        translator = None
        if args.model is not None:
            translator = load_translator(args.model, device, args.generator, tiles=args.tiles, say=line.say)
        report = measure(
            args.data,
            translator,
            rain_side=args.rain_side,
            channels=translator.channels if translator is not None else 3,
            device=device,
            fid=args.fid,
            json_file=args.json,
            csv_file=args.csv,
            sheet=args.sheet,
            progress=line,
        )
    print(report.summary())
    return 0


def rain(arguments: list[str]) -> int:
    """Render rain on clean pictures, for training and tests without a data set."""
    parser = _parser("rain", rain.__doc__ or "")
    parser.add_argument("source", type=Path, metavar="IMAGE|DIR")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--unpaired", action="store_true", help="trainA and trainB of different pictures")
    parser.add_argument("--test", type=int, default=0, metavar="N", help="keep N pictures as pairs in DIR/test")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--layers", type=int, default=RainOptions.layers, help="depths of streaks")
    for name in RANGES:
        low, high = getattr(RainOptions, name)
        parser.add_argument(f"--{name}", default=f"{low:g}:{high:g}", metavar="LOW:HIGH", help="default %(default)s")
    args = parser.parse_args(join_negative(arguments))
    if not args.source.exists():
        raise ValueError(f"{args.source}: no such picture or folder")
    options = RainOptions(**{name: parse_range(name, getattr(args, name)) for name in RANGES}, layers=args.layers)
    with ProgressLine() as line:
        counts = write_rain(
            args.source, args.out, options, seed=args.seed, unpaired=args.unpaired, test=args.test, progress=line
        )
    print(f"written to {args.out}: {', '.join(f'{count} in {folder}' for folder, count in sorted(counts.items()))}")
    return 0


def unpair(arguments: list[str]) -> int:
    """Make an unpaired training set out of pairs: rainy and clean pictures of different scenes."""
    from .evaluate.unpair import main as run_unpair

    return run_unpair(arguments)


def cache(arguments: list[str]) -> int:
    """Decode and resize the pictures of DIR ahead of training, and check them as `fastnce train` does."""
    parser = _parser("cache", cache.__doc__ or "")
    parser.add_argument("--data", type=Path, metavar="DIR", help="folder with trainA, trainB")
    parser.add_argument("--config", type=Path, metavar="FILE")
    parser.add_argument("--method", metavar="METHOD", help="the same as METHOD in front")
    parser.add_argument(
        "overrides", nargs="*", metavar="[METHOD] section.key=value", help="as for fastnce train; METHOD is cut if none"
    )
    args = parser.parse_intermixed_args(arguments)
    named = args.overrides.pop(0) if args.overrides and "=" not in args.overrides[0] else args.method or "cut"
    if args.method not in (None, named):
        raise ValueError(f"fastnce cache takes one method, not {named} and --method {args.method}")
    config = resolve(named, args.config, args.overrides)
    if args.data is not None:
        config.data.dir = str(args.data)
    if not config.data.dir:
        raise ValueError("fastnce cache needs --data DIR")
    for line in cache_run(config):
        print(line)
    return 0


def export(arguments: list[str]) -> int:
    """Write a run's networks as the published code's files, latest_net_G.pth and so on."""
    parser = _parser("export", export.__doc__ or "")
    parser.add_argument("run", type=Path, metavar="RUN", help="or a checkpoint: RUN/checkpoints/best")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--label", default="latest", help="first part of the file names")
    args = parser.parse_args(arguments)
    from .interop import load_weights, save_published

    folder, state = open_checkpoint(args.run)
    with using(folder):
        config = from_dict(state["config"])
        networks = PRESETS[config.method].method(config.loss, config.network).networks()
        tensors = read_tensors(folder / "training.safetensors")
        check_numbers(state, tensors)
        for name, network in networks.items():
            prefix = f"network/{name}/"
            weights = {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)}
            load_weights(network, weights, str(folder))
        for name, weights in load_generators(folder, state).items():  # averaged, where the run keeps an average
            if name not in networks:
                raise ValueError(f"{config.method} has no generator {name}")
            load_weights(networks[name], weights, str(folder))
    for path in save_published(networks, args.out, args.label):
        print(path)
    return 0


def demo(arguments: list[str]) -> int:
    """Train a small FastCUT on photographs for about two minutes and show what it learned."""
    from .demo import main as run_demo

    return run_demo(arguments)


def doctor(arguments: list[str]) -> int:
    """Say what will run on this machine, and check it against the definition."""
    from .doctor import main as run_doctor

    return run_doctor(arguments)


def bench(arguments: list[str]) -> int:
    """Measure this machine: the loss, a training step and the data path, beside what it can do at most."""
    from .bench import main as run_bench

    return run_bench(arguments)


def methods(arguments: list[str]) -> int:
    """List the methods with their papers, terms, networks and defaults."""
    from .methods.table import main as print_table

    _parser("methods", methods.__doc__ or "").parse_args(arguments)
    return print_table()


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "train": train,
    "translate": translate,
    "evaluate": evaluate,
    "rain": rain,
    "unpair": unpair,
    "cache": cache,
    "export": export,
    "demo": demo,
    "doctor": doctor,
    "bench": bench,
    "methods": methods,
}


def main(arguments: list[str] | None = None) -> int:
    """The entry point; returns the exit code."""
    open_streams()
    arguments = sys.argv[1:] if arguments is None else arguments
    before = warnings.formatwarning
    warnings.formatwarning = _one_line  # type: ignore[assignment]
    try:
        return _main(arguments)
    finally:
        warnings.formatwarning = before


def _one_line(message: Warning | str, *_: object) -> str:
    """A warning as a sentence of the command, without the place in our code."""
    return f"fastnce: warning: {message}\n"


def _main(arguments: list[str]) -> int:
    try:
        with raising():
            code = run(arguments)
    except SystemExit as end:  # argparse, after what it had to say
        raise SystemExit(flush(int(end.code or 0))) from None
    except Stopped as stop:
        code = tell(str(stop), 128 + stop.number)
    except KeyboardInterrupt:
        code = tell("stopped by Ctrl-C", 130)
    except ValueError as error:  # DataError among them: the user's to mend
        code = tell(str(error), 2)
    except OSError as error:
        code = 2
        if error.filename is None and isinstance(error, BrokenPipeError):
            # the reader, such as head, has seen enough: as of a program that this ends, not all may be done
            code = 0 if arguments[:1] == ["methods"] else 141
        elif error.filename is not None:
            tell(sentence_of(error), code)
        elif getattr(sys.stdout, "write_through", False):  # nothing waits there to fail once more
            tell(f"standard output: {sentence_of(error)}", code)
        elif stdout_takes():
            tell(sentence_of(error), code)
    except TrainingFailed as error:
        code = tell(str(error), 1)
    except RankLost as error:
        flush(tell(str(error), 1))
        os._exit(1)  # the library's threads abort a process that ends in order without its peer
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        code = tell(f"memory does not suffice ({str(error).partition(chr(10))[0] or type(error).__name__})", 1)
    return flush(code)


def run(arguments: list[str]) -> int:
    """Hand over to a command; returns its exit code."""
    command = arguments[0] if arguments else "--help"
    if command in ("-h", "--help", "help"):
        print("usage: fastnce COMMAND ...   (fastnce COMMAND --help tells more)\n")
        for name, function in COMMANDS.items():
            print(f"  {name:<10} {(function.__doc__ or '').splitlines()[0]}")
        print("\n  --version  print the version")
        return 0
    if command == "--version":
        print(__version__)
        return 0
    if command not in COMMANDS:
        return tell(f"unknown command {command!r}; one of {', '.join(COMMANDS)}", 2)
    for argument in arguments[1:]:  # some versions of argparse make an empty list of it
        if argument.startswith("--") and argument.endswith("=--"):
            return tell(
                f"{argument.removesuffix('=--')} needs a value, and -- is none: name a file of that name ./--", 2
            )
    return COMMANDS[command](arguments[1:])


if __name__ == "__main__":
    sys.exit(main())
