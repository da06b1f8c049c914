"""The command `fastnce cache`."""

from __future__ import annotations

from pathlib import Path

from ..config import resolve
from ..training.data import cache_run, remove_caches_of
from .parsing import command_parser


def main(arguments: list[str]) -> int:
    """Decode and resize the pictures of DIR before training, and check them as `fastnce train` does."""
    parser = command_parser("cache", main)
    parser.add_argument("--data", type=Path, metavar="DIR", help="folder with trainA, trainB")
    parser.add_argument("--config", type=Path, metavar="FILE", help="TOML file, as for fastnce train")
    parser.add_argument("--method", metavar="METHOD", help="the same as the first argument METHOD")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="[METHOD] section.key=value",
        help="as for fastnce train; METHOD defaults to cut",
    )
    parser.add_argument("--remove", action="store_true", help="remove the caches of DIR, and nothing else")
    args = parser.parse_intermixed_args(arguments)
    named = args.overrides.pop(0) if args.overrides and "=" not in args.overrides[0] else args.method or "cut"
    if args.method not in (None, named):
        raise ValueError(f"fastnce cache takes one method, not {named} and --method {args.method}")
    config = resolve(named, args.config, args.overrides)
    if args.data is not None:
        config.data.dir = str(args.data)
    if not (config.data.dir or config.data.dataset):
        raise ValueError("fastnce cache needs --data DIR")
    for line in remove_caches_of(config) if args.remove else cache_run(config):
        print(line)
    return 0
