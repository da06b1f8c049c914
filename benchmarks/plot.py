"""Plot time and memory over rows, log-log, one line per provider, and fit the growth of the cost.

python benchmarks/plot.py DIR    # DIR holds results.json
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Series = dict[str, list[tuple[float, float]]]


def series(rows: list[dict[str, Any]], column: str) -> Series:
    """Return (rows S, value) pairs of the InfoNCE benchmark by provider and mode, where the value was measured."""
    found: Series = defaultdict(list)
    for row in rows:
        if row["benchmark"] == "infonce" and row[column]:
            mode = "" if row["mode"] == "eager" else f" ({row['mode']})"
            found[row["provider"] + mode].append((row["patches"], row[column]))
    return {name: sorted(points) for name, points in found.items()}


def growth(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Yield least-squares exponents of time and memory over S, for providers with at least three sizes."""
    memory = series(rows, "peak_bytes")
    for name, times in series(rows, "p50_ms").items():
        if len(times) >= 3:
            line = f"growth of {name}: time S^{_exponent(times):.2f}"
            if len(memory.get(name, [])) >= 3:
                line += f", memory S^{_exponent(memory[name]):.2f}"
            yield line


def step_growth(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Yield how a step's time grows with images, side and patches: t = c * x^e; for images also t = a + b x."""
    measured = [r for r in rows if r["benchmark"].startswith("growth") and r["p50_ms"]]
    if not measured:
        return
    axes = ("images", "side", "patches")
    # the base point has the values that most rows share
    base = {axis: statistics.mode(r[axis] for r in measured) for axis in axes}
    for axis in axes:
        others = [other for other in axes if other != axis]
        points = sorted((r[axis], r["p50_ms"]) for r in measured if all(r[o] == base[o] for o in others))
        if len(points) < 2:
            continue
        line = f"growth of a step: time {axis}^{_exponent(points):.2f} from {axis} {points[0][0]} to {points[-1][0]}"
        if axis == "images":
            slope, start = statistics.linear_regression(*zip(*points, strict=True))
            line += f"; {start:.3g} ms + {slope:.3g} ms per image"
        yield line


def _exponent(points: list[tuple[float, float]]) -> float:
    x, y = ([math.log(p[i]) for p in points] for i in range(2))
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    slope = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return slope / sum((a - mean_x) ** 2 for a in x)


def draw(folder: Path, rows: list[dict[str, Any]]) -> str:
    """Write infonce.png into the folder and return a sentence about the outcome."""
    panels = [("p50_ms", "milliseconds", 1.0), ("peak_bytes", "MiB above the inputs", 2.0**20)]
    data = [(series(rows, column), label, unit) for column, label, unit in panels]
    if not any(len(points) > 1 for lines, _, _ in data for points in lines.values()):
        return "no plot: the InfoNCE benchmark has fewer than two sizes"
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        return "no plot: matplotlib is not installed"
    figure, axes = pyplot.subplots(1, 2, figsize=(12, 5), constrained_layout=True)
    for axis, (lines, label, unit) in zip(axes, data, strict=True):
        for name, points in lines.items():
            ours = name.startswith("fastnce")
            x, y = [p[0] for p in points], [p[1] / unit for p in points]
            axis.loglog(x, y, marker="o", linewidth=3 if ours else 1.2, label=name, zorder=3 if ours else 2)
        axis.set_xlabel("rows S = N")
        axis.set_ylabel(label)
        axis.grid(True, which="both", alpha=0.2)
    axes[0].legend(fontsize=8)
    path = folder / "infonce.png"
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return f"plot: {path}"


if __name__ == "__main__":
    target = Path(sys.argv[1])
    print(draw(target, json.loads((target / "results.json").read_text())["rows"]))
