"""Hostile files in place of pictures: right pixels or a message with the name, little memory, no code executed."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from random import Random

import numpy as np
from PIL import Image

from fastnce.data.folder import probe_picture, read_picture
from fastnce.data.opening import DataError
from fastnce.networks import ResnetGenerator
from fastnce.networks.published import save_published

from .common import Campaign, Child, Ended, Outcome, pictures, survey, warm
from .hostile import kinds
from .lying import ALLOWED, EXECUTED, Maker, Verdict

SECONDS = 60.0
PIXELS = 2**20
"""A limit that reveals decompression bombs."""
MEMORY = 256
"""Limit in MiB beyond the memory of an idle command."""
STARTS = ("os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.startfile", "subprocess.Popen", "pty.spawn")


class Try:
    """A folder with one hostile file among good ones."""

    def __init__(self, place: Path, name: str, model: Path, idle: int):
        self.place, self.name, self.model, self.idle = place, name, model, idle
        self.mark = place / "executed"
        self.wrong: list[str] = []
        self.most = 0
        bin_folder = place / "bin"
        bin_folder.mkdir()
        for program in ("gs", "gswin64c", "gswin32c", "gswin32"):
            (bin_folder / program).write_text(f'#!/bin/sh\necho {program} >> "${EXECUTED}"\nexit 1\n')
            (bin_folder / program).chmod(0o755)

    def prepare(self) -> None:
        """Set up the fork: every started program and every decoder of other formats writes to the mark."""
        os.environ |= {
            EXECUTED: str(self.mark),
            "PATH": f"{self.place / 'bin'}:{os.environ.get('PATH', '')}",
            "FASTNCE_MAX_PIXELS": str(PIXELS),
            "XDG_CACHE_HOME": str(self.place / "home"),
        }

        def note(what: str) -> None:
            number = os.open(self.mark, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.write(number, f"{what}\n".encode())
            os.close(number)

        def factory(name: str) -> Callable:
            def reached(file, filename):
                note(f"the decoder of {name}")
                raise SyntaxError("not one of our formats")

            return reached

        for name in set(Image.OPEN) - set(ALLOWED):
            Image.OPEN[name] = (factory(name), Image.OPEN[name][1])
        sys.addaudithook(lambda event, _: note(event) if event in STARTS else None)

    def run(self, what: str, *arguments: object, work: Callable[[], int] | None = None) -> Ended:
        ended = Child([str(a) for a in arguments], self.prepare, 3 << 30, work).end(SECONDS)
        found = ended.wrong(0, 2)
        if self.mark.exists():
            found.append(f"executed: {self.mark.read_text().split()}")
            self.mark.unlink()
        self.most = max(self.most, ended.peak - self.idle)
        if ended.peak - self.idle > MEMORY:
            found.append(f"{ended.peak - self.idle} MiB of memory")
        self.wrong += [f"{what}: {problem}" for problem in found]
        return ended

    def says(self, condition: bool, what: str, ended: Ended) -> None:
        if not condition:
            self.wrong.append(f"{what}, exit code {ended.code}: {(ended.err or ended.out)[-300:]!r}")

    def read(self, path: Path, verdict: Verdict) -> bool:
        """Return whether the file can be read, and check its pixels."""
        result = self.place / "pixels.npy"

        def work() -> int:
            try:
                pixels = read_picture(path, 3)
            except DataError as error:
                print(f"fastnce: {error}", file=sys.stderr)
                return 2
            height, width, bits = probe_picture(path)
            if (height, width, bits, 3) != (*pixels.shape[:2], 8 * pixels.itemsize, pixels.shape[2]):
                raise AssertionError(f"the header says {height}x{width} of {bits} bits, the pixels are {pixels.shape}")
            np.save(result, pixels)
            return 0

        ended = self.run("reading", work=work)
        kind, right = verdict
        if ended.code == 0:
            self.says(kind != "refused", "it was read", ended)
            if right is not None:
                self.says(np.array_equal(np.load(result), right), "other pixels were read", ended)
            return True
        self.says(kind != "right", "it was refused", ended)
        self.says(path.name in ended.err, "the file is not named", ended)
        return False

    def clean(self, what: str, *folders: Path) -> None:
        """Check that no partial file is left."""
        for folder in folders:
            left = [p.name for p in folder.rglob("*") if p.name.startswith(".fastnce-") or p.suffix == ".tmp"]
            left = [name for name in left if name != ".fastnce-cache"]
            if left:
                self.wrong.append(f"{what} left {', '.join(left)}")


def cache(it: Try, maker: Maker, rng: Random) -> None:
    data = pictures(it.place / "cached", "trainA/a.png", "trainA/b.png", "trainB/a.png", "trainB/b.png")
    path = data / rng.choice(["trainA", "trainB"]) / it.name
    readable = it.read(path, maker(path, rng))
    arguments = ["cache", "--data", data, "data.load_size=36", "data.crop_size=32"]
    if rng.random() < 0.4:
        ended = it.run("cache with skip_bad", *arguments, "data.skip_bad=true")
        it.says(ended.code == 0, "the others were not cached", ended)
        it.says(readable == (f"skipped {path}" not in ended.out), "passed over wrongly", ended)
    else:
        ended = it.run("cache", *arguments)
        it.says(ended.code == (0 if readable else 2), "cache disagrees with reading", ended)
        it.says(readable or it.name in ended.err, "the file is not named", ended)
    it.clean("cache", data)


def translate(it: Try, maker: Maker, rng: Random) -> None:
    photos, out = pictures(it.place / "photos", "a.png", "z.png"), it.place / "translated"
    path = photos / it.name
    readable = it.read(path, maker(path, rng))
    alone = rng.random() < 0.3
    batch = rng.choice([1, 2])
    how = ["--out", out, "--device", "cpu", "--batch", batch]
    ended = it.run("translate", "translate", it.model, path if alone else photos, *how)
    it.says(ended.code == (0 if readable else 2), "translate disagrees with reading", ended)
    it.says(readable or it.name in ended.err, "the file is not named", ended)
    made = len(list(out.rglob("*.png")))
    it.says(made == (0 if alone else 2) + readable, f"{made} pictures were written", ended)
    it.clean("translate", photos, *([out] if out.exists() else []))


def rain(it: Try, maker: Maker, rng: Random) -> None:
    photos, out = pictures(it.place / "photos", "a.png", "z.png"), it.place / "rained"
    path = photos / it.name
    readable = it.read(path, maker(path, rng))
    how = rng.choice([[], ["--unpaired"], ["--test", "1"]])
    ended = it.run("rain", "rain", photos, "--out", out, *how)
    it.says(ended.code == (0 if readable else 2), "rain disagrees with reading", ended)
    it.says(readable or it.name in ended.err, "the file is not named", ended)
    it.says(readable or not out.exists(), "something was written", ended)
    it.clean("rain", *([out] if out.exists() else []))


def _pairs(it: Try, maker: Maker, rng: Random) -> tuple[Path, bool]:
    data = pictures(it.place / "pairs", *(f"{side}/{n}.png" for side in ("rain", "norain") for n in "az"), side=24)
    sides = ["rain", "norain"]
    rng.shuffle(sides)
    path = data / sides[0] / it.name
    pictures(data / sides[1], f"{path.stem}.png", side=24)
    return data, it.read(path, maker(path, rng))


def evaluate(it: Try, maker: Maker, rng: Random) -> None:
    data, readable = _pairs(it, maker, rng)
    report, sheet = it.place / "report.json", it.place / "sheet.png"
    model = [it.model] if rng.random() < 0.5 else ["--inputs-only"]
    ended = it.run(
        "evaluate", "evaluate", *model, "--data", data, "--device", "cpu", "--json", report, "--sheet", sheet
    )
    it.says(readable or (ended.code == 2 and it.name in ended.err), "the file is not named", ended)
    it.says(report.exists() == sheet.exists() == (ended.code == 0), "reports are there or not", ended)
    it.clean("evaluate", data)


def unpair(it: Try, maker: Maker, rng: Random) -> None:
    data, readable = _pairs(it, maker, rng)
    out = it.place / "unpaired"
    ended = it.run("unpair", "unpair", data, "--out", out)
    if ended.code == 0:  # if only the other picture of its scene is used, the file is not read
        it.says(readable or not list(out.rglob(f"{Path(it.name).stem}.png")), "it was written", ended)
    else:
        it.says(it.name in ended.err, "the file is not named", ended)
        it.says(not out.exists(), "something was written", ended)
    it.clean("unpair", *([out] if out.exists() else []))


COMMANDS = (cache, translate, rain, evaluate, unpair)


def campaign(count: int, seed: int, folder: Path) -> Outcome:
    warm()
    model = save_published({"G": ResnetGenerator(width=2, blocks=1)}, folder / "model")[0]
    idle = Child(["methods", "--help"]).end().peak
    every = sorted(kinds().items())
    Random(seed).shuffle(every)
    most = 0
    unmade = set()

    def attempt(number: int, rng: Random, place: Path) -> tuple[str, list[str]]:
        nonlocal most
        name, maker = every[number % len(every)]
        command = COMMANDS[(number + number // len(every)) % len(COMMANDS)]
        it = Try(place, name, model, idle)
        try:
            command(it, maker, rng)
        except PermissionError as error:
            if error.filename is None or Path(os.fsdecode(error.filename)).name != name:
                raise
            unmade.add(name)  # a device, which only root can create
        most = max(most, it.most)
        return f"{command.__name__} with {name}", it.wrong

    outcome = survey(count, seed, folder, attempt)
    outcome.notes.append(
        f"{len(every)} kinds of files; commands took at most {most} MiB more than an idle one, with "
        f"FASTNCE_MAX_PIXELS={PIXELS:,}"
    )
    if unmade:
        outcome.notes.append(f"not tested, as creating them needs root: {', '.join(sorted(unmade))}")
    return outcome


CAMPAIGN = Campaign(
    "inputs",
    "A hostile or damaged file gives its right pixels or one message with its name; no code is executed, no decoder of "
    "another format is reached, memory and time are bounded, and no partial file is left.",
    600,
    campaign,
)
