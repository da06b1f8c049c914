"""The traceback of a script's error, as Python shows it: without the frames of what ran the script."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from pathlib import Path

_OWN = str(Path(__file__).parent)
_MACHINERY = ("<frozen runpy>", "<frozen importlib.")
"""Python hides these, too, where no frame of ours is between them."""


def show_as_python() -> None:
    """Let Python print the error that is about to end it without these frames, unless the script has a hook."""
    if sys.excepthook is sys.__excepthook__:
        sys.excepthook = _show


def _show(kind: type[BaseException], error: BaseException, trace: types.TracebackType | None) -> None:
    for one in _chain(error):
        one.__traceback__ = scripts_own(one.__traceback__)
    sys.__excepthook__(kind, error, scripts_own(trace))


def scripts_own(trace: types.TracebackType | None) -> types.TracebackType | None:
    """Return a traceback without the frames of this package and of Python's machinery; None if none is left."""
    frames = []
    while trace is not None:
        file = trace.tb_frame.f_code.co_filename
        if not (file.startswith(_MACHINERY) or str(Path(file).parent) == _OWN):
            frames.append(trace)
        trace = trace.tb_next
    kept = None
    for one in reversed(frames):
        kept = types.TracebackType(kept, one.tb_frame, one.tb_lasti, one.tb_lineno)
    return kept


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an error with its causes and contexts, each once."""
    waiting: list[BaseException | None] = [error]
    seen: set[int] = set()
    while waiting:
        one = waiting.pop()
        if one is not None and id(one) not in seen:
            seen.add(id(one))
            yield one
            waiting += [one.__cause__, one.__context__, *getattr(one, "exceptions", ())]
