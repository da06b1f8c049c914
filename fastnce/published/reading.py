"""Read the options of a published command: from its words, or from the printout that it writes (train_opt.txt)."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path

from ..common.messages import brief, nearest
from .table import FLAGS, OLD_NAMES, named

PROGRAM = re.compile(r"(?:.*/)?(train|test)(?:\.py)?")
SHELL_ENDS = {"&&", "||", "|", ";", "&", ">", ">>", "<", "2>&1", "&>"}
"""Words that end a command in a shell."""
LINE = re.compile(r"\s*(\w+): (.*?)\s*?(?:\t\[default: (.*)\])?\s*")
"""A line of the printout: the option, its value, and its default if that is another one."""
NAMES = tuple(dict.fromkeys(flag.name for flag in FLAGS))
LARGEST_FILE = 1 << 20  # bytes


@dataclass
class Source:
    """The options of one published command.

    Args:
        test: it is test.py, not train.py.
        given: the text of each option that the user gave.
        printed: the text of every option, if the source is a printout.
        unknown: options of the printout that no published code has.
    """

    test: bool
    given: dict[str, str]
    printed: dict[str, str] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)


def read_source(words: list[str]) -> Source:
    """Read a file such as train_opt.txt, or a command such as "python train.py --dataroot DIR".

    Args:
        words: the name of the file; or the command as one text or as its words.

    Raises:
        ValueError: it is neither, or an option is unknown, or lacks its value.
    """
    if len(words) == 1:
        path = Path(words[0])
        if len(words[0]) < 4096 and "\n" not in words[0] and path.is_file():
            return _printout(path)
        if re.search(r"\.(txt|toml|ya?ml|json)$", words[0]) and "--" not in words[0]:
            raise ValueError(f"{words[0]}: no such file")
        words = _split(words[0])
    return _command(words)


def _split(text: str) -> list[str]:
    try:
        return shlex.split(re.sub(r"\\\r?\n", " ", text), comments=True)
    except ValueError as error:
        raise ValueError(f"the command cannot be split into words: {str(error).lower()}") from None


def _command(words: list[str]) -> Source:
    words = [word for word in words if word.strip() and word.strip() != "\\"]
    end = next((place for place, word in enumerate(words) if word in SHELL_ENDS), len(words))
    words = words[:end]
    first = next((place for place, word in enumerate(words) if word.startswith("--")), len(words))
    programs = [match for word in words[:first] if (match := PROGRAM.fullmatch(word))]
    if not programs and first:
        raise ValueError(
            f"{brief(' '.join(words))} is neither a file such as train_opt.txt nor a command such as "
            f'"python train.py --dataroot DIR"'
        )
    given: dict[str, str] = {}
    rest = words[first:]
    while rest:
        word, *rest = rest
        if not word.startswith("--"):
            raise ValueError(f"{brief(word)} belongs to no option of the published code")
        name, equals, text = word[2:].partition("=")
        name = _known(name)
        takes = named(name)[0].takes
        if equals and takes == "switch":
            raise ValueError(f"--{name} takes no value, not {brief(text)}")
        if not equals:
            text = "True" if takes != "value" else ""
            if takes != "switch" and rest and not rest[0].startswith("--"):
                text, *rest = rest
            elif takes == "value":
                raise ValueError(f"--{name} needs a value")
        given[name] = text
    return Source(bool(programs) and programs[-1][1] == "test", given)


def _known(name: str) -> str:
    """The name of an option: as it is, of an earlier version, or the only one that begins so, as argparse has it."""
    if name in NAMES or name in OLD_NAMES:
        return OLD_NAMES.get(name, name)
    begun = [one for one in NAMES if one.startswith(name)]
    if name and len(begun) == 1:
        return begun[0]
    meant = nearest(f"--{name}", [f"--{one}" for one in begun or NAMES])
    raise ValueError(f"--{name} is no option of CUT, DCLGAN, DCD-GAN or pytorch-CycleGAN-and-pix2pix{meant}")


def _printout(path: Path) -> Source:
    data = path.read_bytes()[: LARGEST_FILE + 1]
    if len(data) > LARGEST_FILE:
        raise ValueError(f"{path} is larger than 1 MiB, and a printout of options such as train_opt.txt is short")
    lines = data.decode("utf-8-sig", "replace").splitlines()
    marks = [place for place, line in enumerate(lines) if re.match(r"-{8,} (Options|End) -", line)]
    body = lines[marks[0] + 1 : marks[1] if len(marks) > 1 else None] if marks else lines
    found = [match for line in body if (match := LINE.fullmatch(line))]
    printed = {match[1]: match[2] for match in found}
    if not {"dataroot", "model"} <= printed.keys():
        raise ValueError(
            f"{path} is no printout of published options: it should have lines such as `dataroot: ./datasets/mine` "
            f"and `model: cut`, as train_opt.txt has"
        )
    given, unknown = {}, []
    for match in found:
        name = OLD_NAMES.get(match[1], match[1])
        if name == "isTrain":
            continue
        if name not in NAMES:
            unknown.append(match[1])
        elif match[3] is not None:
            given[name] = match[2]
    values = {OLD_NAMES.get(name, name): text for name, text in printed.items()}
    return Source(printed.get("isTrain", "True") != "True", given, values, unknown)
