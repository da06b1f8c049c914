"""Trackers: what a run logs, sent to TensorBoard, Weights & Biases, trackio or MLflow (`run.track`).

A tracker works in a thread of its own. A slow or broken server neither slows down a run nor ends it.
"""

from __future__ import annotations

import json
import queue
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from ..common.writing import write_whole
from ..engine.callbacks import Callback, RunInfo
from ..engine.history import read_lines

FILE = "trackers.json"
"""In the run's folder: what each tracker needs to continue its run, by the tracker's name."""

_FILE_LOCK = threading.Lock()
"""Several trackers keep their entries in one file."""


class Tracker(Callback):
    """Sends what a run logs to one library.

    A class for a library overrides `open`, `scalars`, `pictures`, `text` and `close`. They are called in order, in one
    thread of this tracker. If one raises an error, the run gets one warning and goes on without the tracker.

    Args:
        say: receives a sentence for the user.
    """

    optional = True
    name: ClassVar[str]
    """As in `run.track`; also the package to install."""
    opening = 15.0
    """Seconds that the run waits for `open`. A slower one goes on beside the training."""
    closing = 60.0
    """Seconds that the end of the run waits for what is left to send."""
    waiting = 500
    """Calls that may wait to be sent. With more, the tracker has failed."""

    def __init__(self, say: Callable[[str], None] = lambda sentence: None):
        self.say = say
        self.hint = ""
        """A sentence for the user, set by `open`."""
        self.stored: dict[str, Any] = {}
        """What `trackers.json` holds for this tracker; `open` reads and changes it. Empty for a new run."""
        self._calls: queue.Queue[Callable[[], None] | None] = queue.Queue()
        self._opened = threading.Event()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._last = -1
        self._over = False

    # for a library

    def open(self, run: RunInfo) -> None:
        """Start a run, or continue the one that `self.stored` names."""
        raise NotImplementedError

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Send the values of a step."""
        raise NotImplementedError

    def pictures(self, step: int, strips: dict[str, np.ndarray]) -> None:
        """Send the samples of a step: by name, (height, width, 3) uint8, all images of a name side by side."""
        raise NotImplementedError

    def text(self, step: int, sentence: str) -> None:
        """Send a warning."""
        raise NotImplementedError

    def close(self, state: str) -> None:
        """Send what is left, and mark the run as "finished", "stopped" or "failed"."""
        raise NotImplementedError

    # for the training loop

    def begin(self, run: RunInfo) -> None:
        if run.step:  # otherwise the run is a new one, even if an earlier one was in this folder
            self.stored = _read(run.folder).get(self.name, {})
        if self.stored:
            self._last = self.last_step(run)
        self._thread = threading.Thread(target=self._work, args=(run,), name=f"fastnce {self.name}", daemon=True)
        self._thread.start()
        self._opened.wait(self.opening)
        self._check()

    def last_step(self, run: RunInfo) -> int:
        """The last step that the continued run has already sent.

        A run repeats the steps after its newest checkpoint with the same numbers. They are not sent twice.
        """
        lines = read_lines(run.folder / "metrics.jsonl")
        return max((line["step"] for line in lines if isinstance(line.get("step"), int)), default=-1)

    def log(self, step: int, values: dict[str, float]) -> None:
        numbers = {name: float(value) for name, value in values.items() if isinstance(value, int | float)}
        if step > self._last:
            self._put(self.scalars, step, numbers)

    def samples(self, step: int, pictures: dict[str, Tensor]) -> None:
        if step > self._last:
            self._put(self.pictures, step, {name: strip(column) for name, column in pictures.items()})

    def warn(self, step: int, sentence: str) -> None:
        self._put(self.text, step, sentence)

    def end(self, step: int, state: str, reason: str) -> None:
        if self._thread is None or self._over:
            return
        self._put(self.close, state)
        self._calls.put(None)
        self._over = True
        self._thread.join(self.closing)
        if self._thread.is_alive():
            raise TimeoutError(f"{self.name} has not taken everything after {self.closing:g} s")
        self._check()

    def _put(self, call: Callable[..., None], *arguments: Any) -> None:
        self._check()
        if self._over:
            return
        if self._calls.qsize() >= self.waiting:
            self._over = True
            raise TimeoutError(f"{self.name} is too slow, {self.waiting} calls wait for it")
        self._calls.put(partial(call, *arguments))

    def _check(self) -> None:
        """Say the hint of the thread, once, and raise its error, if there is one."""
        hint, self.hint = self.hint, ""
        if hint:
            self.say(hint)
        if self._error is None:
            return
        self._over = True
        if isinstance(self._error, Exception):
            raise self._error
        raise RuntimeError(f"{type(self._error).__name__}: {self._error}")  # a library called sys.exit, for example

    def _work(self, run: RunInfo) -> None:
        try:
            self.open(run)
            if self.stored:
                _keep(run.folder, self.name, self.stored)
        except BaseException as error:
            self._error = error
            return
        finally:
            self._opened.set()
        try:
            while (call := self._calls.get()) is not None:
                call()
        except BaseException as error:
            self._error = error
            with suppress(BaseException):  # the first error counts
                self.close("failed")


def strip(pictures: Tensor, axis: int = 1) -> np.ndarray:
    """Put the images of one name side by side, or above each other with `axis` 0.

    Args:
        pictures: (images, channels, height, width) in [-1, 1]. With 3 or more channels, the first three are RGB; else
            the first one is grey.

    Returns:
        (height, images * width, 3) or (images * height, width, 3), uint8.
    """
    colours = pictures[:, :3] if pictures.shape[1] >= 3 else pictures[:, :1].expand(-1, 3, -1, -1)
    values = colours.detach().float().cpu().clamp(-1, 1).add(1).mul(127.5).round()
    return np.concatenate(list(values.permute(0, 2, 3, 1).numpy().astype(np.uint8)), axis=axis)


def flat(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration with one key per option, such as "data.batch". Lists become texts, which every tracker takes."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            found |= {f"{key}.{name}": inner for name, inner in flat(value).items()}
        else:
            found[key] = value if isinstance(value, bool | int | float | str) else str(value)
    return found


def _read(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):  # without it, a tracker starts a new run
        return {}
    entries = found.items() if isinstance(found, dict) else ()
    return {name: entry for name, entry in entries if isinstance(entry, dict)}


def _keep(folder: Path, name: str, entry: dict[str, Any]) -> None:
    with _FILE_LOCK:
        write_whole(folder / FILE, json.dumps(_read(folder) | {name: entry}, indent=1).encode())
