"""Disks that are full or fail at any write, for training and for every other command that writes files."""

from __future__ import annotations

import errno
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from random import Random

from .common import TINY, Campaign, Ended, Outcome, run, survey, tree
from .faults import Events, failing, fill, limit_files, log_uniform, on_a_small_disk, sending
from .runs import Reference, arguments, differences, done, half_files, newest, reference, whole

ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS)
FORMATS = ("png", "jpg", "webp", "bmp", "tiff", "npy")
PAGE = 4096
"""Bytes of the smallest file on a disk in memory."""
Prepare = Callable[[], None]


def left_out(result: tuple[str, list[str]] | str, skipped: set[str]) -> tuple[str, list[str]]:
    """Return the result of a try on a small disk; without such a disk, add the reason to `skipped`."""
    if isinstance(result, str):
        skipped.add(result)
        return "", []
    return result


def noted(outcome: Outcome, skipped: set[str]) -> Outcome:
    outcome.notes += [f"Only limits of files were tested, not full disks: {reason}." for reason in sorted(skipped)]
    return outcome


def fault(rng: Random, folder: Path, events: int, largest: int) -> tuple[str, Prepare]:
    """Return a limit of file sizes, or a disk error at one event or from one event on."""
    if rng.random() < 0.4:
        size = log_uniform(rng, 1, largest)
        return f"files of at most {size} bytes", lambda: limit_files(size)
    number, code, again = rng.randint(1, events), rng.choice(ERRORS), rng.random() < 0.6
    told = f"{errno.errorcode[code]} at event {number}{' and after' if again else ''}"
    return told, Events(folder).watch(number, failing(code), again)


# ---- training ----


