"""Find which of the published repositories, and which of its models, a command is for."""

from __future__ import annotations

from ..common.messages import brief, nearest
from .flag import CUT, CYCLEGAN, DCDGAN, DCLGAN, Published
from .models import CUT_DEFAULTS, DEFAULTS, FASTCUT_DEFAULTS, MODELS, NOT_HERE, WORDS
from .reading import Source
from .table import flags_of, named

MODES = {"CUT_mode": CUT, "DCL_mode": DCLGAN, "DCD_mode": DCDGAN}
"""Options that say whose command it is."""


def identify(source: Source, wanted: str = "") -> Published:
    """Find the model of a command, and the value of each of its options.

    Args:
        source: the options that were read.
        wanted: the repository by its word in `WORDS`; empty: the one that has these options.

    Raises:
        ValueError: the model has no preset here, or several repositories would take the command.
    """
    choices = _choices(source, wanted)
    repository, model = _best(choices, source)
    usual = defaults_of(repository, model, source)
    values = usual | (source.printed or source.given)
    for name, text in values.items():
        if not text.isprintable() or "\N{REPLACEMENT CHARACTER}" in text:
            raise ValueError(f"--{name} {brief(text)} has a character that cannot be printed, or is not UTF-8")
    given = [name for name in source.given if name in flags_of(repository, model, source.test)]
    published = Published(repository, model, MODELS[repository][model].method, source.test, values, given, usual)
    if model == "cut" and repository == CUT:
        mode = values["CUT_mode"].lower()
        if mode not in ("cut", "fastcut"):
            raise ValueError(f"--CUT_mode {values['CUT_mode']} must be CUT or FastCUT")
        published.method = mode
    return published


def _choices(source: Source, wanted: str) -> list[tuple[str, str]]:
    """The repositories and models that the options name."""
    if wanted and wanted not in WORDS:
        raise ValueError(f"--from {wanted} must be one of {', '.join(WORDS)}{nearest(wanted, WORDS)}")
    repositories = [WORDS[wanted]] if wanted else list(MODELS)
    model = source.printed.get("model") or source.given.get("model")
    if model is None:
        return [(repository, DEFAULTS[repository]["model"]) for repository in repositories]
    if model in NOT_HERE:
        raise ValueError(f"--model {model} has no equal here: {NOT_HERE[model]}")
    found = [(repository, model) for repository in repositories if model in MODELS[repository]]
    if not found:
        known = list(dict.fromkeys(name for repository in repositories for name in MODELS[repository]))
        raise ValueError(
            f"--model {model} is no model of {' or '.join(repositories)}{nearest(model, known)}; known: "
            f"{', '.join(known)}"
        )
    return found


def _best(choices: list[tuple[str, str]], source: Source) -> tuple[str, str]:
    """The choice that has all the options. If several have them, the one whose defaults a printout shows."""
    names = list(source.printed or source.given)

    def lacking(choice: tuple[str, str]) -> int:
        own = flags_of(*choice, source.test)
        return sum(name not in own and bool(named(name)) for name in names)

    fewest = min(map(lacking, choices))
    choices = [choice for choice in choices if lacking(choice) == fewest]
    named_by_mode = [repository for mode, repository in MODES.items() if mode in source.given]
    choices = [choice for choice in choices if choice[0] in named_by_mode] or choices
    if source.printed:

        def strange(choice: tuple[str, str]) -> int:
            """How many values would have been marked, because they are not this repository's defaults."""
            usual = defaults_of(*choice, source)
            return sum(
                usual[name] != text
                for name, text in source.printed.items()
                if name in usual and name not in source.given
            )

        return min(choices, key=strange)
    if len(choices) > 1 and "model" not in source.given:
        words = [word for word, repository in WORDS.items() for choice in choices if choice[0] == repository]
        raise ValueError(
            f"this command fits {', '.join(repository for repository, _ in choices)}, whose train.py have different "
            f"models without --model: say whose it is, with --from {' or '.join(words)}"
        )
    usual = [CYCLEGAN, CUT, DCLGAN]
    return min(choices, key=lambda choice: usual.index(choice[0]) if choice[0] in usual else len(usual))


def defaults_of(repository: str, model: str, source: Source) -> dict[str, str]:
    """The default of every option of a published model, as text."""
    values = {name: flag.default for name, flag in flags_of(repository, model, source.test).items()}
    values |= {name: text for name, text in DEFAULTS[repository].items() if name in values} | {"model": model}
    found = MODELS[repository][model]
    replaced = dict(found.defaults)
    mode = (source.printed or source.given).get("CUT_mode", "CUT").lower()
    if repository == CUT and mode == "fastcut":
        replaced = FASTCUT_DEFAULTS | {name: text for name, text in replaced.items() if text != CUT_DEFAULTS.get(name)}
    replaced |= found.test if source.test else {}
    if source.test:
        replaced.setdefault("load_size", values["crop_size"])
    return values | {name: text for name, text in replaced.items() if name in values}
