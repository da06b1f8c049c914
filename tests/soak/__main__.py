"""Run the campaigns: all, or those that are named; exit code 1 where anything was lost.

python -m tests.soak [NAME ...] [--seed N] [--share 0.1] [--only NUMBER] [--write docs/reliability.md]
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import os
import pkgutil
import platform
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("TRITON_INTERPRET", "1")  # before a kernel is defined

import numpy
import PIL
import torch

import tests.soak
from fastnce import __version__
from tests.soak.common import Campaign, Outcome
from tests.soak.report import Row, written


def campaigns() -> list[Campaign]:
    found: list[Campaign] = []
    for module in pkgutil.iter_modules(tests.soak.__path__):
        if module.name not in ("__main__", "common", "report"):
            found += getattr(importlib.import_module(f"tests.soak.{module.name}"), "CAMPAIGNS", [])
    return sorted(found, key=lambda campaign: campaign.name)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--list", action="store_true", help="print the campaigns and what they promise")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--share", type=float, default=1.0, help="of the tries of a full run")
    parser.add_argument("--only", type=int, metavar="NUMBER", help="repeat one try")
    parser.add_argument("--write", type=Path, metavar="FILE.md", help="put the figures into the table of this file")
    args = parser.parse_args()
    known = {campaign.name: campaign for campaign in campaigns()}
    if unknown := [name for name in args.names if name not in known]:
        parser.error(f"no campaign {', '.join(unknown)}; there are {', '.join(known)}")
    if args.list:
        for campaign in known.values():
            print(f"{campaign.name:<20} {campaign.tries:>6,} tries: {campaign.promise}")
        return 0
    torch.set_num_threads(1)
    versions = (
        f"fastnce {__version__}, PyTorch {torch.__version__}, NumPy {numpy.__version__}, Pillow {PIL.__version__}"
    )
    lost = 0
    for name in args.names or list(known):
        campaign = known[name]
        began = time.monotonic()
        print(f"{name}: {campaign.promise}", flush=True)
        with tempfile.TemporaryDirectory(prefix="soak-") as folder:
            outcome: Outcome = campaign.run(
                max(1, round(campaign.tries * args.share)), args.seed, Path(folder), args.only
            )
        seconds = time.monotonic() - began
        lost += len(outcome.lost)
        print(f"  {outcome.tried:,} tried, {len(outcome.lost)} lost, {seconds:.0f} s", flush=True)
        for line in [*outcome.lost, *outcome.notes]:
            print(f"  {line}", flush=True)
        if args.write is not None and args.only is None and outcome.tried:
            row = Row(name, campaign.promise, outcome.tried, len(outcome.lost), args.seed, outcome.notes)
            row.date = f"{datetime.date.today()}"
            row.versions = f"Python {platform.python_version()}, {versions}"
            args.write.write_text(written(args.write.read_text(encoding="utf-8"), row), encoding="utf-8")
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
