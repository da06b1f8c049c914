"""The files of a cache, and the pictures in them.

``NAME.bin`` contains the pixels of all pictures one after another, as uint8. If any picture has 16 bits, all are stored
as uint16, and 8-bit values are multiplied by 257. ``NAME.index`` contains a digest of the rest of the file, a line of
JSON, and the height, width and CRC-32 of the pixels of each picture, as little-endian uint32.
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

from ..common.locking import share
from ..common.writing import write_whole
from .folder import DataError, Folder, read_picture, resize_picture
from .opening import regular_file
from .target import Target

DTYPES: dict[str, np.dtype] = {"uint8": np.dtype(np.uint8), "uint16": np.dtype(np.uint16)}
ROWS = np.dtype("<u4")
MOST_HEAD = 1 << 24  # bytes of an index's line of JSON that `source_of` reads at most
LONGEST_REASON = 2000  # characters that are stored of the reason why a picture was skipped


@dataclass(frozen=True, eq=False)
class PictureCache:
    """The decoded pictures of one folder.

    Opening a cache reads only the index. Each picture is compared with its checksum when it is first read.

    Args:
        path: file of the pixels.
        folder: the pictures of the cache, in order.
        target: the sizes that they were resized to.
        pixels: flat uint8 or uint16, memory-mapped.
        index: (pictures, 3) int64 of first element, height, width.
        checksums: (pictures,) uint32.
        skipped: files that could not be used, with the reasons.
        built: just now, by `open_cache`.
    """

    path: Path
    folder: Folder
    target: Target
    pixels: np.ndarray
    index: np.ndarray
    checksums: np.ndarray
    skipped: list[tuple[Path, str]] = field(default_factory=list)
    built: bool = False
    _checked: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_checked", np.zeros(len(self.index), bool))

    @property
    def channels(self) -> int:
        return self.target.channels

    def check(self, places: np.ndarray | None = None) -> None:
        """Compare pictures with their checksums, each once. A damaged one is decoded again and written to the file.

        Args:
            places: int64 indices of the pictures; None for all.

        Raises:
            DataError: a picture is damaged and its source no longer gives the same pixels.
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
            with self.path.open("r+b") as out:  # the mapping sees what is written
                out.seek(int(self.index[place, 0]) * self.pixels.itemsize)
                out.write(fresh)
                out.flush()
                os.fsync(out.fileno())
            if self._sum(place) != self.checksums[place]:
                raise DataError("it does not read back as it was written; the disk may be failing")
        except (OSError, DataError) as error:
            reason = (error.strerror or str(error)) if isinstance(error, OSError) else str(error)
            raise DataError(
                f"the cache {self.path} is damaged where it holds {file}, and this cannot be repaired: {reason}; "
                f"remove the cache (fastnce cache --remove --data DIR) and start again"
            ) from error
        warnings.warn(f"the cache {self.path} was damaged where it holds {file}, which was decoded again", stacklevel=4)


def prepared(file: Path, target: Target, dtype: np.dtype) -> np.ndarray:
    """Read a picture and resize it for a cache; contiguous (height, width, channels).

    Raises:
        DataError: see `read_picture`; or the picture is so small that resizing would leave nothing.
    """
    picture = read_picture(file, target.channels)
    sizes = target.sizes(*picture.shape[:2])
    if min(map(min, sizes)) < 1:
        raise DataError(f"{file} is {picture.shape[1]}x{picture.shape[0]}; 3x3 is the smallest size that can be used")
    if picture.dtype != dtype:  # 255 * 257 = 65535; 16 to 8 bits happens only if the file changed after its probe
        picture = picture * np.uint16(257) if dtype == np.uint16 else (picture >> 8).astype(np.uint8)
    for size in sizes:
        picture = resize_picture(picture, *size)
    return np.ascontiguousarray(picture)


def index_file(base: Path) -> Path:
    return base.with_name(f"{base.name}.index")


def pixel_file(base: Path) -> Path:
    return base.with_name(f"{base.name}.bin")


def write_index(
    base: Path, digest: str, source: Path, dtype: np.dtype, rows: np.ndarray, skipped: Sequence[tuple[int, str]]
) -> None:
    """Write ``NAME.index``.

    Args:
        source: the folder of the pictures; `source_of` reads it.
        rows: (pictures, 3) of height, width, checksum.
        skipped: for each file that could not be used, its position in the folder's listing and the reason.
    """
    head = {
        "digest": digest,
        "dtype": dtype.name,
        "skipped": [(place, why[:LONGEST_REASON]) for place, why in skipped],
        "source": os.fspath(source.resolve()),
    }
    content = json.dumps(head).encode() + b"\n" + rows.astype(ROWS).tobytes()
    write_whole(index_file(base), hashlib.sha256(content).hexdigest().encode() + b"\n" + content)


def source_of(index: Path) -> Path | None:
    """Return the folder of the pictures of a cache, from its index; None if it does not tell."""
    try:
        with regular_file(index) as file:
            file.readline(65)
            return Path(json.loads(file.readline(MOST_HEAD))["source"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def read_cache(base: Path, digest: str, folder: Folder, target: Target) -> PictureCache | None:
    """Open the cache at `base`; None if its index or its size is invalid.

    Args:
        digest: of the sources and their preprocessing, as given to `write_index`.
    """
    try:
        with regular_file(index_file(base)) as file:
            if os.fstat(file.fileno()).st_size > 65_536 + len(folder) * 12 * (LONGEST_REASON + 10):
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
            size = sides.prod(axis=1, dtype=float).sum() * target.channels * dtype.itemsize  # floats do not overflow
            if os.fstat(file.fileno()).st_size != size:
                return None
            share(file)  # as long as the file is mapped, which keeps a duplicate of its descriptor open
            pixels = np.memmap(file, dtype, mode="r")
    except (OSError, ValueError, KeyError, TypeError, IndexError, RecursionError):
        return None
    elements = sides.prod(axis=1) * target.channels
    index = np.column_stack([np.cumsum(elements) - elements, sides])
    return PictureCache(pixel_file(base), folder.without(skipped), target, pixels, index, rows[:, 2], skipped)


def threads() -> int:
    return min(16, os.cpu_count() or 1)
