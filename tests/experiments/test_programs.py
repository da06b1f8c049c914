"""Both experiments start from the root of the checkout, as a script and as a module."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    "arguments", [["experiments/derain.py"], ["experiments/parity.py"], ["-m", "experiments.derain"]], ids=" ".join
)
def test_experiment_starts(arguments):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, *arguments, "--help"]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, env=environment)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.startswith("usage: ")
