"""The table in docs/reliability.md states the promises of the campaigns."""

from __future__ import annotations

import importlib
import os
import pkgutil
import sys
from pathlib import Path

import pytest

if not sys.platform.startswith("linux") or not hasattr(os, "fork"):
    pytest.skip("the campaigns need Linux and fork", allow_module_level=True)

from tests import soak

TABLE = Path(__file__).resolve().parents[1] / "docs" / "reliability.md"


def campaigns():
    for name in sorted(info.name for info in pkgutil.iter_modules(soak.__path__) if not info.name.startswith("_")):
        members = vars(importlib.import_module(f"tests.soak.{name}"))
        yield from [*members.get("CAMPAIGNS", []), *filter(None, [members.get("CAMPAIGN")])]


@pytest.mark.parametrize("campaign", list(campaigns()), ids=lambda campaign: campaign.name)
def test_the_table_has_the_promise(campaign):
    (row,) = [line for line in TABLE.read_text().splitlines() if line.startswith(f"| {campaign.name} |")]
    assert row.split("|")[2].strip() == campaign.promise.rstrip(".")
    assert campaign.promise[0].isupper()
