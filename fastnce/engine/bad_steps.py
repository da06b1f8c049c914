"""Skip a bad step: one in which a gradient is not finite.

A bad step changes only the count of bad steps and the loss scale. All other state is bit for bit what it was before:
weights, moments and step counts of every group, averaged weights, statistics of batch norms, pools of images, banks of
codes. The device decides, and the host does not wait for it.

Some losses use a discriminator that an earlier loss has just updated. That update is made before the step is known to
be good, and is undone if it is not (`Snapshot`). So are the buffers that forward passes change. The updates of the last
loss are skipped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from ..common.imports import CodeError
from ..data.augment import PINNED
from ..methods.base import Losses, Phase
from .optim import ParameterGroup, update_groups

Gradients = tuple[Tensor | None, ...]


class Updates:
    """The updates of one step in the paper's order, each as late as the losses allow; none after a bad gradient.

    Args:
        groups: the parameter groups by name.
        scale: the factor that the losses were multiplied by; None for 1.
        one: the number 1 as a float32 scalar on the device.
        traced: make the updates in operations that a compiler can trace.
    """

    def __init__(
        self,
        groups: Mapping[str, ParameterGroup],
        scale: Tensor | None,
        one: Tensor,
        traced: bool = False,
    ):
        self.groups, self.scale, self.one, self.traced = groups, scale, one, traced
        self.found = torch.zeros_like(one)
        """() float32: 1 if a gradient was not finite, else 0."""
        self.waiting: list[tuple[Phase, Gradients]] = []

    def before(self, phase: Phase) -> None:
        """Make the updates that this phase depends on. Call it before the phase computes its loss."""
        if self.waiting and not phase.apart:
            self.apply()

    def add(self, phase: Phase, gradients: Gradients) -> None:
        """Queue the update of a phase, from the gradients of its groups, one group after another."""
        found = [g for g in gradients if g is not None]
        if self.traced:
            norm = torch.nn.utils.get_total_norm(found)
            self.found = torch.where(norm < float("inf"), self.found, self.one)  # False for infinity and NaN
        elif found:
            # In place, although a factor of 1 changes nothing: an expanded gradient must not be written to.
            dense = [g.contiguous() if torch._debug_has_internal_overlap(g) else g for g in found]
            torch._amp_foreach_non_finite_check_and_unscale_(dense, self.found, self.one)
        self.waiting.append((phase, gradients))

    def apply(self) -> Tensor:
        """Make the queued updates unless a gradient was not finite.

        Returns:
            () float32: 1 if one was not, else 0.
        """
        updates: list[tuple[ParameterGroup, Gradients]] = []
        for phase, gradients in self.waiting:
            for group in map(self.groups.__getitem__, phase.groups):
                own, gradients = gradients[: len(group.parameters)], gradients[len(group.parameters) :]
                updates.append((group, own))
        self.waiting = []
        if self.traced:
            for group, own in updates:
                group.update_traced(own, self.found.bool(), self.scale)
        elif updates:
            update_groups(updates, self.found, self.scale)
        return self.found


def run_phases(
    phases: Sequence[Phase], updates: Updates, differentiate: Callable[[Phase], tuple[Gradients, Losses]]
) -> tuple[Losses, Tensor]:
    """Differentiate each phase's loss and update its groups, in the paper's order.

    Args:
        differentiate: returns the gradients of a phase's groups and the losses that it logs.

    Returns:
        the logged losses; and 1 if a gradient was not finite, else 0, () float32.
    """
    losses: Losses = {}
    for phase in phases:
        updates.before(phase)
        gradients, logged = differentiate(phase)
        updates.add(phase, gradients)
        if twice := losses.keys() & logged.keys():
            raise CodeError(f"two phases log {min(twice)!r}: give each loss a name of its own")
        losses |= {name: value.detach() for name, value in logged.items()}
    return losses, updates.apply()


def early_groups(phases: Sequence[Phase]) -> list[str]:
    """The groups that are updated before the last gradient is known."""
    needs = [i for i, phase in enumerate(phases) if not phase.apart]
    return list(dict.fromkeys(name for phase in phases[: max(needs, default=0)] for name in phase.groups))


class BadStepCount:
    """Reads the number of consecutive bad steps without waiting for the device.

    On an accelerator, a copy to the host starts every `every` steps and is read that many steps later, when it has long
    arrived. The steps are fixed, so several ranks, whose counts are equal, stop together. A row of bad steps is noticed
    less than 2 * `every` steps after it reached `limit`. On the CPU, every count is read at once.

    Args:
        counter: () on the device, changed in place.
        limit: the length of a row that has to be noticed; 0 reads nothing.
        late: read as on an accelerator; None: if the counter is on one.
    """

    def __init__(self, counter: Tensor, limit: int, late: bool | None = None):
        device = counter.device
        self.counter, self.limit = counter, limit
        self.late = device.type != "cpu" if late is None else late
        self.every = max(1, limit // 4) if self.late else 1
        self.module = None if device.type == "cpu" else torch.get_device_module(device)
        self.event = None if self.module is None else self.module.Event()
        self.place = torch.zeros((), dtype=counter.dtype, pin_memory=device.type in PINNED)
        self.begun = 0

    def read(self, done: int) -> tuple[float, int]:
        """After step `done`, return a count and the step that it belongs to; (0.0, 0) if none is read at this step."""
        if self.limit <= 0 or done % self.every:
            return 0.0, 0
        if not self.late:
            return self.counter.item(), done
        if self.begun and self.event is not None:
            self.event.synchronize()
        found = (self.place.item(), self.begun) if self.begun else (0.0, 0)
        self.place.copy_(self.counter, non_blocking=True)
        if self.event is not None and self.module is not None:
            self.event.record(self.module.current_stream(self.counter.device))
        self.begun = done
        return found
