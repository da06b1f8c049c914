"""Terminal output of the commands: streams that are closed or full, missing characters, errors as one sentence."""

from __future__ import annotations

import os
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from .writing import PARTIAL


def open_streams() -> None:
    """Make the standard streams safe to print to.

    A closed stream becomes the null device. Otherwise the next opened file would get its descriptor, and libraries
    would print into that file. Characters that the encoding lacks are printed as escapes.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115  (for the process's life)
        elif mode == "w" and getattr(stream, "errors", None) in ("strict", "surrogateescape"):
            with suppress(AttributeError, OSError, ValueError):  # a replaced stream that has no encoding
                stream.reconfigure(errors="backslashreplace")


def report_error(sentence: str, code: int) -> int:
    """Print one sentence on stderr if possible; return the exit code `code`."""
    with suppress(OSError, ValueError):
        print(f"fastnce: {sentence}", file=sys.stderr, flush=True)
    return code


def print_line(line: str) -> None:
    """Print a line. A closed or full stdout is ignored, so that the work goes on."""
    with suppress(OSError, ValueError):
        print(line, flush=True)


def sentence_of(error: OSError) -> str:
    """Format an error as the file name and the system's message. A temporary name is replaced by the final one."""
    name = "" if error.filename is None else re.sub(rf"{PARTIAL.pattern}/", "", f"{os.fsdecode(error.filename)}: ")
    return f"{name}{error.strerror or error}"


def write_out(text: str) -> None:
    """Write a text of any length to stdout.

    A text longer than the stream's buffer meets a full disk inside of this call. The error then names stdout, and later
    flushes do not repeat it.

    Raises:
        OSError: stdout is full. BrokenPipeError: its reader has stopped.
    """
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        discard_stdout()
        raise OSError(error.errno, error.strerror, "standard output") from None


def flush_stdout() -> bool:
    """Flush stdout; return whether that succeeded."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        return False
    return True


def discard_stdout() -> None:
    """Discard everything that stdout still buffers or will receive, so that Python does not retry it at exit."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def flush(code: int) -> int:
    """Flush stdout while its errors can still be reported; return the exit code."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError) as error:
        discard_stdout()
        if not isinstance(error, BrokenPipeError):  # a broken pipe is no failure: the reader, such as head, has stopped
            code = report_error(f"standard output: {getattr(error, 'strerror', None) or error}", code or 2)
    return code


@contextmanager
def warnings_through(say: Callable[[str], None]) -> Iterator[None]:
    """Within: a warning is one line, which `say` receives, and each text comes once."""
    before, said = warnings.showwarning, set[str]()

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        text = " ".join(str(message).split())
        if text not in said:
            said.add(text)
            say(f"warning: {text}")

    warnings.showwarning = show
    try:
        yield
    finally:
        warnings.showwarning = before


class ProgressLine:
    """A progress line on stderr, rewritten in place. If stderr is not a terminal, one line every ten seconds.

    Errors of the stream, such as a closed pipe, are ignored, so that the work goes on. Warnings get their own lines.
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
        """Print a permanent line on stdout."""
        self.clear()
        print_line(sentence)

    def clear(self) -> None:
        if self._live:
            self._write("\r\x1b[K")

    def _write(self, text: str) -> None:
        with suppress(OSError):
            print(text, end="", file=sys.stderr, flush=True)

    def __enter__(self) -> ProgressLine:
        self._before = warnings.showwarning
        warnings.showwarning = self._show_warning
        return self

    def __exit__(self, *_: object) -> None:
        warnings.showwarning = self._before
        self.clear()

    def _show_warning(self, *warning: Any, **more: Any) -> None:
        self.clear()
        self._before(*warning, **more)
