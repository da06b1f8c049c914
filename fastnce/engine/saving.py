"""Save a run's state: when, whether it is on the disk, and what to do if something fails."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from .checkpoint import Checkpoints, NotSaved
from .distributed import RankLost, Ranks, fails_everywhere


class TrainingFailed(RuntimeError):
    """Training cannot continue, or its last state is not saved; the message says why and what is left."""


class Saving:
    """Saves after complete steps only, and keeps track of which of them are on the disk.

    Args:
        write: saves the state after so many steps, or raises `NotSaved`. Only the first rank calls it.
        checkpoints: where `write` saves.
        networks: must be equal on all ranks.
        ranks: the processes that share the run.
        device: for what the ranks exchange.
        say: receives a sentence if saving fails.
    """

    def __init__(
        self,
        write: Callable[[int], None],
        checkpoints: Checkpoints,
        networks: Sequence[nn.Module],
        ranks: Ranks,
        device: torch.device,
        say: Callable[[str], None],
    ):
        self.write, self.checkpoints, self.networks = write, checkpoints, networks
        self.ranks, self.device, self.say = ranks, device, say
        self.done = 0
        self.sound = True
        """Whether the state is that after a complete step; within a step it is not."""
        self.saved_at = self.tried_at = -1

    def resumed(self, done: int) -> None:
        """Note that the run continues from a checkpoint of step `done`."""
        self.done = self.saved_at = self.tried_at = done

    def step_begins(self) -> None:
        """Note that the state is changing."""
        self.sound = False

    def step_ends(self, done: int) -> None:
        """Note that step `done` is complete."""
        self.done, self.sound = done, True

    def save(self) -> None:
        """Save unless it was tried after this step. If it fails, training goes on until the next interval."""
        if self.tried_at != self.done and (reason := self._try(self.ranks)):
            self.say(f"{reason}; training goes on")

    def _try(self, ranks: Ranks) -> str:
        """Save; returns why it failed, on the first rank only, or an empty text."""
        self.tried_at = self.done
        self.sound = False
        ranks.check_drift(self.networks)
        self.sound = True
        if self.ranks.first:
            try:
                self.write(self.done)
            except NotSaved as error:
                return error.strerror or str(error)
        self.saved_at = self.done
        return ""

    def end(self) -> None:
        """Make sure that the last state is on the disk, trying once more.

        Raises:
            TrainingFailed: it is not; raised on every rank. The message names the newest checkpoint.
        """
        if unsaved := self._secure(self.ranks):
            raise TrainingFailed(unsaved)

    def _secure(self, ranks: Ranks) -> str:
        """As `end`, but returns the message. All of `ranks` return together, after the first one has saved."""
        if not any(ranks.most([float(0 < self.done != self.saved_at)], self.device)):
            return ""
        reason = self._try(ranks)
        if not any(ranks.most([float(bool(reason))], self.device)):
            return ""
        try:
            found = self.checkpoints.state()
        except ValueError:
            found = None
        left = f"{found[1]} is the newest whole one, of step {found[0]['step']:,}" if found else "there is no other"
        why = reason or "the first rank cannot save, and says why"
        return f"{why}; so the last state, of step {self.done:,}, is lost: {left}"

    def after(self, error: Exception) -> None:
        """Save the state of the last complete step before a run ends with an error.

        Nothing is saved after an error within a step, which may be incomplete, or if another rank is lost, because the
        device may then wait forever.

        Raises:
            TrainingFailed: `error` is a mistake of the user, and the state cannot be saved either.
        """
        together = self.ranks.world == 1 or fails_everywhere(error)
        alone = self.ranks.first and not isinstance(error, RankLost)
        if not self.sound or not (together or alone):
            return
        try:
            unsaved = self._secure(self.ranks if together else Ranks())
        except Exception as again:  # a failed device returns no tensors
            unsaved = f"the last state, of step {self.done:,}, cannot be saved: {again}"
        if unsaved and isinstance(error, ValueError | OSError):
            raise TrainingFailed(f"{error}; {unsaved}") from error
        if unsaved or self.saved_at == self.done > 0:
            self.say(unsaved or f"stopped after step {self.done:,} and saved")
