"""What the parsers of the commands share."""

from __future__ import annotations

import argparse
from collections.abc import Callable

TILES_HELP = "auto: whole pictures, exact tiles where memory is too small; exact or fast: always"
TRUST_HELP = "import classes and functions of your own that the run names; importing runs their code"


def command_parser(command: str, function: Callable[[list[str]], int]) -> argparse.ArgumentParser:
    """A parser whose description is the docstring of the command's function."""
    return argparse.ArgumentParser(prog=f"fastnce {command}", description=function.__doc__)
