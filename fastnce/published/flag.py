"""What is known of one option of the published code, and how its value becomes ours."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ..common.toml import SWITCHES

CUT, DCLGAN, DCDGAN, CYCLEGAN = "CUT", "DCLGAN", "DCD-GAN", "CycleGAN"
REPOSITORIES = (CUT, DCLGAN, DCDGAN, CYCLEGAN)
"""The four repositories: their names in the table and in sentences."""
CONTRASTIVE = (CUT, DCLGAN, DCDGAN)
"""The three whose options are those of CUT."""


class NotSupported(Exception):
    """A value of a published option that has no equal here; the message says why, to end a sentence."""


@dataclass
class Published:
    """All options of one published command.

    Args:
        repository: one of `REPOSITORIES`.
        model: the published word, such as "cycle_gan".
        method: our preset for it.
        test: this is a test, not a training.
        values: the text of each option that this model has, defaults included.
        given: the options that the user gave; the others are defaults.
        usual: the default of each option, which shows its type.
    """

    repository: str
    model: str
    method: str
    test: bool
    values: dict[str, str]
    given: list[str] = field(default_factory=list)
    usual: dict[str, str] = field(default_factory=dict)

    def whole(self, name: str) -> int:
        """The value of an option that is a whole number."""
        return _number(int, "a whole number")(self.values[name])

    def on(self, name: str) -> bool:
        """The value of an option that is a switch; False for one that this model does not have."""
        return switch(self.values.get(name, "False"))

    @property
    def devices(self) -> list[str]:
        """The numbers of the GPUs; empty for the CPU."""
        parts = [part.strip() for part in self.values["gpu_ids"].strip("[]").split(",")]
        return [part.lstrip("0") or "0" for part in parts if part >= "0"]

    def steps(self, images: int) -> int:
        """The steps between events that the published loop has whenever its count of images is a multiple of `images`.

        Its count rises by the batch, so with batches of 16 an event at each 100 images is one at each 400.
        """
        batch = self.whole("batch_size")
        return math.lcm(max(images, 1), batch) // batch


Converter = Callable[[str, Published], dict[str, Any]]
"""From a text to values by our key, such as {"network.width": 32}. A ValueError ends the sentence "must be"."""


@dataclass(frozen=True)
class Flag:
    """One option of the published code: the only source of what is known of it.

    Args:
        name: without its dashes.
        where: the repositories that have it.
        default: the published default as text; `fastnce.published.models` has those that differ.
        ours: what it is called here in training: a key such as "network.width", an option such as "--out", or
            "METHOD"; empty if there is no equal.
        convert: makes our values of its text; None if it sets no key.
        remark: the reason if there is no equal, or what should be known of it.
        test: what it is called in `fastnce translate`; empty if it has no meaning there.
        models: the published models that have it; empty: all of these repositories.
        phase: "train", "test", or "both".
        takes: "value", "switch" (no value), or "boolean" (a value or none).
        example: a value that is not the default, for messages and tests.
    """

    name: str
    where: tuple[str, ...]
    default: str
    ours: str = ""
    convert: Converter | None = None
    remark: str = ""
    test: str = ""
    models: tuple[str, ...] = ()
    phase: str = "both"
    takes: str = "value"
    example: str = ""

    @property
    def kind(self) -> str:
        """ "same", "renamed" or "not supported"."""
        if not (self.ours or self.test):
            return "not supported"
        return "same" if self.ours.rpartition(".")[2].lstrip("-") == self.name.lower() else "renamed"


# ---- from texts to values ----


def _number(kind: Callable[[str], Any], wanted: str) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        try:
            return kind(text)
        except (ValueError, OverflowError):
            raise ValueError(wanted) from None

    return read


def at_least_one(text: str) -> int:
    """Read a whole number of at least 1: the published code fails with 0, by which it divides."""
    wanted = "a whole number of at least 1"
    if (found := _number(int, wanted)(text)) < 1:
        raise ValueError(wanted)
    return int(found)


def typed(text: str, usual: str) -> Any:
    """Read a value as the type of its default: a whole number, a number, a boolean or a text."""
    kinds: tuple[Callable[[str], Any], ...] = (int, float, lambda word: bool(("False", "True").index(word)))
    for kind in kinds:
        try:
            kind(usual)
        except ValueError:
            continue
        try:
            return int(text) if usual == "inf" else switch(text) if usual in ("True", "False") else kind(text)
        except ValueError:
            return text
    return text


def switch(text: str) -> bool:
    """Read a boolean as the published code does, which also takes t, y, 1 and f, n, 0."""
    word = {"t": "true", "y": "true", "1": "true", "f": "false", "n": "false", "0": "false"}.get(text.lower(), text)
    if word.lower() not in SWITCHES:
        raise ValueError("True or False")
    return SWITCHES[word.lower()] == "true"


def whole(key: str) -> Converter:
    """A whole number, unchanged."""
    read = _number(int, "a whole number")
    return lambda text, _: {key: read(text)}


def number(key: str) -> Converter:
    """A number, unchanged."""
    read = _number(float, "a number")
    return lambda text, _: {key: read(text)}


def word(key: str, **renamed: str) -> Converter:
    """A text; `renamed` maps published words to ours."""
    return lambda text, _: {key: renamed.get(text, text)}


def no(key: str) -> Converter:
    """A switch that is the opposite of ours."""
    return lambda text, _: {key: not switch(text)}


def wholes(key: str) -> Converter:
    """Whole numbers that are separated by commas."""
    read = _number(lambda text: [int(part) for part in text.split(",")], "whole numbers with commas between them")
    return lambda text, _: {key: read(text)}


def images(key: str) -> Converter:
    """Images between two events, as steps."""
    return lambda text, published: {key: published.steps(at_least_one(text))}
