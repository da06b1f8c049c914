"""The table, the plot and the fits of growth."""

from __future__ import annotations

import sys

from benchmarks import cases, plot, table


def test_a_table_omits_empty_columns():
    row = {**vars(cases.Row("toy", "fastnce", "eager", images=2)), "p50_ms": 1.0, "p20_ms": 0.5, "p80_ms": 2.0}
    header, line = table.table([row], {"device": "CPU"}).splitlines()
    assert header.split() == ["benchmark", "size", "provider", "mode", "ms", "20..80", "%", "x", "ours"]
    assert line.split() == ["toy", "2", "fastnce", "eager", "1.000", "0.500..2.000", "1.00"]
    assert table.table([], {}) == "no rows"
    row |= {"do_bench_ms": 1.25, "do_bench_p20_ms": 1.0, "do_bench_p80_ms": 1.5}
    header, line = table.table([row], {"device": "CPU"}).splitlines()
    assert "do_bench ms  x ours" in header
    assert line.split()[-2:] == ["1.250", "1.00"]


def test_results_from_before_a_column_are_read():
    old = vars(cases.Row("infonce", "fastnce", "eager", patches=64, p50_ms=1.0, p20_ms=0.5, p80_ms=2.0)).copy()
    for name in ("do_bench_ms", "do_bench_p20_ms", "do_bench_p80_ms"):
        del old[name]
    assert "1.000" in table.table([old], {})
    assert plot.series([old], "p50_ms") == {"fastnce": [(64, 1.0)]}


def test_growth_is_fitted_and_a_missing_matplotlib_is_reported(tmp_path, monkeypatch):
    row = {"benchmark": "infonce", "provider": "x", "mode": "eager"}
    rows = [row | {"patches": s, "p50_ms": 1e-3 * s**2, "peak_bytes": 5 * s} for s in (64, 256, 1024)]
    assert list(plot.growth(rows)) == ["growth of x: time S^2.00, memory S^1.00"]
    steps = [
        {"benchmark": "growth cut", "images": b, "side": 64, "patches": 256, "p50_ms": 3.0 + 2.0 * b} for b in (1, 2, 4)
    ]
    steps += [steps[0] | {"side": side, "p50_ms": 5.0 * (side / 64) ** 2} for side in (128, 256)]
    by_images, by_side = plot.step_growth(steps)
    assert by_images.endswith("3 ms + 2 ms per image")
    assert "time side^2.00 from side 64 to 256" in by_side
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert plot.draw(tmp_path, rows) == "no plot: matplotlib is not installed"
    assert "fewer than two sizes" in plot.draw(tmp_path, rows[:1])
