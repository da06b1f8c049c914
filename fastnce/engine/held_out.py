"""The held-out images of a run: pairs, or two sets that are not paired."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from torch import Tensor

from ..data import DataError, find_images, load_image
from ..data.folder import order_of
from ..evaluate.pairs import Pair, check_rain_side, find_pairs

Item = TypeVar("Item")


@dataclass(frozen=True)
class Lone:
    """A held-out image without a truth.

    Args:
        name: its path below testA, or below testB with `data.direction=BtoA`.
        file: the image.
    """

    name: str
    file: Path

    def load(self, channels: int = 3) -> tuple[Tensor, None]:
        """Load (image, None), float32 (channels, height, width) in [-1, 1]; raise DataError as `load_image` does."""
        return load_image(self.file, channels), None

    @property
    def domain(self) -> str:
        """The name of the domain's folder."""
        return self.file.parents[len(Path(self.name).parts) - 1].name


def sizes_of(item: Pair | Lone) -> tuple[int, ...]:
    """The sizes of an item's files, in bytes."""
    files = (item.file,) if isinstance(item, Lone) else (item.rainy, item.clean)
    return tuple(file.stat().st_size for file in files)


def find_validation(
    data: str, validate: str, limit: int = 0, rain_side: str = "right", exchanged: bool = False
) -> list[Pair]:
    """Find the held-out pairs of a run.

    Args:
        data: the run's data folder. Its subfolder `test` is tried if `validate` is empty.
        validate: a folder of pairs in any layout that `fastnce evaluate` accepts.
        limit: take at most this many, spread evenly over the set; 0 takes all.
        rain_side: the rainy half of strips, "right" or "left".
        exchanged: the truths are the inputs (see `Pair.exchanged`).

    Returns:
        the pairs in the order of their names; none if `validate` is empty and DIR/test has no pairs.

    Raises:
        DataError: `validate` names a folder without pairs.
    """
    check_rain_side(rain_side)
    if validate:
        pairs = find_pairs(validate, rain_side)
    else:
        try:
            pairs = find_pairs(Path(data) / "test", rain_side)
        except DataError:
            return []
    return _spread([pair.exchanged() for pair in pairs] if exchanged else pairs, limit)


def unpaired(folder: str) -> bool:
    """Whether a folder holds testA and testB."""
    return bool(folder) and all((Path(folder) / name).is_dir() for name in ("testA", "testB"))


def find_unpaired(folder: str, limit: int = 0, direction: str = "AtoB") -> tuple[list[Lone], list[Path]]:
    """Find held-out images that are not paired.

    Args:
        folder: holds testA and testB.
        limit: take at most this many of each, spread evenly; 0 takes all.
        direction: "AtoB", or "BtoA" to exchange the folders.

    Returns:
        the images of testA, and the files of testB, in the order of their names.

    Raises:
        DataError: one of them has no images.
    """
    sides = [Path(folder) / f"test{domain}" for domain in order_of(direction)]
    found = []
    for side in sides:
        files = find_images(side)
        if not files:
            raise DataError(f"{side} holds no pictures")
        found.append(_spread(files, limit))
    return [Lone(str(file.relative_to(sides[0])), file) for file in found[0]], found[1]


def _spread(items: Sequence[Item], limit: int) -> list[Item]:
    if limit < 0:
        raise ValueError(f"run.validate_pictures must be at least 0, not {limit}")
    if 0 < limit < len(items):
        return [items[i * len(items) // limit] for i in range(limit)]
    return list(items)
