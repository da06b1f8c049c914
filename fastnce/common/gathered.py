"""Warnings that hold for many files: said once, with the first file and their number."""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass
class _Files:
    first: str
    seen: set[int] = field(default_factory=set)


_open: list[dict[str, _Files]] = []
"""What was noted, by sentence, of each `gathering` that has begun. Threads of a pool note to it too."""
_said: set[int] = set()
"""What `gathering` has said: a file that is read again is not warned of again."""
_lock = threading.Lock()


def warn_of_file(sentence: str, path: str | os.PathLike[str]) -> None:
    """Warn of something that may hold for many files. Within `gathering`, note it instead.

    Args:
        sentence: the same for all these files, so that Python shows it once.
        path: of the file.
    """
    name = os.fspath(path)
    key = hash((sentence, name))
    with _lock:
        if key in _said:
            return
        if _open:
            _open[-1].setdefault(sentence, _Files(name)).seen.add(key)
            return
    warnings.warn(sentence, stacklevel=3)


@contextmanager
def gathering() -> Iterator[None]:
    """Within: gather warnings about files. At the end, give one warning per sentence, such as "...: a.png and 3 more".

    Inside of another one in the same process, this one adds to the outer one.
    """
    with _lock:
        outermost = not _open
        if outermost:
            _open.append({})
    try:
        yield
    finally:
        if outermost:
            with _lock:
                gathered = _open.pop()
                _said.update(*(files.seen for files in gathered.values()))
            for sentence, files in gathered.items():
                more = f" and {len(files.seen) - 1:,} more" if len(files.seen) > 1 else ""
                warnings.warn(f"{sentence}: {files.first}{more}", stacklevel=3)
