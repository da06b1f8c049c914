"""Copies of what a step changes, restored if the step is bad. The device decides, and the host does not wait.

before = Snapshot(tensors)
...                     # changes them in place
before.restore(bad)
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor


class Snapshot:
    """Copies of tensors as they are now, in one launch per 64 tensors.

    Restoring takes one launch per 48 tensors, which only reads `bad` if the step was good.

    Args:
        tensors: of floating or integer dtypes, dense in memory.
    """

    def __init__(self, tensors: Sequence[Tensor]):
        kinds: dict[torch.dtype, list[Tensor]] = defaultdict(list)
        for tensor in tensors:
            kinds[tensor.dtype].append(tensor.detach())
        self.pairs = [(kind, [torch.empty_like(t) for t in kind]) for kind in kinds.values()]
        for kind, copies in self.pairs:
            # fused SGD ignores strides
            assert all(t.stride() == copy.stride() for t, copy in zip(kind, copies, strict=True))
            torch._foreach_copy_(copies, kind)

    def restore(self, bad: Tensor) -> None:
        """Restore the tensors if `bad`, () bool or float32, is true or 1; else it is 0."""
        good = 1.0 - bad.float()
        for tensors, copies in self.pairs:
            if tensors[0].is_floating_point():
                # A conditional copy: the first step of fused SGD sets its momentum to the gradient unless `found_inf`
                # is 1. (The copies are its parameters and its gradients; the rate of 0 leaves them unchanged.)
                torch._fused_sgd_(
                    copies,
                    copies,
                    tensors,
                    weight_decay=0.0,
                    momentum=1.0,
                    lr=0.0,
                    dampening=0.0,
                    nesterov=False,
                    maximize=False,
                    is_first_step=True,
                    found_inf=good,
                )
            else:
                changes = torch._foreach_sub(copies, tensors)
                torch._foreach_mul_(changes, bad.to(tensors[0].dtype))
                torch._foreach_add_(tensors, changes)
