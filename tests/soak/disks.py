"""Disks that are full at any write: one sentence, old files whole, no half files, and training goes on where it can."""

from __future__ import annotations

import random
import resource
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image

from fastnce.engine.checkpoint import Checkpoints
from fastnce.interop import save_published
from fastnce.networks import ResnetGenerator

from .common import Campaign, Outcome, Run, command, contents, copied, each, leftovers, losses, pictures

FORMATS = ("png", "jpg", "webp", "bmp", "tiff", "npy")


def limit(size: int) -> None:
    """No file of this process may become larger: a write that would do so fails (EFBIG), after a part of it."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def training(tries: int, seed: int, folder: Path, only: int | None = None) -> Outcome:
    """From a checkpoint at step 2 on, with files of at most so many bytes; then without a limit."""
    run = Run(folder)
    begun = folder / "begun"
    command(run.train(begun, "run.steps=2")).check(0)
    largest = max(path.stat().st_size for path in run.whole.rglob("*") if path.is_file())

    def attempt(number: int, rng: random.Random) -> str:
        size = int(largest ** rng.uniform(0.2, 1.02))
        with copied(begun, folder / "run") as out:
            ended = command(run.train(out), lambda: limit(size))
            ended.check(0, 1, 2)
            found = Checkpoints(out / "checkpoints").load()
            assert found is not None, "no whole checkpoint is left"
            step = found[1]["step"]
            assert (step == run.STEPS) == (ended.code == 0), f"step {step} is saved, {ended.told}"
            assert not leftovers(out), f"left behind: {leftovers(out)}"
            losses(out)
            run.finish(out)
        return ""

    return each(tries, seed, only, attempt)


@contextmanager
def small_disk(place: Path, size: int) -> Iterator[Path]:
    """A file system of so many bytes; OSError where it cannot be made."""
    place.mkdir(exist_ok=True)
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", place], capture_output=True, text=True, check=False
    )
    if made.returncode:
        raise OSError(made.stderr.strip())
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", place], check=True)


def training_on_a_small_disk(tries: int, seed: int, folder: Path, only: int | None = None) -> Outcome:
    """A disk that fills up while training, and is enlarged for the next start."""
    try:
        with small_disk(folder / "probe", 2**20):
            pass
    except (OSError, FileNotFoundError) as error:
        return Outcome(notes=[f"not tried: no small disk can be made here ({error})"])
    run = Run(folder)
    one = sum(path.stat().st_size for path in Checkpoints(run.whole / "checkpoints").steps()[-1].iterdir())

    def attempt(number: int, rng: random.Random) -> str:
        size = int(one * rng.uniform(0.3, 4.0))
        with small_disk(folder / "disk", size) as disk:
            out = disk / "run"
            ended = command(run.train(out))
            ended.check(0, 1, 2)
            found = Checkpoints(out / "checkpoints").load()
            step = 0 if found is None else found[1]["step"]
            assert (step == run.STEPS) == (ended.code == 0), f"step {step} is saved, {ended.told}"
            assert not leftovers(out), f"left behind: {leftovers(out)}"
            subprocess.run(["mount", "-o", f"remount,size={one * 20}", disk], check=True)
            run.finish(out)
        return ""

    return each(tries, seed, only, attempt)


def commands(tries: int, seed: int, folder: Path, only: int | None = None) -> Outcome:
    """cache, translate, evaluate, export, rain and unpair: what stands under its name is whole."""
    run = Run(folder, steps=2)
    photos = pictures(folder / "photos", "a.png", "b.png", "sub/c.png")
    pairs = pictures(folder / "pairs", *(f"{side}/{n}.png" for n in (1, 2) for side in ("rain", "norain")))
    (model,) = save_published({"G": ResnetGenerator(width=2, blocks=1)}, folder / "published")
    out = folder / "out"

    def arguments(rng: random.Random) -> list[object]:
        files = ["--json", out / "json", "--csv", out / "csv", "--sheet", out / "sheet.png"]
        return rng.choice(
            [
                ["cache", "--data", run.data, f"data.cache_dir={out}"],
                ["translate", model, photos, "--out", out, "--device", "cpu", "--format", rng.choice(FORMATS)],
                ["evaluate", model, "--data", pairs, "--device", "cpu", *files],
                ["export", run.whole, "--out", out],
                ["rain", photos, "--out", out, *rng.choice([[], ["--unpaired"]])],
                ["unpair", pairs, "--out", out],
            ]
        )

    def attempt(number: int, rng: random.Random) -> str:
        asked = arguments(rng)
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        command(asked).check(0)
        whole = contents(out)
        largest = max(path.stat().st_size for path in out.rglob("*") if path.is_file())
        kept = rng.random() < 0.5 and asked[0] in ("translate", "evaluate", "export")
        if not kept:
            shutil.rmtree(out)
            out.mkdir()
        size = int(largest ** rng.uniform(0.2, 1.02))
        ended = command(asked, lambda: limit(size))
        ended.check(0, 2)
        found = contents(out)
        assert ended.code or found == whole, f"{asked[0]}, {size} bytes: exit 0, and files are missing"
        odd = {name for name, digest in found.items() if whole.get(name) != digest}
        assert not odd, f"{asked[0]}, {size} bytes: half files {odd}; {ended.told}"
        assert not kept or found == whole, f"{asked[0]}, {size} bytes: earlier files are gone; {ended.told}"
        assert not leftovers(out), f"left behind: {leftovers(out)}"
        for path in out.rglob("*.png"):
            Image.open(path).load()
        if asked[0] in ("rain", "unpair") and ended.code:
            assert not found, f"{asked[0]}, {size} bytes: a part of a set is there: {sorted(found)}"
        return ""

    return each(tries, seed, only, attempt)


CAMPAIGNS = [
    Campaign(
        "full-disk",
        "no file may become larger than some bytes while training: training goes on, the exit code says whether the "
        "last state is saved, and the run continues bit for bit",
        100,
        training,
    ),
    Campaign("small-disk", "the same on a disk that is full", 40, training_on_a_small_disk),
    Campaign(
        "full-disk-commands",
        "the same for cache, translate, evaluate, export, rain, unpair: one sentence, old files whole, no half files",
        150,
        commands,
    ),
]
