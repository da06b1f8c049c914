"""Whether a run stops before its last step: after a signal, for a callback, or because its time is over."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from .distributed import Ranks
from .stop import StopRequest

STOP_CHECK = 10
"""At most this many steps pass before several ranks ask each other whether to stop."""


class EndOfRun:
    """Whether a run stops before its last step, and why.

    Args:
        minutes: `run.minutes`; 0 sets no limit.
        ranks: the processes that share the run.
        device: for what the ranks exchange.
        asked: returns why a callback asks to stop; empty if none does.
    """

    def __init__(self, minutes: float, ranks: Ranks, device: torch.device, asked: Callable[[], str]):
        self.minutes, self.ranks, self.device, self.asked = minutes, ranks, device, asked
        self.why = ""
        """Empty as long as the run goes on."""

    def begin(self, done: int) -> None:
        """Start the clock, after `done` steps."""
        self.began = time.monotonic()
        self._checked, self._checked_at, self._check_at = self.began, done, done

    def seconds(self) -> float:
        """The time since the begin."""
        return time.monotonic() - self.began

    def now(self, stop: StopRequest, done: int) -> bool:
        """Whether to stop before the next step. Several ranks exchange it about once a second, and stop together."""
        over = self.minutes and self.seconds() > 60 * self.minutes
        self.why = stop.name or self.asked() or (f"{self.minutes:g} minutes are over" if over else "")
        if self.ranks.world == 1:
            return bool(self.why)
        if done < self._check_at:
            return False
        now = time.monotonic()
        asked, seconds = self.ranks.most([float(bool(self.why)), now - self._checked], self.device)
        if asked:
            self.why = self.why or "another process was asked to stop"
            return True
        # every rank now knows the seconds of the slowest one, so all choose the same next step
        pace = seconds / max(done - self._checked_at, 1)
        self._check_at = done + max(1, min(STOP_CHECK, int(1 / max(pace, 1e-6))))
        self._checked, self._checked_at = now, done
        return False
