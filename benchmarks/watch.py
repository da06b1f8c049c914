"""Supervise a part of the benchmarks in its own process, so that a provider that hangs or crashes costs nothing else.

The process is forked, so PyTorch is imported only once; the parent must not have used an accelerator.

The process writes a journal with one JSON line per event: `begin` of a provider (with the allowed seconds), `end` of it
(with its time alone), `timing` of several interleaved, `timed`, `row`. If the process dies or hangs after `begin`, that
provider is refused and the process restarted. During `timing`, the providers that replay graphs are refused, or all if
there are none. Rows in the journal are not measured again.

CPU time distinguishes a hung process from one that compiles on a busy machine (`Patience`).
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

RESTARTS = 5
RESTART_SECONDS = 12.0
"""No restart with less time: importing and starting a device take that long."""
GRACE = 2.0
"""Seconds between the time limit of the process and the signal that ends it."""
IDLE = 8.0
"""Seconds without CPU time after which an overdue process counts as hung."""


@dataclass
class Journal:
    """The events that a part has written so far."""

    rows: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Measured rows by `Row.key`."""
    prepared: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Rows of providers that finished their first calls, with their time alone, if any."""
    at_work: dict[str, Any] | None = None
    """The last event `begin` or `timing` that has not ended."""
    refused: dict[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> Journal:
        journal = cls()
        for line in path.read_text().splitlines() if path.exists() else []:
            with contextlib.suppress(json.JSONDecodeError):  # a killed process may leave an unfinished line
                journal.take(json.loads(line))
        return journal

    def take(self, event: dict[str, Any]) -> None:
        if "begin" in event or "timing" in event:
            self.at_work = event
        elif "end" in event:
            self.at_work = None
            if event["row"].get("p50_ms") is not None or event["end"] not in self.prepared:
                self.prepared[event["end"]] = event["row"]  # a failed second try does not replace a time
        elif "timed" in event:
            self.at_work = None
        elif "refuse" in event:
            self.refused[event["refuse"]] = event["why"]
            self.prepared.setdefault(event["refuse"], event["row"])
            self.at_work = None
        elif "row" in event:
            self.rows[event["key"]] = event["row"]

    def suspects(self) -> dict[str, dict[str, Any]]:
        """Return the rows, by key, of the providers that ran last."""
        if self.at_work is None:
            return {}
        if "begin" in self.at_work:
            return {self.at_work["begin"]: self.at_work["row"]}
        return {key: self.prepared[key] for key in self.at_work["timing"]}

    def all_rows(self) -> Iterator[dict[str, Any]]:
        """Yield measured rows, then the rows of providers that were not timed with the others."""
        alone = {key for key, row in self.prepared.items() if row.get("p50_ms") is not None}
        # a row without times, such as that of a refused provider, does not replace a time alone
        final = {key: row for key, row in self.rows.items() if row.get("p50_ms") is not None or key not in alone}
        yield from final.values()
        for key, row in self.prepared.items():
            if key in final:
                continue
            why = "" if key in alone else "stopped before it was timed"
            if key in self.refused:
                why = f"{'stopped' if key in alone else 'did not run'}: {self.refused[key]}"
            yield row | {"note": "; ".join(filter(None, (row["note"], why)))}


@dataclass
class Outcome:
    """The outcome of a part: `trouble` is None on success; `restarts` has the reason of each restart."""

    rows: list[dict[str, Any]]
    trouble: str | None
    restarts: list[str]


def supervise(work: Callable[[float], int], journal: Path, log: Path, seconds: float) -> Outcome:
    """Run `work` to its end or for `seconds`, and restart it without the providers that crash it.

    Args:
        work: called in its own process with its seconds; writes the journal and returns an exit code. Its output goes
            to `log`.
    """
    journal.unlink(missing_ok=True)
    log.unlink(missing_ok=True)
    end, restarts, trouble = time.monotonic() + seconds, [], None
    while True:
        fault = _once(work, journal, log, end)
        state = Journal.read(journal)
        if fault is None:
            break
        left = end - time.monotonic()
        suspects = state.suspects()
        if not suspects:
            trouble = fault
            break
        with journal.open("a") as lines:
            for key, row in suspects.items():
                # start a new line: the process may have died within one
                lines.write("\n" + json.dumps({"refuse": key, "why": fault, "row": row}) + "\n")
        reason = f"{' and '.join(suspects)}: {fault}"
        if left < RESTART_SECONDS or len(restarts) == RESTARTS:
            trouble = reason
            break
        restarts.append(reason)
    return Outcome(list(Journal.read(journal).all_rows()), trouble, restarts)


def _once(work: Callable[[float], int], journal: Path, log: Path, end: float) -> str | None:
    """Run one process and return None or the fault."""
    began = time.monotonic()
    start = log.stat().st_size if log.exists() else 0
    process = fork(functools.partial(work, max(1.0, end - began - GRACE)), log)
    patience: Patience | None = None
    code = None
    state, position = Journal(), 0
    try:
        while (code := _exit_code(process)) is None:
            now = time.monotonic()
            if now > end:
                return f"stopped at its limit of {now - began:.0f} s; its results so far are kept"
            if patience is not None and patience.over(now):
                return f"hung: it took more than {patience.seconds:.2g} s"
            time.sleep(0.02)
            before = state.at_work
            position = _follow(journal, position, state)
            if state.at_work is not before:
                patience = None if state.at_work is None else Patience(process, state.at_work["seconds"])
    finally:
        _stop(process, ended=code is not None)
    if code == 0:
        return None
    lines = log.read_bytes()[start:].decode(errors="replace").strip().splitlines()
    how = f"exit code {code}" if code > 0 else f"killed by {signal.Signals(-code).name}"
    return f"{how}: {lines[-1] if lines else 'no output'}"


class Patience:
    """The time limit of a provider: `seconds` of wall time, and beyond that `seconds` of CPU time.

    A compiler that shares its cores with other processes is slow but not hung. A process that waits in vain for a
    device either spins and uses up its CPU time, or sleeps and uses none for `IDLE` seconds.
    """

    def __init__(self, group: int, seconds: float):
        self.group, self.seconds = group, seconds
        self.busy = time.monotonic()
        """When the process last used the CPU."""
        self.due = self.busy + seconds
        self.at_begin = self.used = cpu_seconds(group)
        self.check_at = self.due - IDLE

    def over(self, now: float) -> bool:
        """Return whether the process counts as hung."""
        if now < self.check_at:
            return False
        self.check_at = now + 0.25  # a check reads a file for every process of the machine
        used = cpu_seconds(self.group)
        if used > self.used + 0.01 * IDLE:
            self.busy, self.used = now, used
        idle = now - self.busy > min(IDLE, self.seconds)
        return now > self.due and (idle or used - self.at_begin > self.seconds)


def cpu_seconds(group: int) -> float:
    """Return the CPU seconds of a process group and its ended children; 0 without /proc."""
    ticks = 0
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            fields = path.read_text().rpartition(")")[2].split()
            if int(fields[2]) == group:
                ticks += sum(map(int, fields[11:15]))  # user and kernel time of the process and its ended children
    return ticks / os.sysconf("SC_CLK_TCK")


def fork(work: Callable[[], int], log: Path) -> int:
    """Fork a process that does the work with its output in the log; return its id, which is also its group's."""
    sys.stdout.flush()
    sys.stderr.flush()
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        os.setsid()
        # a file, as a compiler's workers that outlive the process would hold a pipe open
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        nothing = os.open(os.devnull, os.O_RDONLY)
        for source, target in ((nothing, 0), (output, 1), (output, 2)):
            os.dup2(source, target)
        sys.stdin, sys.stdout, sys.stderr = open(0, closefd=False), open(1, "w", 1), open(2, "w", 1)  # noqa: SIM115
        code = work()
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)  # skip the exit handlers that the parent registered


def end(process: int) -> None:
    """End a forked process if it is still running."""
    _stop(process, ended=_exit_code(process) is not None)


def _exit_code(process: int) -> int | None:
    """Return the exit code, None while the process runs, or minus the signal that ended it."""
    ended, status = os.waitpid(process, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if ended else None


def _follow(journal: Path, position: int, state: Journal) -> int:
    """Read the complete lines after `position` into the state and return the position after them."""
    if not journal.exists():
        return position
    with journal.open("rb") as file:
        file.seek(position)
        text = file.read()
    whole = text[: text.rfind(b"\n") + 1]
    for line in whole.decode(errors="replace").splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            state.take(json.loads(line))
    return position + len(whole)


def _stop(process: int, ended: bool) -> None:
    """End the process group; a process blocked in a driver may remain."""
    for number, patience in ((signal.SIGTERM, 1.0), (signal.SIGKILL, 4.0)):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process, number)  # the process leads its session, so its id is its group's
        until = time.monotonic() + patience
        while not ended and time.monotonic() < until:
            ended = _exit_code(process) is not None
            time.sleep(0.02)
