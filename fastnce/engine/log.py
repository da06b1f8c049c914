"""The output of a run: progress lines, `log.txt`, `metrics.jsonl`, TensorBoard events and sample grids."""

from __future__ import annotations

import io
import json
import math
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

from ..common.streams import report_error
from ..common.writing import write_whole
from .lines import Lines


class RunLog:
    """Writes to the terminal and into the run's folder.

    A file that cannot be written does not end a run: the first failure and the first success after it are reported,
    and every line is tried. If the terminal is gone, nothing more is printed.

    Args:
        folder: of the run; created if needed.
        tensorboard: also write TensorBoard events (needs the extra `tensorboard`).
        quiet: print nothing on the terminal.

    Raises:
        OSError: a file cannot be opened; the error names it.
    """

    def __init__(self, folder: Path, tensorboard: bool = False, quiet: bool = False):
        folder.mkdir(parents=True, exist_ok=True)
        self._text = Lines(folder / "log.txt")
        self._metrics = Lines(folder / "metrics.jsonl", json_only=True)
        self._quiet = quiet
        self._live = sys.stdout.isatty() and not quiet
        self._open_line = False
        self._board: Any = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # optional; `check_run` has checked that it is installed

            self._board = SummaryWriter(str(folder / "tensorboard"))
        if self._metrics.cut:
            self.say(f"{self._metrics.path}: its last line was not finished, its {self._metrics.cut} bytes are cut off")

    def say(self, sentence: str) -> None:
        """Write one line to the terminal and to log.txt."""
        self._show(sentence)
        self.note(sentence)

    def note(self, sentence: str) -> None:
        """Write one line to log.txt alone."""
        self._add(self._text, sentence)

    def progress(self, line: str) -> None:
        """Show a progress line: on a terminal it replaces the one before, elsewhere it is a line of its own."""
        self.note(line)
        if self._live:
            self._print(f"\r{line}\x1b[K")
            self._open_line = True
        elif not self._quiet:
            self._print(f"{line}\n")

    def metrics(self, step: int, values: dict[str, float]) -> None:
        """Append one JSON object. Numbers that are not finite become strings, so that every line parses."""
        clean = {k: v if math.isfinite(v) else str(v) for k, v in values.items()}
        self._add(self._metrics, json.dumps({"step": step, **clean}))
        if self._board is None:
            return
        try:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)
        except Exception as error:  # raised late by a writing thread, and again at each call
            self._close_board()
            reason = getattr(error, "strerror", None) or error
            self.say(f"TensorBoard: {reason}; training goes on without it, metrics.jsonl has the same numbers")

    def _add(self, file: Lines, line: str) -> None:
        lost = file.lost
        error = file.write(line)
        if error is None and lost:
            self.say(f"{file.path} is written again, {lost:,} {'line was' if lost == 1 else 'lines were'} lost")
        if error is None or lost:
            return
        sentence = f"{file.path}: {error.strerror}; training goes on, and its lines are lost until it can be written"
        if file is not self._text:
            self.say(sentence)
        elif self._quiet:
            report_error(sentence, 0)  # the only place that is left
        else:
            self._show(sentence)

    def _end_line(self) -> None:
        if self._open_line:
            self._print("\n")
            self._open_line = False

    def _show(self, sentence: str) -> None:
        self._end_line()
        if not self._quiet:
            self._print(f"{sentence}\n")

    def _print(self, text: str) -> None:
        """Print. A closed terminal, or a reader such as head that has ended, does not end a run."""
        try:
            print(text, end="", flush=True)
        except (OSError, ValueError):
            self._quiet, self._live = True, False

    def _close_board(self) -> None:
        board, self._board = self._board, None
        with suppress(Exception):  # closing writes what is left
            if board is not None:
                board.close()

    def close(self) -> None:
        self._end_line()
        self._text.close()
        self._metrics.close()
        self._close_board()


class SilentLog:
    """Replaces a `RunLog` on ranks that do not write."""

    def say(self, sentence: str) -> None: ...

    def note(self, sentence: str) -> None: ...

    def progress(self, line: str) -> None: ...

    def metrics(self, step: int, values: dict[str, float]) -> None: ...

    def close(self) -> None: ...


class Pace:
    """Measures images per second, the time left and the share of time spent on data, since the last `read`."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._data = 0.0
        self._steps = 0
        self._average: float | None = None

    def step(self, data_seconds: float) -> None:
        self._data += data_seconds
        self._steps += 1

    def read(self, batch: int, steps_left: int) -> dict[str, float]:
        now = time.perf_counter()
        seconds = max(now - self._start, 1e-9)
        a_step = seconds / max(self._steps, 1)
        # a running mean, so that one slow interval does not distort the time left
        self._average = a_step if self._average is None else 0.7 * self._average + 0.3 * a_step
        result = {
            "images_per_second": batch / a_step,
            "data_share": self._data / seconds,
            "seconds_left": steps_left * self._average,
        }
        self._start, self._data, self._steps = now, 0.0, 0
        return result


def clock(seconds: float) -> str:
    """A duration as 1:02:03 or 2:03."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"


def save_grid(pictures: dict[str, Tensor], path: Path, margin: int = 4) -> None:
    """Write a PNG with one column per name and one row per image.

    Args:
        pictures: by name, (images, channels, height, width) in [-1, 1]. With 3 or more channels, the first three are
            shown as RGB; else the first one.
    """
    columns = list(pictures.values())
    header = 14
    widths = [column.shape[3] for column in columns]
    rows = max(column.shape[0] for column in columns)
    height = max(column.shape[2] for column in columns)
    size = (sum(widths) + margin * (len(columns) + 1), header + rows * (height + margin) + margin)
    canvas = Image.new("RGB", size, (255, 255, 255))
    draw = ImageDraw.Draw(canvas)
    x = margin
    for name, column, width in zip(pictures, columns, widths, strict=True):
        draw.text((x, 1), name, fill=(0, 0, 0))
        for row, picture in enumerate(column):
            canvas.paste(_to_image(picture), (x, header + row * (height + margin)))
        x += width + margin
    path.parent.mkdir(parents=True, exist_ok=True)
    packed = io.BytesIO()
    canvas.save(packed, format="PNG")
    write_whole(path, packed.getvalue())


def _to_image(picture: Tensor) -> Image.Image:
    channels = picture[:3] if picture.shape[0] >= 3 else picture[:1].expand(3, -1, -1)
    values = channels.detach().float().cpu().clamp(-1, 1).add(1).mul(127.5).round()
    return Image.fromarray(values.permute(1, 2, 0).numpy().astype(np.uint8))
