"""The pictures, crops and flips of each step, as a function of (seed, step).

The order is the published one of unpaired training. Each epoch visits A in the order of a new permutation of
range(max(|A|, |B|)), modulo |A|; pictures of B are uniformly random; A and B have independent crops and flips. All
draws are made for the *global* batch, and a rank takes every world-th entry, so that the pictures do not depend on the
number of ranks. Without shuffling (published as --serial_batches), place i of an epoch shows picture i of A modulo |A|
and picture i of B modulo |B|; crops and flips stay drawn.

The numbers are raw Philox words, whose stream never changes. NumPy's ``permutation`` and ``integers`` may change
between versions.
"""

from dataclasses import dataclass

import numpy as np

PERMUTATION, BATCH = 0, 1  # streams: the second word of the Philox key


@dataclass(frozen=True)
class Draw:
    """One domain's part of a batch. Each array has one entry per picture.

    Args:
        index: int64, the picture.
        top, left: float64 in [0, 1), the position between the first and the last possible crop.
        flip: bool, mirror left to right.
    """

    index: np.ndarray
    top: np.ndarray
    left: np.ndarray
    flip: np.ndarray


def philox_words(seed: int, stream: int, position: int, count: int) -> np.ndarray:
    """Return `count` uint64 words. Every (seed, stream, position) has 2**64 blocks of its own."""
    counter = np.array([0, position, 0, 0], np.uint64)
    key = np.array([seed, stream], np.uint64)
    return np.random.Philox(counter=counter, key=key).random_raw(count)


class Order:
    """The order of pictures in a run.

    Args:
        size_a, size_b: number of pictures in each domain.
        batch: pictures per rank and step.
        seed: 0 ... 2**64 - 1.
        rank, world: this rank and the number of ranks.
        shuffle: False shows the pictures of both domains in their order.
    """

    def __init__(
        self, size_a: int, size_b: int, batch: int, seed: int, rank: int = 0, world: int = 1, shuffle: bool = True
    ) -> None:
        self.size_a, self.size_b, self.shuffle = size_a, size_b, shuffle
        self.seed, self.rank, self.world = seed, rank, world
        self.global_batch = batch * world
        self.epoch_size = max(size_a, size_b)
        self.steps_per_epoch = max(1, self.epoch_size // self.global_batch)
        self._permutation: tuple[int, np.ndarray] = (-1, np.empty(0, np.int64))

    def permutation(self, epoch: int) -> np.ndarray:
        """Return the epoch's permutation, (epoch_size,) int64."""
        if self._permutation[0] != epoch:
            words = philox_words(self.seed, PERMUTATION, epoch, self.epoch_size)
            self._permutation = (epoch, np.argsort(words, kind="stable"))
        return self._permutation[1]

    def draw(self, step: int) -> tuple[Draw, Draw]:
        """Draw this rank's part of A and of B for a step, counted from 0."""
        epoch, place = divmod(step, self.steps_per_epoch)
        # An epoch smaller than the global batch is one step that wraps around the permutation.
        places = (place * self.global_batch + np.arange(self.global_batch)) % self.epoch_size
        shown = self.permutation(epoch)[places] if self.shuffle else places
        words = philox_words(self.seed, BATCH, step, 7 * self.global_batch)
        uniform = ((words >> np.uint64(11)) * 2.0**-53).reshape(self.global_batch, 7)  # in [0, 1)
        index_a = shown % self.size_a
        index_b = (uniform[:, 0] * self.size_b).astype(np.int64) if self.shuffle else shown % self.size_b
        mine = slice(self.rank, None, self.world)
        a = Draw(index_a[mine], uniform[mine, 1], uniform[mine, 2], uniform[mine, 3] < 0.5)
        b = Draw(index_b[mine], uniform[mine, 4], uniform[mine, 5], uniform[mine, 6] < 0.5)
        return a, b
