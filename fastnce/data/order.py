"""Which pictures a step sees, where they are cropped and whether they are mirrored: a function of (seed, step).

A comes in the order of a fresh permutation of range(max(|A|, |B|)) each epoch, modulo |A|; B is uniformly random; A and
B have crops and flips of their own (the published rule of unpaired training). Everything is drawn for the *global*
batch, of which a rank takes every world-th entry, so that the pictures do not depend on how many ranks share the work.

The numbers are raw Philox words, whose stream is fixed for ever; NumPy's ``permutation`` and ``integers`` may change
from one version to the next.
"""

from dataclasses import dataclass

import numpy as np

PERMUTATION, BATCH = 0, 1  # streams: the second word of the Philox key


@dataclass(frozen=True)
class Draw:
    """One domain's part of a batch; each array has one entry a picture.

    index: int64, which picture. top, left: float64 in [0, 1), where between the first and the last possible crop.
    flip: bool, mirror left to right.
    """

    index: np.ndarray
    top: np.ndarray
    left: np.ndarray
    flip: np.ndarray


def philox_words(seed: int, stream: int, position: int, count: int) -> np.ndarray:
    """`count` uint64 words; every (seed, stream, position) has 2**64 blocks of its own."""
    counter = np.array([0, position, 0, 0], np.uint64)
    key = np.array([seed, stream], np.uint64)
    return np.random.Philox(counter=counter, key=key).random_raw(count)


class Order:
    """The order of one run.

    Args:
        size_a, size_b: pictures in each domain.
        batch: pictures a rank and step.
        seed: 0 ... 2**64 - 1.
        rank, world: this rank and how many there are.
    """

    def __init__(self, size_a: int, size_b: int, batch: int, seed: int, rank: int = 0, world: int = 1) -> None:
        self.size_a, self.size_b = size_a, size_b
        self.seed, self.rank, self.world = seed, rank, world
        self.global_batch = batch * world
        self.epoch_size = max(size_a, size_b)
        self.steps_per_epoch = max(1, self.epoch_size // self.global_batch)
        self._permutation: tuple[int, np.ndarray] = (-1, np.empty(0, np.int64))

    def permutation(self, epoch: int) -> np.ndarray:
        """(epoch_size,) int64."""
        if self._permutation[0] != epoch:
            words = philox_words(self.seed, PERMUTATION, epoch, self.epoch_size)
            self._permutation = (epoch, np.argsort(words, kind="stable"))
        return self._permutation[1]

    def draw(self, step: int) -> tuple[Draw, Draw]:
        """This rank's part of A and of B at a step, counted from 0."""
        epoch, place = divmod(step, self.steps_per_epoch)
        # An epoch smaller than the global batch is one step that goes round the permutation.
        places = (place * self.global_batch + np.arange(self.global_batch)) % self.epoch_size
        index_a = self.permutation(epoch)[places] % self.size_a
        words = philox_words(self.seed, BATCH, step, 7 * self.global_batch)
        uniform = ((words >> np.uint64(11)) * 2.0**-53).reshape(self.global_batch, 7)  # in [0, 1)
        index_b = (uniform[:, 0] * self.size_b).astype(np.int64)
        mine = slice(self.rank, None, self.world)
        a = Draw(index_a[mine], uniform[mine, 1], uniform[mine, 2], uniform[mine, 3] < 0.5)
        b = Draw(index_b[mine], uniform[mine, 4], uniform[mine, 5], uniform[mine, 6] < 0.5)
        return a, b
