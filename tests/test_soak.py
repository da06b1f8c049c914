"""A few tries of each campaign of `make soak`; the same seeds every time."""

from __future__ import annotations

import sys

import pytest

from tests.soak.common import Outcome, each
from tests.soak.report import BEGIN, END, Row, written

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks, limits and signals as Linux has them")

FEW = {
    "kill": 4,
    "kill-caching": 4,
    "full-disk": 4,
    "full-disk-commands": 12,
    "signals": 4,
    "signals-commands": 8,
    "checkpoints": 5,
    "weight-files": 20,
}
"""Campaigns of real processes (ranks, compilers), and small disks, are for `make soak`."""


@pytest.fixture(scope="module")
def campaigns():
    from tests.soak.__main__ import campaigns

    return {campaign.name: campaign for campaign in campaigns()}


@pytest.mark.parametrize("name", FEW)
def test_nothing_is_lost(name, campaigns, tmp_path):
    outcome = campaigns[name].run(FEW[name], 1, tmp_path, None)
    assert outcome.tried == FEW[name]
    assert outcome.lost == []


def test_what_is_lost_is_told_with_its_seed_and_number():
    def attempt(number, rng):
        assert number != 1, "it broke"
        return "it is gone" if number == 2 else ""

    assert each(4, 7, None, attempt) == Outcome(4, ["seed 7, try 1: it broke", "seed 7, try 2: it is gone"])
    assert each(4, 7, 2, attempt) == Outcome(1, ["seed 7, try 2: it is gone"])


def test_a_row_replaces_its_own():
    text = f"before\n{BEGIN}\n{END}\nafter\n"
    one = Row("b", "holds", 1000, 2, 0, ["5 MiB"], "2026-01-01", "x 1")
    text = written(text, one)
    assert "| b | holds | 1,000 | 998 | 2 | 0, 2026-01-01 |" in text
    text = written(text, Row("a", "too", 3, 0, 1, [], "2026-01-02", "x 2"))
    text = written(text, Row("b", "holds", 10, 0, 0, ["6 MiB"], "2026-01-03", "x 2"))
    rows = [line for line in text.splitlines() if line.startswith(("| a", "| b"))]
    assert rows == ["| a | too | 3 | 3 | 0 | 1, 2026-01-02 |", "| b | holds | 10 | 10 | 0 | 0, 2026-01-03 |"]
    assert "- b: 6 MiB." in text
    assert "5 MiB" not in text
    assert text.startswith("before\n")
    assert text.endswith("after\n")
