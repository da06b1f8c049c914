"""trackio: a local database, or the Space that its own variables name."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from ..engine.callbacks import RunInfo
from .tracking import Tracker, flat


class TrackioTracker(Tracker):
    """Logs to the project `TRACKIO_PROJECT`, or "fastnce"; `trackio show` opens it."""

    name = "trackio"

    def open(self, run: RunInfo) -> None:
        import trackio

        self.trackio = trackio
        settings: dict[str, Any] = {
            "project": os.environ.get("TRACKIO_PROJECT") or "fastnce",
            "name": run.folder.resolve().name,
            "config": flat(run.config),
            "embed": False,
        }
        with _silent():
            self.run = trackio.init(**settings, resume="allow" if self.stored else "never")
            if self.stored and self.run.id != self.stored.get("id"):  # of another folder with the same name
                self.run.finish()
                self.run = trackio.init(**settings, resume="never")
                self._last = -1
        self.stored = {"id": self.run.id, "project": self.run.project}

    def scalars(self, step: int, values: dict[str, float]) -> None:
        self.run.log(dict(values), step=step)

    def pictures(self, step: int, strips: dict[str, np.ndarray]) -> None:
        shown = {f"samples/{name}": self.trackio.Image(picture) for name, picture in strips.items()}
        self.run.log(shown, step=step)

    def text(self, step: int, sentence: str) -> None:
        with _silent():
            self.run.alert(f"step {step:,}", sentence, step=step)

    def close(self, state: str) -> None:
        with _silent():
            self.run.finish()


@contextmanager
def _silent() -> Iterator[None]:
    """Within: trackio prints only its warnings. Its other lines would break into the progress bar."""
    modules: list[Any] = [importlib.import_module(name) for name in ("trackio", "trackio.run", "trackio.utils")]
    for module in modules:
        module.print = _print_warning
    try:
        yield
    finally:
        for module in modules:
            vars(module).pop("print", None)


def _print_warning(*words: Any, **options: Any) -> None:
    if words and "warning" in str(words[0]).lower():
        print(*words, **options)
