"""kill -9 at any moment: of a run and its saves, of cache building, and of a run of two processes."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from random import Random

from .common import MARK, TINY, Campaign, Child, Ended, Outcome, heed_signals, marked, pictures, run, survey, tree
from .faults import Events, kill, limit_files, log_uniform
from .runs import SAVE_EVERY, STEPS, arguments, differences, done, logged, measured, newest, reference, whole

ROUNDS = (1, 1, 1, 2, 3)
"""Numbers of successive kills before a run may end, equally likely."""


def killed(
    rng: Random, command: list[str], folders: tuple[Path, ...], seconds: float, events: int, size: int
) -> tuple[str, Ended]:
    """Run a command and kill it: at a time, at a file operation, or during a write.

    Args:
        seconds: approximate duration of the command.
        events: its number of file operations.
        size: of its largest file.
    """
    how = rng.choice(("time", "event", "event", "write"))
    if how == "time":
        moment = rng.uniform(0, seconds)
        child = Child(command)
        child.sleep(moment)
        if child.alive():
            child.send(signal.SIGKILL)
        return f"killed after {moment:.3f} s", child.end()
    number = rng.randint(1, events)
    if how == "event":
        return f"killed at event {number}", run(command, prepare=Events(*folders).watch(number, kill))
    limit = log_uniform(rng, 1, size)
    told = f"killed during a write past {limit} bytes, from event {number} on"
    return told, run(command, prepare=Events(*folders).watch(number, lambda event: limit_files(limit, deadly=True)))


def kill_runs(count: int, seed: int, folder: Path) -> Outcome:
    base = reference(folder)
    largest = max(map(len, tree(base.run).values()))
    kills = again = 0

    def attempt(number: int, rng: Random, place: Path) -> tuple[str, list[str]]:
        nonlocal kills, again
        out = place / "run"
        command = arguments(base.data, out)
        told, wrong, rounds = list[str](), list[str](), rng.choice(ROUNDS)
        early: list[str] = []
        while len(told) < rounds:
            before = newest(out)
            left = 1 - before / STEPS
            how, ended = killed(rng, command, (out,), base.seconds * left, max(1, round(base.events * left)), largest)
            if ended.code == 0:  # it finished before the kill
                shutil.rmtree(out)
                told.clear()
                early.append(how)
                again += 1
                continue
            told.append(how)
            kills += 1
            if ended.code not in (-signal.SIGKILL, -signal.SIGXFSZ):
                wrong.append(f"exit code {ended.code}: {ended.err[-300:]}")
                break
            wrong += _lost(out, before)
        if newest(out):
            wrong += run(["translate", out, base.data / "trainA", "--out", place / "out", "--device", "cpu"]).wrong(0)
        wrong += run(command).wrong(0) + differences(out, base.run, len(told))
        return f"{', then '.join(told)}{_late(early)}", wrong

    outcome = survey(count, seed, folder, attempt)
    outcome.notes.append(f"{kills} kills; {again} runs finished before the kill and were repeated.")
    return outcome


def _late(early: list[str]) -> str:
    """Tell the kills that came too late, because the command had ended."""
    return f" (too late: {', '.join(early)})" if early else ""


def _lost(out: Path, before: int) -> list[str]:
    """Return faults after a kill: partial checkpoints, and a missing one whose step was followed by a logged step."""
    good, bad = whole(out)
    wrong = [f"{name} is not whole" for name in bad if (out / "checkpoints" / name / "state.json").exists()]
    last = logged(out) - 1
    due = max(before, last - last % SAVE_EVERY)
    if max(good, default=0) < due:
        wrong.append(f"the checkpoint of step {due} is lost: there are {sorted(good)}")
    return wrong


def kill_caching(count: int, seed: int, folder: Path) -> Outcome:
    names = [f"{part}/{number}.png" for part in ("trainA", "trainB") for number in range(8)]
    data, place = pictures(folder / "data", *names), folder / "cache"
    command = ["cache", "--data", data, *TINY, f"data.cache_dir={place}"]
    events = Events(place)
    seconds = done(run(command, prepare=events.watch())).seconds
    wanted = tree(place)
    largest = max(map(len, wanted.values()))

    def attempt(number: int, rng: Random, _: Path) -> tuple[str, list[str]]:
        wrong, early, ended = list[str](), list[str](), None
        while ended is None or ended.code == 0:  # repeat if it finished before the kill
            for path in place.iterdir():
                path.unlink()
            how, ended = killed(rng, command, (place,), seconds, events.count, largest)
            early += [how] * (ended.code == 0)
        if ended.code not in (-signal.SIGKILL, -signal.SIGXFSZ):
            wrong.append(f"exit code {ended.code}: {ended.err[-300:]}")
        wrong += run(command).wrong(0)
        found = tree(place)
        # the file of a lock may remain: no process holds it
        wrong += [f"{name} is left" for name in found.keys() - wanted.keys() if not name.endswith(".lock")]
        wrong += [f"{name} is not as it was made at once" for name in wanted if found.get(name) != wanted[name]]
        return f"{how}{_late(early)}", wrong

    return survey(count, seed, folder, attempt)


# ---- two processes ----


def launch(command: list[str], mark: str, place: Path) -> subprocess.Popen[bytes]:
    """Start `fastnce ARGUMENTS` as a user does, with the mark for its processes and its output in `place`/said."""
    environment = os.environ | {MARK: mark, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment["PYTHONPATH"] = os.pathsep.join([os.getcwd(), environment.get("PYTHONPATH", "")])
    program = [sys.executable, "-m", "fastnce", *map(str, command)]
    with (place / "said").open("ab") as said:
        ends = {"stdout": said, "stderr": said, "stdin": subprocess.DEVNULL}
        return subprocess.Popen(program, env=environment, preexec_fn=heed_signals, **ends)


def all_gone(mark: str, seconds: float = 60.0) -> list[str]:
    """Wait until no process of a try is left; kill and report those that remain after `seconds`."""
    until = time.monotonic() + seconds
    while (left := marked(mark)) and time.monotonic() < until:
        time.sleep(0.1)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    return [f"{len(left)} processes were left after {seconds:.0f} s"] if left else []


def until_steps(process: subprocess.Popen[bytes], out: Path, steps: int) -> None:
    """Wait until a run has logged this number of steps, or has ended."""
    while process.poll() is None and len(measured(out)) < steps:
        time.sleep(0.02)


def kill_ranks(count: int, seed: int, folder: Path) -> Outcome:
    steps = 24
    data = reference(folder).data
    base, two = folder / "two", ("--nproc", "2")
    assert launch(arguments(data, base, *two, steps=steps), f"{seed}-base", folder).wait() == 0

    def attempt(number: int, rng: Random, place: Path) -> tuple[str, list[str]]:
        out, mark = place / "run", f"{os.getpid()}-{seed}-{number}"
        command = arguments(data, out, *two, steps=steps)
        process = launch(command, mark, place)
        until_steps(process, out, rng.randint(0, steps // 2))
        time.sleep(rng.uniform(0, 0.2))
        who = rng.choice(("a rank", "the launcher", "all"))
        ranks = [pid for pid in marked(mark) if pid != process.pid]
        victims = {"a rank": ranks and [rng.choice(sorted(ranks))], "the launcher": [process.pid]}
        at = logged(out)
        for pid in victims.get(who, [process.pid, *ranks]):
            os.kill(pid, signal.SIGKILL)
        code = process.wait(120)
        wrong = all_gone(mark) + _lost(out, 0)
        if who == "a rank" and ranks and not code and newest(out) != steps:
            wrong.append("exit code 0 though a rank was killed")
        again = launch(command, mark, place).wait(180)
        if again != 0:
            wrong.append(f"exit code {again} of the continued run: {(place / 'said').read_text()[-400:]}")
        return f"{who} killed at step {at}", wrong + differences(out, base, 1)

    return survey(count, seed, folder, attempt)


CAMPAIGNS = [
    Campaign(
        "kill",
        "A run that is killed at any moment, also during a save, continues and ends bit-equal to an undisturbed one.",
        100,
        kill_runs,
    ),
    Campaign(
        "kill-caching",
        "After cache building is killed, the next start builds the same cache as an undisturbed start, and leaves "
        "nothing else.",
        60,
        kill_caching,
    ),
    Campaign(
        "kill-ranks",
        "If a rank of a run of two processes, the launcher or all are killed, no process stays, and the run continues "
        "bit-equal.",
        10,
        kill_ranks,
    ),
]
