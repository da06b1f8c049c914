"""Curves over the steps of a run as an SVG file: one panel per curve, raw and smoothed."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

COLUMNS, WIDTH, HEIGHT = 3, 300, 170
LEFT, RIGHT, TOP, BOTTOM = 44, 10, 24, 24
"""What a panel leaves around its curve, in pixels."""
SMOOTHED_FROM = 20
"""A curve of fewer points is drawn with dots, and not smoothed."""


class Series(NamedTuple):
    """A curve: its title, and a value at each of its steps (ascending)."""

    title: str
    steps: Sequence[int]
    values: Sequence[float]


def ticks(low: float, high: float) -> list[float]:
    """Return two to six round numbers from `low` to `high`: multiples of 1, 2 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10((high - low) / 5))
    unit = next(u * power for u in (1, 2, 5, 10) if (high - low) / (u * power) <= 5)
    return [round(i * unit, 12) for i in range(math.ceil(low / unit - 1e-9), math.floor(high / unit + 1e-9) + 1)]


def smooth(values: Sequence[float]) -> np.ndarray:
    """Return the mean over a window of a tenth of the values around each one; the window is smaller at the ends."""
    reach = max(1, len(values) // 20)
    sums = np.concatenate([[0.0], np.cumsum(np.asarray(values, np.float64))])
    at = np.arange(len(values))
    reach_here = np.minimum(reach, np.minimum(at, at[::-1]))
    return (sums[at + reach_here + 1] - sums[at - reach_here]) / (2 * reach_here + 1)


def draw_curves(series: Sequence[Series], title: str) -> str:
    """Return the text of an SVG: a panel per series, three in a row. A series without a value gets none."""
    series = [one for one in series if len(one.steps)]
    rows = -(-len(series) // COLUMNS)
    width, height = COLUMNS * WIDTH, rows * HEIGHT + 26
    last = max((one.steps[-1] for one in series), default=1)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'font-family="sans-serif" font-size="10">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<text x="{LEFT}" y="17" font-size="12">{html.escape(title)}</text>',
    ]
    for number, one in enumerate(series):
        x, y = number % COLUMNS * WIDTH, number // COLUMNS * HEIGHT + 26
        parts += [f'<g transform="translate({x} {y})">', *_panel(one, last), "</g>"]
    return "\n".join([*parts, "</svg>"]) + "\n"


def _panel(series: Series, last: int) -> list[str]:
    low, high = min(series.values), max(series.values)
    if high - low <= 1e-9 * max(abs(high), abs(low)):  # constant
        low, high = low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2
    inner_width, inner_height = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM

    def across(step: float) -> float:
        return LEFT + inner_width * step / max(last, 1)

    def down(value: float) -> float:
        return TOP + inner_height * (high - value) / (high - low)

    def points(values: Sequence[float] | np.ndarray) -> str:
        return " ".join(f"{across(s):.1f},{down(v):.1f}" for s, v in zip(series.steps, values, strict=True))

    parts = [f'<text x="{LEFT}" y="{TOP - 8}">{html.escape(series.title)}</text>']
    for value in ticks(low, high):
        y = f"{down(value):.1f}"
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}" stroke="#e4e4e4"/>')
        parts.append(f'<text x="{LEFT - 4}" y="{y}" dy="3" text-anchor="end" fill="#555">{value:g}</text>')
    for step in ticks(0, last):
        place = f'x="{across(step):.1f}" y="{HEIGHT - BOTTOM + 13}"'
        parts.append(f'<text {place} text-anchor="middle" fill="#555">{step:,g}</text>')
    many = len(series.steps) >= SMOOTHED_FROM
    raw = "#b9cfe4" if many else "#1f5f99"
    parts.append(f'<polyline points="{points(series.values)}" fill="none" stroke="{raw}"/>')
    if many:
        smoothed = points(smooth(series.values))
        parts.append(f'<polyline points="{smoothed}" fill="none" stroke="#1f5f99" stroke-width="1.5"/>')
    else:
        places = (point.split(",") for point in points(series.values).split())
        parts += [f'<circle cx="{x}" cy="{y}" r="2" fill="{raw}"/>' for x, y in places]
    return parts
