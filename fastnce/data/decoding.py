"""Decode a folder into a cache. After a kill, the next process continues where the killed one stopped.

An unfinished cache consists of two files whose names identify the process (`fastnce.common.writing.partial_name`): the
pixels, and a journal. The journal has one line of JSON per picture: [height, width, checksum], or why the picture
cannot be used.
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

from ..common.gathered import gathering
from ..common.messages import counted
from ..common.writing import PARTIAL, is_dead, partial_name, sweep
from .cached import pixel_file, prepared, threads, write_index
from .folder import DataError, Folder, probe_picture
from .target import Target

Progress = Callable[[str], None]
SECONDS = 5.0  # between two progress messages
FLUSHED = 1.0  # seconds between flushes: the most work that a killed process loses
PROBED = 64  # files per task that reads file headers
T = TypeVar("T")
R = TypeVar("R")


def decode_all(
    base: Path, digest: str, folder: Folder, target: Target, skip_bad: bool, progress: Progress | None
) -> None:
    """Write ``base.bin`` and ``base.index``.

    Raises:
        DataError: some files cannot be used (the message names all of them), or none can, or the disk is full or fails.
    """
    place = base.parent
    name = f"{partial_name()}.{digest[:16]}"
    pixels, journal = place / f"{name}_pixels", place / f"{name}_journal"
    _take_up(place, digest, pixels, journal)
    sweep(place)
    unfinished = [pixels, journal]
    try:
        with gathering(), ThreadPoolExecutor(threads()) as pool:
            dtype, needed = _survey(pool, folder, target)
            with _updating(pixels) as out, _updating(journal) as lines:
                rows, bad, done = _agreeing(out, lines, len(folder), target.channels, dtype)
                free = shutil.disk_usage(place).free + out.tell()
                if free < needed:
                    raise DataError(f"the cache {base}.bin needs {needed} bytes, but the disk has {free}")
                if progress:
                    before = f"; {done} of them {'was' if done == 1 else 'were'} decoded before" if done else ""
                    what = f"{counted(len(folder), 'picture')} of {folder.path}, {target.words()},"
                    progress(f"decoding {what} into {place}{before}")

                def decode(number: int) -> np.ndarray | str:
                    try:
                        return prepared(folder.file(number), target, dtype)
                    except DataError as error:
                        return str(error)

                reported = flushed = time.monotonic()
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
                    if progress and now - reported > SECONDS:
                        reported = now
                        progress(f"decoding {folder.path}: {number + 1} of {counted(len(folder), 'picture')}")
                out.flush()
                os.fsync(out.fileno())
        if bad and (not skip_bad or len(bad) == len(folder)):
            raise DataError(bad_files([reason for _, reason in bad], len(folder), folder.path))
        os.replace(pixels, pixel_file(base))
        unfinished = [pixel_file(base), journal]
        write_index(base, digest, folder.path, dtype, rows[rows[:, 0] > 0], bad)
        unfinished = [journal]
    except OSError as error:
        reason = error.strerror or str(error)
        raise DataError(f"the cache {base}.bin, {needed} bytes, cannot be written: {reason}") from error
    except Exception:
        raise
    except BaseException:  # a signal: keep both files, so that the next process continues
        unfinished = []
        raise
    finally:
        for file in unfinished:
            with suppress(OSError):
                file.unlink(missing_ok=True)


def bad_files(reasons: list[str], of: int, folder: Path) -> str:
    """Format the error: one line with the count, then one line per file."""
    first = f"{len(reasons)} of {counted(of, 'picture')} in {folder} cannot be used (data.skip_bad=true skips them):"
    return "\n  ".join([first, *reasons])


def probe_sizes(folder: Folder, target: Target) -> dict[tuple[int, int], Path]:
    """Return every (height, width) that batches of a folder show, each with the first such file, from file headers."""

    def probe(numbers: range) -> dict[tuple[int, int], int]:
        found: dict[tuple[int, int], int] = {}
        for number in numbers:
            with suppress(DataError):  # decoding the file will report the error
                height, width, _ = probe_picture(folder.file(number))
                found.setdefault(target.shown(*target.size(height, width)), number)
        return found

    sizes: dict[tuple[int, int], Path] = {}
    with gathering(), ThreadPoolExecutor(threads()) as pool:
        for _, found in _in_order(pool, probe, _parts(len(folder))):
            for size, number in found.items():
                sizes.setdefault(size, folder.file(number))
    return sizes


def _parts(count: int) -> Iterator[range]:
    return (range(first, min(first + PROBED, count)) for first in range(0, count, PROBED))


def _survey(pool: ThreadPoolExecutor, folder: Folder, target: Target) -> tuple[np.dtype, int]:
    """Return the cache's dtype and size in bytes, from the headers of the files."""

    def probe(numbers: range) -> tuple[int, bool]:
        elements, deep = 0, False
        for number in numbers:
            with suppress(DataError):  # decoding the file will report the error
                height, width, bits = probe_picture(folder.file(number))
                height, width = target.size(height, width)
                elements, deep = elements + height * width, deep or bits == 16
        return elements, deep

    found = [result for _, result in _in_order(pool, probe, _parts(len(folder)))]
    dtype = np.dtype(np.uint16 if any(deep for _, deep in found) else np.uint8)
    return dtype, sum(elements for elements, _ in found) * target.channels * dtype.itemsize


def _take_up(place: Path, digest: str, pixels: Path, journal: Path) -> None:
    """Rename the unfinished files of a killed process that was building the same cache to these names."""
    for found in _of_the_dead(place, digest, "journal"):
        with suppress(OSError):
            os.replace(found.with_name(found.name.removesuffix("journal") + "pixels"), pixels)
            os.replace(found, journal)
            return


def forget(place: Path, digest: str) -> None:
    """Remove the files of a process that was killed just before it had finished the cache."""
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
    """Read what a killed process decoded, and truncate both files after the last picture that matches the journal.

    Returns:
        rows of (height, width, checksum), the bad files with the reasons, and the number of pictures of both kinds.
    """
    rows, bad, done = np.zeros((pictures, 3), np.uint32), list[tuple[int, str]](), 0
    size, end, line_end = os.fstat(out.fileno()).st_size, 0, 0
    with suppress(ValueError, TypeError, OverflowError, RecursionError):  # an invalid line ends the journal
        for line in lines:
            entry = json.loads(line)
            if isinstance(entry, str):
                bad.append((done, entry))
            else:
                height, width, checksum = map(int, entry)
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
    """Yield (item, result) in order. Few results wait at a time: all decoded pictures may not fit into memory."""
    waiting: deque[tuple[T, Future[R]]] = deque()
    for item in items:
        waiting.append((item, pool.submit(function, item)))
        if len(waiting) > 4 * threads():
            first, result = waiting.popleft()
            yield first, result.result()
    while waiting:
        first, result = waiting.popleft()
        yield first, result.result()
