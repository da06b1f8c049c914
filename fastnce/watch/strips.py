"""Small pictures out of a run's sample grids: steps spread over time, a fixed budget of bytes, nothing made twice."""

from __future__ import annotations

import base64
import io
import json
import re
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image, features

SIDE, GRID_SIDE = 320, 900
"""The longest side of a picture, and of a grid that is shown whole, in pixels."""
LEAST = 48
"""A picture that needs more bytes than it may have is not made smaller than this."""
QUALITIES = {82: 1.0, 70: 0.75, 55: 0.62, 40: 0.5, 25: 0.38}
"""Qualities of pictures, with their rough sizes in comparison."""
SHOWN = ("A", "fake_B", "B", "fake_A")
"""The columns of a grid to show if it has the first two; the others are for debugging."""
PLANS = ((24, 4), (16, 3), (12, 2), (8, 1))
"""Numbers of steps and rows to show, the first that leaves `ENOUGH` bytes per picture."""
ENOUGH = 8_000


@dataclass(frozen=True)
class Box:
    """A picture within a grid, in pixels."""

    column: str
    row: int
    area: tuple[int, int, int, int]


@dataclass
class Sample:
    """What is shown of one grid: pictures[row][column] is a data URI. A grid of unknown layout has the column ""."""

    step: int
    pictures: list[dict[str, str]] = field(default_factory=list)


class Strips:
    """Makes the pictures of reports, and keeps those that the next report needs again.

    Args:
        budget: bytes of all pictures of one report, as data URIs.
        seconds: no further grid is read after this time in one call of `read`; the next call goes on. None: no limit.
        runs: how many runs share the report.
    """

    def __init__(
        self,
        budget: int,
        seconds: float | None = None,
        runs: int = 1,
        now: Callable[[], float] = time.perf_counter,
    ):
        self.seconds, self.now = seconds, now
        self.budget = budget // max(runs, 1)
        raw = int(self.budget * 3 / 4 * 0.95)  # base64, and the prefixes
        outputs = sum(name.startswith("fake") for name in SHOWN)
        for self.steps, self.rows in PLANS:
            self.bytes = raw // (self.steps * self.rows * outputs + 2 * self.rows)
            if self.bytes >= ENOUGH:
                break
        self.grid_bytes = raw // self.steps
        self._made: dict[tuple[str, int, int], Sample] = {}

    def read(self, folder: Path) -> list[Sample]:
        """The samples of a run, oldest first. Grids that cannot be read are left out."""
        grids = {step: path for path in folder.glob("samples/step-*.png") if (step := _step(path)) is not None}
        began, kept, found = self.now(), {}, []
        for step in _important_first(spread(sorted(grids), self.steps)):
            try:
                stat = grids[step].stat()
            except OSError:
                continue
            key = (str(grids[step]), stat.st_mtime_ns, stat.st_size)
            sample = self._made.get(key)
            if sample is None:
                if self.seconds is not None and self.now() - began > self.seconds:
                    continue
                sample = self._cut(grids[step], step)
            kept[key] = sample
            if sample.pictures:
                found.append(sample)
        self._made = kept
        found.sort(key=lambda sample: sample.step)
        while len(found) > 1 and sum(map(len, distinct(found)[0])) > self.budget:  # inputs that change have no room
            found = found[:-1:2] + found[-1:] if len(found) > 2 else found[-1:]
        return found

    def _cut(self, path: Path, step: int) -> Sample:
        sample = Sample(step)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                with Image.open(path, formats=["PNG"]) as grid:
                    grid.load()  # the layout may stand behind the pixels
                    boxes = shown(layout(grid.info.get("fastnce"), grid.size))
                    if not boxes:
                        sample.pictures.append({"": small(grid.convert("RGB"), GRID_SIDE, self.grid_bytes)})
                    for box in boxes:
                        if box.row >= self.rows:
                            continue
                        while len(sample.pictures) <= box.row:
                            sample.pictures.append({})
                        tile = grid.crop(box.area).convert("RGB")
                        sample.pictures[box.row][box.column] = small(tile, SIDE, self.bytes)
        except Exception:  # a damaged file makes the library raise errors of many kinds
            sample.pictures.clear()
        return sample


