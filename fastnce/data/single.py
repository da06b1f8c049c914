"""One picture per domain: crops of a zoomed picture, as SinCUT is trained (Park et al., ECCV 2020, section 4.4).

::

    data = SinglePictureData("monet2cliff", batch=16, device="cuda")
    real_a, real_b = data.batch(step)  # float32 (16, 3, 64, 64) in [-1, 1]
"""

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..common.messages import counted
from .augment import send
from .folder import DataError, Folder, domain_folders, load_image
from .order import philox_words

STREAM_A, STREAM_B = 2, 3  # different from the streams of `order`


class SinglePictureData:
    """Batches of crops of two pictures, with the interface of `UnpairedData`.

    Each batch draws one zoom per domain, independently for width and height. Its crops are different cells of one grid,
    so no two overlap and negatives never show the place of their query. (The published loader intends both, but its
    shuffling mixes zooms and repeats cells.) If the zoomed picture had fewer cells than the batch has crops, it is
    zoomed less.

    Args:
        root: holds trainA and trainB with one picture each.
        crop_size: side of the crops.
        phase, direction, max_images: see `UnpairedData`.
        channels: 1, 3 or the files' own number; two numbers are those of A and of B.
        flip: mirror crops left to right with probability 1/2.
        batch: crops per domain, rank and step.
        seed, rank, world: together, `world` ranks of batch b see what one rank of batch world*b sees.
        device: of the pictures and the batches.
        zoom: smallest zoom factor, in (0, 1]; the largest is 1. Published: 1 / random_scale_max.
        crops_per_epoch: number of crops that count as an epoch.

    Raises:
        DataError: a domain does not have exactly one picture, or the picture cannot be read or is too small for a
            batch.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        *,
        phase: str = "train",
        direction: str = "AtoB",
        max_images: int = 0,
        crop_size: int = 64,
        channels: int | tuple[int, int] = 3,
        flip: bool = True,
        batch: int = 16,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        device: str | torch.device = "cpu",
        zoom: float = 1 / 3,
        crops_per_epoch: int = 100_000,
    ) -> None:
        if batch < 1 or not 0 <= rank < world or not 0 < zoom <= 1:
            raise DataError(
                f"batch={batch} should be at least 1, rank={rank} between 0 and world-1={world - 1}, and zoom={zoom} "
                f"above 0 and at most 1"
            )
        self.root = Path(root)
        self.crop, self.flip, self.zoom = crop_size, flip, zoom
        self.seed, self.rank, self.world = seed, rank, world
        self.global_batch = batch * world
        self.device = torch.device(device)
        self._folders = domain_folders(root, phase, direction, max_images)
        counts = (channels, channels) if isinstance(channels, int) else channels
        self._pictures = [self._read(folder, count) for folder, count in zip(self._folders, counts, strict=True)]
        self.skipped: list[tuple[Path, str]] = []
        self.size_a = self.size_b = 1
        self.epoch_size = crops_per_epoch
        self.steps_per_epoch = max(1, crops_per_epoch // self.global_batch)

    def _read(self, folder: Folder, channels: int) -> Tensor:
        if len(folder) != 1:
            raise DataError(
                f"{folder.path} holds {counted(len(folder), 'picture')}; single-picture training takes exactly one per "
                f"domain"
            )
        path = folder.file(0)
        picture = load_image(path, channels)[None].to(self.device)
        height, width = picture.shape[2:]
        cells = (height // self.crop) * (width // self.crop)
        if cells < self.global_batch:
            raise DataError(
                f"{path} of {width}x{height} pixels has {cells} separate crops of {self.crop}x{self.crop}, a batch "
                f"needs {self.global_batch}: take a larger picture, smaller crops or a smaller batch"
            )
        return picture

    def batch(self, step: int, *, decaying: bool = False) -> tuple[Tensor, Tensor]:
        """Return the crops of one step. They depend only on (seed, rank, step); `decaying` has no effect.

        Returns:
            A and B, float32 (batch, channels, crop_size, crop_size) in [-1, 1], channels-last in memory.
        """
        a, b = self._pictures
        return self._crops(a, STREAM_A, step), self._crops(b, STREAM_B, step)

    def prepare(self, *, decaying: bool = False) -> None:
        """Do nothing: both pictures are in memory."""

    def cached(self, *, decaying: bool = False) -> dict[Path, int]:
        """Return no files: every run reads the pictures again."""
        return {}

    def _crops(self, picture: Tensor, stream: int, step: int) -> Tensor:
        crop = self.crop
        height, width = picture.shape[2:]
        most = (height // crop) * (width // crop)
        words = philox_words(self.seed, stream, step, 4 + most + self.global_batch)
        uniform = (words >> np.uint64(11)) * 2.0**-53  # in [0, 1)
        height, width = self.zoomed(height, width, uniform[0], uniform[1])
        rows, columns = height // crop, width // crop
        top = int(uniform[2] * (height - rows * crop + 1))
        left = int(uniform[3] * (width - columns * crop + 1))
        mine = slice(self.rank, self.global_batch, self.world)
        cells = np.argsort(words[4 : 4 + rows * columns], kind="stable")[mine]
        mirrored = (uniform[4 + most :] < 0.5)[mine] & self.flip
        whole = F.interpolate(picture, (height, width), mode="bilinear", antialias=True, align_corners=False)
        grid = whole[0, :, top : top + rows * crop, left : left + columns * crop]
        grid = grid.unflatten(1, (rows, crop)).unflatten(3, (columns, crop)).permute(1, 3, 0, 2, 4).flatten(0, 1)
        crops = grid[send(torch.from_numpy(cells), self.device)]
        crops = torch.where(send(torch.from_numpy(mirrored), self.device)[:, None, None, None], crops.flip(3), crops)
        return crops.contiguous(memory_format=torch.channels_last)

    def zoomed(self, height: int, width: int, y: float, x: float) -> tuple[int, int]:
        """Return the sides of the zoomed picture for draws in [0, 1), enlarged towards full size until a batch fits."""
        for shrink in np.linspace(1.0, 0.0, 21):
            sides = [
                max(self.crop, round(side * (1 - shrink * (1 - self.zoom) * (1 - draw))))
                for side, draw in ((height, y), (width, x))
            ]
            if (sides[0] // self.crop) * (sides[1] // self.crop) >= self.global_batch:
                break
        return sides[0], sides[1]

    def samples(self, count: int, phase: str = "train") -> tuple[Tensor, Tensor]:
        """Return the picture of each domain, cut to sides of multiples of 4; `count` and `phase` have no effect."""
        a, b = (p[:, :, : p.shape[2] // 4 * 4, : p.shape[3] // 4 * 4] for p in self._pictures)
        return a, b

    def digest(self) -> str:
        """Return 64 hexadecimal digits that change when a picture is renamed or written again."""
        return hashlib.sha256(json.dumps([folder.listing() for folder in self._folders]).encode()).hexdigest()
