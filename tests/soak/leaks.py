"""Thousands of steps, losses and translations in one process do not leak memory, tensors, file handles or threads."""

from __future__ import annotations

import gc
import json
import os
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from fastnce import NegativeBank, PatchNCEHead, PatchNCELoss, PatchSampleF, patch_nce
from fastnce.commands.main import main
from fastnce.data import save_image
from fastnce.engine.step import Step
from fastnce.nce import Weights
from fastnce.networks import ResnetGenerator
from fastnce.networks.published import save_published
from fastnce.translate.files import translate_files
from fastnce.translate.load import load_translator

from .command_lines import tiny
from .common import Campaign, Child, Outcome, pictures, training_pictures, warm

LOOKS = 30
"""Measurements per part, evenly spread; the first third is the warm-up."""
BOUNDS = {"tensors": 0.0, "objects": 50.0, "files": 0.0, "threads": 0.0, "MiB": 0.5}
"""Allowed growth of each quantity from the middle third to the last."""
PER_CALL = {"tensors": 0.0, "objects": 0.01, "files": 0.0, "threads": 0.0, "MiB": 1e-4}
"""Additionally allowed growth per call; 0.0001 MiB are 105 bytes."""
METHODS = {"fastcut": 0.6, "cyclegan": 0.2, "dclgan": 0.2}


def counted() -> dict[str, float]:
    """Return the current numbers of this process."""
    gc.collect()
    objects = gc.get_objects()
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {
        "tensors": sum(isinstance(thing, Tensor) for thing in objects),
        "objects": len(objects),
        "files": len(os.listdir("/proc/self/fd")),
        "threads": int(status["Threads"]),
        "MiB": int(status["RssAnon"].split()[0]) / 1024,
    }


class Looks:
    """Counts calls, and measures after some of them."""

    def __init__(self, calls: int):
        self.every, self.done, self.found = max(1, calls // LOOKS), 0, []
        gc.freeze()  # excludes existing objects

    def call(self) -> None:
        self.done += 1
        if self.done % self.every == 0:
            self.found.append(counted())


def training(method: str, steps: int, data: Path, out: Path) -> list[dict[str, float]]:
    """Train. Logging, saving and so on fall on the same steps of each interval between two measurements."""
    looks = Looks(steps)
    run = Step.run

    def watched(self, *arguments):
        losses = run(self, *arguments)
        looks.call()
        return losses

    Step.run = watched
    rounds = {"log_every": 2, "monitor_every": 5, "sample_every": 5, "validate_every": 10, "save_every": 10}
    more = [f"run.{key}={looks.every if looks.every < value else value}" for key, value in rounds.items()]
    how = ["run.samples=2", "optim.ema=0.9", f"run.steps={steps}", "optim.n_epochs=20000"]
    code = main(["train", method, "--data", str(data), "--out", str(out), "--quiet", *tiny(method), *how, *more])
    return looks.found if code == 0 else []


def losses(calls: int) -> list[dict[str, float]]:
    """Call every loss, forward and backward, with the options that keep state."""
    looks = Looks(calls)
    head, sampler = PatchNCEHead([3, 4], dim=8, patches=16), PatchSampleF(nc=8)
    bank, published = NegativeBank(20, [8]), PatchNCELoss(temperature=0.1)
    optimiser = torch.optim.Adam(head.parameters(), lr=1e-4)
    for _ in range(calls):
        maps = [torch.randn(2, channels, 8, 8, requires_grad=True) for channels in (3, 4)]
        (rows, *_), _ = sampler(maps, 16)
        keys = rows.detach().roll(1, 0)
        loss = head(maps, [one.detach() for one in maps]) + published(rows, keys, 2).mean()
        weights = Weights(pair_weight=torch.rand(32, 32), decoupled=True)
        loss = loss + patch_nce(rows, keys, extra_keys=bank.keys()[0], weights=weights)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        bank.enqueue([keys])
        looks.call()
    return looks.found


def translations(calls: int, folder: Path) -> list[dict[str, float]]:
    """Translate files, loading the model each time, with all kinds of tiling in turn."""
    looks = Looks(calls)
    model = save_published({"G": ResnetGenerator(width=2, blocks=1)}, folder / "model")[0]
    photos = pictures(folder / "photos", "a.png", "b.jpg", side=40)
    save_image(torch.zeros(3, 30, 150), photos / "long.png")
    for call in range(calls):
        translator = load_translator(model, tiles=("auto", "exact", "fast")[call % 3], tile_size=128)
        translate_files(translator, photos, folder / "out", (".png", ".npy", ".webp")[call % 3])
        looks.call()
    return looks.found


def grown(found: list[dict[str, float]], calls: int) -> Iterator[tuple[str, float, float, float]]:
    """Yield for each quantity its middle value, its last value and the allowed growth."""
    third = len(found) // 3
    middle, end = found[third : 2 * third], found[-third:]
    for name in BOUNDS:
        before, after = (statistics.median(look[name] for look in part) for part in (middle, end))
        yield name, before, after, BOUNDS[name] + PER_CALL[name] * calls / 3


def campaign(count: int, seed: int, folder: Path) -> Outcome:
    warm()
    data = training_pictures(folder / "data", 3)
    outcome = Outcome()

    def part(name: str, calls: int, work: Callable[[], list[dict[str, float]]]) -> None:
        if calls < LOOKS:
            return

        def live() -> int:
            torch.manual_seed(seed)
            print(json.dumps(work()))
            return 0

        ended = Child(work=live).end(3600)
        outcome.tried += calls
        try:
            found = json.loads(ended.out.splitlines()[-1])
        except (ValueError, IndexError):
            found = []
        if ended.code != 0 or not found:
            outcome.lost.append(f"--seed {seed}: {calls:,} {name}: exit code {ended.code}: {ended.err[-300:]!r}")
            return
        told = []
        for thing, before, after, allowed in grown(found, calls):
            told.append(f"{after:,.4g} {thing} ({after - before:+.3g})")
            if after - before > allowed:
                outcome.lost.append(
                    f"--seed {seed}: {calls:,} {name}: {thing} grew from {before:,g} to {after:,g} in the last third"
                )
        outcome.notes.append(f"{calls:,} {name} end with {', '.join(told)}; in brackets: growth")

    for method, share in METHODS.items():
        steps = round(count * share)
        part(f"steps of {method}", steps, lambda: training(method, steps, data, folder / f"run-{method}"))  # noqa: B023
    part("calls of each loss", count // 5, lambda: losses(count // 5))
    part("calls that translate three pictures", count // 50, lambda: translations(count // 50, folder))
    return outcome


CAMPAIGN = Campaign(
    "leaks",
    "After a warm-up, thousands of steps, losses and translations need no more memory, tensors, files or threads.",
    10_000,
    campaign,
)
