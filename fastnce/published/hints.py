"""Our words for published options that a user gives to a command of ours."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import PurePath
from types import SimpleNamespace

from .flag import Flag, NotSupported
from .table import FLAGS, OLD_NAMES, named

WHOLE = "fastnce import-options 'python train.py ...' turns a whole command into ours"

NAMES = (*dict.fromkeys(flag.name for flag in FLAGS), *OLD_NAMES)
_ONE_GPU = SimpleNamespace(test=False, devices=["0"])
"""Enough of a published command for options that depend on the number of GPUs alone."""

SAID = {
    "continue_train": "is not needed: the same command continues a run (run.start_from takes published weights)",
    "eval": "is the default here, and --train-mode switches it off",
}
"""What is said of options for which the name of our option would mislead."""


def published_words(arguments: list[str], own: Collection[str], command: str) -> str:
    """Name our words for the published options among the arguments of a command, as one sentence.

    Args:
        arguments: of the command.
        own: the options that the command has itself.
        command: "train", "translate" or "evaluate".

    Returns:
        the sentence; empty if there are none.
    """
    if "--" in arguments:
        arguments = arguments[: arguments.index("--")]
    found: dict[str, str] = {}
    for place, word in enumerate(arguments):
        if bare := command == "train" and not word.startswith("--") and "=" in word:  # nce_T=0.1, as a key of ours
            before = arguments[place - 1] if place else ""
            if before in own and before != "--change":
                continue
            word = f"--{word}"
        name, equals, text = word[2:].partition("=")
        if not word.startswith("--") or (f"--{name}" in own and not bare) or not (published := _published(name)):
            continue
        follows = arguments[place + 1] if place + 1 < len(arguments) else "--"
        value = text if equals else "" if follows.startswith("--") else follows
        found.setdefault(name if bare else f"--{name}", _word(published, value, command, own))
    if not found:
        return ""
    return f"{', '.join(f'{name} {word}' for name, word in found.items())} ({WHOLE})"


def _published(name: str) -> str:
    """The published name that a user means, who may write it with dashes: --batch-size, --data-root; "" if none."""
    if named(name):
        return name
    plain = name.replace("-", "").replace("_", "")
    return next((one for one in NAMES if one.replace("_", "") == plain), "") if "-" in name else ""


def _word(name: str, value: str, command: str, own: Collection[str]) -> str:
    """What is said of one option: "is --data DIR here"."""
    flags = named(name)
    if (said := SAID.get(name)) and (name == "continue_train") == (command == "train"):
        return said
    if command != "train":
        if name == "eval":
            return "is what fastnce does without --train-mode"
        here = next((flag.test for flag in flags if flag.test), "")
        here = {"DATA": "--data TEST"}.get(here, here) if command == "evaluate" else here
        if here.startswith("--") and here.split()[0] not in own:
            return f"is {here} of fastnce translate"
        if here:
            return f"is {here} here" if here != "RUN" else "is a part of RUN here"
        flags = [flag for flag in flags if not flag.ours] or flags
    if command == "train" and not any(flag.ours for flag in flags):
        here = next((flag.test for flag in flags if flag.test), "")
        if here:
            return f"is {here} of fastnce translate"
    flag = next((flag for flag in flags if flag.ours), flags[0])
    if not flag.ours:
        return f"is not supported: {flag.remark}"
    if command != "train":
        return "is part of the trained model here"
    if name == "name" and value:
        return f"is --out {PurePath('runs') / value} here"
    return {
        "data.dir": "is --data DIR here",
        "--out": "is a part of --out RUN here",
        "METHOD": "is the argument METHOD here",
    }.get(flag.ours) or f"is {_example(flag, value)} here"


def _example(flag: Flag, value: str) -> str:
    """Our key with its value, if the value alone says it."""
    value = value or ("True" if flag.takes != "value" else "")
    if flag.convert is None or not value:
        return flag.ours
    try:
        ((key, ours),) = flag.convert(value, _ONE_GPU).items()  # type: ignore[arg-type]
    except (ValueError, NotSupported, AttributeError):  # it depends on other options, or is wrong there too
        return flag.ours
    if isinstance(ours, list):
        ours = ",".join(map(str, ours))
    return f"{key}={str(ours).lower() if isinstance(ours, bool) else ours}"
