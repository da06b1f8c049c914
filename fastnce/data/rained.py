"""Rain as an augmentation: render rain on clean crops during training, so that clean photographs suffice."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from .augment import PictureStore
from .cached import PictureCache
from .folder import DataError, Folder, clean_folder, domain_folders
from .order import Draw, philox_words
from .rain import RainOptions, render_rain
from .unpaired import Sizes, UnpairedData

RAIN = 2
"""Stream of the Philox key, different from those of `Order`."""
WORDS = 6


class RainedData(UnpairedData):
    """`UnpairedData` in which a share of A's pictures are pictures of B with rendered rain.

    The pictures, their crops and their rain depend only on (seed, step) and the position in the global batch: a
    continued run is bit-equal, and the number of ranks changes nothing. Pictures for rain are drawn independently of
    B's part of the batch, which shows other crops.

    Args:
        root: holds trainA and trainB. With `share` 1, trainA is not needed and not read. (With direction="BtoA", B is
            trainA, and trainB is not needed.)
        share: probability that a picture of A is a rained one, above 0 and at most 1.
        rain: parameters of the rain, or several kinds of which each picture draws one. Lengths are fractions of the
            cached picture's shorter side, before cropping.
        arguments: see `UnpairedData`; 1 or 3 channels, the same for both domains.

    Raises:
        DataError: see `UnpairedData`; or the share or the number of channels is out of range.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        *,
        share: float = 1.0,
        rain: RainOptions | Sequence[RainOptions] | None = None,
        **arguments: Any,
    ) -> None:
        if not 0 < share <= 1:
            raise DataError(f"share={share} should be above 0 and at most 1")
        channels = arguments.get("channels", 3)
        if channels not in (1, 3, (1, 1), (3, 3)):
            count = " and ".join(map(str, channels)) if isinstance(channels, tuple) else channels
            raise DataError(f"rain is rendered on pictures of 1 or 3 channels, the same for A and B, not {count}")
        self.share, self.rain = share, rain or RainOptions()
        if torch.device(arguments.get("device", "cpu")).type != "cpu":
            # Rain is drawn on the CPU and sent in dozens of synchronous copies: run them beside the training step.
            arguments.setdefault("ahead", True)
        super().__init__(root, **arguments)
        self.skipped = list(dict.fromkeys(self.skipped))  # trainB may have been opened for both domains

    def _find_folders(self, root: str | os.PathLike[str], phase: str) -> tuple[Folder, Folder]:
        if self.share < 1:
            return domain_folders(root, phase, self.direction, self.max_images)
        clean = clean_folder(root, phase, self.direction, self.max_images)
        return clean, clean

    def _stored(self, caches: list[PictureCache]) -> list[PictureStore]:
        if caches[0].path != caches[1].path:
            return super()._stored(caches)
        return super()._stored(caches[1:]) * 2  # one copy on the device

    def sizes(self, *, decaying: bool = False) -> tuple[Sizes, Sizes]:
        """See `UnpairedData.sizes`. A picture of A may be one of B with rain."""
        a, b = super().sizes(decaying=decaying)
        return {**b, **a}, b

    def _make(self, step: int, decaying: bool) -> tuple[torch.Tensor, torch.Tensor]:
        a, b = super()._make(step, decaying)
        world, mine = self.order.global_batch, slice(self.order.rank, None, self.order.world)
        words = philox_words(self.order.seed, RAIN, step, WORDS * world).reshape(world, WORDS)[mine]
        uniform = (words >> np.uint64(11)) * 2.0**-53  # (B, 6) in [0, 1)
        wet = np.flatnonzero(uniform[:, 0] < self.share)
        if not len(wet):
            return a, b
        target = self.target.decaying() if decaying else self.target
        store = self._stores[target][1]
        index = (uniform[wet, 1] * self.size_b).astype(np.int64)
        draw = Draw(index, uniform[wet, 2], uniform[wet, 3], uniform[wet, 4] < 0.5)
        crops = self._take(store, draw, target)
        sides = store.cache.index[index][:, 1:].min(axis=1)
        rained = torch.cat(
            [
                render_rain(crop, self.rain, torch.Generator().manual_seed(int(seed >> np.uint64(1))), side=int(side))
                for crop, seed, side in zip(crops.split(1), words[wet, 5], sides, strict=True)
            ]
        )
        if len(wet) == len(a):
            a = rained
        else:
            a[torch.from_numpy(wet).to(a.device)] = rained
        return a.contiguous(memory_format=torch.channels_last), b

    def samples(self, count: int, phase: str = "test") -> tuple[torch.Tensor, torch.Tensor]:
        """See `UnpairedData.samples`. If A's samples would be clean training pictures, rain is rendered on them."""
        a, b = super().samples(count, phase)
        try:
            domain_folders(self.root, phase, self.direction)
        except DataError:
            if self.share == 1:
                a = render_rain(a, self.rain, torch.Generator().manual_seed(self.order.seed % 2**63))
        return a, b
