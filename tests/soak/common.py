"""Shared code of the campaigns: tries with their own random generators, and commands in forks of this process.

A fork of a process that has imported PyTorch starts in milliseconds; a new interpreter would take seconds per try.
"""

from __future__ import annotations

import mmap
import os
import resource
import select
import shutil
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import numpy as np
import torch
from PIL import Image

import fastnce.commands.main  # noqa: F401  (imported once, not in each fork)
from fastnce.__main__ import entry
from fastnce.config import resolve
from fastnce.config.build import plan

TINY = [
    "network.generator=resnet_4blocks",
    "network.width=2",
    "network.discriminator_width=2",
    "loss.nce_layers=4,8",
    "loss.patches=16",
    "loss.projection=8",
    "data.load_size=36",
    "data.crop_size=32",
    "run.device=cpu",
    "run.threads=1",
    "run.log_every=1",
    "run.monitor_every=0",
    "run.sample_every=0",
]
MARK = "FASTNCE_SOAK"
"""Environment variable that identifies the processes of a try, even without their parents."""


@dataclass
class Outcome:
    """The outcome of a campaign: the tries with what each was, a sentence per lost try, and further notes."""

    tried: int = 0
    done: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Campaign:
    """A campaign of faults.

    Args:
        name: of the campaign.
        promise: what must hold in every try.
        tries: number of tries of a full run.
        run: takes the number of tries, the seed and an empty folder.
    """

    name: str
    promise: str
    tries: int
    run: Callable[[int, int, Path], Outcome]


@dataclass
class Bounds:
    """Limits from the command line: a single try, and a time after which no try starts."""

    only: int | None = None
    until: float = float("inf")


BOUNDS = Bounds()


def tries(count: int, seed: int) -> Iterator[tuple[int, Random]]:
    """Yield the number of each try with its own random generator, so that a single try can be repeated."""
    for number in range(count) if BOUNDS.only is None else [BOUNDS.only]:
        if time.monotonic() > BOUNDS.until:
            return
        yield number, Random(f"{seed}/{number}")


def survey(
    count: int, seed: int, folder: Path, attempt: Callable[[int, Random, Path], tuple[str, list[str]]]
) -> Outcome:
    """Run the tries.

    Args:
        attempt: takes the number of a try, its random generator and an empty folder, which is removed after a success;
            returns a description and a list of faults.
    """
    outcome = Outcome()
    for number, rng in tries(count, seed):
        place = folder / f"try-{number}"
        place.mkdir(parents=True)
        try:
            done, wrong = attempt(number, rng, place)
        except Exception:
            done, wrong = "the test itself failed", [traceback.format_exc()]
        outcome.tried += 1
        outcome.done.append(done)
        if wrong:
            outcome.lost.append(f"--seed {seed} --only {number}: {done}: {'; '.join(wrong)}")
        else:
            shutil.rmtree(place, ignore_errors=True)
    return outcome


