"""Remove the caches of a data set."""

import os
import re
from contextlib import ExitStack, suppress
from pathlib import Path

from ..common.locking import hold, is_shared
from ..common.writing import sweep
from .cache import BESIDE, cache_places
from .cached import source_of
from .limit import DataError

FILE = re.compile(r"(?P<stem>.+-[0-9a-f]{8})-[0-9a-f]{16}\.(?:bin|index)")
LOCK = re.compile(r"(?P<stem>.+-[0-9a-f]{8})\.lock")


def remove_caches(root: str | os.PathLike[str], cache_dir: str | os.PathLike[str] | None = None) -> dict[Path, int]:
    """Remove the caches of the pictures in `root`, and nothing else; return path -> bytes of each removed file.

    In `root`/.fastnce-cache, that is every cache. Other folders may hold caches of several data sets: there, only those
    that were made of pictures in `root` are removed. A folder that is empty then is removed too.

    Args:
        root: the folder of the data.
        cache_dir: as given to training; None looks in both default places.

    Raises:
        DataError: there is no such folder, or a training reads one of the caches. Nothing is removed.
        InUse: another process builds one of them. Nothing is removed.
        OSError: a file cannot be removed.
    """
    root = Path(root)
    if not root.is_dir():
        raise DataError(f"there is no folder {root}")
    places = [place for place in cache_places(root, cache_dir) if place.is_dir()]
    removed: dict[Path, int] = {}
    with ExitStack() as held:
        files = [file for place in places for file in _files(place, root)]
        stems = {(file.parent, FILE.fullmatch(file.name)["stem"]) for file in files}  # type: ignore[index]
        for place in places:
            if _is_own(place, root):
                locks = (LOCK.fullmatch(entry.name) for entry in place.iterdir())
                stems |= {(place, lock["stem"]) for lock in locks if lock}
        for place, stem in sorted(stems):
            held.enter_context(hold(place, "fastnce cache --remove", "keep the cache", name=f"{stem}.lock"))
        for file in files:
            if is_shared(file):
                raise DataError(f"{file} is in use by a running process: wait until it ends, or stop it")
        for file in files:
            size = file.stat().st_size
            file.unlink()
            removed[file] = size
        for place in places:
            if _is_own(place, root):
                sweep(place)
    for place in places:
        if _is_own(place, root):
            with suppress(OSError):  # not empty: it holds files of others
                place.rmdir()
    return removed


def _is_own(place: Path, root: Path) -> bool:
    """Whether a place holds caches of this data set only."""
    return os.path.realpath(place) == os.path.realpath(root / BESIDE)


def _files(place: Path, root: Path) -> list[Path]:
    """The files of this data set's caches, those of an index before their index."""
    files = [entry for entry in sorted(place.iterdir()) if FILE.fullmatch(entry.name) and entry.is_file()]
    if _is_own(place, root):
        return files
    top = os.path.join(os.path.realpath(root), "")
    mine = []
    for file in files:
        source = source_of(file.with_suffix(".index"))
        if source is not None and os.path.join(os.fspath(source), "").startswith(top):
            mine.append(file)
    return mine
