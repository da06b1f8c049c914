"""The summary that `check.py` prints last: at most 90 lines of 110 characters, to fit the end of an output."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from benchmarks import profiled
from benchmarks.measure import OVER

LINES, WIDTH = 90, 110
OURS = "fastnce"


@dataclass
class Outcome:
    """The outcome of a stage; `trouble` is empty on success."""

    name: str
    share: float
    seconds: float
    trouble: str = ""
    lines: list[str] = field(default_factory=list)
    """Further findings of the stage."""


@dataclass
class Report:
    """All results of a check so far."""

    machine: dict[str, Any] = field(default_factory=dict)
    stages: list[Outcome] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)
    smoke: dict[str, Any] = field(default_factory=dict)
    tests: list[dict[str, Any]] = field(default_factory=list)
    profile: list[profiled.Line] = field(default_factory=list)


def summary(report: Report) -> list[str]:
    """Return the lines of all sections, each section cut to its limit."""
    sections = [
        (4, _head(report)),
        (15, _stages(report)),
        (6, _smoke(report)),
        (8, _tests(report)),
        (13, _goals(report)),
        (28, _rows(report)),
        (12, _profile(report)),
        (4, _missing(report)),
    ]
    lines: list[str] = []
    for most, section in sections:
        found = [part for line in _guarded(section) for part in _wrapped(line)]
        if len(found) > most:
            found = [*found[: most - 1], f"    ... {len(found) - most + 1} more lines in the files"]
        lines += found
    assert len(lines) <= LINES
    return lines


def _guarded(section: Iterator[str]) -> Iterator[str]:
    """Yield the lines of a section, or one line about the error if the results are malformed."""
    try:
        yield from section
    except Exception as error:  # the other sections and the exit code must not suffer
        yield f"a section of this summary failed: {type(error).__name__}: {error}"


def _wrapped(line: str) -> list[str]:
    """Wrap a line to at most three lines."""
    indent = " " * (len(line) - len(line.lstrip()))
    return textwrap.wrap(
        line.lstrip(), WIDTH, initial_indent=indent, subsequent_indent=f"{indent}    ", max_lines=3, placeholder=" ..."
    )


def _head(report: Report) -> Iterator[str]:
    m = report.machine
    versions = [
        f"{name} {m[name]}" for name in ("driver", "torch", "triton", "python", "commit", "date") if m.get(name)
    ]
    yield f"== {m.get('device', 'machine unknown (the stage ceilings describes it)')}: {', '.join(versions)}"
    if "nvml" in m:
        yield m["nvml"]
    limits = m.get("ceilings", {})
    if limits:
        yield (
            f"ceilings: copy {limits.get('copy_bytes_per_s', 0) / 1e12:.2f} TB/s, bf16 "
            f"{limits.get('matmul_bfloat16_flop_per_s', 0) / 1e12:.0f}, tf32 "
            f"{limits.get('matmul_tf32_flop_per_s', 0) / 1e12:.0f}, fp32 "
            f"{limits.get('matmul_float32_flop_per_s', 0) / 1e12:.0f} TFLOP/s, launch "
            f"{limits.get('launch_eager_s', 0) * 1e6:.1f} us, in a graph {limits.get('launch_graph_s', 0) * 1e6:.1f} us"
        )


def _stages(report: Report) -> Iterator[str]:
    for stage in report.stages:
        result = "; ".join(filter(None, [stage.trouble, *stage.lines])) or "finished"
        yield f"{stage.name:10} {stage.seconds:4.0f} of {stage.share:3.0f} s  {result}"


def _smoke(report: Report) -> Iterator[str]:
    checks = report.smoke.get("checks", [])
    if not checks:
        return
    wrong = [check for check in checks if not check["ok"]]
    library = report.smoke.get("library", "not tested")
    yield f"smoke: {len(checks) - len(wrong)} of {len(checks)} passed; F.instance_norm: {library}"
    for check in wrong:
        error = "not finite" if check["error"] is None else f"{check['error']:.1e}"
        yield f"    FAILED {check['name']}: {error} (gate {check['gate']:.0e})"


def _tests(report: Report) -> Iterator[str]:
    counts = Counter(test["outcome"] for test in report.tests)
    if counts:
        longest = max(report.tests, key=lambda test: test["seconds"])
        yield (
            f"tests: {', '.join(f'{count} {outcome}' for outcome, count in sorted(counts.items()))}; the longest took "
            f"{longest['seconds']:.0f} s: {_test_name(longest)}"
        )
    for test in report.tests:
        if test["outcome"] == "failed":
            yield f"    FAILED {_test_name(test)}: {test['why']}"[:WIDTH]


def _test_name(test: dict[str, Any]) -> str:
    return test["name"].removeprefix("tests/")


# --- goals ---------------------------------------------------------------------------------------------------------


def _goals(report: Report) -> Iterator[str]:
    """Each goal that has a measurement: the goal and the result."""

    def row(benchmark: str, provider: str = "", mode: str = "", **size: Any) -> dict[str, Any] | None:
        for r in report.rows:
            fits = r["benchmark"] == benchmark and r["p50_ms"] and all(r[k] == v for k, v in size.items())
            if fits and (r["provider"] == provider if provider else _is_peer(r)) and (not mode or r["mode"] == mode):
                return r
        return None

    def ratio(peer: dict[str, Any] | None, ours: dict[str, Any] | None) -> str:
        return f"{peer['p50_ms'] / ours['p50_ms']:.2f}x" if peer and ours else "?"

    plain = row("chain", images=1)
    variants = ("chain, bf16", OURS, "graph"), ("chain", OURS, "graph"), ("chain", OURS, "eager")
    ours = [row(*variant, images=1) for variant in variants]
    if any(ours):
        half, full, uncaptured = (ratio(plain, found) for found in ours)
        yield (
            f"P1 chain, against {_name(plain)}: captured bf16 {half} (goal 30x), captured float32 {full} (9x), "
            f"uncaptured {uncaptured} (4x)"
        )
    ours = [row("chain, bf16", OURS, mode, images=16) for mode in ("graph", "eager")]
    if any(ours):
        plain = row("chain, bf16", images=16)
        captured, uncaptured = (ratio(plain, found) for found in ours)
        yield f"P2 chain of 16, bf16, against {_name(plain)}: captured {captured} (goal 10x), uncaptured {uncaptured}"
    for goal, rows in (("P3", 16384), ("P4", 65536)):
        default, unit = (row("infonce", name, "eager", patches=rows) for name in (OURS, f"{OURS}, unit rows"))
        if default is None:
            continue
        peer = row("infonce", patches=rows)
        captured = row("infonce", OURS, "graph", patches=rows)
        rates = [f"{r['ceiling_fraction']:.0%}" if r and r["ceiling_fraction"] else "?" for r in (default, captured)]
        memory = f"{default['peak_bytes'] / 2**20:.0f} MiB" if default["peak_bytes"] else "not measured"
        yield (
            f"{goal} {rows:,} rows: {rates[0]} of the ceiling, captured {rates[1]} (goal 60 %), with unit_rows "
            f"{ratio(default, unit)}, against {_name(peer)} {ratio(peer, default)} (goal 6x), memory {memory}"
        )
    for goal, name, images, target in (
        ("P5", "cut", 1, "6x"),
        ("P6", "cut", 8, "3.5x"),
        ("P7", "dclgan", 1, "6x"),
        ("P7", "dcdgan-released", 1, "6x"),
        ("P8", "fastcut", 1, "10 min"),
    ):
        step = row(f"step {name}", f"{OURS} bf16", images=images)
        if step is None:
            continue
        peer = row(f"step {name}", images=images)
        more = f", {step['ceiling_fraction']:.0%} of the ceiling" if step["ceiling_fraction"] else ""
        if name == "fastcut":
            more += f", 213,400 steps: {213_400 * step['p50_ms'] / 6e4:.1f} minutes"
        yield (
            f"{goal} {name} B={images} {step['mode']} {step['p50_ms']:.2f} ms{more}; {ratio(peer, step)} {_name(peer)} "
            f"(goal {target})"
        )


def _is_peer(row: dict[str, Any]) -> bool:
    """Whether the row measures a published implementation or its stand-in."""
    return row["note"].startswith(("published", "written here", "stands in for the published"))


def _stands_in(row: dict[str, Any]) -> bool:
    """Whether the row measures our own version of a published implementation."""
    return _is_peer(row) and not row["note"].startswith("published")


def _name(row: dict[str, Any] | None) -> str:
    if row is None:
        return "the published code"
    stand_in = " (our own version, no checkout)" if _stands_in(row) else ""
    return f"{row['provider'].removesuffix(' published')}{stand_in}"


# --- figures -------------------------------------------------------------------------------------------------------


def _rows(report: Report) -> Iterator[str]:
    """One paragraph per case: the milliseconds of each provider."""
    cases: dict[str, list[str]] = {}
    if any(map(_stands_in, report.rows)):
        yield "* our own version of the published mathematics: no checkout was given"
    for row in report.rows:
        if row["p50_ms"] is None:
            continue
        title = row["benchmark"]
        if title.startswith("growth"):  # one paragraph for all sizes
            label = "x".join(str(row[axis]) for axis in ("images", "side", "patches"))
        else:
            size = "x".join(str(row[axis]) for axis in ("images", "side", "patches") if row[axis] is not None)
            title, label = f"{title} {size}", _label(row)
        cases.setdefault(title, []).append(f"{label} {_short(row['p50_ms'])}")
    for title, figures in cases.items():
        yield f"{title}, ms: {' | '.join(figures)}"


def _label(row: dict[str, Any]) -> str:
    name = row["provider"].replace(f"{OURS}, ", "").replace(OURS, "ours")
    name += "*" if _stands_in(row) else ""
    mode = "" if row["mode"] == "eager" else f" {row['mode']}"
    return f"{name}{'' if row['benchmark'].startswith(('waterfall', 'data')) else mode}"


def _short(ms: float) -> str:
    return f"{ms:.4g}" if ms >= 0.001 else f"{ms:.1g}"


def _profile(report: Report) -> Iterator[str]:
    steps = dict.fromkeys((line.step, line.images) for line in report.profile)
    for step, images in steps:
        lines = [line for line in report.profile if (line.step, line.images) == (step, images)]
        yield (
            f"one replay of {step} B={images}: {sum(line.count for line in lines)} launches, "
            f"{sum(line.microseconds for line in lines) / 1e3:.2f} ms of kernels, busy {lines[0].busy:.0%}"
        )
        for line in lines[:3]:
            yield f"    {line.share:4.0%} {line.count:4}x {line.microseconds:8.0f} us  {line.kernel}"[:WIDTH]


def _missing(report: Report) -> Iterator[str]:
    """The providers without a result: one line per reason."""
    reasons: dict[str, list[str]] = {}
    for row in report.rows:
        if row["p50_ms"] is None:
            why = "the time was over" if OVER in row["note"] else row["note"].removeprefix("did not run: ")
            reasons.setdefault(why, []).append(f"{row['benchmark']} {_label(row)}")
    for why, names in reasons.items():
        yield f"no result: {names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''}: {why}"
