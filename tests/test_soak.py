"""A few tries of each fault campaign with fixed seeds (`make soak` runs all of them)."""

from __future__ import annotations

import os
import sys

import pytest

if not sys.platform.startswith("linux") or not hasattr(os, "fork"):
    pytest.skip("the campaigns need fork and /proc of Linux", allow_module_level=True)

from tests.forked import skip_beside_a_gpu
from tests.soak import checkpoints, full_disks, kill, signals, weight_files
from tests.soak.common import Campaign, warm

FEW = {
    "kill": 6,
    "kill-caching": 6,
    "kill-ranks": 0,  # test_distributed.py and test_signals.py kill ranks and launchers
    "full-disks": 42,
    "full-disks-training": 5,
    "signals": 8,
    "signals-commands": 33,
    "signals-starts": 2,
    "signals-ranks": 0,  # test_signals.py has runs of two processes
    "signals-compiling": 0,  # minutes
    "checkpoints": 16,
    "weight-files": 42,
}
MODULES = (kill, full_disks, signals, checkpoints, weight_files)
CAMPAIGNS = [c for module in MODULES for c in getattr(module, "CAMPAIGNS", [getattr(module, "CAMPAIGN", None)])]


@pytest.fixture(scope="module", autouse=True)
def warmed():
    skip_beside_a_gpu()
    warm()


@pytest.mark.parametrize("campaign", [c for c in CAMPAIGNS if FEW[c.name]], ids=lambda campaign: campaign.name)
def test_nothing_is_lost(campaign: Campaign, tmp_path):
    outcome = campaign.run(FEW[campaign.name], 1, tmp_path)
    assert outcome.lost == []
    assert outcome.tried == FEW[campaign.name]
