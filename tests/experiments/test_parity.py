"""experiments/parity.py: every precision starts from the same state, and the losses are written to a CSV file."""

from __future__ import annotations

import csv
import json
from importlib.util import find_spec

import pytest
from PIL import Image

from experiments import parity
from experiments.parity import AGAIN, compare, main


def test_all_runs_are_written(folder, tmp_path, capsys):
    options = ["--steps", "3", "--width", "4", "--crop", "32", "--data", str(folder), "--out", str(tmp_path / "out")]
    assert main(options) == 0
    with (tmp_path / "out" / "losses.csv").open() as file:
        rows = list(csv.DictReader(file))
    found = {name: [row for row in rows if row["run"] == name] for name in ("fp32", AGAIN, "bf16")}
    assert [[row["step"] for row in run] for run in found.values()] == [["1", "2", "3"]] * 3
    first = {name: run[0] for name, run in found.items()}
    assert first[AGAIN]["D_real"] == first["fp32"]["D_real"]  # computed before patches are drawn
    assert first[AGAIN]["NCE"] != first["fp32"]["NCE"]
    assert float(first["bf16"]["NCE"]) == pytest.approx(float(first["fp32"]["NCE"]), rel=0.02)
    assert first["bf16"]["NCE"] != first["fp32"]["NCE"]
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["last quarter"]["fp32"]["NCE"]["relative"] == 0
    assert summary["fp32"] == "float32"
    assert list(summary["runs"]) == ["fp32", AGAIN, "bf16"]
    assert all(state.startswith("3 steps in") for state in summary["runs"].values())
    if find_spec("matplotlib"):
        assert Image.open(tmp_path / "out" / "losses.png").width > 600
    else:
        assert "matplotlib is not installed" in capsys.readouterr().out


def test_the_last_quarter_is_compared():
    def run(*values):
        return [{"step": i, "G": value} for i, value in enumerate(values)]

    found = compare({"fp32": run(9, 9, 9, 9, 9, 9, 2, 4), "bf16": run(0, 0, 0, 0, 0, 0, 3, 6)}, ["G"])
    assert found["bf16"]["G"] == {"mean": 4.5, "relative": 0.5}
    found = compare({"fp32": run(9, 9, 9, 2, 8, 8, 8, 8), "bf16": run(0, 0, 0, 3)}, ["G"])  # stopped early
    assert found["bf16"]["G"] == {"mean": 3, "relative": 0.5}


def test_results_are_written_after_each_run_and_survive_a_failed_run(folder, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    seen = []

    def train(name, *_):
        seen.append({row["run"] for row in csv.DictReader((out / "losses.csv").open())} if seen else set())
        if name == AGAIN:
            raise MemoryError("too large")
        return [{"step": 1, "G": 2.0}]

    monkeypatch.setattr(parity, "train", train)
    monkeypatch.setattr(parity, "draw", lambda *_: None)
    assert main(["--steps", "1", "--crop", "32", "--data", str(folder), "--out", str(out)]) == 1
    assert seen == [set(), {"fp32"}, {"fp32"}]
    summary = json.loads((out / "summary.json").read_text())
    assert summary["runs"][AGAIN] == "failed: MemoryError: too large"
    assert set(summary["last quarter"]) == {"fp32", "bf16"}
    assert "too large" in capsys.readouterr().err


def test_a_run_that_stops_early_reports_its_step(folder, tmp_path):
    options = ["--steps", "50", "--width", "4", "--crop", "32", "--data", str(folder), "--out", str(tmp_path)]
    assert main([*options, "--minutes", "1e-9", "--precisions", "bf16"]) == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert all(state.endswith("stopped at step 1 of 50") for state in summary["runs"].values())
