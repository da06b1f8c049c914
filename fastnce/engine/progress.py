"""Where a run is in its schedule: in epochs and pictures, which stay true when the batch of all ranks changes.

Steps count updates of the weights, so that the names of checkpoints only grow. What a step reads is its place in the
data: with the batch that a run began with, the place is the count of steps; with another one, it is the same epoch and
the same picture of it, rounded down to a whole step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


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

    def resumed(self, done: int, stored: dict[str, int] | None) -> Progress:
        """This schedule from a checkpoint on; `stored` is its `state`, None where it is older than that.

        Pictures that a smaller batch had seen of a step that is now begun are seen twice in this epoch, at most a
        batch less one.
        """
        if stored is None:
            return self
        steps = min(stored["pictures"] // self.batch, self.steps_per_epoch)
        place = stored["epoch"] * self.steps_per_epoch + steps
        extra = stored["seen"] - done * self.batch
        return Progress(self.epochs, self.steps_per_epoch, self.batch, self.ranks, place - done, extra)


def check_batch(
    stored: dict[str, int] | None, batch: int, ranks: int, where: str, whole_batch: Callable[[], str] = lambda: ""
) -> None:
    """Refuse to continue with another batch than a checkpoint's, which would move the schedule and change the run.

    Args:
        stored: the checkpoint's `Progress.state`; None allows everything.
        batch: of each rank.
        ranks: processes now.
        where: names the run.
        whole_batch: why the share of one process matters, see `Method.whole_batch`; asked where it has changed.

    Raises:
        ValueError: says what would continue the run.
    """
    if stored is None:
        return
    old, before = stored["batch"], stored["ranks"]
    if batch * ranks != old:
        reason = f"steps of {batch * ranks} pictures"
    elif ranks != before and (clause := whole_batch()):
        reason = f"another share for each process, and {clause}"
    else:
        return
    same = _split(before, old // before)
    if batch * ranks != old and old % ranks == 0 and ranks != before:
        same += f", or {_split(ranks, old // ranks)},"
    raise ValueError(
        f"{where} was trained in steps of {old} pictures ({_processes(before)} with data.batch={old // before}), and "
        f"this would be {reason} ({_processes(ranks)} with data.batch={batch}): continue with {same} or allow it with "
        f"run.change_batch=true, which keeps the place in the epochs and leaves optim.lr as it is"
    )


def _split(ranks: int, batch: int) -> str:
    return f"--nproc {ranks} data.batch={batch}"


def _processes(ranks: int) -> str:
    return "1 process" if ranks == 1 else f"{ranks} processes"
