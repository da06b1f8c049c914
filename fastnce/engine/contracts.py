"""What the training loop needs of a data set."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class DataSet(Protocol):
    """Images of two domains, in batches that follow from the step's number alone.

    When a run opens the data set, every member is checked and a wrong one is refused with one sentence. Every later
    batch is checked for its shape, dtype and device. With `data.direction=BtoA`, the run exchanges A and B of every
    result.

    A run that was interrupted continues bit for bit, so a batch must not depend on earlier calls. Each rank of a run
    has a data set of its own, which returns the rank's share of the batch. `fastnce.data.UnpairedData` is an example.

    Optional members:
        one_size (bool): whether the images of all steps have the size of the first batch; True if missing. Another size
            is refused unless it is False. `run.compile=auto` does not compile then, because every new size would be
            compiled anew.
        size_a, size_b (int): the number of images in each domain, for the line that a run begins with.
        skipped (list of (path, reason)): files that are left out, printed when a run begins.
    """

    steps_per_epoch: int
    """Steps in one epoch, a whole number of at least 1. The learning rate's schedule counts epochs."""

    def batch(self, step: int, *, decaying: bool = False) -> tuple[Tensor, Tensor]:
        """Return the images of one step.

        Args:
            step: counted from 0 over the whole run.
            decaying: the learning rate has begun to fall. The published loaders resize images by another filter then; a
                data set may ignore it.

        Returns:
            A and B, each float32 (batch, channels, height, width) in [-1, 1], on the run's device.
        """

    def samples(self, count: int) -> tuple[Tensor, Tensor]:
        """Return up to `count` images of each domain, the same in every call, for sample grids and the monitor.

        Returns:
            A and B, each float32 (images, channels, height, width) in [-1, 1], on the run's device. Both have the same
            number of images, at least 1.
        """

    def digest(self) -> str:
        """Return a text that changes if the images change, and is the same on every rank.

        It is called once per run. A checkpoint with another digest is not continued.
        """
