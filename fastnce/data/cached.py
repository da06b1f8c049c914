"""The files of a cache, and the pictures in them.

``NAME.bin`` holds the pixels of all pictures one after another as uint8, or as uint16 where any of them has 16 bits;
8-bit ones are then multiplied by 257. ``NAME.index`` holds a digest of all that follows it, a line of JSON, and for
each picture its height, its width and the CRC-32 of its pixels, as little-endian uint32.
"""

import hashlib
import json
import os
import warnings
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ..common.writing import write_whole
from .folder import DataError, Folder, read_picture, resize_picture
from .opening import regular_file
from .target import Target

DTYPES: dict[str, np.dtype] = {"uint8": np.dtype(np.uint8), "uint16": np.dtype(np.uint16)}
ROWS = np.dtype("<u4")
LONGEST_REASON = 2000  # characters that are kept of why a picture was skipped


@dataclass(frozen=True, eq=False)
class PictureCache:
    """The decoded pictures of one folder.

    A picture is compared with its checksum when it is first read: a start reads the index alone.

    Args:
        path: of the pixels.
        folder: the pictures that are in it, in their order.
        target: what they were resized to.
        pixels: flat uint8 or uint16, mapped.
        index: (pictures, 3) int64 of first element, height, width.
        checksums: (pictures,) uint32.
        skipped: files that could not be used, and why.
    """

    path: Path
    folder: Folder
    target: Target
    pixels: np.ndarray
    index: np.ndarray
    checksums: np.ndarray
    skipped: list[tuple[Path, str]] = field(default_factory=list)
    _checked: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_checked", np.zeros(len(self.index), bool))

    @property
    def channels(self) -> int:
        return self.target.channels

    def check(self, places: np.ndarray | None = None) -> None:
        """Compare pictures with their checksums, each once; a damaged one is decoded anew, into the file.

        Args:
            places: of the pictures, int64; None for all.

        Raises:
            DataError: one is damaged and its source does not give the same pixels any more.
        """
        if places is None:
            places = np.flatnonzero(~self._checked)
            with ThreadPoolExecutor(threads()) as pool:
                list(pool.map(self.check, np.array_split(places, 4 * threads())))
        elif not self._checked[places].all():
            for place in np.unique(places).tolist():
                if not self._checked[place]:
                    if self._sum(place) != self.checksums[place]:
                        self._mend(place)
                    self._checked[place] = True

    def _sum(self, place: int) -> int:
        first, height, width = self.index[place].tolist()
        return zlib.crc32(self.pixels[first : first + height * width * self.channels].data)

    def _mend(self, place: int) -> None:
        file = self.folder.file(place)
        try:
            fresh = prepared(file, self.target, self.pixels.dtype).data
            if zlib.crc32(fresh) != self.checksums[place]:
                raise DataError(f"{file} has changed since")
            with self.path.open("r+b") as out:  # the mapping shows what is written
                out.seek(int(self.index[place, 0]) * self.pixels.itemsize)
                out.write(fresh)
                out.flush()
                os.fsync(out.fileno())
            if self._sum(place) != self.checksums[place]:
                raise DataError("it does not read back as it was written; the disk may be failing")
        except (OSError, DataError) as error:
            reason = (error.strerror or str(error)) if isinstance(error, OSError) else str(error)
            raise DataError(
                f"the cache {self.path} is damaged where it holds {file}, which cannot be mended: {reason}; remove "
                f"the cache and start again"
            ) from error
        warnings.warn(f"the cache {self.path} was damaged where it holds {file}, which was decoded anew", stacklevel=4)


def prepared(file: Path, target: Target, dtype: np.dtype) -> np.ndarray:
    """One picture as a cache holds it, contiguous (height, width, channels).

    Raises:
        DataError: as `read_picture`, or too small for anything to be left of it.
    """
    picture = read_picture(file, target.channels)
    height, width = target.size(*picture.shape[:2])
    if height < 1 or width < 1:
        raise DataError(f"{file} is {picture.shape[1]}x{picture.shape[0]}; 3x3 is the least that can be used")
    if picture.dtype != dtype:  # 255 * 257 = 65535; the other way round, a file that changed since its probe
        picture = picture * np.uint16(257) if dtype == np.uint16 else (picture >> 8).astype(np.uint8)
    return np.ascontiguousarray(resize_picture(picture, height, width))


def index_file(base: Path) -> Path:
    return base.with_name(f"{base.name}.index")


def pixel_file(base: Path) -> Path:
    return base.with_name(f"{base.name}.bin")


def write_index(base: Path, digest: str, dtype: np.dtype, rows: np.ndarray, skipped: Sequence[tuple[int, str]]) -> None:
    """Write ``NAME.index``.

    Args:
        rows: (pictures, 3) of height, width, checksum.
        skipped: place in the folder's listing and reason of each file that could not be used.
    """
    head = {"digest": digest, "dtype": dtype.name, "skipped": [(place, why[:LONGEST_REASON]) for place, why in skipped]}
    content = json.dumps(head).encode() + b"\n" + rows.astype(ROWS).tobytes()
    write_whole(index_file(base), hashlib.sha256(content).hexdigest().encode() + b"\n" + content)


def read_cache(base: Path, digest: str, folder: Folder, target: Target) -> PictureCache | None:
    """The cache at `base`, or None where anything about its index or its size is not as it should be.

    Args:
        digest: of the sources and of what is done to them, as `write_index` got it.
    """
    try:
        with regular_file(index_file(base)) as file:
            if os.fstat(file.fileno()).st_size > 4096 + len(folder) * 12 * (LONGEST_REASON + 10):
                return None
            stated = file.readline(65)
            if hashlib.file_digest(file, "sha256").hexdigest().encode() + b"\n" != stated:
                return None
            file.seek(len(stated))
            head = json.loads(file.readline())
            if head["digest"] != digest:
                return None
            rows = np.frombuffer(file.read(), ROWS).reshape(-1, 3)
        dtype = DTYPES[head["dtype"]]
        places = [place for place, why in head["skipped"] if type(place) is int and type(why) is str]
        if len(places) < len(head["skipped"]) or places != sorted(set(places)) or min(places, default=0) < 0:
            return None
        skipped = [(folder.file(place), why) for place, why in head["skipped"]]
        sides = rows[:, :2].astype(np.int64)
        if len(rows) + len(skipped) != len(folder) or not len(rows) or sides.min() < 1:
            return None
        with regular_file(pixel_file(base)) as file:
            size = sides.prod(axis=1, dtype=float).sum() * target.channels * dtype.itemsize  # no number is too large
            if os.fstat(file.fileno()).st_size != size:
                return None
            pixels = np.memmap(file, dtype, mode="r")
    except (OSError, ValueError, KeyError, TypeError, IndexError, RecursionError):
        return None
    elements = sides.prod(axis=1) * target.channels
    index = np.column_stack([np.cumsum(elements) - elements, sides])
    return PictureCache(pixel_file(base), folder.without(skipped), target, pixels, index, rows[:, 2], skipped)


def threads() -> int:
    return min(16, os.cpu_count() or 1)
