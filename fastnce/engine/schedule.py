"""The learning rate of every step: its schedule over the epochs, and its rise at the beginning.

The schedules are those of the published code (`networks.get_scheduler` of CUT), as functions of the epoch. Two things
differ there: a schedule `constant`, and what `plateau` watches, which the published code never sets (see `Plateau`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .options import OptimOptions

CUT_BY = 0.1
"""What `step` multiplies the rate by."""


def linear(epoch: int, n_epochs: int, n_epochs_decay: int) -> float:
    """The factor of the learning rate in an epoch, counted from 0 (published `lambda_rule`)."""
    return 1.0 - max(0, epoch + 1 - n_epochs) / (n_epochs_decay + 1)


def factor_of(options: OptimOptions, epoch: int) -> float:
    """The factor of the learning rate in an epoch, counted from 0, for every schedule but `plateau`.

    `step` and `cosine` count from `optim.first_epoch`, as the published schedulers do. After `n_epochs`, `cosine` rises
    again, as `torch.optim.lr_scheduler.CosineAnnealingLR` does.
    """
    since = max(0, epoch + 1 - options.first_epoch)
    if options.schedule == "step":
        return CUT_BY ** (since // options.decay_every)
    if options.schedule == "cosine":
        return (1.0 + math.cos(math.pi * since / options.n_epochs)) / 2.0
    if options.schedule == "constant":
        return 1.0
    return linear(epoch, options.n_epochs, options.n_epochs_decay)


class Plateau:
    """Cuts the learning rate where the generators' loss stands still (`torch.optim.lr_scheduler.ReduceLROnPlateau`).

    The published settings: after more than 5 epochs in a row whose loss is not 1 % below the best one, the rate is
    multiplied by 0.2. The published code passes a measure that it never sets, 0 in every epoch, so there the rate falls
    after the epochs 7, 13, 19 and so on, whatever is trained. Here the measure is the loss that the generators
    minimise: the mean over the steps of the epoch that were not bad, and over the ranks.

    The state is in tensors on the device: a checkpoint holds them, and a recorded step adds to them.

    Args:
        lr: the learning rate that is cut.
        device: of the step.
    """

    FACTOR = 0.2
    PATIENCE = 5
    THRESHOLD = 0.01
    SMALLEST = 1e-8
    """A cut that lowers the rate by less is not made."""
    NAMES = ("mean", "count", "best", "judged", "waited", "cuts")

    def __init__(self, lr: float, device: torch.device):
        self.lr = lr
        self.tensors = {name: torch.zeros((), device=device) for name in self.NAMES}

    def add(self, losses: Sequence[Tensor], bad: Tensor) -> None:
        """Take the generators' losses of a step, each (), into the mean of the epoch, unless `bad`, () bool, holds."""
        mean, count = self.tensors["mean"], self.tensors["count"]
        loss = torch.stack([loss.to(mean.dtype) for loss in losses]).sum()
        good = bad.logical_not() & loss.isfinite()
        count.add_(good)
        # a loss that is not finite must not reach the mean, not even times 0
        mean.add_(torch.where(good, loss - mean, torch.zeros_like(mean)) / count.clamp_min(1.0))

    def judge(self) -> str:
        """Compare the loss of the epoch that has ended with the best one; returns a sentence if the rate is cut.

        It waits for the device, once per epoch.
        """
        names = list(self.tensors)
        state = dict(zip(names, torch.stack(list(self.tensors.values())).tolist(), strict=True))
        said = ""
        if state["count"]:
            loss, best = state["mean"], state["best"]
            wanted = best * (1.0 - math.copysign(self.THRESHOLD, best))
            state["waited"] += 1
            if not state["judged"] or loss < wanted:
                state["best"], state["waited"], state["judged"] = loss, 0, 1
            if state["waited"] > self.PATIENCE:
                waited, state["waited"] = int(state["waited"]), 0
                rate = self.lr * self.FACTOR ** state["cuts"]
                if rate - rate * self.FACTOR > self.SMALLEST:
                    state["cuts"] += 1
                    said = (
                        f"the generators' loss, {loss:.4g}, has not fallen by 1 % below {best:.4g} in {waited} epochs: "
                        f"the learning rate is {rate * self.FACTOR:.3g} from here on"
                    )
        state["mean"] = state["count"] = 0.0
        for name, value in state.items():
            self.tensors[name].fill_(value)
        return said

    def factor(self) -> float:
        """The factor of the learning rate now. It waits for the device."""
        return self.FACTOR ** self.tensors["cuts"].item()


class Rate:
    """Sets the factor of the learning rate before each step, when it changes.

    Args:
        options: the schedule.
        plateau: for `optim.schedule=plateau`, the one that the step adds to.
        set_factor: receives a new factor.
    """

    def __init__(self, options: OptimOptions, plateau: Plateau | None, set_factor: Callable[[float], None]):
        self.options, self.plateau, self.set_factor = options, plateau, set_factor
        self.factor = math.nan
        """The factor of the last step."""
        self._epoch = -1
        self._of_epoch = 1.0

    def before_step(self, place: int, steps_per_epoch: int) -> None:
        """Set the factor of a step.

        Over the first `optim.warmup` epochs of a run the rate rises by the same amount at every step, from one step's
        share to the schedule's rate (gradual warm-up of Goyal et al. 2017, section 2.2).

        Args:
            place: the step of the data set, as `Progress.place` returns.
            steps_per_epoch: of the data set.
        """
        epoch = place // steps_per_epoch
        if epoch != self._epoch:
            self._epoch = epoch
            self._of_epoch = factor_of(self.options, epoch) if self.plateau is None else self.plateau.factor()
        risen = place + 1 - (self.options.first_epoch - 1) * steps_per_epoch
        whole = self.options.warmup * steps_per_epoch
        factor = self._of_epoch * (risen / whole if 0 < risen < whole else 1.0)
        if factor != self.factor:
            self.factor = factor
            self.set_factor(factor)

    def after_epoch(self) -> str:
        """Judge the epoch that has ended; returns a sentence if that changes the rate."""
        return "" if self.plateau is None else self.plateau.judge()
