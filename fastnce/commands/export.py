"""The command `fastnce export`."""

from __future__ import annotations

from pathlib import Path

from ..common.writing import check_folder
from ..config.build import build_method
from ..config.stored import from_dict
from ..engine.checkpoint import open_checkpoint
from ..engine.stored import check_numbers, load_generators, read_tensors, using
from ..networks.published import load_weights, save_published
from .parsing import TRUST_HELP, command_parser


def main(arguments: list[str]) -> int:
    """Write a run's networks as files of the published code, such as latest_net_G.pth."""
    parser = command_parser("export", main)
    parser.add_argument("run", type=Path, metavar="RUN", help="a run, or a checkpoint such as RUN/checkpoints/best")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the files")
    parser.add_argument("--label", default="latest", help="first part of the file names (default %(default)s)")
    parser.add_argument("--trust-code", action="store_true", help=TRUST_HELP)
    args = parser.parse_args(arguments)
    check_folder(args.out, f"one file per network, such as {args.label}_net_G.pth")
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
    for path in save_published(networks, args.out, args.label):
        print(path)
    return 0
