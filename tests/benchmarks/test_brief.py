"""The summary of a check: it fits, and it states the goals and the results."""

from __future__ import annotations

from benchmarks import brief, cases, nvml, profiled


def row(benchmark, provider, p50, **more):
    return vars(cases.Row(benchmark, provider, more.pop("mode", "eager"), p50_ms=p50, **more))


def large_report() -> brief.Report:
    report = brief.Report(machine={"device": "A device", "driver": "1" * 300, "torch": "2.11.0"})
    report.stages = [brief.Outcome(f"stage {i}", 10.0, 9.0, "trouble " * 60) for i in range(40)]
    report.smoke = {
        "checks": [{"name": f"check {i} " * 20, "error": None, "gate": 1e-3, "ok": False} for i in range(60)]
    }
    report.tests = [
        {"name": f"tests/test_x.py::test_{i}", "outcome": "failed", "why": "wrong " * 50, "seconds": 1.0}
        for i in range(99)
    ]
    report.rows = [row(f"case {i} {'x' * 99}", f"provider {j}", 1.0, patches=j) for i in range(50) for j in range(9)]
    report.rows += [row("missing", f"provider {i}", None, note=f"did not run: reason {i}") for i in range(50)]
    report.profile = [
        profiled.Line(f"step {i}", 1, "kernel " * 30, 1, 2.0, 0.5, 0.9) for i in range(30) for _ in range(60)
    ]
    return report


def test_the_summary_fits_for_any_results():
    lines = brief.summary(large_report())
    assert len(lines) <= brief.LINES
    assert max(map(len, lines)) <= brief.WIDTH
    assert sum(len(line) + 1 for line in lines) < 12_000
    assert any("more lines" in line for line in lines)
    assert brief.summary(brief.Report())  # no results at all


def test_a_faulty_section_does_not_affect_others():
    report = brief.Report(machine={"device": "A device", "ceilings": "none"})
    report.stages = [brief.Outcome("smoke", 10.0, 9.0)]
    lines = brief.summary(report)
    assert "a section of this summary failed: AttributeError" in lines[1]
    assert lines[2].startswith("smoke")


def test_goals_are_stated_with_the_results():
    report = brief.Report()
    report.rows = [
        row("chain", "cut classes", 3.0, images=1, note="published"),
        row("chain, bf16", "fastnce", 0.05, images=1, mode="graph"),
        row("chain", "fastnce", 0.5, images=1),
        row("infonce", "fastnce", 1.0, patches=16384, ceiling_fraction=0.5, peak_bytes=2**20),
        row("infonce", "fastnce", 0.7, patches=16384, mode="graph", ceiling_fraction=0.7),
        row("infonce", "fastnce, unit rows", 0.5, patches=16384),
        row("infonce", "CUT", 8.0, patches=16384, note="written here, no checkout was given"),
        row("step fastcut", "fastnce bf16", 3.0, images=1, mode="captured"),
        row("step fastcut", "cut published", 9.0, images=1, note="published"),
    ]
    goals = "\n".join(brief._goals(report))
    assert "captured bf16 60.00x (goal 30x)" in goals
    assert "captured float32 ? (9x)" in goals
    assert "uncaptured 6.00x (4x)" in goals
    assert "50% of the ceiling, captured 70% (goal 60 %), with unit_rows 2.00x, against CUT (our own version, " in goals
    assert "no checkout) 8.00x (goal 6x), memory 1 MiB" in goals
    assert "3.00 ms, 213,400 steps: 10.7 minutes; 3.00x cut" in goals


def test_missing_readings_of_the_board_are_stated():
    lines = brief.summary(brief.Report(machine={"device": "A device", "nvml": nvml.INSTALL}))
    assert "install nvidia-ml-py" in lines[1]
