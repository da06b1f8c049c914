"""The command `fastnce rain`."""

from __future__ import annotations

from pathlib import Path

from ..common.streams import ProgressLine
from ..data.limit import accepting
from ..data.rain import RANGES, RainOptions, join_negative, parse_range, write_rain
from .parsing import MAX_PIXELS, add_max_pixels, command_parser

RANGE_HELP = {
    "density": "fraction of the picture that streaks cover",
    "length": "length of the nearest streaks, as a fraction of the shorter side",
    "width": "width of the nearest streaks, as a fraction of the shorter side",
    "angle": "degrees from the vertical; positive leans to the right at the top",
    "opacity": "opacity of the nearest streaks, 0 to 1",
    "haze": "fraction of the light that the veil absorbs where it is thickest",
    "additive": "0: streaks cover what is behind them; 1: they only add light, as in most synthetic sets",
    "drizzle": "opacity of fine rain: dense thin streaks over the whole picture, 0 to 1",
}


def main(arguments: list[str]) -> int:
    """Render rain on clean pictures, to train and test without a data set."""
    parser = command_parser("rain", main)
    parser.add_argument("source", type=Path, metavar="IMAGE|DIR", help="a clean picture, or a folder of them")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="receives the folders rain and norain")
    parser.add_argument("--unpaired", action="store_true", help="write trainA and trainB of different pictures instead")
    parser.add_argument("--test", type=int, default=0, metavar="N", help="hold out N pictures as pairs in DIR/test")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the rain (default %(default)s)")
    parser.add_argument(
        "--layers", type=int, default=RainOptions.layers, metavar="N", help="number of depths (default %(default)s)"
    )
    for name in RANGES:
        low, high = getattr(RainOptions, name)
        parser.add_argument(
            f"--{name}",
            default=f"{low:g}:{high:g}",
            metavar="LOW:HIGH",
            help=f"{RANGE_HELP[name]} (default %(default)s)",
        )
    add_max_pixels(parser)
    args = parser.parse_args(join_negative(arguments))
    if not args.source.exists():
        raise ValueError(f"{args.source}: no such picture or folder")
    options = RainOptions(**{name: parse_range(name, getattr(args, name)) for name in RANGES}, layers=args.layers)
    with ProgressLine() as line, accepting(args.max_pixels, MAX_PIXELS):
        counts = write_rain(
            args.source, args.out, options, seed=args.seed, unpaired=args.unpaired, test=args.test, progress=line
        )
    print(f"written to {args.out}: {', '.join(f'{count} in {folder}' for folder, count in sorted(counts.items()))}")
    return 0
