"""The output of a run: the terminal, `log.txt`, `metrics.jsonl`, `history.jsonl`, and what the callbacks are told."""

from __future__ import annotations

import json
import math
import time
from contextlib import nullcontext
from datetime import datetime
from pathlib import Path
from typing import Any

from ..common.streams import report_error
from . import history
from .bar import Bar, can_draw
from .callbacks import Callbacks, RunInfo
from .lines import Lines


class RunLog:
    """Writes to the terminal and into the run's folder.

    A file that cannot be written does not end a run: the first failure and the first success after it are reported,
    and every line is tried. If the terminal is gone, nothing more is printed.

    Args:
        folder: of the run; created if needed.
        quiet: print nothing on the terminal.
        callbacks: are told of metrics and warnings.

    Raises:
        OSError: a file cannot be opened; the error names it.
    """

    def __init__(self, folder: Path, quiet: bool = False, callbacks: Callbacks | None = None):
        folder.mkdir(parents=True, exist_ok=True)
        self._text = Lines(folder / "log.txt")
        self._metrics = Lines(folder / "metrics.jsonl", json_only=True)
        self._history = Lines(folder / history.NAME, json_only=True)
        self._quiet = quiet
        self._bar: Bar | None = None
        self._done, self._begun = 0, False
        self.callbacks = callbacks or Callbacks()
        for lines in (self._metrics, self._history):
            if lines.cut:
                self.say(f"{lines.path}: its last line was not finished, its {lines.cut} bytes are cut off")

    def begin(self, run: RunInfo, batch: int, save_every: int, **values: Any) -> None:
        """Note the start of a run, and show a progress bar if stdout is a terminal.

        Args:
            batch: images of each domain per step.
            save_every: steps between checkpoints; 0 for one at the end.
            values: for the event "start", such as `command`.
        """
        self._done, self._begun = run.step, True
        machine = "; ".join(f"{name} {value}" for name, value in {**run.versions, **run.machine}.items())
        self.note(f"start after step {run.step:,} of {run.total:,}: {' '.join(values.get('command', []))} ({machine})")
        self.event("start", total=run.total, device=run.device, machine=run.machine, versions=run.versions, **values)
        if can_draw() and not self._quiet:
            self._bar = Bar(run.step, run.total, batch, save_every, self._lose)

    def step(self, done: int) -> None:
        """Note that `done` steps are done."""
        self._done = self.callbacks.step = done
        if self._bar is not None:
            self._bar.step(done)

    def end(self, state: str, reason: str) -> None:
        """Note the end of a run that has begun; see `Callback.end`."""
        if not self._begun:
            return
        self._begun = False  # an error of a callback here does not end the run a second time
        self.event("end", state=state, reason=reason)
        self.callbacks.end(self._done, state, reason)

    def say(self, sentence: str) -> None:
        """Write one line to the terminal and to log.txt."""
        self._show(sentence)
        self.note(sentence)

    def warn(self, sentence: str) -> None:
        """`say` a warning, and add it to the run's history."""
        self.say(sentence)
        self.event("warning", text=sentence)
        self.callbacks.warn(sentence)

    def note(self, sentence: str) -> None:
        """Write one line to log.txt alone, with the time."""
        self._add(self._text, f"{datetime.now():%Y-%m-%d %H:%M:%S}  {sentence}")

    def event(self, name: str, **values: Any) -> None:
        """Append an event to history.jsonl."""
        self._add(self._history, history.event(name, self._done, **values))

    def progress(self, line: str, epoch: str = "", values: str = "") -> None:
        """Show a progress line.

        Args:
            line: for log.txt, and for a stdout that is not a terminal.
            epoch, values: for the progress bar.
        """
        self.note(line)
        if self._bar is not None:
            self._bar.show(epoch, values)
        elif not self._quiet:
            self._print(f"{line}\n")

    def metrics(self, step: int, values: dict[str, float]) -> None:
        """Append one JSON object. Numbers that are not finite become strings, so that every line parses."""
        clean = {k: v if math.isfinite(v) else str(v) for k, v in values.items()}
        self._add(self._metrics, json.dumps({"step": step, **clean}))
        self.callbacks.log(step, values)

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

    def _show(self, sentence: str) -> None:
        if self._quiet:
            return
        with nullcontext() if self._bar is None else self._bar.hidden():
            self._print(f"{sentence}\n")

    def _print(self, text: str) -> None:
        """Print. A closed terminal, or a reader such as head that has ended, does not end a run."""
        try:
            print(text, end="", flush=True)
        except (OSError, ValueError):
            self._lose()

    def _lose(self) -> None:
        """Print nothing more."""
        self._quiet, self._bar = True, None

    def end_bar(self) -> None:
        """Leave the progress bar as it is; later lines are printed below it."""
        if self._bar is not None:
            bar, self._bar = self._bar, None
            bar.close()

    def close(self) -> None:
        self.end_bar()
        for file in (self._text, self._metrics, self._history):
            file.close()


class SilentLog:
    """Replaces a `RunLog` on ranks that do not write."""

    def __init__(self) -> None:
        self.callbacks = Callbacks()

    def begin(self, run: RunInfo, batch: int, save_every: int, **values: Any) -> None: ...

    def step(self, done: int) -> None: ...

    def end(self, state: str, reason: str) -> None: ...

    def say(self, sentence: str) -> None: ...

    def warn(self, sentence: str) -> None: ...

    def note(self, sentence: str) -> None: ...

    def event(self, name: str, **values: Any) -> None: ...

    def progress(self, line: str, epoch: str = "", values: str = "") -> None: ...

    def metrics(self, step: int, values: dict[str, float]) -> None: ...

    def end_bar(self) -> None: ...

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
