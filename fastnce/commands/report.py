"""The command `fastnce report`."""

from __future__ import annotations

from pathlib import Path

from ..common.streams import print_line
from ..watch import write_report
from .parsing import command_parser


def main(arguments: list[str]) -> int:
    """Write the report of a run as one HTML file, or compare several runs in one."""
    parser = command_parser("report", main)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="the folder of a run")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="default: RUN/report.html; for several runs compare.html, here"
    )
    args = parser.parse_args(arguments)
    print_line(f"written to {write_report(args.runs, args.out)}")
    return 0
