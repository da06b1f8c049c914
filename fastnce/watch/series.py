"""Reads `metrics.jsonl` into curves of bounded size: only what is new, however long the run.

A curve is a row of spans of steps. Each span has the least, the largest and the mean value of its steps, so thinning
hides no spike.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

SPANS = 800
"""The most spans that a curve keeps in memory."""
CURVES = 200
"""The most names that are read: a damaged file could have any number."""
CHUNK = 2 * 2**20
"""Bytes that are read at once."""
READ_ALL = 8 * 2**20
"""Bytes. Of a longer unread part, evenly spread lines of about this size are parsed, and all held-out measures."""
HELD_OUT = "held_out_"


class Curve:
    """One name's values over the steps, thinned as they come."""

    def __init__(self) -> None:
        self.first = np.empty(0, np.int64)
        self.last = np.empty(0, np.int64)
        self.low = np.empty(0)
        self.high = np.empty(0)
        self.total = np.empty(0)
        self.count = np.empty(0, np.int64)
        self.width = 1
        """Steps of a span."""
        self.not_finite = 0
        """The number of values that are not finite; they are in no span."""

    def __len__(self) -> int:
        return len(self.first)

    @property
    def mean(self) -> np.ndarray:
        """(spans,) float64."""
        return self.total / self.count

    def add(self, steps: list[int], values: list[float]) -> None:
        """Append values at ascending steps."""
        at, value = np.array(steps, np.int64), np.array(values, np.float64)
        finite = np.isfinite(value)
        self.not_finite += int((~finite).sum())
        at, value = at[finite], value[finite]
        new = (at, at, value, value, value, np.ones(len(at), np.int64))
        self._set(*(np.concatenate(pair) for pair in zip(self._columns(), new, strict=True)))
        self._thin(SPANS)

    def forget_from(self, step: int) -> None:
        """Drop what was logged at `step` and later: a run that continues from a checkpoint does these steps again."""
        kept = self.last < step
        self._set(*(column[kept] for column in self._columns()))

    def thinned(self, limit: int) -> Curve:
        """A copy of at most `limit` spans, all of one width."""
        made = Curve()
        made._set(*self._columns())
        made.width, made.not_finite = self.width, self.not_finite
        if made.width > 1:
            made._merge()  # the newest lines are not merged yet
        made._thin(limit)
        return made

    def _columns(self) -> tuple[np.ndarray, ...]:
        return self.first, self.last, self.low, self.high, self.total, self.count

    def _set(self, *columns: np.ndarray) -> None:
        self.first, self.last, self.low, self.high, self.total, self.count = columns

    def _thin(self, limit: int) -> None:
        if len(self) <= limit:
            return
        self._merge()  # spans of the present width may still be open
        while len(self) > limit:
            self.width *= 2
            self._merge()

    def _merge(self) -> None:
        starts = np.flatnonzero(np.diff(self.first // self.width, prepend=-1))
        ends = np.append(starts[1:], len(self)) - 1
        self._set(
            self.first[starts],
            self.last[ends],
            np.minimum.reduceat(self.low, starts),
            np.maximum.reduceat(self.high, starts),
            np.add.reduceat(self.total, starts),
            np.add.reduceat(self.count, starts),
        )


@dataclass(frozen=True)
class Line:
    """One line of metrics.jsonl."""

    step: int
    values: dict[str, float]


class Metrics:
    """The curves of one run. `update` reads what the file has got since.

    Args:
        file: RUN/metrics.jsonl, which need not exist.
    """

    def __init__(self, file: Path):
        self.file = file
        self._clear()

    def _clear(self) -> None:
        self.curves: dict[str, Curve] = {}
        self.step = -1
        """The newest step; -1 before the first line."""
        self.newest: dict[str, float] = {}
        """The newest value of each name."""
        self.inputs: dict[str, float] = {}
        """The held-out measures of the untranslated pictures."""
        self.validated: Line | None = None
        """The newest held-out measures."""
        self._offset = 0

    def update(self) -> None:
        """Read the lines that were written since the last call. Lines that are not complete are left out.

        Raises:
            OSError: the file is there, and cannot be read.
        """
        try:
            size = self.file.stat().st_size
        except FileNotFoundError:
            self._clear()
            return
        if size < self._offset:  # another file
            self._clear()
        share = min(1.0, READ_ALL / max(size - self._offset, 1))
        with self.file.open("rb") as file:
            file.seek(self._offset)
            rest = b""
            while chunk := file.read(CHUNK):
                whole, end, rest = (rest + chunk).rpartition(b"\n")
                if end:
                    self._offset += len(whole) + 1
                    self._take(parsed(chosen(whole, share)))
                elif len(rest) > 2 * CHUNK:  # no line is that long
                    self._offset += len(rest)
                    rest = b""

    def _take(self, lines: list[Line]) -> None:
        begin = 0
        for place, line in enumerate(lines):
            if line.step < self.step:
                self._append(lines[begin:place])
                begin = place
                for curve in self.curves.values():
                    curve.forget_from(line.step)
                if self.validated is not None and self.validated.step >= line.step:
                    self.validated = None
            self.step = line.step
        self._append(lines[begin:])

    def _append(self, lines: list[Line]) -> None:
        columns: dict[str, tuple[list[int], list[float]]] = {}
        for line in lines:
            if line.step == 0 and (held_out := _held_out(line)):
                self.inputs = held_out
                continue
            for name, value in line.values.items():
                if name not in columns:
                    columns[name] = ([], [])
                steps, values = columns[name]
                steps.append(line.step)
                values.append(value)
        if any(name.startswith(HELD_OUT) for name in columns):
            self.validated = next(Line(line.step, found) for line in reversed(lines) if (found := _held_out(line)))
        for name, (steps, values) in columns.items():
            self.newest[name] = values[-1]
            if name in self.curves or len(self.curves) < CURVES:
                self.curves.setdefault(name, Curve()).add(steps, values)


def _held_out(line: Line) -> dict[str, float]:
    return {name: value for name, value in line.values.items() if name.startswith(HELD_OUT)}


def chosen(lines: bytes, share: float) -> list[bytes]:
    """The lines to parse: all of them, or about this share of the bytes and every line with held-out measures."""
    if share >= 1:
        return lines.split(b"\n")
    cut = lines.find(b"\n", int(len(lines) * share))
    if cut < 0:
        return lines.split(b"\n")
    found, mark, at = lines[:cut].split(b"\n"), f'"{HELD_OUT}'.encode(), cut
    while (at := lines.find(mark, at)) >= 0:
        end = lines.find(b"\n", at)
        end = len(lines) if end < 0 else end
        found.append(lines[lines.rfind(b"\n", 0, at) + 1 : end])
        at = end
    return found


def parsed(lines: list[bytes]) -> list[Line]:
    """The lines that are JSON objects with a step and numbers."""
    try:
        found = json.loads(b"[" + b",".join(line for line in lines if line.strip()) + b"]")
    except (ValueError, RecursionError):  # one of them is damaged
        found = list(_whole(lines))
    return [line for value in found if (line := _line(value)) is not None]


def _whole(lines: list[bytes]) -> Iterator[Any]:
    for line in lines:
        try:
            yield json.loads(line)
        except (ValueError, RecursionError):
            continue


def _line(value: Any) -> Line | None:
    step = value.get("step") if isinstance(value, dict) else None
    if type(step) is not int or not 0 <= step < 2**53:
        return None
    numbers: dict[str, float] = {}
    for name, one in value.items():
        if type(one) is float:
            numbers[name] = one
        elif name != "step" and (number := _number(one)) is not None:
            numbers[name] = number
    return Line(step, numbers)


def _number(value: Any) -> float | None:
    """A number, also one that is not finite, which the file has as text; None for anything else."""
    if isinstance(value, str):
        return float(value) if value in ("nan", "inf", "-inf") else None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf
