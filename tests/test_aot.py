"""The kernels of everyday training compile for every architecture, spill nothing, fit and use the matrix unit.

`python -m benchmarks.aot` without `--quick` compiles every form of every tile: benchmarks/results/aot.csv.

No device is needed. Triton must not be in its interpreter, so each architecture compiles in a process of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
from fastnce.kernels import configs

ROOT = Path(__file__).resolve().parents[1]


def compile_for(arch: str) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, "-m", "benchmarks.aot", "--quick", "--arch", arch]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="module")
def compilations():
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield {arch: pool.submit(compile_for, arch) for arch in configs.ARCHITECTURES}


@pytest.mark.slow
@pytest.mark.parametrize("arch", configs.ARCHITECTURES)
def test_every_kernel_compiles(arch: str, compilations: dict[str, Future]):
    result = compilations[arch].result()
    faults = [line for line in result.stdout.splitlines() if line.startswith(arch) and not line.endswith(" ok")]
    assert not faults, "\n".join(faults)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.splitlines()[-1].endswith("0 with a fault")
    assert {"nce_kernel", "project_kernel", "merge_kernel", "draw_kernel"} <= set(result.stdout.split())
