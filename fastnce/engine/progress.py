"""Where a run is in its schedule: in epochs and pictures, which stay true when the batch of all ranks changes.

Steps count updates of the weights, so that the names of checkpoints only grow. What a step reads is its place in the
data: with the batch that a run began with, the place is the count of steps; with another one, it is the same epoch and
the same picture of it, rounded down to a whole step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..methods.base import Method


@dataclass(frozen=True)
class Progress:
    """The schedule of a run as one batch of all ranks takes it.

    Args:
        epochs: of the whole schedule.
        steps_per_epoch: with this batch.
        batch: pictures of each domain in a step, all ranks together.
        ranks: processes that share it.
        shift: the place in the data less the steps done; 0 unless the batch has changed.
        extra: pictures seen less the steps done times `batch`; 0 unless the batch has changed.
    """

    epochs: int
    steps_per_epoch: int
    batch: int
    ranks: int = 1
    shift: int = 0
    extra: int = 0

    @property
    def total(self) -> int:
        """Steps of the whole schedule: those done, and those that are left with this batch."""
        return self.epochs * self.steps_per_epoch - self.shift

    def place(self, done: int) -> int:
        """The data set's step that comes after so many steps."""
        return done + self.shift

    def epoch(self, done: int) -> int:
        """Counted from 0."""
        return self.place(done) // self.steps_per_epoch

    def seen(self, done: int) -> int:
        """Pictures of each domain in so many steps."""
        return done * self.batch + self.extra

    def state(self, done: int) -> dict[str, int]:
        """What is written beside a checkpoint, for `resumed`."""
        epoch, steps = divmod(self.place(done), self.steps_per_epoch)
        place = {"epoch": epoch, "pictures": steps * self.batch, "seen": self.seen(done)}
        return {"batch": self.batch, "ranks": self.ranks, **place}

    def end(self, steps: int) -> int:
        """Steps after which a run ends; `steps` is its own limit, 0 for none."""
        return min(steps or self.total, self.total)

    def resumed(self, done: int, stored: dict[str, int] | None) -> Progress:
        """This schedule from a checkpoint on; `stored` is its `state`, None where it is older than that.

        Of the pictures that the last batches have shown in this epoch, fewer than one new batch are shown again.

        Raises:
            ValueError: an older checkpoint that cannot have had this batch.
        """
        if stored is None:
            if done > self.total:
                raise ValueError(
                    f"the checkpoint is at step {done:,}, beyond the {self.total:,} of the schedule: it had a smaller "
                    f"batch, which it is too old to name; continue with as many processes as then"
                )
            return self
        steps = min(stored["pictures"] // self.batch, self.steps_per_epoch)
        place = stored["epoch"] * self.steps_per_epoch + steps
        extra = stored["seen"] - done * self.batch
        return Progress(self.epochs, self.steps_per_epoch, self.batch, self.ranks, place - done, extra)

    def resume_messages(self, done: int, steps: int, stored: dict[str, int] | None, where: str) -> list[str]:
        """What to say when a run is continued from the checkpoint `where`, with `end(steps)` as its end."""
        if done >= self.end(steps):
            done_with = f"{self.epochs:,} epochs are" if done >= self.total else f"run.steps={steps} is"
            return [f"nothing is left to do: {done_with} done, {where} is at step {done:,}"]
        said = [f"continuing from {where} (step {done:,} of {self.end(steps):,})"]
        if stored is not None and stored["batch"] != self.batch:
            said.append(
                f"{_steps(self.batch)} from here on, of {stored['batch']} before: epoch {self.epoch(done) + 1} "
                f"goes on where it was, optim.lr stays as it was"
            )
        return said


def check_pictures(state: dict[str, Any], digest: str, where: str) -> None:
    """ValueError where a checkpoint's state does not name the pictures of this digest."""
    if state.get("data") != digest:
        raise ValueError(
            f"{where} was trained on other pictures (files were added, removed or changed since): restore them, or "
            f"train into another --out"
        )


def check_batch(
    stored: dict[str, int] | None, batch: int, ranks: int, where: str, method: Method | Callable[[], Method]
) -> None:
    """Refuse to continue with another batch than a checkpoint's, which would move the schedule and change the run.

    Args:
        stored: the checkpoint's `Progress.state`; None allows everything.
        batch: of all ranks.
        ranks: processes now.
        where: names the run.
        method: or what makes it, for where only the share of each process has changed.

    Raises:
        ValueError: says what would continue the run.
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
        change = f"this would share them otherwise, which counts: {reason}"
    raise ValueError(
        f"{where} was trained in {_steps(old)} ({_split(before, old)}), and {change} "
        f"({_split(ranks, batch)}): continue with {', or '.join(ways)}, or allow it with run.change_batch=true (the "
        f"place in the epochs is kept, optim.lr stays as it is)"
    )


def _steps(batch: int) -> str:
    return f"steps of {batch} {'picture' if batch == 1 else 'pictures'} a domain"


def _split(ranks: int, batch: int) -> str:
    return f"--nproc {ranks} data.batch={batch // ranks}"
