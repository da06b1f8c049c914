"""`fastnce rain`."""

from __future__ import annotations

from pathlib import Path

from ..common.streams import ProgressLine
from ..data.rain import RANGES, RainOptions, join_negative, parse_range, write_rain
from .parsing import command_parser


def main(arguments: list[str]) -> int:
    """Render rain on clean pictures, for training and tests without a data set."""
    parser = command_parser("rain", main)
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
