"""The kernels of common training runs compile for every architecture, do not spill, fit, and use the matrix unit.

`python -m benchmarks.aot` without `--quick` compiles every form with every tile: benchmarks/results/aot.csv.

No device is needed. Triton's interpreter must be off, so the kernels are compiled in separate processes: two, which run
at the same time where tests do.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from fastnce.kernels import configs

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.parametrize("half", [0, 1])
def test_every_kernel_compiles_for_every_architecture(half):
    architectures = configs.ARCHITECTURES[half::2]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, "-m", "benchmarks.aot", "--quick", "--arch", *architectures]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    *builds, summary = result.stdout.splitlines() or [""]
    faults = [line for line in builds if not line.endswith(" ok")]
    assert not faults, "\n".join(faults)
    assert result.returncode == 0, result.stderr[-3000:]
    assert summary.endswith("0 with a fault")
    for arch in architectures:
        built = {name for line in builds if line.startswith(f"{arch} ") for name in line.split()}
        assert {"nce_kernel", "project_kernel", "merge_kernel", "draw_kernel"} <= built, arch
