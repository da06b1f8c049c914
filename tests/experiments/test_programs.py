"""Every experiment starts from the root of the checkout, as a script and as a module."""

from __future__ import annotations

import os

import pytest

from tests.programs import run_program


@pytest.mark.parametrize(
    "arguments",
    [
        ["experiments/derain.py"],
        ["experiments/parity.py"],
        ["experiments/feature_distance.py"],
        ["experiments/record_networks.py"],
        ["experiments/showcase.py"],
        ["-m", "experiments.derain"],
    ],
    ids=" ".join,
)
def test_experiment_starts(arguments):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    finished = run_program([*arguments, "--help"], environment=environment, anew=("experiments", "benchmarks"))
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.startswith("usage: ")