def heed_signals() -> None:
    """Restore default signal handling: nohup and a shell's `&` start processes that ignore some signals."""
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pictures(folder: Path, *names: str, side: int = 20, seed: int = 0) -> Path:
    """Write square pictures of noise, each different."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        numbers = np.random.default_rng([seed, *name.encode()])
        Image.fromarray(numbers.integers(0, 256, (side, side, 3), np.uint8)).save(path)
    return folder


def training_pictures(folder: Path, count: int = 3) -> Path:
    """Write trainA, trainB and held-out pairs."""
    names = [f"{part}/{n}.png" for part in ("trainA", "trainB", "test/rain", "test/norain") for n in range(count)]
    return pictures(folder, *names)


def warm() -> None:
    """Import modules that commands import lazily, so that forks need not. Computes nothing and starts no thread."""
    torch.set_num_threads(1)
    Image.init()
    plan(resolve("fastcut"))


@dataclass(frozen=True)
class Ended:
    """A command that has ended.

    Args:
        code: exit code; negative after a signal, None if it exceeded its time and was killed.
        peak: memory in MiB.
        behind: processes that it left running.
    """

    code: int | None
    out: str
    err: str
    seconds: float
    peak: int
    behind: list[int]

    @property
    def said(self) -> list[str]:
        """The lines on stderr without warnings and progress."""
        lines = [line for line in self.err.splitlines() if line.startswith("fastnce: ") or "Traceback" in line]
        return [line for line in lines if not line.startswith("fastnce: warning: ")]

    def wrong(self, *codes: int) -> list[str]:
        """Return faults: a wrong exit code, a traceback, no or several error messages, processes left running."""
        found = []
        if self.code not in codes:
            found.append(f"exit code {self.code} is not one of {', '.join(map(str, codes))}: {self.err[-300:]!r}")
        if "Traceback" in self.err or "Traceback" in self.out:
            found.append(f"a traceback: {self.err[-600:]!r}")
        elif self.code and self.code > 0 and len(self.said) != 1:
            found.append(f"{len(self.said)} sentences with exit code {self.code}: {self.err[-300:]!r}")
        if self.behind:
            found.append(f"{len(self.behind)} processes are left")
        return found


class Child:
    """`fastnce ARGUMENTS` in a fork, in its own session.

    Args:
        prepare: called in the fork before the command.
        memory: limit in bytes beyond the memory at the start; 0 sets no limit.
        work: called instead of the command.
    """

    def __init__(
        self,
        arguments: list[str] | tuple[str, ...] = (),
        prepare: Callable[[], None] | None = None,
        memory: int = 0,
        work: Callable[[], int] | None = None,
    ):
        self.began = time.monotonic()
        self._text = {1: bytearray(), 2: bytearray()}
        ends = {number: os.pipe() for number in self._text}
        sys.stdout.flush()
        sys.stderr.flush()
        self._ready = mmap.mmap(-1, 1)
        self.pid = os.fork()
        if not self.pid:
            self._live(ends, list(map(str, arguments)), prepare, memory, work)
        self._pipes = {}
        for number, (readable, writable) in ends.items():
            os.close(writable)
            os.set_blocking(readable, False)
            self._pipes[readable] = self._text[number]
        while not self._ready[0] and self.alive():  # the set-up is not part of the command
            time.sleep(0.001)

    def _live(self, ends, arguments, prepare, memory, work) -> None:
        code = 1
        try:
            os.setsid()
            heed_signals()
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            for number, (readable, writable) in ends.items():
                os.close(readable)
                os.dup2(writable, number)
                os.close(writable)
            sys.stdout, sys.stderr = (open(n, "w", buffering=1, closefd=False) for n in (1, 2))  # noqa: SIM115
            os.environ["CUDA_VISIBLE_DEVICES"] = ""
            if memory:
                pages = int(Path("/proc/self/statm").read_text().split()[0])
                resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + memory,) * 2)
            warnings.showwarning = _show  # a test may have replaced it
            warnings.simplefilter("default")
            sys.argv = ["fastnce", *arguments]
            if prepare is not None:
                prepare()
            self._ready[0] = 1
            code = work() if work is not None else entry()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        except BaseException as error:  # as the interpreter does
            traceback.print_exception(error, file=sys.stderr)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def read(self, seconds: float = 0.0) -> str:
        """Return the output on stdout so far, after waiting at most `seconds` for more."""
        for pipe in select.select(list(self._pipes), [], [], seconds)[0]:
            try:
                while part := os.read(pipe, 65536):
                    self._pipes[pipe] += part
                self._close(pipe)
            except BlockingIOError:
                pass
        return self._text[1].decode(errors="replace")

    def _close(self, pipe: int) -> None:
        del self._pipes[pipe]
        os.close(pipe)

    def alive(self) -> bool:
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None

    def send(self, number: int) -> None:
        os.kill(self.pid, number)

    def sleep(self, seconds: float) -> None:
        """Wait `seconds`, or until the command ends."""
        until = time.monotonic() + seconds
        while self.alive() and (left := until - time.monotonic()) > 0:
            if self._pipes:
                self.read(min(left, 0.01))
            else:
                time.sleep(min(left, 0.01))

    def end(self, seconds: float = 180.0) -> Ended:
        """Wait for the command to end; kill it after `seconds`."""
        self.sleep(seconds)
        late = self.alive()
        if late:
            self.send(signal.SIGKILL)
        _, status, usage = os.wait4(self.pid, 0)
        took = time.monotonic() - self.began
        self.read()
        for pipe in list(self._pipes):
            self._close(pipe)
        out, err = (text.decode(errors="replace") for text in self._text.values())
        behind = in_session(self.pid)
        for pid in behind:
            os.kill(pid, signal.SIGKILL)
        code = None if late else os.waitstatus_to_exitcode(status)
        return Ended(code, out, err, took, usage.ru_maxrss // 1024, behind)


def _show(message, category, filename, lineno, file=None, line=None) -> None:
    sys.stderr.write(warnings.formatwarning(message, category, filename, lineno, line))


def run(arguments: list[str], **how) -> Ended:
    """Run `fastnce ARGUMENTS` in a fork until it ends (see `Child`)."""
    return Child(arguments, **how).end()


def in_session(session: int) -> list[int]:
    """Return the running processes of a session, as far as /proc lists them."""
    return [pid for pid, fields in _processes() if int(fields[3]) == session]


def marked(mark: str) -> list[int]:
    """Return the running processes that were started with this value of the variable `MARK`."""
    found = []
    for pid, _ in _processes():
        try:
            environment = Path(f"/proc/{pid}/environ").read_bytes()
        except OSError:
            continue
        if f"{MARK}={mark}".encode() in environment.split(b"\0"):
            found.append(pid)
    return found


def _processes() -> Iterator[tuple[int, list[str]]]:
    """Yield the id and the status fields (state, parent, group, session, ...) of each process except zombies."""
    for place in Path("/proc").glob("[0-9]*"):
        try:
            # the fields after the program's name, which is in parentheses
            fields = (place / "stat").read_text(errors="replace").rpartition(")")[2].split()
        except OSError:
            continue
        if fields and fields[0] not in "ZX":
            yield int(place.name), fields


def tree(folder: Path) -> dict[str, bytes]:
    """Return the content of every file below a folder, including hidden files, by relative name."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
