"""Text files that grow by complete lines even if the disk fails: `log.txt` and `metrics.jsonl`."""

from __future__ import annotations

import json
import mmap
import os
import stat
from contextlib import suppress
from pathlib import Path

from ..common.writing import named


class Lines:
    """A file to which lines are appended, each completely or not at all.

    A line is appended in one write. If the disk takes only a part of it, that part is cut off again. An unfinished last
    line of a killed process is handled when the file is opened.

    Args:
        path: created if needed.
        json_only: each line is a JSON object, so an unfinished one is cut off. In other files it stays, and is ended.

    Raises:
        OSError: the file cannot be opened; the error names it.
    """

    def __init__(self, path: Path, json_only: bool = False):
        self.path = path
        self.cut = 0
        """Bytes of an unfinished last line that were cut off when the file was opened."""
        self.lost = 0
        """Lines that could not be written since the last successful one."""
        self._number = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o666)
        self._regular = stat.S_ISREG(os.fstat(self._number).st_mode)  # a pipe or a device cannot be truncated
        self._torn = False
        if self._regular and os.fstat(self._number).st_size:
            self._mend(json_only)

    def _mend(self, json_only: bool) -> None:
        with self.path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            whole = content.rfind(b"\n") + 1
            rest = content[whole:]
        if not rest:
            return
        if json_only and not _is_object(rest):
            try:
                os.ftruncate(self._number, whole)
            except OSError as error:
                raise named(error, self.path) from None
            self.cut = len(rest)
        else:
            self._torn = True  # the next write ends this line first

    def write(self, line: str) -> OSError | None:
        """Append a line; returns the error if it fails."""
        torn = self._torn
        left = f"{chr(10) if torn else ''}{line}\n".encode("utf-8", "backslashreplace")
        try:
            before = os.fstat(self._number).st_size
            try:
                while left:  # after a short write, a second one to learn the reason
                    left = left[os.write(self._number, left) :]
            except OSError:
                if self._regular:
                    self._torn = True
                    os.ftruncate(self._number, before)
                    self._torn = torn
                raise
        except OSError as error:
            self.lost += 1
            return named(error, self.path)
        self._torn, self.lost = False, 0
        return None

    def close(self) -> None:
        with suppress(OSError):  # which a network disk may report only now
            os.close(self._number)


def _is_object(text: bytes) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False
