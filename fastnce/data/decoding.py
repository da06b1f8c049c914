"""Decode a folder into a cache; what was decoded before the process was killed is not decoded again.

While it is made, a cache is two files that name their process (see `fastnce.common.writing.partial_name`): the pixels,
and a journal with a line of JSON for each picture, its [height, width, checksum] or why it cannot be used.
"""

import json
import os
import shutil
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, TypeVar

import numpy as np

from ..common.writing import PARTIAL, is_dead, partial_name, sweep
from .cached import pixel_file, prepared, threads, write_index
from .folder import DataError, Folder, probe_picture
from .target import Target

Progress = Callable[[str], None]
SECONDS = 5.0  # between two sentences about the progress
FLUSHED = 1.0  # seconds of work that a killed process loses
PROBED = 64  # files whose heads are read in one piece of work
T = TypeVar("T")
R = TypeVar("R")


def decode_all(
    base: Path, digest: str, folder: Folder, target: Target, skip_bad: bool, progress: Progress | None
) -> None:
    """Make ``base.bin`` and ``base.index``.

    Raises:
        DataError: files cannot be used (all of them are named), none can, or the disk is full or fails.
    """
    place = base.parent
    name = f"{partial_name()}.{digest[:16]}"
    pixels, journal = place / f"{name}_pixels", place / f"{name}_journal"
    _take_up(place, digest, pixels, journal)
    sweep(place)
    unfinished = [pixels, journal]
    try:
        with ThreadPoolExecutor(threads()) as pool:
            dtype, needed = _survey(pool, folder, target)
            with _updating(pixels) as out, _updating(journal) as lines:
                rows, bad, done = _agreeing(out, lines, len(folder), target.channels, dtype)
                free = shutil.disk_usage(place).free + out.tell()
                if free < needed:
                    raise DataError(f"the cache {base}.bin needs {needed} bytes and the disk has {free}")
                if progress:
                    before = f"; {done} of them were decoded before" if done else ""
                    progress(f"decoding {len(folder)} pictures of {folder.path} into {place}{before}")

                def decode(number: int) -> np.ndarray | str:
                    try:
                        return prepared(folder.file(number), target, dtype)
                    except DataError as error:
                        return str(error)

                said = flushed = time.monotonic()
                for number, picture in _in_order(pool, decode, range(done, len(folder))):
                    if isinstance(picture, str):
                        bad.append((number, picture))
                        line = json.dumps(picture)
                    else:
                        out.write(picture.data)
                        rows[number] = (*picture.shape[:2], zlib.crc32(picture.data))
                        line = json.dumps(rows[number].tolist())
                    lines.write(line.encode() + b"\n")
                    now = time.monotonic()
                    if now - flushed > FLUSHED:
                        flushed = now
                        out.flush()
                        lines.flush()
                    if progress and now - said > SECONDS:
                        said = now
                        progress(f"decoding {folder.path}: {number + 1} of {len(folder)} pictures")
                out.flush()
                os.fsync(out.fileno())
        if bad and (not skip_bad or len(bad) == len(folder)):
            raise DataError(bad_files([reason for _, reason in bad], len(folder), folder.path))
        os.replace(pixels, pixel_file(base))
        unfinished = [pixel_file(base), journal]
        write_index(base, digest, dtype, rows[rows[:, 0] > 0], bad)
        unfinished = [journal]
    except OSError as error:
        reason = error.strerror or str(error)
        raise DataError(f"the cache {base}.bin, {needed} bytes, cannot be written: {reason}") from error
    except Exception:
        raise
    except BaseException:  # a signal: the next process goes on from here
        unfinished = []
        raise
    finally:
        for file in unfinished:
            with suppress(OSError):
                file.unlink(missing_ok=True)


def bad_files(reasons: list[str], of: int, folder: Path) -> str:
    """One line that says how many, then one for each file."""
    how = "data.skip_bad=true, in Python skip_bad=True, passes over them"
    return "\n  ".join([f"{len(reasons)} of {of} pictures in {folder} cannot be used ({how}):", *reasons])


def _survey(pool: ThreadPoolExecutor, folder: Folder, target: Target) -> tuple[np.dtype, int]:
    """The cache's dtype and bytes, by the files' heads."""

    def probe(numbers: range) -> tuple[int, bool]:
        elements, deep = 0, False
        for number in numbers:
            with suppress(DataError):  # decoding it will say so
                height, width, bits = probe_picture(folder.file(number))
                height, width = target.size(height, width)
                elements, deep = elements + height * width, deep or bits == 16
        return elements, deep

    parts = (range(first, min(first + PROBED, len(folder))) for first in range(0, len(folder), PROBED))
    found = [result for _, result in _in_order(pool, probe, parts)]
    dtype = np.dtype(np.uint16 if any(deep for _, deep in found) else np.uint8)
    return dtype, sum(elements for elements, _ in found) * target.channels * dtype.itemsize


def _take_up(place: Path, digest: str, pixels: Path, journal: Path) -> None:
    """Give the files of a process that was killed while it made the same cache these names."""
    for found in _of_the_dead(place, digest, "journal"):
        with suppress(OSError):
            os.replace(found.with_name(found.name.removesuffix("journal") + "pixels"), pixels)
            os.replace(found, journal)
            return


def forget(place: Path, digest: str) -> None:
    """Remove what a process left that was killed when the cache was all but made."""
    for found in _of_the_dead(place, digest, "*"):
        with suppress(OSError):
            found.unlink()


def _of_the_dead(place: Path, digest: str, kind: str) -> Iterator[Path]:
    for found in place.glob(f".fastnce-*.{digest[:16]}_{kind}"):
        match = PARTIAL.fullmatch(found.name)
        if match is not None and is_dead(match["machine"], int(match["pid"]), match["born"]):
            yield found


def _updating(file: Path) -> BinaryIO:
    file.touch()
    return file.open("r+b")


def _agreeing(
    out: BinaryIO, lines: BinaryIO, pictures: int, channels: int, dtype: np.dtype
) -> tuple[np.ndarray, list[tuple[int, str]], int]:
    """What is taken up: rows of height, width, checksum, those that are bad, and how many pictures these are.

    Both files are cut after the last picture whose pixels are as the journal says.
    """
    rows, bad, done = np.zeros((pictures, 3), np.uint32), list[tuple[int, str]](), 0
    size, end, line_end = os.fstat(out.fileno()).st_size, 0, 0
    with suppress(ValueError, TypeError, OverflowError, RecursionError):  # a line that is none: the last that counts
        for line in lines:
            said = json.loads(line)
            if isinstance(said, str):
                bad.append((done, said))
            else:
                height, width, checksum = map(int, said)
                data = out.read(min(height * width * channels * dtype.itemsize, size - end))
                if len(data) != height * width * channels * dtype.itemsize or zlib.crc32(data) != checksum:
                    break
                rows[done], end = (height, width, checksum), end + len(data)
            done, line_end = done + 1, line_end + len(line)
            if done == pictures:
                break
    for file, kept in ((out, end), (lines, line_end)):
        file.seek(kept)
        file.truncate()
    return rows, bad, done


def _in_order(pool: ThreadPoolExecutor, function: Callable[[T], R], items: Iterable[T]) -> Iterator[tuple[T, R]]:
    """(item, result) in order, with few results waiting: all decoded pictures together may not fit in memory."""
    waiting: deque[tuple[T, Future[R]]] = deque()
    for item in items:
        waiting.append((item, pool.submit(function, item)))
        if len(waiting) > 4 * threads():
            first, result = waiting.popleft()
            yield first, result.result()
    while waiting:
        first, result = waiting.popleft()
        yield first, result.result()
