"""SIGINT, SIGTERM, SIGHUP and SIGUSR1 at any moment of a command, once or twice, and for runs of two processes."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from random import Random

from .common import Campaign, Child, Ended, Outcome, heed_signals, marked, run, survey, tree
from .faults import Events, sending
from .full_disks import commands
from .kill import all_gone, launch, until_steps
from .runs import STEPS, Reference, arguments, differences, done, half_files, logged, newest, reference

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
APART = 1.3
"""Seconds between two signals that count separately. Signals within one second count as one."""
ANSWER = 60.0
"""Limit in seconds for a reaction, also on a busy machine. Without compilers it takes fractions of a second."""


# ---- training ----


def to_runs(count: int, seed: int, folder: Path) -> Outcome:
    base = reference(folder)
    codes: dict[int, int] = {}
    slowest = 0.0
    counter = Events(folder / "counted", reads=True)
    done(run(_with_cache(base, folder / "counted"), prepare=counter.watch()))

    def attempt(number: int, rng: Random, place: Path) -> tuple[str, list[str]]:
        nonlocal slowest
        out, which = place / "run", rng.choice(SIGNALS)
        if rng.random() < 0.3:
            command, events = _with_cache(base, place), Events(place, reads=True)
            moment = rng.randint(1, counter.count)  # includes caching
        else:
            command, events = arguments(base.data, out), Events(out, base.data / "test", reads=True)
            moment = rng.randint(1, 2 * base.events)
        if twice := rng.random() < 0.2:
            other = rng.choice(SIGNALS)

            def act(event) -> None:  # as on a slow disk, where nothing can be saved meanwhile
                os.kill(os.getpid(), which)
                time.sleep(APART)
                os.kill(os.getpid(), other)
                time.sleep(APART)

            told = f"{which.name} at event {moment}, then {other.name} {APART} s later"
            ended = run(command, prepare=events.watch(moment, act))
        elif rng.random() < 0.5:
            told, ended = f"{which.name} at event {moment}", run(command, prepare=events.watch(moment, sending(which)))
        else:
            after = rng.uniform(0, base.seconds)
            told, (ended, took) = f"{which.name} after {after:.3f} s", _send(Child(command), after, which)
            slowest = max(slowest, took)
        numbers = {which, other} if twice else {which}
        codes[ended.code or 0] = codes.get(ended.code or 0, 0) + 1
        wrong = _judge(ended, out, base, numbers, twice)
        wrong += run(command).wrong(0) + differences(out, base.run, 1)
        return f"{told}{', with a cache' if command[-1].startswith('data.cache_dir=') else ''}", wrong

    outcome = survey(count, seed, folder, attempt)
    outcome.notes.append(f"Exit codes: {', '.join(f'{code} {n} times' for code, n in sorted(codes.items()))}.")
    outcome.notes.append(f"The slowest reaction to a signal took {slowest:.1f} s.")
    return outcome


def _with_cache(base: Reference, place: Path) -> list[str]:
    """Return the arguments of a training that builds its cache first."""
    return arguments(base.data, place / "run", f"data.cache_dir={place / 'cache'}")


def _send(child: Child, after: float, which: int) -> tuple[Ended, float]:
    child.sleep(after)
    if child.alive():
        child.send(which)
    began = time.monotonic()
    return child.end(ANSWER), time.monotonic() - began


def _judge(ended: Ended, out: Path, base: Reference, numbers: set[int], twice: bool = False) -> list[str]:
    """Return faults: the exit code must match the state of the run, before it is continued."""
    wrong = ended.wrong(0, *(128 + number for number in numbers))
    last, saved = logged(out), newest(out)
    if ended.code == 0 and f"step {STEPS}/{STEPS}" not in ended.out:
        if f"stopped after step {saved:,} and saved" not in ended.out:
            wrong.append(f"exit code 0 without the message that step {saved} is saved: {ended.out[-200:]!r}")
        if saved < last:
            wrong.append(f"exit code 0, and step {last} was done after the last checkpoint, of step {saved}")
    elif ended.code == 0 and saved < STEPS:
        wrong.append(f"exit code 0 at the end, with a checkpoint of step {saved} only")
    if (ended.code or 0) > 128 and not twice and saved < last:
        wrong.append(f"exit code {ended.code} after step {last}, which should have been saved")
    if twice and (ended.code or 0) > 128 and out.exists():
        return wrong  # a second signal ends a run at once; the next start cleans up
    return wrong + (half_files(out, base.run) if out.exists() else [])


# ---- the other commands ----


def to_commands(count: int, seed: int, folder: Path) -> Outcome:
    base = reference(folder)
    names = [name for name in sorted(commands(base, folder)) if not name.startswith("rain --")]
    wanted: dict[str, dict[str, bytes]] = {}
    figures: dict[str, tuple[float, int]] = {}
    for name in names:
        out = folder / "wanted" / name.replace(" ", "-")
        out.mkdir(parents=True)
        counter = Events(out, base.data, reads=True)
        ended = done(run(commands(base, out)[name], prepare=counter.watch()))
        wanted[name], figures[name] = tree(out), (ended.seconds, counter.count)

    def attempt(number: int, rng: Random, place: Path) -> tuple[str, list[str]]:
        name, which, out = names[number % len(names)], rng.choice(SIGNALS), place / "out"
        out.mkdir()
        command, (seconds, events) = commands(base, out)[name], figures[name]
        if rng.random() < 0.7:
            moment = rng.randint(1, events)
            told = f"{name}: {which.name} at event {moment}"
            ended = run(command, prepare=Events(out, base.data, reads=True).watch(moment, sending(which)))
        else:
            after = rng.uniform(0, seconds)
            told, (ended, _) = f"{name}: {which.name} after {after:.3f} s", _send(Child(command), after, which)
        if ended.code == -which and not ended.err:  # ended by the system before it had started work
            ended = replace(ended, code=0 if tree(out) == wanted[name] else 128 + which, err="fastnce: stopped")
        wrong = ended.wrong(0, 128 + which)
        found, files = tree(out), wanted[name]
        left = found.keys() - files.keys()
        if name == "cache":  # the next start resumes from these files
            left = {file for file in left if not file.endswith(("_pixels", "_journal"))}
        wrong += [f"{file} is left" for file in left]
        wrong += [f"{file} is half written" for file in found.keys() & files.keys() if found[file] != files[file]]
        if ended.code == 0 and found != files:
            wrong.append("exit code 0, and not everything is written")
        if name == "unpair" and ended.code and found:
            wrong.append(f"unpair was stopped and left {sorted(found)[:3]}")
        if name in ("rain", "unpair"):  # these refuse existing folders
            shutil.rmtree(out)
            out.mkdir()
        wrong += run(command).wrong(0)
        if tree(out) != files:
            wrong.append("the repeated command does not write the right files")
        return told, wrong

    return survey(count, seed, folder, attempt)


# ---- whole processes: start-up, two ranks, compilers ----

PROGRAM = "import os; from fastnce.__main__ import entry; os.write(1, b'here\\n'); entry()"
"""As `python -m fastnce`, but prints a line when the interpreter has started."""


def to_starts(count: int, seed: int, folder: Path) -> Outcome:
    base = reference(folder)

    def attempt(number: int, rng: Random, place: Path) -> tuple[str, list[str]]:
        out, which, after = place / "run", rng.choice(SIGNALS), rng.uniform(0, 3.0)
        command = arguments(base.data, out)
        environment = os.environ | {"PYTHONPATH": os.getcwd(), "CUDA_VISIBLE_DEVICES": ""}
        process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, *command],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
            text=True,
            env=environment,
            preexec_fn=heed_signals,
        )
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(after)
        process.send_signal(which)
        try:
            words = process.communicate(timeout=ANSWER)
        except subprocess.TimeoutExpired:
            process.kill()
            words = process.communicate()
            return f"{which.name} after {after:.2f} s", [f"no reaction within {ANSWER:.0f} s: {words[1][-300:]}"]
        code = 128 + which if process.returncode == -which and not words[1] else process.returncode
        ended = Ended(code, *words, 0.0, 0, [])
        if code == 128 + which and process.returncode < 0:  # ended by the system before it could print a message
            wrong = [] if not out.exists() else ["a run had started, and did not handle the signal"]
        else:
            wrong = _judge(ended, out, base, {which})
        wrong += run(command).wrong(0) + differences(out, base.run, 1)
        return f"{which.name} {after:.2f} s after the start", wrong

    return survey(count, seed, folder, attempt)


def to_ranks(count: int, seed: int, folder: Path) -> Outcome:
    data = reference(folder).data
    base, two = folder / "two", ("--nproc", "2")
    assert launch(arguments(data, base, *two), f"{os.getpid()}-{seed}-base", folder).wait() == 0

    def attempt(number: int, rng: Random, place: Path) -> tuple[str, list[str]]:
        out, mark, which = place / "run", f"{os.getpid()}-{seed}-{number}", rng.choice(SIGNALS)
        command = arguments(data, out, *two)
        process = launch(command, mark, place)
        start_up = rng.random() < 0.4
        until_steps(process, out, 0 if start_up else rng.randint(1, STEPS // 2))
        time.sleep(rng.uniform(2.0, 6.0) if start_up else rng.uniform(0, 0.2))
        ranks = [pid for pid in marked(mark) if pid != process.pid]
        who = rng.choice(("the launcher", "the launcher", "a rank" if ranks and not start_up else "the launcher"))
        try:
            os.kill(process.pid if who == "the launcher" else rng.choice(sorted(ranks)), which)
        except ProcessLookupError:
            who = "nobody"
        wrong = []
        try:
            code = process.wait(ANSWER)
        except subprocess.TimeoutExpired:
            wrong.append(f"no answer within {ANSWER:.0f} s")
            code = -1
        wrong += all_gone(mark, 30.0)
        said = (place / "said").read_text()
        saved, last = newest(out), logged(out)
        if code == 0 and saved < max(1, last):
            wrong.append(f"exit code 0 with step {last} done and step {saved} saved: {said[-300:]}")
        elif (code != -which or out.exists()) and (code not in (0, 128 + which) or "Traceback" in said):
            wrong.append(f"exit code {code}: {said[-600:]}")
        elif code and last:
            wrong.append(f"exit code {code} after step {last}, which should have been saved")
        again = launch(command, mark, place).wait(180)
        if again != 0:
            wrong.append(f"exit code {again} of the continued run: {(place / 'said').read_text()[-400:]}")
        when = "in start-up" if start_up else f"at step {last}"
        return f"{which.name} to {who} {when}", wrong + differences(out, base, 1)

    return survey(count, seed, folder, attempt)


def while_compiling(count: int, seed: int, folder: Path) -> Outcome:
    if not any(shutil.which(name) for name in ("c++", "g++", "clang++")):
        return Outcome(notes=["Nothing was compiled, because there is no C++ compiler."])
    data = reference(folder).data

    def attempt(number: int, rng: Random, place: Path) -> tuple[str, list[str]]:
        mark, which, after = f"{os.getpid()}-{seed}-{number}", rng.choice(SIGNALS), rng.uniform(0.0, 15.0)
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(place / "compiled")
        process = launch(arguments(data, place / "run", "run.compile=true"), mark, place)
        while process.poll() is None and not (place / "run" / "config.toml").exists():
            time.sleep(0.05)
        time.sleep(after)
        process.send_signal(which)
        began, wrong = time.monotonic(), []
        try:
            code = process.wait(ANSWER)
        except subprocess.TimeoutExpired:
            wrong.append(f"no answer within {ANSWER:.0f} s")
            process.kill()
            code = process.wait()
        told = f"{which.name} after {after:.1f} s, reaction after {time.monotonic() - began:.1f} s"
        wrong += all_gone(mark, 20.0)
        said = (place / "said").read_text()
        trained = logged(place / "run")
        if code != (0 if trained else 128 + which) or "Traceback" in said:
            wrong.append(f"exit code {code} after step {trained}: {said[-400:]}")
        return told, wrong

    return survey(count, seed, folder, attempt)


CAMPAIGNS = [
    Campaign(
        "signals",
        "A run reacts to a signal at any moment; the exit code says whether its last state is saved; the continued run "
        "ends bit-equal.",
        150,
        to_runs,
    ),
    Campaign(
        "signals-commands",
        "Other commands stop with one message and 128 + n, leave no partial file, and work when repeated.",
        220,
        to_commands,
    ),
    Campaign("signals-starts", "A program that is just starting stops in the same way.", 16, to_starts),
    Campaign("signals-ranks", "Runs of two processes stop in the same way, and no process stays.", 10, to_ranks),
    Campaign("signals-compiling", "A run reacts to a signal while its first step is compiled.", 6, while_compiling),
]
