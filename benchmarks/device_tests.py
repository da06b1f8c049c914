"""The tests that need a GPU, and the pytest commands that run them in two halves."""

from __future__ import annotations

import importlib.util
import os
import sys

FIRST_TESTS = (
    "tests/kernels/test_kernels_gpu.py",
    "tests/networks/test_layers_gpu.py",
    "tests/engine/test_weights.py",
    "tests/data/test_data.py",
    "tests/translate/test_translate.py",
    "tests/engine/test_engine_gpu.py",
)
SECOND_TESTS = ("tests/engine/test_engine_gpu.py", "tests/engine/test_recorded_run.py")
ENGINE_FIRST = "(bf16 and (cut or dcdgan)) or random or failed or finite"
"""Tests of `test_engine_gpu.py` in the first half. The second half has the others, and whole runs."""


def pytest_command(second: bool) -> list[str]:
    """Return the command that runs the first or the second half."""
    files = SECOND_TESTS if second else FIRST_TESTS
    selected = f"not ({ENGINE_FIRST})" if second else f"not engine_gpu or {ENGINE_FIRST}"
    command = [sys.executable, "-m", "pytest", "-p", "benchmarks.outcomes", "--tb=short", "-p", "no:cacheprovider"]
    if _is_installed("xdist"):
        command += ["-n", str(max(1, min(12, 3 * (os.cpu_count() or 1) // 4)))]
    if _is_installed("pytest_timeout"):
        command += ["--timeout", "100"]
    return [*command, "-m", "gpu and not slow", "-k", selected, *files]


def _is_installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None
