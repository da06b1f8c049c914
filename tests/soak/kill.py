"""kill -9 at any moment: what is continued ends as if nothing had happened."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

from .common import (
    TINY,
    Campaign,
    Outcome,
    Run,
    begin,
    command,
    contents,
    digests,
    each,
    end,
    killed_by,
    leftovers,
    losses,
    pictures,
)

CALLS = ("fsync", "replace", "rename", "write", "unlink", "ftruncate", "mkdir", "rmdir")


def die_at(count: int) -> None:
    """From now on: the process is killed at its count-th call that changes files, before or after it."""
    left = [count]

    def deadly(function):
        def call(*arguments, **options):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)

        return call

    for name in CALLS:
        setattr(os, name, deadly(getattr(os, name)))


def training(tries: int, seed: int, folder: Path, only: int | None = None) -> Outcome:
    """Half of the tries at a random time, half within a call that changes files: inside saves."""
    run = Run(folder)
    calls = 300

    def attempt(number: int, rng: random.Random) -> str:
        out = folder / "run"
        shutil.rmtree(out, ignore_errors=True)
        for _ in range(rng.choice([1, 1, 2])):  # also killed twice
            if rng.random() < 0.5:
                count = rng.randrange(1, calls)
                process = begin(run.train(out), partial(die_at, count))
            else:
                process = begin(run.train(out))
                time.sleep(rng.uniform(0.0, 1.2))
                if os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
                    process.send(signal.SIGKILL)
            end(process).check(0, 137)
        run.finish(out)
        return ""

    return each(tries, seed, only, attempt)


def caching(tries: int, seed: int, folder: Path, only: int | None = None) -> Outcome:
    data = pictures(folder / "data", *(f"train{d}/{n}.png" for d in "AB" for n in range(20)))
    options: list[object] = ["cache", "fastcut", "--data", data, *TINY]
    command([*options, f"data.cache_dir={folder / 'whole'}"]).check(0)
    wanted = contents(folder / "whole")

    def attempt(number: int, rng: random.Random) -> str:
        place = folder / "cache"
        shutil.rmtree(place, ignore_errors=True)
        count = rng.randrange(1, 40)
        if rng.random() < 0.5:
            process = begin([*options, f"data.cache_dir={place}"], partial(die_at, count))
        else:
            process = begin([*options, f"data.cache_dir={place}"])
            time.sleep(rng.uniform(0.0, 0.2))
            if os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
                process.send(signal.SIGKILL)
        end(process).check(0, 137)
        command([*options, f"data.cache_dir={place}"]).check(0)
        assert contents(place) == wanted, f"another cache: {sorted(contents(place))}"
        assert not leftovers(place), f"left behind: {leftovers(place)}"
        return ""

    return each(tries, seed, only, attempt)


def ranks(tries: int, seed: int, folder: Path, only: int | None = None) -> Outcome:
    """Two processes; one of them, or their launcher, or all three are killed."""
    run = Run(folder)
    whole = folder / "two"
    launch = [sys.executable, "-m", "fastnce"]
    options = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "cwd": Path(__file__).parents[2]}

    def arguments(out: Path) -> list[str]:
        return [*launch, *map(str, run.train(out, "--nproc", "2"))]

    assert subprocess.run(arguments(whole), **options).returncode == 0
    run.digests, run.losses = digests(whole), losses(whole)

    def attempt(number: int, rng: random.Random) -> str:
        out = folder / "run"
        shutil.rmtree(out, ignore_errors=True)
        process = subprocess.Popen(arguments(out), **options)
        time.sleep(rng.uniform(1.0, 12.0))
        children = killed_by(process.pid)
        victims = {"one": children[:1], "launcher": [process.pid], "all": [process.pid, *children]}[
            rng.choice(["one", "launcher", "all"])
        ]
        if process.poll() is None:
            for pid in victims:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        process.wait(60)
        until = time.monotonic() + 40
        while still := killed_by(process.pid):
            assert time.monotonic() < until, f"ranks that stay behind: {still}"
            time.sleep(0.2)
        assert subprocess.run(arguments(out), **options).returncode == 0, "it does not continue"
        run.compare(out)
        return ""

    return each(tries, seed, only, attempt)


CAMPAIGNS = [
    Campaign(
        "kill",
        "kill -9 while training, also inside of saves: the continued run ends bit for bit as an uninterrupted one",
        100,
        training,
    ),
    Campaign(
        "kill-caching", "kill -9 while caching: the next start makes the same cache, and nothing is left", 100, caching
    ),
    Campaign("kill-ranks", "kill -9 of a rank, of the launcher or of all: no orphans, and the same end", 10, ranks),
]
