"""Format results as a text table."""

from __future__ import annotations

from typing import Any

Cell = tuple[str, str]


def table(rows: list[dict[str, Any]], machine: dict[str, Any]) -> str:
    """Return medians, ratios to our median of the same case, and floors. Empty columns are left out."""
    counted = "operators" if machine.get("device") == "CPU" else "launches"
    ours = {_case(r): r["p50_ms"] for r in reversed(rows) if r["provider"] == "fastnce" and r["mode"] == "eager"}
    lines = [_cells(row, ours.get(_case(row)), counted) for row in rows]
    if not lines:
        return "no rows"
    used = [i for i in range(len(lines[0])) if any(line[i][1] for line in lines)]
    kept = [[line[i] for i in used] for line in lines]
    texts = [[name for name, _ in kept[0]], *([text for _, text in line] for line in kept)]
    widths = [max(len(text[i]) for text in texts) for i in range(len(used))]
    return "\n".join("  ".join(f"{cell:{w}}" for cell, w in zip(t, widths, strict=True)).rstrip() for t in texts)


def _cells(row: dict[str, Any], own: float | None, counted: str) -> list[Cell]:
    """Return (column, text) pairs of a row. The text is empty if nothing was measured."""

    def text(name: str, form: str, scale: float = 1.0) -> str:
        return "" if row.get(name) is None else format(row[name] * scale, form)

    size = [str(row[name]) for name in ("images", "side", "patches") if row[name] is not None]
    p50 = row["p50_ms"]
    return [
        ("benchmark", row["benchmark"]),
        ("size", " x ".join(size)),
        ("provider", row["provider"]),
        ("mode", row["mode"]),
        ("ms", text("p50_ms", ".3f")),
        ("20..80 %", "" if p50 is None else f"{row['p20_ms']:.3f}..{row['p80_ms']:.3f}"),
        ("do_bench ms", text("do_bench_ms", ".3f")),
        ("x ours", "" if p50 is None or not own else f"{p50 / own:.2f}"),
        ("images/s", text("images_per_s", ",.4g")),
        ("GFLOP", text("flop", ",.4g", 1e-9)),
        ("of ceiling", text("ceiling_fraction", ".0%")),
        ("floor ms", text("floor_ms", ".3g")),
        ("of floor", text("floor_fraction", ".0%")),
        (counted, text("launches", ".0f")),
        ("launch floor ms", text("launch_floor_ms", ".3g")),
        ("peak MiB", text("peak_bytes", ",.1f", 2.0**-20)),
        ("J", text("joules", ".3g")),
        ("J/1000 images", text("joules_per_1000_images", ",.4g")),
        ("note", row["note"]),
    ]


def _case(row: dict[str, Any]) -> tuple:
    return tuple(row[name] for name in ("benchmark", "images", "side", "patches", "dim", "layers"))
