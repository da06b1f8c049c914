"""Decode and resize every picture once, into one flat file that is then memory-mapped.

A cache consists of two files, ``NAME.bin`` and ``NAME.index`` (see `cached`). NAME contains a digest of the name, size
and time of every source file and of the preprocessing. A cache is built again if its index is damaged or differs from
its sources. A picture with damaged pixels is decoded again when it is first read.
"""

import contextlib
import hashlib
import json
import os
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..common.locking import hold
from .cached import PictureCache, read_cache
from .decoding import Progress, decode_all, forget
from .folder import DataError, Folder, domain_folders
from .target import Target

BESIDE = ".fastnce-cache"
"""Name of the folder for caches, in the folder of the data."""
FORMAT = 3  # version of the files and of decoding: increase it whenever the same source would give other pixels


def cache_place(root: Path, cache_dir: str | os.PathLike[str] | None) -> Path:
    """Return the folder for caches, created if necessary.

    It is `cache_dir` if given, else `root`/.fastnce-cache if that can be written, else the user's cache folder. A root
    without any write permission is never written to, not even by an administrator who could.

    Raises:
        DataError: none of them can be written.
    """
    places = cache_places(root, cache_dir)
    if len(places) > 1 and not root.stat().st_mode & 0o222:
        places = places[1:]
    reason = ""
    for place in places:
        try:
            place.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=place):
                return place
        except OSError as error:
            reason = error.strerror or str(error)
    raise DataError(f"no cache can be written in {places[-1]} ({reason}); name another folder with data.cache_dir=DIR")


def cache_places(root: Path, cache_dir: str | os.PathLike[str] | None) -> list[Path]:
    """Return the folders where the caches of `root` may be, the preferred one first."""
    if cache_dir is not None:
        return [Path(cache_dir)]
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastnce"
    return [root / BESIDE, home]


def open_cache(
    folder: Folder, target: Target, place: Path, *, skip_bad: bool = False, progress: Progress | None = None
) -> PictureCache:
    """Open the cache of a folder for a target; build it first if there is no valid one.

    Args:
        skip_bad: skip files that cannot be used and list them in `skipped`.
        progress: called with a sentence when decoding starts and every few seconds while it runs.

    Raises:
        DataError: some files cannot be used (the message names all of them), or none can, or the disk is full.
    """
    key = {**target.key(), "format": FORMAT, **({"first": folder.first} if folder.first else {})}
    stem = f"{folder.path.name}-{_digest(os.fspath(folder.path.resolve()), key)[:8]}"
    digest = _digest(
        "\0".join(folder.names), key, folder.sizes.astype("<i8").tobytes(), folder.times.astype("<i8").tobytes()
    )
    base = place / f"{stem}-{digest[:16]}"
    cache = _usable(base, digest, folder, target, skip_bad)
    if cache is not None:
        forget(place, digest)
        return cache
    with hold(place, "fastnce cache", name=f"{stem}.lock", wait=progress or (lambda sentence: None)):
        cache = _usable(base, digest, folder, target, skip_bad)  # another process may have built it in the meantime
        if cache is not None:
            return cache
        for old in place.glob(f"{stem}-*"):  # of an earlier state of the sources
            with contextlib.suppress(OSError):
                old.unlink()
        decode_all(base, digest, folder, target, skip_bad, progress)
    cache = _usable(base, digest, folder, target, skip_bad)
    if cache is None:
        raise DataError(f"{base}.bin does not read back as it was written; the disk may be failing")
    return replace(cache, built=True)


def _usable(base: Path, digest: str, folder: Folder, target: Target, skip_bad: bool) -> PictureCache | None:
    cache = read_cache(base, digest, folder, target)
    return None if cache is None or (cache.skipped and not skip_bad) else cache


def _digest(text: str, key: dict[str, Any], *more: bytes) -> str:
    digest = hashlib.sha256(f"{json.dumps(key, sort_keys=True)}\n{text}\n".encode("utf-8", "surrogateescape"))
    for part in more:
        digest.update(part)
    return digest.hexdigest()


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
    max_images: int = 0,
) -> list[tuple[Path, int]]:
    """Build every cache that training with these settings needs, before and after the learning rate decays.

    Returns:
        (path, bytes) of each cache file.

    Raises:
        DataError: see `domain_folders` and `open_cache`.
    """
    target = Target.checked(preprocess, load_size, crop_size, channels)
    folders = domain_folders(root, phase, limit=max_images)
    place = cache_place(Path(root), cache_dir)
    written: dict[Path, int] = {}
    for folder in folders:
        for variant in dict.fromkeys((target, target.decaying())):
            cache = open_cache(folder, variant, place, skip_bad=skip_bad, progress=progress)
            cache.check()
            folder = cache.folder  # without skipped files, as training opens the second cache
            written[cache.path] = cache.path.stat().st_size
    return list(written.items())
