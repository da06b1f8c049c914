"""Your own data set: images that are generated, or read from anywhere, instead of two folders.

fastnce train fastcut --out RUN data.dataset=examples/own_dataset.py:Discs
python examples/own_dataset.py                         # the same, for three steps
"""

from __future__ import annotations

import torch
from pictures import picture, train_small
from torch import Tensor


class Discs:
    """`fastnce.engine.contracts.DataSet` describes every member."""

    steps_per_epoch = 8

    def __init__(self, options, *, channels, seed, rank, world, device):
        self.batch_size, self.side = options.batch, options.crop_size
        self.seed, self.rank, self.world, self.device = seed, rank, world, device

    def batch(self, step: int, *, decaying: bool = False) -> tuple[Tensor, Tensor]:
        """Depends only on (seed, rank, step), so that an interrupted run continues exactly."""
        first = self.seed + (step * self.world + self.rank) * self.batch_size
        return self._images(range(first, first + self.batch_size))

    def samples(self, count: int) -> tuple[Tensor, Tensor]:
        return self._images(range(count))

    def digest(self) -> str:
        """Identifies the images: a run is not continued with other data."""
        return f"discs of {self.side}"

    def _images(self, seeds: range) -> tuple[Tensor, Tensor]:
        a, b = (
            torch.stack([torch.from_numpy(picture(seed, warm, self.side)) for seed in seeds]).permute(0, 3, 1, 2)
            for warm in (False, True)
        )
        return (a / 127.5 - 1).to(self.device), (b / 127.5 - 1).to(self.device)


def main() -> int:
    return train_small("fastcut", f"data.dataset={__file__}:Discs", "loss.nce_layers=0,4,8")


if __name__ == "__main__":
    main()
