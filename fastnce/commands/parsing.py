"""Helpers shared by the argument parsers of the commands."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from typing import NoReturn

from ..common.messages import nearest

GENERATOR_HELP = "for a method with two generators: G_A (A to B, default) or G_B"
MODEL_HELP = "a run, a checkpoint folder or a published file"
TILES_HELP = "auto (default): whole pictures, or exact tiles if memory is too small; exact, fast: always tiles"
TRUST_HELP = "import the user's own classes and functions that the run names; importing runs their code"


class Parser(argparse.ArgumentParser):
    """A parser that names the nearest option or choice when it refuses one."""

    def error(self, message: str) -> NoReturn:
        if found := re.match(r"unrecognized arguments: (--[\w-]+)", message):
            message += nearest(found[1], [name for action in self._actions for name in action.option_strings])
        if found := re.search(r"invalid choice: '(.*)' \(choose from (.*)\)$", message):
            message += nearest(found[1], re.findall(r"[\w.-]+", found[2]))
        super().error(message)


def command_parser(command: str, function: Callable[[list[str]], int]) -> argparse.ArgumentParser:
    """Make a parser whose description is the docstring of the command's function."""
    return Parser(prog=f"fastnce {command}", description=function.__doc__)