def train_on_full_disks(count: int, seed: int, folder: Path) -> Outcome:
    base = reference(folder)
    begun = folder / "begun"  # a run that stopped in the middle
    done(run(arguments(base.data, begun), prepare=Events(begun).watch(base.events // 2, sending(signal.SIGTERM))))
    size = sum(path.stat().st_size for path in base.run.rglob("*") if path.is_file())
    skipped: set[str] = set()

    def attempt(number: int, rng: Random, place: Path) -> tuple[str, list[str]]:
        fresh = rng.random() < 0.25
        if rng.random() < 0.5:
            told, prepare = fault(rng, place / "run", base.events, 2 * size // 3)
            return told, _train(base, place / "run", None if fresh else begun, prepare, lambda: None)
        leave = rng.randrange(0, 2 * size, 512)
        result = on_a_small_disk(place, 4 * size, lambda: _train_on_a_small_disk(base, place, begun, fresh, leave))
        return left_out(result, skipped)

    return noted(survey(count, seed, folder, attempt), skipped)


def _train_on_a_small_disk(base: Reference, place: Path, begun: Path, fresh: bool, leave: int) -> tuple[str, list[str]]:
    if not fresh:
        shutil.copytree(begun, place / "run")
    fill(place, leave)
    free = (place / "filler").unlink
    return f"a disk with {leave:,} bytes free", _train(base, place / "run", None, lambda: None, free)


def _train(base: Reference, out: Path, begun: Path | None, prepare: Prepare, mend: Callable[[], None]) -> list[str]:
    """Train on a failing disk, then on a good one."""
    if begun is not None:
        shutil.copytree(begun, out)
    command = arguments(base.data, out)
    before = newest(out)
    ended = run(command, prepare=prepare)
    wrong = ended.wrong(0, 1, 2) + half_files(out, base.run)
    last, end = newest(out), newest(base.run)
    if last < before:
        wrong.append(f"the checkpoint of step {before} is lost: there are {sorted(whole(out)[0])}")
    if ended.code == 0 and last < end:
        wrong.append(f"exit code 0 with a checkpoint of step {last} only")
    at_the_end = f"step {end}/{end}" in ended.out
    if ended.code == 1 and not at_the_end:
        wrong.append(f"training ended before its end: {ended.err[-300:]}")
    if ended.code == 1 and last and f"step-{last:08d}" not in ended.err:
        wrong.append(f"the newest whole checkpoint is of step {last}, and not named: {ended.err[-300:]}")
    if ended.code == 2 and f"step {before + 1}/" in ended.out:
        wrong.append(f"exit code 2 after training has started, though the disk failed: {ended.err[-300:]}")
    mend()
    wrong += run(command).wrong(0)
    return wrong + differences(out, base.run, 1_000)  # lines that could not be written are lost, and the run reports it


# ---- the other commands ----


def commands(base: Reference, out: Path) -> dict[str, list[str]]:
    """Return commands that write into the existing folder `out`."""
    model, photographs, pairs = base.run, base.data / "trainA", base.data / "test"
    found = {
        f"translate {kind}": ["translate", model, photographs, "--out", out, "--format", kind, "--device", "cpu"]
        for kind in FORMATS
    }
    evaluate = ["evaluate", model, "--data", pairs, "--device", "cpu"]
    for option, name in (("--json", "report.json"), ("--csv", "report.csv"), ("--sheet", "sheet.png")):
        evaluate += [option, out / name]
    found |= {
        "evaluate": evaluate,
        "export": ["export", model, "--out", out],
        "rain": ["rain", base.data / "trainB", "--out", out],
        "rain --unpaired": ["rain", base.data / "trainB", "--out", out, "--unpaired", "--test", "1"],
        "unpair": ["unpair", pairs, "--out", out, "--test", pairs],
        "cache": ["cache", "--data", base.data, *TINY, f"data.cache_dir={out}"],
    }
    return {name: list(map(str, words)) for name, words in found.items()}


MENDED_BY_HAND = ("rain", "rain --unpaired")
"""Commands that refuse existing folders, including their own partial ones."""
REPLACING = ("translate", "evaluate", "export")
"""Commands that may overwrite the files of an earlier call."""


def other_commands(count: int, seed: int, folder: Path) -> Outcome:
    base = reference(folder)
    wanted: dict[str, dict[str, bytes]] = {}
    events: dict[str, int] = {}
    for name in commands(base, folder):
        out = folder / "wanted" / name.replace(" ", "-")
        out.mkdir(parents=True)
        counter = Events(out)
        done(run(commands(base, out)[name], prepare=counter.watch()))
        wanted[name], events[name] = tree(out), counter.count
    names = sorted(wanted)
    skipped: set[str] = set()

    def attempt(number: int, rng: Random, place: Path) -> tuple[str, list[str]]:
        name = names[number % len(names)]
        old = name.split()[0] in REPLACING and rng.random() < 0.5
        files, out = wanted[name], place / "out"
        size = sum(map(len, files.values()))
        if rng.random() < 0.6:
            told, prepare = fault(rng, out, events[name], 2 * max(map(len, files.values())))
            return f"{name}: {told}", _judge(
                base, name, out, files, old, prepare, lambda: None, for_good="and after" in told
            )
        leave = rng.randrange(0, 2 * size + 8 * PAGE, 512)

        def on_the_disk() -> tuple[str, list[str]]:
            if old:
                _put_old(out, files)
            fill(place, leave)
            free = (place / "filler").unlink
            wrong = _judge(base, name, out, files, False, lambda: None, free, was_old=old)
            return f"{name}: a disk with {leave:,} bytes free", wrong

        result = on_a_small_disk(place, 4 * size + 64 * PAGE * len(files), on_the_disk)
        return left_out(result, skipped)

    return noted(survey(count, seed, folder, attempt), skipped)


OLD = b"what was there before"


def _put_old(out: Path, files: dict[str, bytes]) -> None:
    for file in files:
        (out / file).parent.mkdir(parents=True, exist_ok=True)
        (out / file).write_bytes(OLD)


def _judge(
    base: Reference,
    name: str,
    out: Path,
    files: dict[str, bytes],
    old: bool,
    prepare: Prepare,
    mend: Callable[[], None],
    was_old: bool = False,
    for_good: bool = False,
) -> list[str]:
    """Return faults: every file must be old or complete, as the exit code and message say; a repetition must work.

    Args:
        for_good: the disk fails for good, so a published folder cannot be withdrawn.
    """
    out.mkdir(exist_ok=True)
    if old:
        _put_old(out, files)
    command = commands(base, out)[name]
    ended = run(command, prepare=prepare)
    found = tree(out)
    wrong = ended.wrong(0, 2) + _names(ended, out)
    for file in found.keys() - files.keys():
        wrong.append(f"{file} is left")
    for file, content in found.items():
        if file in files and content != files[file] and not ((old or was_old) and content == OLD):
            wrong.append(f"{file} has {len(content)} of {len(files[file])} bytes")
    if (old or was_old) and files.keys() - found.keys():
        wrong.append(f"{min(files.keys() - found.keys())} was there before, and is gone")
    if ended.code == 0 and found != files:
        wrong.append("exit code 0, and not everything is written")
    if name == "cache":
        halves = {Path(file).stem for file in found if file.endswith(".bin")}
        halves ^= {Path(file).stem for file in found if file.endswith(".index")}
        wrong += [f"one half of the cache {half} is left" for half in halves]
    mend()
    if name in MENDED_BY_HAND or (name == "unpair" and for_good):
        shutil.rmtree(out, ignore_errors=True)
    elif name == "unpair" and ended.code != 0 and found:
        wrong.append(f"unpair has failed and left {sorted(found)[:3]}")
    elif name == "unpair" and ended.code == 0:
        return wrong
    out.mkdir(exist_ok=True)
    wrong += run(command).wrong(0)
    if tree(out) != files:
        wrong.append("on a disk with room it does not write what it should")
    return wrong


def _names(ended: Ended, out: Path) -> list[str]:
    """Return a fault if the message about a failed write names no file or folder in `out`."""
    if ended.code == 0 or str(out) in ended.err:
        return []
    return [f"the message names nothing in {out.name}: {ended.err[-300:]!r}"]


CAMPAIGNS = [
    Campaign(
        "full-disks",
        "On a full or failing disk, a command reports it in one message; old files stay intact, no file is partial, "
        "and the command works again once there is space.",
        600,
        other_commands,
    ),
    Campaign(
        "full-disks-training",
        "A run on such a disk continues while it can, reports by its exit code whether its last state is saved, loses "
        "no checkpoint, and ends bit-equal once there is space.",
        80,
        train_on_full_disks,
    ),
]
