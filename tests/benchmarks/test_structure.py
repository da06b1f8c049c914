"""The modules of benchmarks/ and experiments/ import each other without circles, and named programs exist."""

from __future__ import annotations

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("benchmarks", "experiments")
MODULES = {f"{folder}.{path.stem}": path for folder in FOLDERS for path in (ROOT / folder).glob("*.py")}
TEXTS = [*MODULES.values(), *ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "Makefile"]


def imported(path: Path) -> set[str]:
    """The modules of the two folders that a file imports, also inside of functions."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names & MODULES.keys()


def test_imports_have_no_circle():
    graph = {name: imported(path) for name, path in MODULES.items()}
    assert graph["benchmarks.check"] >= {"benchmarks.device_tests", "benchmarks.triton_cache"}
    order = list(TopologicalSorter(graph).static_order())  # raises CycleError
    assert set(order) == set(MODULES)


def test_benchmarks_import_no_experiment():
    for name, path in MODULES.items():
        if name.startswith("benchmarks."):
            assert not {module for module in imported(path) if module.startswith("experiments.")}, name


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_named_programs_exist(path):
    named = set(re.findall(r"(?<![\w/.])(?:benchmarks|experiments|tests)/[a-z0-9_/]+\.py\b", path.read_text()))
    named |= {
        f"{module.replace('.', '/')}.py"
        for module in re.findall(r"-m ((?:benchmarks|experiments)\.[a-z_]+)", path.read_text())
    }
    assert not sorted(name for name in named if not (ROOT / name).is_file())
