"""Signals that ask a run to stop: the step is finished, everything is saved, the same command continues."""

from __future__ import annotations

import os
import signal
import threading
from typing import Any


class StopRequest:
    """Turns the first SIGINT, SIGTERM or SIGUSR1 into a flag; a second one ends the process at once."""

    SIGNALS = ("SIGINT", "SIGTERM", "SIGUSR1")

    def __init__(self) -> None:
        self.name = ""
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for name in self.SIGNALS:
                if hasattr(signal, name):
                    number = getattr(signal, name)
                    self._previous[number] = signal.signal(number, self._handle)
        return self

    def _handle(self, number: int, frame: Any) -> None:
        if self.name:
            os._exit(128 + number)
        self.name = signal.Signals(number).name

    def __exit__(self, *_: Any) -> None:
        for number, previous in self._previous.items():
            signal.signal(number, previous)
