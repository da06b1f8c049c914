"""Every key of the configuration with values at and beyond its limits, in runs of two steps."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from random import Random

from fastnce.config import Config
from fastnce.config.config import from_preset
from fastnce.methods.presets import PRESETS

from .command_lines import tiny
from .common import Campaign, Outcome, pictures, survey, tree, warm
from .judge import attempt_line, judged, place_of, prepare_template

WHOLE = ("0", "-1", "1", "3", "7", "1000001", "1000000000000", "9223372036854775808", "-18446744073709551616", "1.5")
REAL = ("0", "-1", "1", "1e308", "1e-320", "nan", "inf", "-inf", "2.5", "1e39", "-0.0", "1e400")
TEXT = ("", "nonsense", "\u00e9", "../x", "'", "a" * 3000)
LIST = ("[]", "[-1]", "[99]", "[4,4]", "[8,4]", "[0]", "[9223372036854775808]", "[1.5]", "[true]", "[nan]", "4")
SIDES = ("0", "-4", "4", "30", "[32,36]", "[36,32]", "[true,true]", "[-4,-4]", "1000000000000", "[0,0]", "[32]", "[]")
LEFT_OUT = ("data.dir", "run.compile")
"""Untested keys: the data folder, and the compiler, which may take minutes."""
SINGLE = [
    "data.crop_size=32",
    "data.batch=2",
    "network.resolution=32",
    "network.width=1",
    "network.discriminator_width=1",
]


def values_of(value: object, kind: str) -> tuple[str, ...]:
    if "int | list" in kind:
        return SIDES
    if isinstance(value, bool):
        return ("true", "false", "1", "maybe")
    for type_of, found in ((int, WHOLE), (float, REAL), (list, LIST)):
        if isinstance(value, type_of):
            return found
    return TEXT


def trials() -> list[tuple[str, str]]:
    """Return every method with each of its keys and values."""
    found = []
    for method, preset in PRESETS.items():
        config = from_preset(method, preset)
        for section in Config.SECTIONS:
            options = getattr(config, section)
            for field in fields(options):
                key = f"{section}.{field.name}"
                values = values_of(getattr(options, field.name), str(field.type))
                if method == "sincut" and key == "run.steps":
                    values = ("-1", "1", "3", "7", "1.5")  # otherwise a run lasts for epochs of 100,000 crops
                found += [(method, f"{key}={value}") for value in values if key not in LEFT_OUT]
    return found


def sizes(method: str) -> list[str]:
    if method != "sincut":
        return tiny(method)
    return [*SINGLE, *(text for text in tiny(method) if "size" not in text and text.startswith(("run.", "loss.proj")))]


def campaign(count: int, seed: int, folder: Path) -> Outcome:
    warm()
    template = prepare_template(folder)
    pictures(template / "single", "trainA/one.png", "trainB/one.png", side=70)
    before = tree(template)
    every = trials()
    Random(seed).shuffle(every)
    codes: dict[int, int] = {}

    def attempt(number: int, rng: Random, place: Path) -> tuple[str, list[str]]:
        method, text = every[number % len(every)]
        arguments = ["train", method, "--data", "single" if method == "sincut" else "data", "--out", "OUT/a", "--quiet"]
        arguments += [*sizes(method), "run.steps=2", "optim.n_epochs=1", "optim.n_epochs_decay=1"]
        arguments += ["run.sample_every=1", "run.samples=1", "run.save_every=1", "run.monitor_every=1", text]
        work = place_of(template, place)
        ended = attempt_line(arguments, work)
        codes[ended.code or 0] = codes.get(ended.code or 0, 0) + 1
        wrong = judged(arguments, ended, work, before)
        if ended.code == 2 and not names(text, ended.err):
            wrong.append(f"the key is not named: {ended.err[-300:]!r}")
        return f"fastnce train {method} ... {text!a:.100}", wrong

    outcome = survey(count, seed, folder, attempt)
    outcome.notes.append(f"{len(every):,} pairs of a key and a value, of {len(PRESETS)} methods")
    outcome.notes.append(f"{codes.get(0, 0)} runs trained, {codes.get(2, 0)} were refused")
    return outcome


def names(text: str, sentence: str) -> bool:
    """Return whether an error message names the key or quotes the value."""
    key, _, value = text.partition("=")
    return key.partition(".")[2].split("_")[0] in sentence or (bool(value) and value in sentence)


CAMPAIGN = Campaign(
    "options",
    "Every key of a configuration, with any value, trains or is refused by a message that names it.",
    600,
    campaign,
)
