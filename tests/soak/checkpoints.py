"""Damaged checkpoints are refused with path and remedy, or skipped with a message; wrong values are never loaded."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from random import Random

from .common import Campaign, Child, Ended, Outcome, run, survey, tree
from .damage import LAST, MIDDLE, NEWEST, OLDEST, Damage, damages, place, replaced
from .runs import OPTIONS, STEPS, Reference, arguments, done, reference, tensors_differ, whole

MEMORY = 1 << 30
"""Memory limit in bytes of a command on these tiny networks."""
SECONDS = 60.0
REMEDY = re.compile(r"another|move|remove|use the same|should|wait|take")


def command(name: str, base: Reference, model: Path, out: Path) -> list[str]:
    if name == "train":
        return arguments(base.data, model, "run.keep=3")
    if name == "export":
        return ["export", str(model), "--out", str(out)]
    source = model / "checkpoints" / "best" if name == "best" else model
    return [
        "translate",
        str(source),
        str(base.data / "trainA"),
        "--out",
        str(out),
        "--format",
        "npy",
        "--device",
        "cpu",
    ]


def damaged_checkpoints(count: int, seed: int, folder: Path) -> Outcome:
    base = reference(folder, "run.keep=3")
    assert STEPS == LAST
    begun = folder / "begun"
    shutil.copytree(base.run, begun)
    shutil.rmtree(place(begun, LAST))
    for pointer, step in (("latest", NEWEST), ("good", MIDDLE), ("best", OLDEST)):
        (begun / "checkpoints" / pointer).write_text(place(begun, step).name)
    assert sorted(whole(begun)[0]) == [OLDEST, MIDDLE, NEWEST]
    # the outputs of each checkpoint, which must differ
    outputs: dict[str, dict[int, dict[str, bytes]]] = {"translate": {}, "export": {}}
    for kind, found in outputs.items():
        for step in (OLDEST, MIDDLE, NEWEST):
            out = folder / f"{kind}-{step}"
            done(run(command(kind, base, place(begun, step), out)))
            found[step] = tree(out)
        assert found[OLDEST] != found[MIDDLE] != found[NEWEST]
    kinds = [*damages(), *_of_other_runs(base, folder)]
    Random(seed).shuffle(kinds)
    kinds = _every_part_first(kinds)
    counts = {"refused": 0, "done": 0}

    def attempt(number: int, rng: Random, where: Path) -> tuple[str, list[str]]:
        damage = kinds[number % len(kinds)]
        model = where / "model"
        shutil.copytree(begun, model)
        told = damage.apply(rng, model)
        wrong = []
        for name in damage.commands:
            mine, out = where / name / "run", where / name / "out"
            shutil.copytree(model, mine, symlinks=True)
            before = {step: tree(path) for step, path in whole(mine)[0].items()}
            ended = Child(command(name, base, mine, out), memory=MEMORY).end(SECONDS)
            counts["done" if ended.code == 0 else "refused"] += 1
            faults = ended.wrong(*(damage.codes if name == "train" else (0, 2)))
            if ended.code == 0 and name == "train":
                faults += tensors_differ(mine, base.run)
            elif ended.code == 0:
                faults += _loaded_wrong(name, tree(out), outputs["export" if name == "export" else "translate"], damage)
            elif not faults:
                faults += _told(ended, mine, damage.remedy)
            if ended.code != 0:
                kept = {step: tree(path) for step, path in whole(mine)[0].items()}
                faults += [f"the checkpoint of step {s} is gone" for s in before if kept.get(s) != before[s]]
            if ended.code == 0 and name in ("train", "translate") and not damage.silent:
                faults += _passed_over_silently(name, before, ended, tree(out) if name != "train" else None, outputs)
            wrong += [f"{name}: {fault}" for fault in faults]
        return f"{damage.part}: {damage.name} ({told})", wrong

    outcome = survey(count, seed, folder, attempt)
    outcome.notes.append(f"{counts['refused']} commands refused, {counts['done']} did the same as with an intact one.")
    return outcome


def _every_part_first(kinds: list[Damage]) -> list[Damage]:
    """Return the kinds in an order in which a few tries damage every part of a run."""
    first: list[Damage] = []
    later: list[Damage] = []
    for damage in kinds:
        (later if damage.part in {other.part for other in first} else first).append(damage)
    return first + later


def _of_other_runs(base: Reference, folder: Path) -> list[Damage]:
    found = []
    for name, method, more in (("seed", "fastcut", ["run.seed=1"]), ("method", "cut", [])):
        out = folder / f"other-{name}"
        words = ["train", method, "--data", str(base.data), "--out", str(out), *OPTIONS, *more, f"run.steps={NEWEST}"]
        done(run(words))
        # an intact checkpoint of another run is not damaged: only training can detect that it does not belong here
        found.append(Damage(f"another {name}'s", replaced(out), commands=("train",)))
    return found


def _loaded_wrong(
    name: str, found: dict[str, bytes], outputs: dict[int, dict[str, bytes]], damage: Damage
) -> list[str]:
    allowed = [OLDEST] if name == "best" and not damage.pointer else list(outputs)
    if any(found == outputs[step] for step in allowed):
        return []
    return ["the loaded weights are those of no intact checkpoint"]


def _passed_over_silently(
    name: str, good: dict[int, object], ended: Ended, found: dict[str, bytes] | None, outputs: dict
) -> list[str]:
    """Return a fault if the newest checkpoint was skipped and no message names it."""
    if found is not None:
        taken = next((step for step in outputs["translate"] if outputs["translate"][step] == found), NEWEST)
        passed_over = taken < NEWEST
    else:
        passed_over = NEWEST not in good
    text = ended.out + ended.err
    if passed_over and not ("damaged" in text and re.search(r"step-\d{8}", text)):
        return [f"skipped without a message: {text[-300:]!r}"]
    return []


def _told(ended: Ended, model: Path, remedy: bool) -> list[str]:
    """Return faults of an error message, which must name a path in the run and a remedy."""
    sentence = ended.said[0]
    wrong = [] if str(model) in sentence else [f"the message names no path: {sentence}"]
    if remedy and ended.code == 2 and not REMEDY.search(sentence):
        wrong.append(f"the message names no remedy: {sentence}")
    return wrong


CAMPAIGN = Campaign(
    "checkpoints",
    "A damaged checkpoint is refused with its path and a remedy, or skipped with a message; only the written values "
    "are loaded, and intact checkpoints are kept.",
    420,
    damaged_checkpoints,
)
