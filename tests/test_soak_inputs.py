"""A few tries of the campaigns of wrong input: command lines, files, names, options and calls."""

from __future__ import annotations

import sys

import pytest

if not sys.platform.startswith("linux"):
    pytest.skip("the campaigns need fork and /proc of Linux", allow_module_level=True)

from tests.forked import skip_beside_a_gpu
from tests.soak import calls, command_lines, inputs, names, option_values, toml_files
from tests.soak.common import warm

FEW = {calls: 60, command_lines: 30, inputs: 15, names: 6, option_values: 10, toml_files: 20}
SEEDS = {calls: 1, command_lines: 1, inputs: 1, names: 1, option_values: 1, toml_files: 1}
"""With these, the few tries are of every kind."""
CALLS = ("patch_nce of", "not finite", "channels as", "deepcopy", "pickle", "save", "threads")
LINES = [f"fastnce ['{command}'" for command in ("train", "translate", "evaluate", "rain", "unpair", "cache", "export")]
KINDS = {
    calls: CALLS,
    command_lines: LINES,
    inputs: [f"{command.__name__} with " for command in inputs.COMMANDS],
    names: [f"{command.__name__} with " for command in names.COMMANDS],
}


@pytest.mark.parametrize("module", FEW, ids=lambda module: module.__name__.rpartition(".")[2])
def test_nothing_is_lost(module, tmp_path):
    skip_beside_a_gpu()
    warm()
    outcome = module.CAMPAIGN.run(FEW[module], SEEDS[module], tmp_path)
    assert outcome.lost == []
    assert outcome.tried == FEW[module]
    assert [kind for kind in KINDS.get(module, ()) if not any(kind in done for done in outcome.done)] == []
