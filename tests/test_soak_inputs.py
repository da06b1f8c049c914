"""A few tries of the campaigns of wrong input: command lines, files, names, options and calls."""

from __future__ import annotations

import sys

import pytest

if not sys.platform.startswith("linux"):
    pytest.skip("the campaigns need fork and /proc of Linux", allow_module_level=True)

from tests.forked import skip_beside_a_gpu
from tests.soak import calls, command_lines, inputs, names, option_values, toml_files
from tests.soak.common import warm

FEW = {calls: 100, command_lines: 60, inputs: 30, names: 12, option_values: 20, toml_files: 40}


@pytest.mark.parametrize("module", FEW, ids=lambda module: module.__name__.rpartition(".")[2])
def test_nothing_is_lost(module, tmp_path):
    skip_beside_a_gpu()
    warm()
    outcome = module.CAMPAIGN.run(FEW[module], 1, tmp_path)
    assert outcome.lost == []
    assert outcome.tried == FEW[module]
