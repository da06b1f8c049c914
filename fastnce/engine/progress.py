"""The place of a run in its schedule, in epochs and images, which also hold after the batch size changes.

Steps count updates of the weights, so the numbers of checkpoints only grow. A step's place in the data set decides
which images it takes. As long as the batch is the one that the run began with, the place is the number of steps done.
With another batch, it is the same image of the same epoch, rounded down to a whole step.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Any

from ..common.messages import counted
from ..methods.base import Method


@dataclass(frozen=True)
class Progress:
    """The schedule of a run for one batch size.

    Args:
        epochs: of the whole schedule.
        steps_per_epoch: with this batch size.
        batch: images of each domain in a step, of all ranks together.
        ranks: processes that share the batch.
        shift: the place in the data minus the steps done; 0 unless the run began later or the batch has changed.
        extra: the images seen minus the steps done times `batch`; 0 unless the batch has changed.
    """

    epochs: int
    steps_per_epoch: int
    batch: int
    ranks: int = 1
    shift: int = 0
    extra: int = 0

    def begun(self, first_epoch: int) -> Progress:
        """This schedule for a run that begins with `first_epoch`, counted from 1 (published `--epoch_count`)."""
        return replace(self, shift=(first_epoch - 1) * self.steps_per_epoch)

    @property
    def total(self) -> int:
        """Steps of the whole schedule: those done, and those that remain with this batch size."""
        return self.epochs * self.steps_per_epoch - self.shift

    def place(self, done: int) -> int:
        """The step of the data set that follows after `done` steps."""
        return done + self.shift

    def epoch(self, done: int) -> int:
        """The epoch after `done` steps, counted from 0."""
        return self.place(done) // self.steps_per_epoch

    def ended(self, done: int) -> int:
        """The number of the epoch, counted from 1, that step `done` ends; 0 if it ends none."""
        epoch, steps = divmod(self.place(done), self.steps_per_epoch)
        return 0 if steps else epoch

    def seen(self, done: int) -> int:
        """Images of each domain in the first `done` steps."""
        return done * self.batch + self.extra

    def state(self, done: int) -> dict[str, int]:
        """The values that a checkpoint stores for `resumed`."""
        epoch, steps = divmod(self.place(done), self.steps_per_epoch)
        place = {"epoch": epoch, "pictures": steps * self.batch, "seen": self.seen(done)}
        return {"batch": self.batch, "ranks": self.ranks, **place}

    def end(self, steps: int) -> int:
        """The step after which the run ends; `steps` is `run.steps`, 0 for no limit."""
        return min(steps or self.total, self.total)

    def beyond(self, steps: int) -> str:
        """Say that the schedule ends before `run.steps`; an empty text if it does not."""
        if steps <= self.total:
            return ""
        schedule = f"{counted(self.epochs, 'epoch')} of {counted(self.steps_per_epoch, 'step')}"
        return (
            f"run.steps={steps} is beyond the schedule, which ends at step {self.total:,} ({schedule}): a larger "
            f"optim.n_epochs trains longer"
        )

    def resumed(self, done: int, stored: dict[str, int] | None) -> Progress:
        """This schedule continued from a checkpoint.

        Fewer images than one new batch are shown again in the current epoch.

        Args:
            done: steps of the checkpoint.
            stored: its `state`; None for checkpoints of versions that stored none.

        Raises:
            ValueError: `stored` is None and the checkpoint cannot have had this batch size.
        """
        if stored is None:
            if done > self.total:
                raise ValueError(
                    f"the checkpoint is at step {done:,}, beyond the {self.total:,} of the schedule: it had a smaller "
                    f"batch, which its version did not store; continue with the same number of processes as before"
                )
            return self
        steps = min(stored["pictures"] // self.batch, self.steps_per_epoch)
        place = stored["epoch"] * self.steps_per_epoch + steps
        extra = stored["seen"] - done * self.batch
        return Progress(self.epochs, self.steps_per_epoch, self.batch, self.ranks, place - done, extra)

    def resume_messages(self, done: int, steps: int, stored: dict[str, int] | None, where: str) -> list[str]:
        """The messages when a run continues from the checkpoint `where` and ends at `end(steps)`."""
        if done >= self.end(steps):
            epochs = f"{counted(self.epochs, 'epoch')} {'is' if self.epochs == 1 else 'are'}"
            done_with = epochs if done >= self.total else f"run.steps={steps} is"
            return [f"nothing is left to do: {done_with} done, {where} is at step {done:,}"]
        messages = [f"continuing from {where} (step {done:,} of {self.end(steps):,})"]
        if stored is not None and stored["batch"] != self.batch:
            messages.append(
                f"{_steps(self.batch)} from here on, of {stored['batch']} before: epoch {self.epoch(done) + 1} "
                f"goes on where it was, optim.lr does not follow the batch"
            )
        return messages


def check_pictures(state: dict[str, Any], digest: str, where: str, changes: Collection[str] = ()) -> None:
    """ValueError if a checkpoint belongs to images with another digest.

    Args:
        changes: keys that the user changes, which may be the reason.
    """
    if state.get("data") == digest:
        return
    if keys := ", ".join(key for key in changes if key.startswith("data.")):
        raise ValueError(
            f"{where} was trained on other pictures than {keys} gives now, or files were added, removed or changed "
            f"since: leave out this change, or begin another --out with run.start_from={where}"
        )
    raise ValueError(
        f"{where} was trained on other pictures (files were added, removed or changed since): restore them, or "
        f"train into another --out"
    )


def check_batch(
    stored: dict[str, int] | None, batch: int, ranks: int, where: str, method: Method | Callable[[], Method]
) -> None:
    """Refuse to continue a checkpoint with another batch size, which would shift the schedule and change the run.

    Args:
        stored: the checkpoint's `Progress.state`; None allows everything.
        batch: the batch size of all ranks.
        ranks: the number of processes.
        where: names the run.
        method: the method or a function that makes it. It decides if only the share of each process has changed.

    Raises:
        ValueError: the message says what would continue the run.
    """
    if stored is None or (stored["batch"] == batch and stored["ranks"] == ranks):
        return
    old, before = stored["batch"], stored["ranks"]
    ways = [_split(before, old)]
    if batch != old:
        change = f"this would take {_steps(batch)}"
        ways += [_split(ranks, old)] if old % ranks == 0 and ranks != before else []
    else:
        reason = (method if isinstance(method, Method) else method()).whole_batch(ranks=True)
        if not reason:
            return
        change = f"this would share them otherwise, which changes the run: {reason}"
    raise ValueError(
        f"{where} was trained in {_steps(old)} ({_split(before, old)}), and {change} "
        f"({_split(ranks, batch)}): continue with {', or '.join(ways)}, or allow it with run.change_batch=true (the "
        f"place in the epochs is kept, optim.lr stays as it is)"
    )


def _steps(batch: int) -> str:
    return f"steps of {counted(batch, 'picture')} a domain"


def _split(ranks: int, batch: int) -> str:
    return f"--nproc {ranks} data.batch={batch // ranks}"
