"""Writes the report of a run, or of several runs in comparison: one HTML file."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor

from ..common.writing import write_whole
from ..engine.callbacks import Callback, RunInfo
from .page import MARK, page
from .reading import check_is_run, read_facts
from .series import Metrics
from .strips import Strips
from .tables import Run

NAME = "report.html"
COMPARED = Path("compare.html")
MOST_RUNS = 20
PICTURES = 3_200_000
"""Bytes of all pictures of a report, of less than 5 MB in all."""
EVERY = 60.0
"""Seconds between two reports of a run that trains, at least."""
SHARE = 100
"""A report that took so long is followed by a pause at least this many times as long: less than 1 % of the time."""
PICTURE_SECONDS = 1.0
"""Seconds that one report of a run that trains spends on new pictures; the next one makes those that are missing."""


def write_report(folders: Sequence[Path], out: Path | None = None) -> Path:
    """Write the report of one run, or the comparison of several.

    Args:
        folders: of the runs.
        out: the file to write; RUN/report.html if None, or compare.html in the current folder for several runs. An
            earlier report is replaced.

    Returns:
        the file.

    Raises:
        ValueError: one is no run, or `out` exists and is no report.
        OSError: a file cannot be read or written; the error names it.
    """
    folders = [Path(folder) for folder in folders]
    if not 1 <= len(folders) <= MOST_RUNS:
        raise ValueError(f"a report shows 1 to {MOST_RUNS} runs, not {len(folders)}")
    for folder in folders:
        check_is_run(folder)
    if out is None:
        out = folders[0] / NAME if len(folders) == 1 else COMPARED
    out = Path(out)
    check_replaceable(out)
    strips = [Strips(PICTURES, runs=len(folders)) for _ in folders]
    runs = []
    for folder, name, maker in zip(folders, names_of(folders), strips, strict=True):
        metrics = Metrics(folder / "metrics.jsonl")
        metrics.update()
        runs.append(Run(name, read_facts(folder), metrics, maker.read(folder)))
    _write(out, runs)
    return out


def check_replaceable(out: Path) -> None:
    """ValueError if `out` is there and is no report, or if its folder is missing."""
    if out.is_dir():
        raise ValueError(f"{out} is a folder, and the report is a file: name another place")
    if not out.parent.is_dir():
        raise ValueError(f"{out}: the folder {out.parent} does not exist")
    if not out.exists():
        return
    if not out.is_file():  # opening a pipe could wait forever
        raise ValueError(f"{out} is no regular file: name another place for the report")
    with out.open("rb") as file:
        if MARK.encode() not in file.read(1000):
            raise ValueError(f"{out} exists and is no report of fastnce: name another place for the report")


def names_of(folders: Sequence[Path]) -> list[str]:
    """A name for each run: of its folder, or the path as given where two folders have the same name."""
    short = [folder.resolve().name or str(folder) for folder in folders]
    return [name if short.count(name) == 1 else str(folder) for name, folder in zip(short, folders, strict=True)]


def _write(out: Path, runs: Sequence[Run]) -> None:
    write_whole(out, page(runs).encode("utf-8", "replace"))


class ReportCallback(Callback):
    """Rewrites RUN/report.html while a run trains, rarely enough to cost less than 1 % of the time.

    Args:
        every: seconds between two reports, at least.
        now: the time in seconds.
    """

    optional = True

    def __init__(self, every: float = EVERY, now: Callable[[], float] = time.perf_counter):
        self.every, self.now = every, now
        self._folder: Path | None = None
        self._next = 0.0

    def begin(self, run: RunInfo) -> None:
        self._folder, self._total = run.folder, run.total
        self._metrics = Metrics(run.folder / "metrics.jsonl")
        self._strips = Strips(PICTURES, PICTURE_SECONDS)
        self._write("running", "")

    def log(self, step: int, values: dict[str, float]) -> None:
        self._if_due()

    def samples(self, step: int, pictures: dict[str, Tensor]) -> None:
        self._if_due()

    def warn(self, step: int, sentence: str) -> None:
        self._if_due()

    def saved(self, step: int, folder: Path, best: bool) -> None:
        self._if_due()

    def end(self, step: int, state: str, reason: str) -> None:
        if self._folder is not None:
            self._write(state, reason)

    def _if_due(self) -> None:
        if self._folder is not None and self.now() >= self._next:
            self._write("running", "")

    def _write(self, state: str, reason: str) -> None:
        assert self._folder is not None
        began = self.now()
        out = self._folder / NAME
        check_replaceable(out)
        self._metrics.update()
        facts = read_facts(self._folder)
        facts.state, facts.reason, facts.total = state, reason, self._total
        (name,) = names_of([self._folder])
        _write(out, [Run(name, facts, self._metrics, self._strips.read(self._folder))])
        ended = self.now()
        self._next = ended + max(self.every, SHARE * (ended - began))
