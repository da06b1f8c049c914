"""Unpaired image folders: decoded once, then cropped and mirrored on the device.

::

    data = UnpairedData("horse2zebra", batch=4, device="cuda")
    real_a, real_b = data.batch(step)  # float32 (4, 3, 256, 256) in [-1, 1]
"""

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import torch

from .augment import PictureStore
from .cache import cache_place, open_cache
from .cached import PictureCache
from .decoding import Progress, probe_sizes
from .folder import DataError, Folder, domain_folders, load_image
from .order import Draw, Order
from .staging import Staging
from .target import Target

Sizes = dict[tuple[int, int], Path]
CACHE_BUDGET = 2 << 30  # bytes of device memory: horse2zebra at 286x286 takes 0.55 GiB


class UnpairedData:
    """Batches of two domains for unpaired translation (published loader of CUT, Park et al. 2020).

    Opening decodes every picture that is not cached yet, so unusable files are found before training.

    Args:
        root: holds {phase}A and {phase}B. For "test", valA and valB are used if testA does not exist.
        direction: "AtoB", or "BtoA" to exchange the domains everywhere: A is what {phase}B holds.
        load_size, crop_size: int or (height, width). Pictures are resized to load_size (bicubic), then a random crop of
            crop_size is taken; once `decaying`, they are resized to crop_size. Sides of crop_size: multiples of 4.
        channels: 1, 3 or the files' own number.
        preprocess: one of the published modes, see `Target`. Some keep sizes that depend on the pictures; with batch
            above 1, all pictures of a domain must then get one size.
        flip: mirror left to right with probability 1/2.
        batch: pictures per domain, rank and step.
        shuffle: False shows the pictures of both domains in their order (see `Order`).
        max_images: of each domain, take the first so many (see `Folder.listed`); 0 takes all.
        seed, rank, world: at each step, `world` ranks of batch b together see what one rank of batch world*b sees.
        device: of the batches.
        cache_dir: default `root`/.fastnce-cache, or the user's cache folder if root cannot be written.
        cache_budget: bytes. If both domains fit, they stay in the device's memory. Otherwise only the crops are sent,
            those of the next step during the current one. The CPU reads the mapped cache and ignores this.
        ahead: make the next step's batch in a thread; None: only if crops are sent.
        skip_bad: skip files that cannot be used and list them in `skipped` as (path, reason).
        progress: called with a sentence every few seconds while pictures are decoded.

    Attributes:
        place: the folder of the caches.
        cached_pictures: number of pictures of both domains that they hold.
        built: path and bytes of the cache files that opening has built.

    Raises:
        DataError: folders, files or settings cannot be used. The message names all bad files.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        phase: str = "train",
        *,
        direction: str = "AtoB",
        load_size: int | tuple[int, int] = 286,
        crop_size: int | tuple[int, int] = 256,
        channels: int = 3,
        preprocess: str = "resize_and_crop",
        flip: bool = True,
        batch: int = 1,
        shuffle: bool = True,
        max_images: int = 0,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        device: str | torch.device = "cpu",
        cache_dir: str | os.PathLike[str] | None = None,
        cache_budget: int = CACHE_BUDGET,
        ahead: bool | None = None,
        skip_bad: bool = False,
        progress: Progress | None = None,
    ) -> None:
        self.root = Path(root)
        self.target = Target.checked(preprocess, load_size, crop_size, channels)
        if batch < 1:
            raise DataError(f"data.batch={batch} should be at least 1")
        if not 0 <= rank < world:
            raise DataError(f"rank={rank} should be between 0 and world-1, and world is {world}")
        if not 0 <= seed < 2**64:
            raise DataError(f"seed={seed} should be between 0 and 2**64-1")
        self.direction, self.max_images = direction, max_images
        self.flip, self.skip_bad, self.progress = flip, skip_bad, progress
        self.device, self.cache_budget = torch.device(device), cache_budget
        folders = self._find_folders(root, phase)
        self.place = cache_place(self.root, cache_dir)
        caches, complaints = [], []
        for folder in folders:
            try:
                caches.append(open_cache(folder, self.target, self.place, skip_bad=skip_bad, progress=progress))
            except DataError as error:
                complaints.append(str(error))
        if complaints:
            raise DataError("\n".join(complaints))
        self.skipped: list[tuple[Path, str]] = [file for cache in caches for file in cache.skipped]
        self.cached_pictures = sum({cache.path: len(cache.folder) for cache in caches}.values())
        self.built = {cache.path: cache.path.stat().st_size for cache in caches if cache.built}
        self._folders: list[Folder] = [cache.folder for cache in caches]
        self._stores: dict[Target, list[PictureStore]] = {self.target: self._stored(caches)}
        self.size_a, self.size_b = (len(folder) for folder in self._folders)
        self.order = Order(self.size_a, self.size_b, batch, seed, rank, world, shuffle)
        self.epoch_size, self.steps_per_epoch = self.order.epoch_size, self.order.steps_per_epoch
        self.one_size = self._has_one_size(batch)
        sent = any(store.flat is None for store in self._stores[self.target])
        self.staging = Staging(self._make, self.device) if (sent if ahead is None else ahead) else None

    def _find_folders(self, root: str | os.PathLike[str], phase: str) -> tuple[Folder, Folder]:
        return domain_folders(root, phase, self.direction, self.max_images)

    def _has_one_size(self, batch: int) -> bool:
        """Whether the batches of all steps have the same size; refuse sizes that cannot be in one batch."""
        found = [self.sizes()]
        one = all(len(sizes) == 1 for sizes in found[0])
        if self.target.decaying() != self.target and (one or batch > 1):
            found.append(self.sizes(decaying=True))
        for several in (sizes for both in found for sizes in both if len(sizes) > 1 and batch > 1):
            (first, file), (second, other) = list(several.items())[:2]
            raise DataError(
                f"data.batch={batch} should be 1 with data.preprocess={self.target.preprocess}, which gives pictures "
                f"of several sizes: {file} {first[1]}x{first[0]}, {other} {second[1]}x{second[0]}"
            )
        return one and all([*map(list, both)] == [*map(list, found[0])] for both in found)

    def batch(self, step: int, *, decaying: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the batch of one step. It depends only on (seed, rank, step).

        Args:
            step: counted from 0 over the whole run.
            decaying: whether the learning rate is decaying. The first such call builds the cache for it (see
                `prepare`).

        Returns:
            A and B, float32 (batch, channels, height, width) in [-1, 1], channels-last in memory.
        """
        return self._make(step, decaying) if self.staging is None else self.staging.take(step, decaying)

    def close(self) -> None:
        """Stop the thread that makes batches ahead, if there is one."""
        if self.staging is not None:
            self.staging.close()

    def _make(self, step: int, decaying: bool) -> tuple[torch.Tensor, torch.Tensor]:
        self.prepare(decaying=decaying)
        target = self.target.decaying() if decaying else self.target
        draws = self.order.draw(step)
        a, b = (self._take(store, draw, target) for store, draw in zip(self._stores[target], draws, strict=True))
        return a, b

    def _take(self, store: PictureStore, draw: Draw, target: Target) -> torch.Tensor:
        size = target.crop if target.window else None
        return store.crops(draw, size, self.flip, trim=target.window == "trim")

    def prepare(self, *, decaying: bool = False) -> None:
        """Build the cache and the stores that `batch(decaying=...)` reads, unless they exist."""
        target = self.target.decaying() if decaying else self.target
        if target in self._stores:
            return
        caches = [open_cache(folder, target, self.place, progress=self.progress) for folder in self._folders]
        if self.device.type != "cpu":
            self._stores.clear()  # both variants together would exceed the budget
        self._stores[target] = self._stored(caches)

    def sizes(self, *, decaying: bool = False) -> tuple[Sizes, Sizes]:
        """Return every (height, width) of the batches of A and of B, each with an example file.

        Args:
            decaying: of the batches while the learning rate decays. If they have no cache yet, headers are read.
        """
        target = self.target.decaying() if decaying else self.target
        stores, found = self._stores.get(target, []), list[Sizes]()
        for place, folder in enumerate(self._folders):
            if target.fixed:
                found.append({target.fixed: folder.file(0)})
            elif stores:
                shown = stores[place].cache.index[:, 1:]
                shown = np.minimum(shown, target.crop) if target.window else shown
                sizes, first = np.unique(shown, axis=0, return_index=True)
                found.append({tuple(sizes[i].tolist()): folder.file(int(first[i])) for i in np.argsort(first)})
            else:
                found.append(probe_sizes(folder, target))
        return found[0], found[1]

    def cached(self, *, decaying: bool = False) -> dict[Path, int]:
        """Build (if necessary) and check the cache files that `batch(decaying=...)` reads; return path -> bytes."""
        self.prepare(decaying=decaying)
        stores = self._stores[self.target.decaying() if decaying else self.target]
        for store in stores:
            store.cache.check()
        return {store.cache.path: store.cache.path.stat().st_size for store in stores}

    def _stored(self, caches: list[PictureCache]) -> list[PictureStore]:
        resident = sum(cache.pixels.nbytes for cache in caches) <= self.cache_budget
        return [PictureStore(cache, self.device, resident) for cache in caches]

    def samples(self, count: int, phase: str = "test") -> tuple[torch.Tensor, torch.Tensor]:
        """Load the first pictures of each domain for sample grids, resized to crop_size without cropping.

        They come from {phase}A and {phase}B (for "test", from valA and valB if testA does not exist). Without these
        folders, they are training pictures.

        Returns:
            A and B on the device, float32 (n, channels, *crop_size) in [-1, 1]; n is `count`, or the size of the
            smaller folder if that is less.

        Raises:
            DataError: a picture cannot be used and `skip_bad` is off.
        """
        try:
            folders = list(domain_folders(self.root, phase, self.direction))
        except DataError:
            folders = self._folders
        columns: list[list[torch.Tensor]] = []
        for folder in folders:
            pictures: list[torch.Tensor] = []
            for place in range(len(folder)):
                if len(pictures) == count:
                    break
                try:
                    pictures.append(load_image(folder.file(place), self.target.channels, self.target.crop))
                except DataError:
                    if not self.skip_bad:
                        raise
            columns.append(pictures)
        least = min(len(pictures) for pictures in columns)
        if least == 0:
            raise DataError(f"no {phase} picture in {self.root} can be used as a sample")
        a, b = (torch.stack(pictures[:least]).to(self.device) for pictures in columns)
        return a, b

    def digest(self) -> str:
        """Return 64 hexadecimal digits of the files' names and sizes in bytes, so that a run detects changed data.

        Modification times are not included: a copied data set is the same data set.
        """
        listings = [[(name, size) for name, size, _ in folder.listing()] for folder in self._folders]
        return hashlib.sha256(json.dumps(listings).encode()).hexdigest()
