"""Stop a command by a signal: a run saves first; a command with nothing to save ends at once."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch

NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")
ONE_SIGNAL = 1.0
"""Seconds within which several signals count as one: a launcher passes on what the terminal sends to all."""
INSIST = 5.0
"""Seconds after which a signal before the first step raises again: compilers drop errors of their callbacks."""
BEFORE = " before the first step: nothing was trained"


class Stopped(KeyboardInterrupt):
    """Raised by a signal if there is nothing to save; the message is a sentence.

    Args:
        number: of the signal.
        when: the end of the sentence.
    """

    def __init__(self, number: int, when: str = ""):
        self.number = number
        name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
        super().__init__(f"stopped by {name}{when}")


def heeded() -> list[int]:
    """The signals of `NAMES` that exist on this system and are not ignored (as SIGHUP is under nohup)."""
    numbers = [getattr(signal, name) for name in NAMES if hasattr(signal, name)]
    return [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]


@contextmanager
def handled(numbers: list[int], handler: Any) -> Iterator[None]:
    """Within: `handler` handles these signals. Does nothing outside of the main thread, which receives signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def raising() -> Iterator[None]:
    """Within: the first signal raises `Stopped`, so that partial files are removed; a second one ends at once."""
    first: list[float] = []
    came: list[int] = []

    def handle(number: int, frame: Any) -> None:
        if first:
            if time.monotonic() - first[0] > ONE_SIGNAL:
                os._exit(128 + number)
            return
        first.append(time.monotonic())
        came.append(number)
        raise Stopped(number)

    with handled(heeded(), handle):
        try:
            yield
        except Exception:  # a library may have turned `Stopped` into another error
            if came:
                raise Stopped(came[0]) from None
            raise


@contextmanager
def default() -> Iterator[None]:
    """Within: signals end the process at once, even while it waits in a library outside of Python."""
    with handled(heeded(), signal.SIG_DFL):
        yield


class StopRequest:
    """Turns the first signal into a flag once there is something to save; before, it raises `Stopped`.

    A second signal, at least a second later, ends the process at once.

    Args:
        verbose: print to stderr that the step is finished first.
    """

    def __init__(self, verbose: bool = True) -> None:
        self.name = ""
        self._verbose = verbose
        self._at = 0.0
        self._something_to_save = False
        self._got_through, self._repeated = threading.Event(), False

    def __enter__(self) -> StopRequest:
        self._anomaly = torch.is_anomaly_enabled(), torch.is_anomaly_check_nan_enabled()
        self._unraisable = sys.unraisablehook
        sys.unraisablehook = self._drop
        self._context = handled(heeded(), self._handle)
        self._context.__enter__()
        return self

    def wait_for_steps(self) -> None:
        """Call it after a step: from now on, a signal waits for the end of the next step and for its checkpoint."""
        self._something_to_save = True
        self._got_through.set()

    def _drop(self, dropped: Any) -> None:
        if not isinstance(dropped.exc_value, Stopped):  # `_insist` sends it again
            self._unraisable(dropped)

    def _insist(self, number: int) -> None:
        while not self._got_through.wait(INSIST):
            self._repeated = True
            os.kill(os.getpid(), number)

    def _handle(self, number: int, frame: Any) -> None:
        now = time.monotonic()
        if self._repeated:
            self._repeated = False
            if not self._something_to_save:
                raise Stopped(number, BEFORE)
            return
        if self.name:
            if now - self._at > ONE_SIGNAL:
                os._exit(128 + number)
            return
        self.name, self._at = signal.Signals(number).name, now
        if not self._something_to_save:
            torch.set_anomaly_enabled(False)  # compilers turn it on, and it would print a traceback
            threading.Thread(target=self._insist, args=(number,), daemon=True, name="signal").start()
            raise Stopped(number, BEFORE)
        if self._verbose:
            with suppress(OSError):  # not through Python's buffers, which the signal may have interrupted
                os.write(2, f"\nfastnce: {self.name}: the step is finished and saved first\n".encode())

    def __exit__(self, *error: Any) -> None:
        self._got_through.set()
        sys.unraisablehook = self._unraisable
        torch.set_anomaly_enabled(*self._anomaly)
        self._context.__exit__(*error)


def end_with_parent(parent: int) -> None:
    """Send SIGTERM to this process when the process that started it is gone, even by kill -9."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True, name="launcher").start()
