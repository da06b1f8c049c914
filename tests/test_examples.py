"""Every example runs on a CPU within seconds."""

import runpy
import sys
from pathlib import Path

import pytest

from fastnce.commands import methods
from fastnce.methods import PRESETS, find_preset

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
INFERENCE = ("infer_torch.py", "infer_onnx.py")
"""They take an exported folder: tests/commands/test_export_formats.py runs them."""
FILES = sorted(path.name for path in EXAMPLES.glob("*.py") if path.name not in ("pictures.py", *INFERENCE))


def run(name: str, monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.chdir(EXAMPLES.parent)
    monkeypatch.setattr(sys, "argv", [name])
    return runpy.run_path(str(EXAMPLES / name), run_name="example")["main"]()


@pytest.mark.parametrize("name", FILES)
def test_an_example_runs(name, monkeypatch, capsys):
    result = run(name, monkeypatch)
    printed = capsys.readouterr().out
    if name in ("own_loop.py", "external_negatives.py"):
        assert len(result) == 3
        assert len(set(result)) == 3
        assert printed.count("step ") == 3
        assert name != "own_loop.py" or result[-1] < result[0]
    elif name == "derain_folder.py":
        assert len(result) == 2
        assert all(path.parts[0] == "derained" for path in result)
    else:
        assert result == 3
        assert "step 3/3" in printed


@pytest.mark.parametrize("name", [*FILES, *INFERENCE])
def test_an_example_is_short_and_named_in_the_docs(name):
    code = (EXAMPLES / name).read_text().partition("from __future__ import annotations\n")[2]
    assert len([line for line in code.splitlines() if line.strip()]) <= 60
    page = "export.md" if name in INFERENCE else "extending.md"
    docs = (EXAMPLES.parent / "docs" / page).read_text()
    assert f"../examples/{name}" in docs


def test_a_method_with_few_options_can_become_a_preset(monkeypatch, capsys):
    """`fastnce methods` prints what there is."""
    monkeypatch.chdir(EXAMPLES.parent)
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.setitem(PRESETS, "coarse", find_preset("examples/own_method.py:CoarseGAN"))
    assert methods.main([]) == 0
    assert "terms       gan 1, coarse 10" in capsys.readouterr().out
