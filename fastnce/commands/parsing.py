"""Helpers shared by the argument parsers of the commands."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from typing import NoReturn

from ..common.messages import nearest
from ..common.streams import report_error
from ..models import names
from ..published.hints import published_words

GENERATOR_HELP = "for a method with two generators: G_A (A to B, default) or G_B"
MODEL_HELP = (
    "a run, a checkpoint folder, an exported folder, a published file, or the name of a model that comes with fastnce: "
    f"{', '.join(names())}"
)
TILES_HELP = "auto (default): whole pictures, or exact tiles if memory is too small; exact, fast: always tiles"
EPOCH_HELP = "of a run: the checkpoint that was kept for an epoch (run.keep_epochs), the best, or the last (default)"
NUM_HELP = "take so many pictures at most, in the order of their names; default: all (test.py takes 50)"
TRAIN_MODE_HELP = "dropout and batch norm compute as in training, as test.py without --eval does; default: eval mode"
TRUST_HELP = "import the user's own classes and functions that the run names; importing runs their code"


class SuggestingParser(argparse.ArgumentParser):
    """A parser that refuses with one sentence, which names the nearest option or choice."""

    def error(self, message: str) -> NoReturn:
        if found := re.match(r"unrecognized arguments: (--[\w-]+)", message):
            message += nearest(found[1], [name for action in self._actions for name in action.option_strings])
        if found := re.search(r"invalid choice: '(.*)' \(choose from (.*)\)$", message):
            message += nearest(found[1], re.findall(r"[\w.-]+", found[2]))
        if found := re.match(r"the following arguments are required: (.*)", message):
            message = f"{self.prog} needs {found[1]}"
        raise SystemExit(report_error(f"{message} ({self.prog} --help shows its options)", 2))

    def check_words(self, arguments: list[str]) -> None:
        """Refuse options of the published code with our words for them; ValueError is one sentence."""
        own = [name for action in self._actions for name in action.option_strings]
        if sentence := published_words(arguments, own, self.prog.rpartition(" ")[2]):
            raise ValueError(sentence)


def command_parser(command: str, function: Callable[[list[str]], int]) -> SuggestingParser:
    """Make a parser whose description is the docstring of the command's function."""
    return SuggestingParser(prog=f"fastnce {command}", description=function.__doc__)


MAX_PIXELS = "--max-pixels {}"
"""How a user of a command accepts larger pictures (see `fastnce.data.limit.accepting`)."""


def add_max_pixels(parser: argparse.ArgumentParser) -> None:
    """Add --max-pixels, whose value is 0 if it is not given."""
    parser.add_argument(
        "--max-pixels",
        type=_pixels,
        default=0,
        metavar="N",
        help="largest picture to read, in pixels (default 178,956,970); decoding takes about 15 bytes per pixel",
    )


def _pixels(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and 0 < int(text[:20]) < 2**62):
        raise argparse.ArgumentTypeError(f"must be a whole number of pixels above 0, not {text!r}")
    return int(text)


def positive(text: str) -> int:
    """Read a whole number above 0, for argparse."""
    if not (text.isascii() and text.isdecimal() and 0 < int(text[:20]) < 2**31):
        raise argparse.ArgumentTypeError(f"must be a whole number above 0, not {text!r}")
    return int(text)
