"""When a run's state is saved, whether it is on the disk, and what is saved when something fails."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from .checkpoint import Checkpoints, NotSaved
from .distributed import RankLost, Ranks, fails_everywhere


class TrainingFailed(RuntimeError):
    """Training cannot go on, or its last state is not saved; the message says why and what is left."""


class Saving:
    """Saves after finished steps only, and knows which of them are on the disk.

    Args:
        write: saves the state after so many steps; `NotSaved` where the disk does not take it. The first rank calls it.
        checkpoints: what `write` writes to.
        networks: must be equal on all ranks.
        ranks: the processes that share the run.
        device: where they exchange what they decide.
        say: receives a sentence about what could not be saved.
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
        """Whether everything is as a finished step left it; within a step it is not."""
        self.saved_at = self.tried_at = -1

    def resumed(self, done: int) -> None:
        self.done = self.saved_at = self.tried_at = done

    def step_begins(self) -> None:
        self.sound = False

    def step_ends(self, done: int) -> None:
        self.done, self.sound = done, True

    def save(self) -> None:
        """Save unless that was tried after this step; where it fails, training goes on until the next interval."""
        if self.tried_at != self.done and (reason := self._try(self.ranks)):
            self.say(f"{reason}; training goes on")

    def _try(self, ranks: Ranks) -> str:
        """What is wrong where it fails, on the first rank; the others know nothing of it."""
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
        """Have the last state on the disk, trying once more.

        Raises:
            TrainingFailed: it is not, on every rank; says what is.
        """
        if unsaved := self._secure(self.ranks):
            raise TrainingFailed(unsaved)

    def _secure(self, ranks: Ranks) -> str:
        """As `end`, returning the sentence; all of `ranks` return alike, once the first one is done."""
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
        """Save what the finished steps have made before a run ends with an error.

        Not after an error within a step, which may be half done. Nor when another rank is lost: what a device waits for
        then may never come.

        Raises:
            TrainingFailed: an error of the user's, and the state cannot be saved either.
        """
        together = self.ranks.world == 1 or fails_everywhere(error)
        alone = self.ranks.first and not isinstance(error, RankLost)
        if not self.sound or not (together or alone):
            return
        try:
            unsaved = self._secure(self.ranks if together else Ranks())
        except Exception as again:  # a device that has failed gives nothing back
            unsaved = f"the last state, of step {self.done:,}, cannot be saved: {again}"
        if unsaved and isinstance(error, ValueError | OSError):
            raise TrainingFailed(f"{error}; {unsaved}") from error
        if unsaved or self.saved_at == self.done > 0:
            self.say(unsaved or f"stopped after step {self.done:,} and saved")
