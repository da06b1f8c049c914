"""mypy checks kernels/ as `fastnce.kernels`, by the link that the Makefile makes and the settings of pyproject.toml."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

PROGRAM = """\
from fastnce.kernels.blur import blur_down
from fastnce.kernels.chosen import layer_splits

blur_down(1)
layer_splits("sm_90", programs=1)
"""

WITHOUT_LIBRARIES = """
[[tool.mypy.overrides]]
module = ["torch.*", "triton.*"]
follow_imports = "skip"
"""
"""Reading PyTorch takes most of mypy's time."""


def test_mypy_knows_the_types_of_kernels(tmp_path):
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / "kernels").symlink_to(ROOT / "kernels")
    (tmp_path / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text() + WITHOUT_LIBRARIES)
    (tmp_path / "program.py").write_text(PROGRAM)
    subprocess.run(["make", "-s", ".venv/typed/fastnce/kernels"], cwd=tmp_path, check=True)
    command = [sys.executable, "-m", "mypy", "program.py"]
    # with PYTHONPATH, mypy reads all of the fastnce that is found there
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    for line in (4, 5):
        assert f"program.py:{line}: error: " in run.stdout, run.stdout + run.stderr
    assert "[call-arg]" in run.stdout, run.stdout
