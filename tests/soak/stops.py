"""Signals at any moment: what is done is saved, what is begun is removed, nobody stays behind, and exit codes tell."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from fastnce.engine.checkpoint import Checkpoints
from fastnce.engine.stop import ONE_SIGNAL
from fastnce.interop import save_published
from fastnce.networks import ResnetGenerator

from .common import (
    Campaign,
    Outcome,
    Run,
    begin,
    command,
    contents,
    copied,
    digests,
    each,
    end,
    killed_by,
    leftovers,
    pictures,
)
from .common import losses as losses_of

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


def send(process, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.send(number)


def saved(out: Path) -> int:
    found = Checkpoints(out / "checkpoints", log=lambda _: None).load() if out.exists() else None
    return 0 if found is None else found[1]["step"]


def training(tries: int, seed: int, folder: Path, only: int | None = None) -> Outcome:
    """With held-out pairs, so that validation is interrupted too; some get a second signal."""
    pairs = pictures(folder / "pairs", *(f"{side}/{n}.png" for n in (1, 2) for side in ("rain", "norain")))
    run = Run(folder, "run.validate_every=3", f"data.validate={pairs}")

    def attempt(number: int, rng: random.Random) -> str:
        out = folder / "run"
        shutil.rmtree(out, ignore_errors=True)
        process = begin(run.train(out))
        time.sleep(rng.uniform(0.0, 1.5))
        sent = rng.choice(SIGNALS)
        send(process, sent)
        if again := rng.random() < 0.2:
            time.sleep(ONE_SIGNAL + 0.1)
            send(process, rng.choice(SIGNALS))
        ended = end(process)
        step = saved(out)
        if ended.code == 0:
            assert step == run.STEPS or f"stopped after step {step:,} and saved" in ended.out, ended.told
        else:
            ended.check(*(128 + n for n in (SIGNALS if again else [sent])))
            assert again or step == 0, f"step {step} is saved, {ended.told}"
        assert not leftovers(out), f"left behind: {leftovers(out)}"
        run.finish(out)
        return ""

    return each(tries, seed, only, attempt)


def commands(tries: int, seed: int, folder: Path, only: int | None = None) -> Outcome:
    photos = pictures(folder / "photos", *(f"{n}.png" for n in range(30)))
    pairs = pictures(folder / "pairs", *(f"{side}/{n}.png" for n in range(12) for side in ("rain", "norain")))
    data = pictures(folder / "data", *(f"train{d}/{n}.png" for d in "AB" for n in range(40)))
    (model,) = save_published({"G": ResnetGenerator(width=4, blocks=2)}, folder / "published")
    out = folder / "out"
    asked: list[list[object]] = [
        ["cache", "--data", data, f"data.cache_dir={out}"],
        ["translate", model, photos, "--out", out, "--device", "cpu"],
        ["evaluate", model, "--data", pairs, "--device", "cpu", "--json", out / "x.json", "--sheet", out / "x.png"],
        ["rain", photos, "--out", out],
        ["unpair", pairs, "--out", out],
    ]
    whole: list[dict[str, str]] = []
    for arguments in asked:
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        command(arguments).check(0)
        whole.append(contents(out))

    def attempt(number: int, rng: random.Random) -> str:
        place = rng.randrange(len(asked))
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        process = begin(asked[place])
        time.sleep(rng.uniform(0.0, 0.6))
        sent = rng.choice(SIGNALS)
        send(process, sent)
        ended = end(process)
        ended.check(0, 128 + sent)
        found = contents(out) if out.exists() else {}
        assert ended.code or found == whole[place], f"{asked[place][0]}: exit 0, and files are missing"
        odd = {name for name, digest in found.items() if whole[place].get(name) != digest}
        assert not odd, f"{asked[place][0]}: half files {odd}"
        assert not leftovers(out), f"{asked[place][0]}: left behind: {leftovers(out)}"
        return ""

    return each(tries, seed, only, attempt)


def real(arguments: list[object], **options: object) -> subprocess.Popen[str]:
    """The command as users start it."""
    launch = [sys.executable, "-m", "fastnce", *map(str, arguments)]
    cwd = Path(__file__).parents[2]
    return subprocess.Popen(launch, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=cwd, **options)


def ranks(tries: int, seed: int, folder: Path, only: int | None = None) -> Outcome:
    """Two processes from one command, from the first millisecond on."""
    run = Run(folder)
    whole = folder / "two"
    assert real(run.train(whole, "--nproc", "2")).wait() == 0
    run.digests, run.losses = digests(whole), losses_of(whole)

    def attempt(number: int, rng: random.Random) -> str:
        out = folder / "run"
        shutil.rmtree(out, ignore_errors=True)
        process = real(run.train(out, "--nproc", "2"))
        time.sleep(rng.uniform(0.0, 12.0))
        sent = rng.choice(SIGNALS)
        if process.poll() is None:
            process.send_signal(sent)
        said, _ = process.communicate(timeout=120)
        assert "Traceback" not in said, said[-600:]
        # before Python handles signals, the system ends the process
        assert process.returncode in (0, 128 + sent, -sent), f"exit {process.returncode} after {sent}: {said[-300:]}"
        assert not killed_by(process.pid), "ranks stay behind"
        assert process.returncode != 0 or saved(out) > 0, f"exit 0, and nothing is saved: {said[-300:]}"
        assert real(run.train(out, "--nproc", "2")).wait() == 0, "it does not continue"
        run.compare(out)
        return ""

    return each(tries, seed, only, attempt)


def compiling(tries: int, seed: int, folder: Path, only: int | None = None) -> Outcome:
    """In the minutes that compiling takes: it ends within seconds, and no compiler stays behind."""
    run = Run(folder)
    outcome = Outcome()

    def attempt(number: int, rng: random.Random) -> str:
        out = folder / "run"
        with copied(folder / "data", folder / "unused"):
            shutil.rmtree(out, ignore_errors=True)
        variables = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(folder / f"compiled-{number}")}
        process = real(run.train(out, "run.compile=true"), env=variables)
        time.sleep(rng.uniform(8.0, 40.0))
        sent = rng.choice(SIGNALS)
        asked = time.monotonic()
        process.send_signal(sent)
        said, _ = process.communicate(timeout=300)
        outcome.notes.append(f"stopped while compiling: {time.monotonic() - asked:.1f} s")
        assert process.returncode in (0, 128 + sent), f"exit {process.returncode}: {said[-300:]}"
        assert "Traceback" not in said, said[-600:]
        return ""

    found = each(tries, seed, only, attempt)
    found.notes += outcome.notes
    return found


CAMPAIGNS = [
    Campaign(
        "signals",
        "SIGINT, SIGTERM, SIGHUP, SIGUSR1 at any moment of training: saved and exit 0, or nothing done and 128 + n; "
        "the run continues bit for bit",
        100,
        training,
    ),
    Campaign("signals-commands", "the same for cache, translate, evaluate, rain, unpair: no half files", 100, commands),
    Campaign("signals-ranks", "the same for two processes: all of them end", 10, ranks),
    Campaign("signals-compiling", "the same while PyTorch compiles the first step", 3, compiling),
]
