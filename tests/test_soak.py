"""A few tries of each fault campaign with fixed seeds (`make soak` runs all of them)."""

from __future__ import annotations

import os
import sys
from typing import NamedTuple

import pytest

if not sys.platform.startswith("linux") or not hasattr(os, "fork"):
    pytest.skip("the campaigns need fork and /proc of Linux", allow_module_level=True)

from tests.forked import skip_beside_a_gpu
from tests.soak import checkpoints, full_disks, kill, signals, weight_files
from tests.soak.common import Campaign, warm


class Few(NamedTuple):
    """A short form of a campaign.

    Args:
        tries: their number.
        seed: one with which these tries are of every kind.
        kinds: texts that the descriptions of the tries must have.
    """

    tries: int
    seed: int = 1
    kinds: tuple[str, ...] = ()


KILLS = ("killed after", "killed at event", "killed during a write")
SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")
DISKS = ("files of at most", " at event ", " and after", " bytes free")
FORMATS = tuple(f"translate {kind}:" for kind in full_disks.FORMATS)
OTHERS = ("evaluate:", "export:", "rain:", "unpair:", "cache:")
PARTS = ("a file", "a file of the run", "tensors", "state.json", "a pointer of nonsense", "several", "entries")
WEIGHTS = ("evil", "odd tensors", "odd keys", "lies", "many numbers", "damaged", "noise", "no file", "other precision")
FEW = {
    "kill": Few(3, 41, (*KILLS, ", then ")),
    "kill-caching": Few(3, 5, KILLS),
    "kill-ranks": Few(0),  # test_distributed.py and test_signals.py kill ranks and launchers
    "full-disks": Few(12, 0, (*DISKS, *FORMATS, *OTHERS, "rain --unpaired:")),
    "full-disks-training": Few(3, 7, DISKS),
    "signals": Few(4, 18, (*SIGNALS, " at event ", " after ", ", then ", ", with a cache")),
    "signals-commands": Few(14, 0, (*SIGNALS, *FORMATS, *OTHERS, " at event ", " after ")),
    "signals-starts": Few(1),
    "signals-ranks": Few(0),  # test_signals.py has runs of two processes
    "signals-compiling": Few(0),  # minutes
    "checkpoints": Few(10, 37, (*(f"{part}:" for part in PARTS), "in the way:", "another seed:", "another method:")),
    "weight-files": Few(len(weight_files.KINDS), 1, WEIGHTS),
}
MODULES = (kill, full_disks, signals, checkpoints, weight_files)
CAMPAIGNS = [c for module in MODULES for c in getattr(module, "CAMPAIGNS", [getattr(module, "CAMPAIGN", None)])]


@pytest.fixture(scope="module", autouse=True)
def warmed():
    skip_beside_a_gpu()
    warm()


@pytest.mark.parametrize("campaign", [c for c in CAMPAIGNS if FEW[c.name].tries], ids=lambda campaign: campaign.name)
def test_nothing_is_lost(campaign: Campaign, tmp_path):
    tries, seed, kinds = FEW[campaign.name]
    outcome = campaign.run(tries, seed, tmp_path)
    assert outcome.lost == []
    assert outcome.tried == tries
    without_disks = any(note.startswith("Only limits of files were tested") for note in outcome.notes)
    missing = [kind for kind in kinds if not any(kind in done for done in outcome.done)]
    assert missing == [" bytes free"] * (without_disks and " bytes free" in missing)
