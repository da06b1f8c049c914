"""Decode and resize every picture once, into one flat file that is mapped afterwards.

A cache is two files: ``NAME.bin``, the pixels of all pictures one after another as uint8 (uint16 where any of them has
16 bits; 8-bit ones are then multiplied by 257), and ``NAME.json``, which says where each picture begins, its height and
width and its checksum. NAME carries a digest of the name, size and time of every source file and of what is done to it.
A cache that does not agree with its sources, or is damaged, is built again. Both files are written under other names
and renamed.
"""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import time
import uuid
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .folder import DataError, Folder, domain_folders, pair, probe_picture, read_picture, resize_picture

FORMAT = 2  # of the files; also covers decoding: change it whenever the same source would give other pixels
PREPROCESS = ("resize_and_crop", "crop", "scale_width_and_crop", "scale_shortside_and_crop", "none")
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Target:
    """What a picture is resized to before it is cropped; `load` and `crop` are (height, width).

    The modes are the published ones. "crop" keeps the picture's size, "scale_width_and_crop" sets its width,
    "scale_shortside_and_crop" only enlarges, both when they are too small; "none" rounds sides to a multiple of 4.
    """

    preprocess: str
    load: tuple[int, int]
    crop: tuple[int, int]
    channels: int

    @classmethod
    def checked(
        cls, preprocess: str, load: int | tuple[int, int], crop: int | tuple[int, int], channels: int
    ) -> "Target":
        """Raises DataError where the settings contradict each other."""
        if preprocess not in PREPROCESS:
            raise DataError(f"preprocess={preprocess!r} is none of {', '.join(PREPROCESS)}")
        if channels < 1:
            raise DataError(f"channels should be at least 1, not {channels}")
        load, crop = pair("load_size", load), pair("crop_size", crop)
        if preprocess in ("crop", "none"):
            load = crop  # load_size has no part in these: nothing changes when the learning rate decays
        if preprocess != "none" and (crop[0] % 4 or crop[1] % 4):
            raise DataError(f"the sides of crop_size should be multiples of 4, not {crop}")
        if load[1] < crop[1] or (load[0] < crop[0] and preprocess != "scale_width_and_crop"):
            raise DataError(f"load_size={load} is too small for crop_size={crop}: it should be at least as large")
        return cls(preprocess, load, crop, channels)

    def decaying(self) -> "Target":
        """Once the learning rate decays, load_size becomes crop_size (published rule of CUT)."""
        return Target(self.preprocess, self.crop, self.crop, self.channels)

    def size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) to which a picture of this size is resized."""
        if self.preprocess == "resize_and_crop":
            return self.load
        if self.preprocess == "scale_width_and_crop":
            if width == self.load[1] and height >= self.crop[0]:
                return height, width
            return int(max(self.load[1] * height / width, self.crop[0])), self.load[1]
        if self.preprocess == "none":
            return round(height / 4) * 4, round(width / 4) * 4
        scale = max(self.load[0] / height, self.load[1] / width)
        return (height, width) if scale <= 1 else (round(height * scale), round(width * scale))

    def key(self) -> dict[str, Any]:
        """The settings that decide about the cached pixels, and only those."""
        key = {"filter": "bicubic", "format": FORMAT, "preprocess": self.preprocess, "channels": self.channels}
        if self.preprocess != "none":
            key["load"] = self.load
        if self.preprocess == "scale_width_and_crop":
            key["crop"] = self.crop
        return key


@dataclass(frozen=True)
class PictureCache:
    """pixels: flat uint8 or uint16, mapped. index: (pictures, 3) int64 of first element, height, width."""

    path: Path
    channels: int
    pixels: np.ndarray
    index: np.ndarray
    skipped: list[tuple[Path, str]] = field(default_factory=list)


def cache_place(root: Path, cache_dir: str | os.PathLike[str] | None) -> Path:
    """`cache_dir`, or `root`/.fastnce-cache where that may be written, or the user's cache folder; it exists then.

    A root without any write permission is left alone, also by an administrator who could write there.

    Raises:
        DataError: none of them can be written.
    """
    if cache_dir is not None:
        places = [Path(cache_dir)]
    else:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastnce"
        places = [root / ".fastnce-cache", home] if root.stat().st_mode & 0o222 else [home]
    reason = ""
    for place in places:
        try:
            place.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=place):
                return place
        except OSError as error:
            reason = error.strerror or str(error)
    raise DataError(f"no cache can be written in {places[-1]} ({reason}); name another folder with cache_dir")


def open_cache(
    folder: Folder, target: Target, place: Path, *, skip_bad: bool = False, progress: Progress | None = None
) -> PictureCache:
    """The cache of a folder for a target, built when there is none that can be trusted.

    Args:
        skip_bad: leave files out that cannot be used, and list them in `skipped`.
        progress: called with a sentence when decoding starts and every few seconds while it goes on.

    Raises:
        DataError: files cannot be used (all of them are named), none can, or the disk is full.
    """
    tag = hashlib.sha256(json.dumps([str(folder.path.resolve()), target.key()], sort_keys=True).encode()).hexdigest()
    digest = hashlib.sha256(json.dumps([folder.listing(), target.key()], sort_keys=True).encode()).hexdigest()
    stem = f"{folder.path.name}-{tag[:8]}"
    base = place / f"{stem}-{digest[:16]}"
    cache = _trusted(base, digest, folder, target, skip_bad)
    if cache is not None:
        return cache
    with _one_builder(place / f"{stem}.lock") as alone:
        cache = _trusted(base, digest, folder, target, skip_bad)  # another process may have built it meanwhile
        if cache is not None:
            return cache
        if alone:  # what is left of builders that were killed, and caches of what the sources were before
            for old in place.glob(f"{stem}-*"):
                with contextlib.suppress(OSError):
                    old.unlink()
        _build(base, digest, folder, target, skip_bad, progress)
    cache = _trusted(base, digest, folder, target, skip_bad)
    if cache is None:
        raise DataError(f"{base}.bin does not read back as it was written; the disk may be failing")
    return cache


def _trusted(base: Path, digest: str, folder: Folder, target: Target, skip_bad: bool) -> PictureCache | None:
    """The cache at `base`, or None where anything about it is not as it should be."""
    try:
        head = json.loads(base.with_name(base.name + ".json").read_text())
        binary = base.with_name(base.name + ".bin")
        index = np.array(head["index"], np.int64).reshape(-1, 3)
        dtype = {"uint8": np.uint8, "uint16": np.uint16}[head["dtype"]]
        elements = index[:, 1] * index[:, 2] * target.channels
        skipped = [(folder.path / name, why) for name, why in head["skipped"]]
        sound = (
            head["digest"] == digest
            and len(index) + len(skipped) == len(folder.files)
            and len(index) == len(head["checksums"]) > 0
            and bool((elements > 0).all())
            and bool((index[:, 0] == np.cumsum(elements) - elements).all())
            and binary.stat().st_size == int(elements.sum()) * np.dtype(dtype).itemsize
        )
        if not sound or (skipped and not skip_bad):
            return None
        pixels = np.memmap(binary, dtype, mode="r")
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return None
    spans = zip(index[:, 0].tolist(), elements.tolist(), strict=True)
    with ThreadPoolExecutor(_threads()) as pool:
        if list(pool.map(lambda span: zlib.crc32(pixels[span[0] : sum(span)].data), spans)) != head["checksums"]:
            return None
    return PictureCache(binary, target.channels, pixels, index, skipped)


def _build(base: Path, digest: str, folder: Folder, target: Target, skip_bad: bool, progress: Progress | None) -> None:
    files = [file for file, _, _ in folder.files]
    names = {file: name for file, (name, _, _) in zip(files, folder.listing(), strict=True)}
    with ThreadPoolExecutor(_threads()) as pool:
        heads = [head for head in pool.map(_or_reason(probe_picture), files) if isinstance(head, tuple)]
        dtype = np.dtype(np.uint16 if any(bits == 16 for _, _, bits in heads) else np.uint8)
        sizes = [target.size(height, width) for height, width, _ in heads]
        needed = sum(height * width for height, width in sizes) * target.channels * dtype.itemsize
        free = shutil.disk_usage(base.parent).free
        if free < needed:
            raise DataError(f"the cache {base}.bin needs {needed} bytes and the disk has {free}")

        def decode(file: Path) -> np.ndarray:
            picture = read_picture(file, target.channels)
            height, width = target.size(*picture.shape[:2])
            if height < 1 or width < 1:
                raise DataError(f"{file} is {picture.shape[1]}x{picture.shape[0]}; 3x3 is the least that can be used")
            if picture.dtype != dtype:  # 255 * 257 = 65535; the other way round, a file that changed since its probe
                picture = picture * np.uint16(257) if dtype == np.uint16 else (picture >> 8).astype(np.uint8)
            return resize_picture(picture, height, width)

        unique = f".{os.getpid()}-{uuid.uuid4().hex}.tmp"
        temporary = [base.with_name(base.name + suffix + unique) for suffix in (".bin", ".json")]
        index: list[tuple[int, int, int]] = []
        checksums: list[int] = []
        bad: list[tuple[Path, str]] = []
        end, said = 0, time.monotonic()
        if progress:
            progress(f"decoding {len(files)} pictures of {folder.path} into {base.parent}")
        try:
            with temporary[0].open("wb") as out:
                for done, (file, picture) in enumerate(_in_order(pool, _or_reason(decode), files), 1):
                    if isinstance(picture, str):
                        bad.append((file, picture))
                    else:
                        data = np.ascontiguousarray(picture).data
                        out.write(data)
                        checksums.append(zlib.crc32(data))
                        index.append((end, *picture.shape[:2]))
                        end += picture.size
                    if progress and time.monotonic() - said > 5:
                        said = time.monotonic()
                        progress(f"decoding {folder.path}: {done} of {len(files)} pictures")
                out.flush()
                os.fsync(out.fileno())
            if bad and (not skip_bad or not index):
                raise DataError(bad_files(bad, len(files), folder.path))
            skipped = [(names[file], why) for file, why in bad]
            head = {"digest": digest, "dtype": dtype.name, "index": index, "checksums": checksums, "skipped": skipped}
            temporary[1].write_text(json.dumps(head))
            for file, suffix in zip(temporary, (".bin", ".json"), strict=True):
                os.replace(file, base.with_name(base.name + suffix))
        except OSError as error:
            reason = error.strerror or str(error)
            raise DataError(f"the cache {base}.bin, {needed} bytes, cannot be written: {reason}") from error
        finally:
            for file in temporary:
                file.unlink(missing_ok=True)


def bad_files(bad: list[tuple[Path, str]], of: int, folder: Path) -> str:
    """One line that says how many, then one for each file."""
    how = "data.skip_bad=true, in Python skip_bad=True, passes over them"
    lines = [f"{len(bad)} of {of} pictures in {folder} cannot be used ({how}):"]
    return "\n  ".join(lines + [reason for _, reason in bad])


def _or_reason(function: Callable[[Path], Any]) -> Callable[[Path], Any]:
    """The function's result, or the sentence of its DataError."""

    def attempt(file: Path) -> Any:
        try:
            return function(file)
        except DataError as error:
            return str(error)

    return attempt


