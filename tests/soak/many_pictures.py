"""A folder of very many small pictures: memory hardly grows with their number, and a killed command resumes."""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from pathlib import Path
from random import Random

import numpy as np
from PIL import Image

from fastnce.data.unpaired import UnpairedData

from .common import TINY, Campaign, Child, Outcome, tries, warm

SIDE = 32
CONTENTS = 300
"""Number of different pictures; the others are links to them."""
SPARE, EACH = 1.5, 500
"""Allowed growth for four times as many pictures: in MiB, plus bytes per additional picture."""
SETTINGS = [text for text in TINY if not text.startswith("data.")] + [f"data.{k}_size={SIDE}" for k in ("load", "crop")]
WHOLE = "optim.n_epochs_decay=0"
"""Without a decay phase, sizes stay the same, so one cache is enough."""


def contents(folder: Path) -> list[bytes]:
    """Write pictures in every lossless format and return their pixels."""
    folder.mkdir()
    found = []
    for number in range(CONTENTS):
        suffix = (".png", ".png", ".png", ".bmp", ".tif", ".ppm", ".npy")[number % 7]
        pixels = np.random.default_rng(number).integers(0, 256, (SIDE, SIDE, 3), np.uint8)
        if suffix == ".npy":
            np.save(folder / f"{number:03d}{suffix}", pixels)
        else:
            Image.fromarray(pixels).save(folder / f"{number:03d}{suffix}")
        found.append(pixels.tobytes())
    return found


def fill(data: Path, source: Path, count: int) -> Counter[int]:
    """Create trainA with `count` pictures, in folders of a thousand, and a small trainB; count each content of A."""
    files = sorted(source.iterdir())
    used: Counter[int] = Counter()
    for domain, number in (("trainA", count), ("trainB", 10)):
        for place in range(number):
            folder = data / domain / f"{place // 1000:03d}"
            if place % 1000 == 0:
                folder.mkdir(parents=True)
            content = place * 7 % CONTENTS
            link(files[content], folder / f"{place:06d}{files[content].suffix}")
            used[content] += domain == "trainA"
    return +used


def link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # the disk has no links, or has reached its limit
        target.write_bytes(source.read_bytes())


class Watched:
    """A command whose private memory is monitored, without the pages of mapped files."""

    def __init__(self, data: Path, more: str = WHOLE):
        self.child = Child(["cache", "--data", str(data), "fastcut", *SETTINGS, more])
        self.peak = 0.0

    def watch(self, seconds: float) -> bool:
        """Monitor until the command ends, or for `seconds`; return whether it has ended."""
        until = time.monotonic() + seconds
        while self.child.alive():
            if time.monotonic() > until:
                return False
            try:
                status = Path(f"/proc/{self.child.pid}/status").read_text()
                self.peak = max(self.peak, int(status.partition("RssAnon:")[2].split()[0]) / 1024)
            except (OSError, IndexError):  # the command has just ended
                break
            self.child.read(0.003)
        return True


def seen(data: Path, folder: Path, contents: list[bytes]) -> tuple[Counter[int], int]:
    """Return what an epoch of training reads: the count of each content, and the number of unknown pictures."""
    answer = folder / "seen.json"

    def work() -> int:
        number = {pixels: place for place, pixels in enumerate(contents)}
        source = UnpairedData(data, load_size=SIDE, crop_size=SIDE, flip=False, batch=50, progress=None)
        found: Counter[int] = Counter()
        for step in range(source.steps_per_epoch):
            pictures, _ = source.batch(step)
            levels = pictures.add(1).mul(127.5).round().byte().permute(0, 2, 3, 1).numpy()
            found.update(number.get(np.ascontiguousarray(one).tobytes(), -1) for one in levels)
        answer.write_text(json.dumps(found))
        return 0

    ended = Child(work=work).end(1800)
    if ended.code != 0:
        raise RuntimeError(f"training cannot read the cache: {ended.err[-500:]}")
    counts = {int(key): count for key, count in json.loads(answer.read_text()).items()}
    strange = counts.pop(-1, 0)
    return Counter(counts), strange


def attempt(count: int, rng: Random, folder: Path, outcome: Outcome) -> list[str]:
    """Cache a quarter of the pictures; then cache all, kill the command in the middle, repeat it, and read all."""
    wrong: list[str] = []
    pixels = contents(folder / "contents")
    few, many = folder / "few", folder / "many"
    fill(few, folder / "contents", count // 4)
    used = fill(many, folder / "contents", count)

    def done(data: Path, what: str) -> tuple[float, float]:
        watched = Watched(data)
        watched.watch(3600)
        ended = watched.child.end(1)
        wrong.extend(f"{what}: {problem}" for problem in ended.wrong(0))
        return watched.peak, ended.seconds

    least, seconds = done(few, "a quarter cached")
    least_again, _ = done(few, "a quarter opened")
    victim = Watched(many)
    victim.watch(rng.uniform(0.1, 3.0) * seconds)
    victim.child.send(9)
    victim.child.end(1)
    most, took = done(many, "all cached after kill -9")
    most_again, start = done(many, "all opened")
    allowed = SPARE + EACH * (count - count // 4) / 2**20
    for what, before, after in (("caching", least, max(most, victim.peak)), ("opening", least_again, most_again)):
        outcome.notes.append(
            f"{what} {count:,} pictures takes {after:.1f} MiB, {count // 4:,} pictures {before:.1f} MiB, with PyTorch"
        )
        if after - before > allowed:
            wrong.append(f"{what}: memory grew by {after - before:.1f} MiB, more than {allowed:.1f}")
    outcome.notes.append(f"caching them after kill -9 took {took:.0f} s, opening the cache {start:.1f} s")
    left = [p.name for p in (many / ".fastnce-cache").iterdir() if p.name.startswith(".") or p.suffix == ".tmp"]
    if left:
        wrong.append(f"left are {', '.join(left)}")
    found, strange = seen(many, folder, pixels)
    if strange or found != used:
        wrong.append(f"{strange} unknown pictures were read, and {(used - found).total()} were not read")
    return wrong


def campaign(count: int, seed: int, folder: Path) -> Outcome:
    warm()
    outcome = Outcome()
    for number, rng in tries(1, seed):
        wrong = attempt(count, rng, folder, outcome)
        outcome.tried += count
        outcome.lost += [f"--seed {seed} --only {number}: {count:,} pictures: {problem}" for problem in wrong]
    return outcome


CAMPAIGN = Campaign(
    "many-pictures",
    "Caching and opening a folder of very many pictures takes memory that hardly grows with their number; after "
    "kill -9 the same command finishes the work, and training reads every picture once per epoch, bit for bit.",
    100_000,
    campaign,
)
