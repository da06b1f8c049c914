"""Text files that grow by whole lines, whatever the disk does: `log.txt` and `metrics.jsonl`."""

from __future__ import annotations

import json
import mmap
import os
import stat
from contextlib import suppress
from pathlib import Path

from ..common.writing import named


class Lines:
    """A file that lines are added to, each of them whole or not at all.

    A line goes to the file's end in one write. Of a line that the disk takes in part, that part is cut off again, and
    the next line is tried anew. What a killed process left of a last line is dealt with when the file is opened.

    Args:
        path: made if need be.
        json_only: each line is a JSON object, so an unfinished one is cut off. In other files it stays, as a line of
            its own.

    Raises:
        OSError: the file cannot be opened; it names the file.
    """

    def __init__(self, path: Path, json_only: bool = False):
        self.path = path
        self.cut = 0
        """Bytes of an unfinished last line that were cut off."""
        self.lost = 0
        """Lines that could not be written since the last one that could."""
        self._number = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o666)
        self._regular = stat.S_ISREG(os.fstat(self._number).st_mode)  # a pipe or a device cannot be cut
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
            self._torn = True  # the next line begins with the end of this one

    def write(self, line: str) -> OSError | None:
        """Add a line; returns the error if it could not be."""
        torn = self._torn
        left = f"{chr(10) if torn else ''}{line}\n".encode("utf-8", "backslashreplace")
        try:
            before = os.fstat(self._number).st_size
            try:
                while left:  # a second time only to learn why the first one was short
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
        with suppress(OSError):  # what a shared disk says only now
            os.close(self._number)


def _is_object(text: bytes) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except ValueError:
        return False
