"""The command `fastnce unpair`."""

from __future__ import annotations

from pathlib import Path

from ..common.streams import ProgressLine
from ..data.limit import accepting
from ..evaluate.pairs import RAIN_SIDE_HELP, RAIN_SIDES
from ..evaluate.unpair import write_unpaired
from .parsing import MAX_PIXELS, add_max_pixels, command_parser


def main(arguments: list[str]) -> int:
    """Make an unpaired training set from pairs: rainy and clean pictures of different scenes."""
    parser = command_parser("unpair", main)
    parser.add_argument(
        "pairs", type=Path, metavar="PAIRS", help="rain/ and norain/, strips, ... (see fastnce evaluate)"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="receives trainA and trainB")
    parser.add_argument("--test", type=Path, metavar="PAIRS", help="more pairs, written to DIR/test")
    parser.add_argument("--rain-side", default="right", choices=RAIN_SIDES, help=RAIN_SIDE_HELP)
    add_max_pixels(parser)
    args = parser.parse_args(arguments)
    with ProgressLine() as line, accepting(args.max_pixels, MAX_PIXELS):
        counts = write_unpaired(args.pairs, args.out, args.test, line, args.rain_side)
    print(f"written to {args.out}: {', '.join(f'{count} in {folder}' for folder, count in sorted(counts.items()))}")
    return 0