def spread(steps: Sequence[int], limit: int) -> list[int]:
    """At most `limit` of the steps, evenly spread, with the first and the last.

    A longer list keeps a part of the earlier choice, so that few pictures are made anew as a run goes on.
    """
    stride = 1
    while -(-len(steps) // stride) + 1 > limit and stride < len(steps):
        stride *= 2
    return sorted({*steps[::stride], *steps[-1:]})


def _important_first(steps: list[int]) -> list[int]:
    """The last and the first step, then the others from coarse to fine."""
    order = [*steps[-1:], *steps[:1]]
    stride = 1 << max(len(steps).bit_length() - 1, 0)
    while stride:
        order += steps[::stride]
        stride //= 2
    return list(dict.fromkeys(order))


def layout(text: Any, size: tuple[int, int]) -> list[Box]:
    """The pictures of a grid as its text says; none if there is no such text, or if it does not fit the grid."""
    try:
        found = json.loads(text)
        boxes = [
            Box(str(column["name"]), row, _area(column, line))
            for row, line in enumerate(found["rows"])
            for column in found["columns"]
        ]
    except (TypeError, ValueError, KeyError, OverflowError, RecursionError):
        return []
    width, height = size
    inside = all(0 <= left < right <= width and 0 <= top < low <= height for left, top, right, low in _areas(boxes))
    return boxes if inside else []


def _area(column: dict[str, Any], row: dict[str, Any]) -> tuple[int, int, int, int]:
    left, width, top, height = (int(one) for one in (column["left"], column["width"], row["top"], row["height"]))
    return left, top, left + width, top + height


def _areas(boxes: list[Box]) -> list[tuple[int, int, int, int]]:
    return [box.area for box in boxes]


def shown(boxes: list[Box]) -> list[Box]:
    """The boxes of input, output and the other direction; all boxes of a method with other names."""
    names = {box.column for box in boxes}
    if not {"A", "fake_B"} <= names:
        return boxes if len(names) <= len(SHOWN) else []
    both = "fake_A" in names
    return [box for box in boxes if box.column in (SHOWN if both else SHOWN[:2])]


def small(picture: Image.Image, side: int, most: int) -> str:
    """A picture as a data URI of about `most` bytes before base64, or less: smaller or coarser if it must be."""
    kind = "webp" if features.check("webp") else "jpeg"
    picture, quality, least = picture.copy(), max(QUALITIES), min(QUALITIES)
    while True:
        picture.thumbnail((side, side), Image.Resampling.LANCZOS, reducing_gap=2.0)
        packed = io.BytesIO()
        picture.save(packed, format=kind, quality=quality)
        share, smallest = most / packed.tell(), max(picture.size) <= LEAST
        if share >= 1 or (smallest and quality == least):
            return _uri(kind, packed)
        coarser = [q for q, size in QUALITIES.items() if q < quality and size <= share * QUALITIES[quality]]
        if coarser or smallest:
            quality = max(coarser, default=least)
        else:
            side = max(LEAST, int(max(picture.size) * min(0.8, share**0.5)))


def _uri(kind: str, packed: io.BytesIO) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(packed.getvalue()).decode('ascii')}"


def distinct(samples: list[Sample]) -> tuple[list[str], dict[str, int]]:
    """All pictures of these samples once, and the place of each: inputs are the same at every step."""
    places: dict[str, int] = {}
    for sample in samples:
        for row in sample.pictures:
            for picture in row.values():
                places.setdefault(picture, len(places))
    return list(places), places


def _step(path: Path) -> int | None:
    match = re.fullmatch(r"step-(\d{1,15})\.png", path.name)
    return int(match[1]) if match else None
