"""Run one part of the benchmarks in a process of its own, and lose nothing to a provider that hangs or crashes.

The process is forked, so that importing PyTorch is paid once; the parent must not have touched an accelerator.

The process writes a journal, a JSON line an event: `begin` a provider (with the seconds that it may take), `end` it
(with its times alone), `timing` of several side by side, `timed`, `row`. When it dies or hangs while a provider is
begun, that one is refused and the process started again; while several are timed, those that replay graphs are refused,
or all where none does. Rows that are in the journal are not measured twice.

What hangs is told from what compiles on a busy machine by the time that the processor gave it (`Patience`).
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
"""Below this a new process would hardly get to its first provider: importing and starting a device take that long."""
GRACE = 2.0
"""Seconds between the moment at which the process should have ended by itself and the signal."""
IDLE = 8.0
"""Seconds without any work on the CPU after which a process that is overdue counts as hung."""


@dataclass
class Journal:
    """What a part has written so far."""

    rows: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Measured, by `Row.key`."""
    prepared: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Rows of providers whose first calls came to an end, with their times alone, if any."""
    at_work: dict[str, Any] | None = None
    """The last event, `begin` or `timing`, that has not come to an end."""
    refused: dict[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> Journal:
        journal = cls()
        for line in path.read_text().splitlines() if path.exists() else []:
            with contextlib.suppress(json.JSONDecodeError):  # a line that a killed process did not finish
                journal.take(json.loads(line))
        return journal

    def take(self, event: dict[str, Any]) -> None:
        if "begin" in event or "timing" in event:
            self.at_work = event
        elif "end" in event:
            self.at_work = None
            if event["row"].get("p50_ms") is not None or event["end"] not in self.prepared:
                self.prepared[event["end"]] = event["row"]  # a second try that failed takes no figure away
        elif "timed" in event:
            self.at_work = None
        elif "refuse" in event:
            self.refused[event["refuse"]] = event["why"]
            self.prepared.setdefault(event["refuse"], event["row"])
            self.at_work = None
        elif "row" in event:
            self.rows[event["key"]] = event["row"]

    def suspects(self) -> dict[str, dict[str, Any]]:
        """Rows, by key, of those that were at work last."""
        if self.at_work is None:
            return {}
        if "begin" in self.at_work:
            return {self.at_work["begin"]: self.at_work["row"]}
        return {key: self.prepared[key] for key in self.at_work["timing"]}

    def all_rows(self) -> Iterator[dict[str, Any]]:
        """Measured rows, then what is known of providers that were not timed beside the others."""
        alone = {key for key, row in self.prepared.items() if row.get("p50_ms") is not None}
        # a row without times, such as a refused one's, does not take the place of times alone
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
    """How a part went: `trouble` is None when it ran to its end; `restarts` says why it was begun again."""

    rows: list[dict[str, Any]]
    trouble: str | None
    restarts: list[str]


def supervise(work: Callable[[float], int], journal: Path, log: Path, seconds: float) -> Outcome:
    """Run `work` to its end or for `seconds`, beginning it again without providers that end it.

    Args:
        work: called in a process of its own with the seconds that it has; writes the journal and returns an exit code.
            Its other words go to `log`.
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
                # a line of its own: the process may have died within one
                lines.write("\n" + json.dumps({"refuse": key, "why": fault, "row": row}) + "\n")
        reason = f"{' and '.join(suspects)}: {fault}"
        if left < RESTART_SECONDS or len(restarts) == RESTARTS:
            trouble = reason
            break
        restarts.append(reason)
    return Outcome(list(Journal.read(journal).all_rows()), trouble, restarts)


def _once(work: Callable[[float], int], journal: Path, log: Path, end: float) -> str | None:
    """One process: None, or what went wrong."""
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
                return f"stopped at its limit of {now - began:.0f} s; what it had measured by then is kept"
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
    return f"{how}: {lines[-1] if lines else 'it said nothing'}"


class Patience:
    """What a provider may take: `seconds` of the clock and, where more passed, `seconds` of the CPU.

    A compiler that shares its cores with others is not hung: its time on the clock says little. A process that waits
    for a device in vain either spins, and uses up its time on the CPU, or sleeps, and uses none for `IDLE` seconds.
    """

    def __init__(self, group: int, seconds: float):
        self.group, self.seconds = group, seconds
        self.busy = time.monotonic()
        """When it was last seen to have used the CPU."""
        self.due = self.busy + seconds
        self.at_begin = self.used = cpu_seconds(group)
        self.ask_at = self.due - IDLE

    def over(self, now: float) -> bool:
        """Whether it counts as hung."""
        if now < self.ask_at:
            return False
        self.ask_at = now + 0.25  # asking reads a file of every process of the machine
        used = cpu_seconds(self.group)
        if used > self.used + 0.01 * IDLE:
            self.busy, self.used = now, used
        idle = now - self.busy > min(IDLE, self.seconds)
        return now > self.due and (idle or used - self.at_begin > self.seconds)


def cpu_seconds(group: int) -> float:
    """Of all processes of a group and those of their children that have ended; 0 where the system does not tell."""
    ticks = 0
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            fields = path.read_text().rpartition(")")[2].split()
            if int(fields[2]) == group:
                ticks += sum(map(int, fields[11:15]))  # its own and its ended children's, in user and in kernel mode
    return ticks / os.sysconf("SC_CLK_TCK")


def fork(work: Callable[[], int], log: Path) -> int:
    """The number of a process, and of its group, that does the work and writes to the log."""
    sys.stdout.flush()
    sys.stderr.flush()
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        os.setsid()
        # A file and not a pipe: a compiler's workers that outlive the process would hold a pipe open.
        words = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        nothing = os.open(os.devnull, os.O_RDONLY)
        for source, target in ((nothing, 0), (words, 1), (words, 2)):
            os.dup2(source, target)
        sys.stdin, sys.stdout, sys.stderr = open(0, closefd=False), open(1, "w", 1), open(2, "w", 1)  # noqa: SIM115
        code = work()
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)  # nothing of the parent's that is registered for the end is this process's to do


def end(process: int) -> None:
    """End a forked process, if it has not ended."""
    _stop(process, ended=_exit_code(process) is not None)


def _exit_code(process: int) -> int | None:
    """None while it runs; minus the signal that ended it."""
    ended, status = os.waitpid(process, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if ended else None


def _follow(journal: Path, position: int, state: Journal) -> int:
    """Take the whole lines after `position`; the position after them."""
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
    """End the process and those that it started; one that a driver holds is left behind."""
    for number, patience in ((signal.SIGTERM, 1.0), (signal.SIGKILL, 4.0)):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process, number)  # its own session, so its group has its number
        until = time.monotonic() + patience
        while not ended and time.monotonic() < until:
            ended = _exit_code(process) is not None
            time.sleep(0.02)