def _in_order(pool: ThreadPoolExecutor, function: Callable[[Path], Any], files: list[Path]) -> Iterator[Any]:
    """(file, result) in order, with few results waiting: all decoded pictures together may not fit in memory."""
    waiting: deque[tuple[Path, Future[Any]]] = deque()
    for file in files:
        waiting.append((file, pool.submit(function, file)))
        if len(waiting) > 4 * _threads():
            first, result = waiting.popleft()
            yield first, result.result()
    for first, result in waiting:
        yield first, result.result()


def _threads() -> int:
    return min(16, os.cpu_count() or 1)


@contextlib.contextmanager
def _one_builder(lock: Path) -> Iterator[bool]:
    """Let one process build while the others wait; False where the system has no such locks.

    Only work is saved by this: builders that do not see each other still write to different names. The lock ends with
    its process, however that ends.
    """
    with lock.open("w") as held:
        try:
            import fcntl

            fcntl.flock(held, fcntl.LOCK_EX)
        except (ImportError, OSError):
            yield False
            return
        yield True


def build_cache(
    root: str | os.PathLike[str],
    *,
    phase: str = "train",
    load_size: int | tuple[int, int] = 286,
    crop_size: int | tuple[int, int] = 256,
    channels: int = 3,
    preprocess: str = "resize_and_crop",
    cache_dir: str | os.PathLike[str] | None = None,
    skip_bad: bool = False,
    progress: Progress | None = None,
) -> list[tuple[Path, int]]:
    """Build every cache that training with these settings needs; both before and after the learning rate decays.

    Returns:
        (path, bytes) of each cache file.

    Raises:
        DataError: as `domain_folders` and `open_cache`.
    """
    target = Target.checked(preprocess, load_size, crop_size, channels)
    folders = domain_folders(root, phase)
    place = cache_place(Path(root), cache_dir)
    written: dict[Path, int] = {}
    for folder in folders:
        for variant in dict.fromkeys((target, target.decaying())):
            cache = open_cache(folder, variant, place, skip_bad=skip_bad, progress=progress)
            folder = folder.without(cache.skipped)  # as training opens the second one
            written[cache.path] = cache.path.stat().st_size
    return list(written.items())
