"""A progress bar on a terminal: steps, time left, the next checkpoint and the newest values."""

from __future__ import annotations

import os
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

try:
    from tqdm import tqdm as _Tqdm
except ImportError:  # the extra `bar`: without it a run prints lines
    _Tqdm = object

LAYOUTS = (
    "{desc}{percentage:3.0f}%|{bar:16}| {steps} [{elapsed}<{remaining}, {speed}{checkpoint}] {values}",
    "{desc}{percentage:3.0f}%|{bar:8}| {steps} [{elapsed}<{remaining}, {speed}] {values}",
    "{desc}{percentage:3.0f}% {steps} [<{remaining}, {speed}] {values}",
    "{percentage:3.0f}% {steps} <{remaining} {values}",
)
"""From wide to narrow. The first one in which all values have room is drawn."""


def on_terminal() -> bool:
    """Whether stdout is a terminal that can redraw a line."""
    try:
        return sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
    except (OSError, ValueError):  # closed
        return False


def can_draw() -> bool:
    """Whether stdout is a terminal and tqdm is installed."""
    return _Tqdm is not object and on_terminal()


class Bar:
    """Redraws one line at most five times a second. It has no colours, so NO_COLOR needs no attention.

    Args:
        done, total: steps done before, and the step after which the run ends.
        batch: images of each domain per step.
        save_every: steps between checkpoints; 0 for one at the end.
        lost: called once if the terminal is gone; nothing is drawn any more.
    """

    def __init__(self, done: int, total: int, batch: int, save_every: int, lost: Callable[[], None]):
        self._stream = _Stream(lost)
        self._bar = _Line(
            total=total,
            initial=done,
            file=self._stream,
            mininterval=0.2,
            miniters=1,
            bar_format=LAYOUTS[0],
        )
        self._bar.batch, self._bar.save_every = batch, save_every

    def step(self, done: int) -> None:
        """Note that `done` steps are done."""
        self._bar.update(done - self._bar.n)

    def show(self, epoch: str, values: str) -> None:
        """Show the epoch before the bar, and the newest values after it."""
        self._bar.values = values
        self._bar.set_description_str(epoch, refresh=False)
        self._bar.refresh()

    @contextmanager
    def hidden(self) -> Iterator[None]:
        """Within: the bar is not on the terminal, so that lines can be printed."""
        self._bar.clear()
        try:
            yield
        finally:
            self._bar.refresh()

    def close(self) -> None:
        """Leave the last state of the bar on the terminal, and end its line."""
        self._bar.refresh()
        self._bar.close()


class _Line(_Tqdm):
    """tqdm without a thread of its own, with the next checkpoint and the newest values."""

    monitor_interval = 0
    _lock = threading.RLock()  # tqdm's own also locks between processes, and needs shared memory
    batch = 1
    save_every = 0
    values = ""

    @property
    def format_dict(self) -> dict[str, Any]:
        known: dict[str, Any] = super().format_dict
        done, total, rate = known["n"], known["total"], known["rate"]
        if rate is None and known["elapsed"] > 0:
            rate = (done - known["initial"]) / known["elapsed"]
        speed = f"{self.batch * rate:.2f} images/s" if rate else "? images/s"
        checkpoint = ""
        if self.save_every and rate:
            left = min(self.save_every - done % self.save_every, total - done)
            checkpoint = f", checkpoint in {self.format_interval(left / rate)}" if left else ""
        steps = f"{done:,}/{total:,}"
        width = shutil.get_terminal_size().columns  # tqdm's own takes a terminal of unknown size for one without room
        known |= {"ncols": width, "steps": steps, "speed": speed, "checkpoint": checkpoint, "values": self.values}
        for layout in LAYOUTS:
            known["bar_format"] = layout
            if len(self.format_meter(**(known | {"ncols": None}))) < width:
                return known
        # drop whole values, the discriminators' first: the generator's total is the last one
        words = self.values.split(" ")
        while words and len(self.format_meter(**(known | {"ncols": None}))) >= width:
            words = words[2:]
            known["values"] = " ".join(words)
        return known


class _Stream:
    """Standard output, which may be closed at any time."""

    def __init__(self, lost: Callable[[], None]):
        self._lost: Callable[[], None] | None = lost

    encoding = property(lambda self: getattr(sys.stdout, "encoding", None) or "ascii")

    def isatty(self) -> bool:
        return on_terminal()

    def fileno(self) -> int:
        return sys.stdout.fileno()

    def write(self, text: str) -> None:
        self._try(lambda: sys.stdout.write(text))

    def flush(self) -> None:
        self._try(sys.stdout.flush)

    def _try(self, act: Callable[[], Any]) -> None:
        if self._lost is None:
            return
        try:
            act()
        except (OSError, ValueError):
            lost, self._lost = self._lost, None
            lost()
