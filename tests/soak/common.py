"""What the campaigns share: their form, small pictures and options, and commands in forks."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from fastnce.cli import main
from fastnce.engine.checkpoint import Checkpoints, read_state
from fastnce.writing import PARTIAL
from tests.forked import Forked

TINY = [
    "network.generator=resnet_4blocks",
    "network.width=4",
    "network.discriminator_width=4",
    "loss.nce_layers=0,4,8",
    "loss.patches=16",
    "loss.projection=8",
    "data.load_size=36",
    "data.crop_size=32",
    "run.device=cpu",
    "run.threads=1",
    "run.log_every=1",
    "run.sample_every=4",
    "run.save_every=2",
    "optim.ema=0.9",
]


@dataclass
class Outcome:
    """Of a campaign: how much was tried, what was lost (seed, number, what happened), and figures to tell."""

    tried: int = 0
    lost: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Campaign:
    """A kind of fault.

    Args:
        name: as it is called on the command line.
        promise: what must hold in each try.
        tries: of a full run.
        run: (tries, seed, empty folder, the one number to try or None) -> outcome.
    """

    name: str
    promise: str
    tries: int
    run: Callable[[int, int, Path, int | None], Outcome]


def each(tries: int, seed: int, only: int | None, attempt: Callable[[int, random.Random], str]) -> Outcome:
    """Call `attempt(number, rng)` for each number; what it returns, or fails with, is what was lost."""
    outcome = Outcome()
    for number in range(tries) if only is None else [only]:
        try:
            lost = attempt(number, random.Random(f"{seed}/{number}"))
        except AssertionError as error:
            lost = str(error) or "an assertion without words"
        outcome.tried += 1
        if lost:
            outcome.lost.append(f"seed {seed}, try {number}: {lost}")
    return outcome


def picture(path: Path, seed: int = 0, size: tuple[int, int] = (40, 36)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    coarse = np.random.default_rng(seed).integers(0, 256, (9, 10, 3), np.uint8)
    Image.fromarray(coarse).resize(size).save(path)
    return path


def pictures(folder: Path, *names: str) -> Path:
    for seed, name in enumerate(names):
        picture(folder / name, seed)
    return folder


@dataclass
class Ended:
    """A command that has ended."""

    code: int
    out: str
    err: str

    @property
    def told(self) -> str:
        return f"exit {self.code}: {self.err.strip()[-300:] or self.out.strip()[-200:]!r}"

    def check(self, *codes: int) -> None:
        """One of these exit codes, no traceback, and at most a sentence where something is wrong."""
        assert "Traceback" not in self.err + self.out, f"a traceback: {self.err.strip()[-600:]}"
        assert self.code in codes, self.told
        if self.code in (1, 2):
            said = [line for line in self.err.splitlines() if line.startswith("fastnce: ") and "warning:" not in line]
            assert len(said) == 1, f"{len(said)} sentences: {self.err[-600:]!r}"


def begin(arguments: list[object], before: Callable[[], None] = lambda: None) -> Forked:
    """A command in a fork; `before` is called in there first."""

    def work() -> int:
        before()
        try:
            return main([str(argument) for argument in arguments])
        except SystemExit as end:
            return int(end.code or 0)

    return Forked(work)


def end(process: Forked, seconds: float = 120.0) -> Ended:
    code = process.end(seconds)
    texts = (told.read_text() for told in (process.out, process.err))
    return Ended(128 - code if code < 0 else code, *texts)


def command(arguments: list[object], before: Callable[[], None] = lambda: None) -> Ended:
    return end(begin(arguments, before))


def digests(run: Path) -> dict[str, object]:
    """Of the newest checkpoint."""
    path = Checkpoints(run / "checkpoints").steps()[-1]
    state = read_state(path)
    return {"step": state["step"], **state["sha256"]}


def losses(run: Path) -> dict[int, dict[str, float]]:
    """The last record of each step, without what a clock has measured; fails where a line is torn."""
    found: dict[int, dict[str, float]] = {}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        if "G" in row:
            found[row["step"]] = {k: v for k, v in row.items() if k not in ("images_per_second", "data_share")}
    return found


def leftovers(folder: Path) -> list[str]:
    """What is not finished."""
    return [str(path) for path in folder.rglob("*") if PARTIAL.fullmatch(path.name) or path.name.endswith(".tmp")]


def contents(folder: Path) -> dict[str, str]:
    """Digest of each file, locks apart."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not re.search(r"lock(-owner)?$", path.name)
    }


@contextlib.contextmanager
def copied(folder: Path, to: Path) -> Iterator[Path]:
    """A copy that goes at the end."""
    shutil.rmtree(to, ignore_errors=True)
    shutil.copytree(folder, to, symlinks=True)
    try:
        yield to
    finally:
        shutil.rmtree(to, ignore_errors=True)


class Run:
    """A tiny run: its data, its command, and what it comes to when nothing happens to it."""

    STEPS = 12

    def __init__(self, folder: Path, *more: str, steps: int = STEPS):
        self.folder = folder
        self.data = pictures(folder / "data", *(f"train{d}/{n}.png" for d in "AB" for n in range(3)))
        self.options = [*TINY, f"run.steps={steps}", *more]
        self.whole = folder / "whole"
        command(self.train(self.whole)).check(0)
        self.digests, self.losses = digests(self.whole), losses(self.whole)

    def train(self, out: Path, *more: str) -> list[object]:
        return ["train", "fastcut", "--data", self.data, "--out", out, *self.options, *more]

    def finish(self, out: Path, *more: str) -> None:
        """Continue a run, and compare: bit for bit what it comes to when nothing happens."""
        command(self.train(out, *more)).check(0)
        self.compare(out)

    def compare(self, out: Path) -> None:
        assert digests(out) == self.digests, "the continued run ends otherwise"
        assert losses(out) == self.losses, "the continued run has other losses"
        assert not leftovers(out), f"left behind: {leftovers(out)}"


def killed_by(pid: int) -> list[int]:
    """Processes that a launcher with this number started and that are still there."""
    found = []
    mark = f"FASTNCE_LAUNCHER={pid}".encode()
    for place in Path("/proc").iterdir():
        if place.name.isdigit():
            with contextlib.suppress(OSError):
                if mark in (place / "environ").read_bytes().split(b"\0"):
                    found.append(int(place.name))
    return found


@contextlib.contextmanager
def environment(**variables: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
