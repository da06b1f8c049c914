"""Where a command's words go: streams that are closed, full, or lack a character, and errors told in one sentence."""

from __future__ import annotations

import os
import re
import sys
import time
from contextlib import suppress

from .writing import PARTIAL


def open_streams() -> None:
    """Make standard streams safe to print to.

    A closed one becomes the null device: its number would go to the next file that is opened, and what a library prints
    into that file. Characters that the encoding lacks are printed as escapes.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115  (for the process's life)
        elif mode == "w" and getattr(stream, "errors", None) in ("strict", "surrogateescape"):
            with suppress(AttributeError, OSError, ValueError):  # a stand-in that knows no encoding; nobody reads
                stream.reconfigure(errors="backslashreplace")


def tell(sentence: str, code: int) -> int:
    """Print one sentence on stderr, if that can be; returns the exit code."""
    with suppress(OSError, ValueError):
        print(f"fastnce: {sentence}", file=sys.stderr, flush=True)
    return code


def show(line: str) -> None:
    """Print a line for whoever reads it: where nobody does, the work that it tells of goes on."""
    with suppress(OSError, ValueError):
        print(line, flush=True)


def sentence_of(error: OSError) -> str:
    """The file and what the system says of it. Files that are written aside are named as they will be."""
    name = "" if error.filename is None else re.sub(rf"{PARTIAL.pattern}/", "", f"{os.fsdecode(error.filename)}: ")
    return f"{name}{error.strerror or error}"


def stdout_takes() -> bool:
    """Whether everything printed so far got out."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        return False
    return True


def give_up_stdout() -> None:
    """Drop what stdout has not taken and will be given, lest it is tried again at the end."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def flush(code: int) -> int:
    """Empty stdout while its errors can still be told; returns the exit code."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError) as error:
        give_up_stdout()
        if not isinstance(error, BrokenPipeError):  # the reader, such as head, has seen enough
            code = tell(f"standard output: {getattr(error, 'strerror', None) or error}", code or 2)
    return code


class ProgressLine:
    """A line on stderr, rewritten in place; where stderr is no terminal, a line every ten seconds.

    Nothing that happens to these lines, such as a closed pipe, ends the work that they tell of.
    """

    EVERY = 10.0

    def __init__(self) -> None:
        self._live = sys.stderr.isatty()
        self._last = time.monotonic()

    def __call__(self, text: str) -> None:
        if self._live:
            self._write(f"\r{text}\x1b[K")
        elif time.monotonic() - self._last >= self.EVERY:
            self._write(f"{text}\n")
            self._last = time.monotonic()

    def say(self, sentence: str) -> None:
        """A line that stays, on stdout."""
        self.clear()
        show(sentence)

    def clear(self) -> None:
        if self._live:
            self._write("\r\x1b[K")

    def _write(self, text: str) -> None:
        with suppress(OSError):
            print(text, end="", file=sys.stderr, flush=True)

    def __enter__(self) -> ProgressLine:
        return self

    def __exit__(self, *_: object) -> None:
        self.clear()
