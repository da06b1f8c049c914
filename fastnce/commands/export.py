"""The command `fastnce export`."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..common.writing import check_folder
from ..config.build import build_method
from ..config.stored import from_dict
from ..engine.checkpoint import open_checkpoint
from ..engine.stored import check_numbers, follow, load_generators, read_tensors, using
from ..export import DTYPES, GRAPHS, open_source, write_graph, write_published, write_safetensors
from ..export.card import edited_card
from ..models import names
from ..networks.published import load_weights
from ..translate.exported import CARD, CONFIG, is_exported
from ..translate.named import absent, locate, model_path
from .parsing import GENERATOR_HELP, TRUST_HELP, command_parser

FORMATS = ("published", "safetensors", *GRAPHS)
FORMAT_HELP = (
    "published (default of a run): a .pth file for each network, for the published code; safetensors (default of "
    "anything else): weights that fastnce reads; torch: a torch.export program; onnx; aoti: compiled for this "
    "machine's CPU"
)
RUN_HELP = (
    "a run, or a checkpoint such as RUN/checkpoints/best; for every format but published also an exported folder, a "
    f"published .pth file, or the name of a model that comes with fastnce: {', '.join(names())}"
)
DTYPE_HELP = "of the weights (default float32; safetensors of an exported folder: as it has them); not for published"


def main(arguments: list[str]) -> int:
    """Write a generator for other programs, or a run's networks as files of the published code."""
    parser = command_parser("export", main)
    parser.add_argument("run", type=model_path, metavar="RUN|NAME", help=RUN_HELP)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the files")
    parser.add_argument("--format", choices=FORMATS, help=FORMAT_HELP)
    parser.add_argument("--generator", default="", help=GENERATOR_HELP)
    parser.add_argument("--dtype", choices=tuple(DTYPES), help=DTYPE_HELP)
    parser.add_argument("--label", default=None, help="of published: first part of the file names (default latest)")
    parser.add_argument("--trust-code", action="store_true", help=TRUST_HELP)
    args = parser.parse_args(arguments)
    args.run = locate(args.run)
    if not args.run.exists():
        raise ValueError(absent(args.run))
    if args.format is None:
        args.format = "safetensors" if _is_generator_alone(args.run) else "published"
    if args.format == "published":
        return _published(args)
    if args.label is not None:
        raise ValueError(f"--label {args.label} is for --format published: {args.format} has one model file")
    check_folder(args.out, f"the model, {CONFIG} and {CARD}")
    source = open_source(args.run, args.generator, args.trust_code)
    if args.format == "safetensors":
        path = write_safetensors(source, args.out, args.dtype or source.dtype, edited_card(args.run))[0]
        checked = "Read again: the weights are equal."
    else:
        written = write_graph(source, args.out, args.format, args.dtype or "float32")
        path, checked = written.paths[0], written.sentence
    print(f"{path} ({path.stat().st_size / 1e6:.3g} MB, {source.name}). {checked}")
    return 0


def _is_generator_alone(path: Path) -> bool:
    """Whether this is an exported folder or a published file, and no run."""
    named = follow(path)
    return named.is_file() or is_exported(named)


def _published(args: argparse.Namespace) -> int:
    label = "latest" if args.label is None else args.label
    if args.dtype not in (None, "float32"):
        raise ValueError(f"--dtype {args.dtype} is not for --format published: the published code reads float32")
    check_folder(args.out, f"one file per network, such as {label}_net_G.pth")
    if _is_generator_alone(args.run):
        raise ValueError(
            f"--format published needs a run, which has all networks: {args.run} holds generators alone. Take another "
            f"--format, such as safetensors"
        )
    folder, state = open_checkpoint(args.run)
    with using(folder):
        config = from_dict(state["config"], trust_code=args.trust_code)
        method = build_method(config)
        networks, generators = method.networks(), method.generators()
        tensors = read_tensors(folder / "training.safetensors")
        check_numbers(state, tensors)
        for name, network in networks.items():
            prefix = f"network/{name}/"
            weights = {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)}
            load_weights(network, weights, str(folder))
        for name, weights in load_generators(folder, state).items():  # averaged weights, if the run has them
            if name not in generators:
                raise ValueError(f"{config.method} has no generator {name}")
            load_weights(generators[name], weights, str(folder))
        source = open_source(folder, args.generator, args.trust_code)
    for path in write_published(networks, source, args.out, label):
        print(path)
    return 0
