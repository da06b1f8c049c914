"""What the training loop needs of a data set."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class DataSet(Protocol):
    """Images of two domains, in batches that follow from the step's number alone.

    A run that was interrupted continues bit for bit, so a batch must not depend on earlier calls. Each rank of a run
    has a data set of its own, which returns the rank's share of the batch. `fastnce.data.UnpairedData` is an example.

    Optional members:
        one_size (bool): whether the images of all steps have one size; True if missing. `run.compile=auto` does not
            compile if it is False, because every new size would be compiled anew.
        size_a, size_b (int): the number of images in each domain, for the line that a run begins with.
        skipped (list of (path, reason)): files that are left out, printed when a run begins.
    """

    steps_per_epoch: int
    """Steps in one epoch, at least 1. The learning rate's schedule counts epochs."""

    def batch(self, step: int, *, decaying: bool = False) -> tuple[Tensor, Tensor]:
        """Return the images of one step.

        Args:
            step: counted from 0 over the whole run.
            decaying: the learning rate has begun to fall. The published loaders resize images by another filter then; a
                data set may ignore it.

        Returns:
            A and B, each float (batch, channels, height, width) in [-1, 1], on the run's device.
        """

    def samples(self, count: int) -> tuple[Tensor, Tensor]:
        """Return up to `count` images of each domain, the same in every call, for sample grids and the monitor."""

    def digest(self) -> str:
        """Return a text that changes if the images change. A checkpoint with another digest is not continued."""
