"""Helpers shared by the argument parsers of the commands."""

from __future__ import annotations

import argparse
from collections.abc import Callable

GENERATOR_HELP = "for a method with two generators: G_A (A to B, default) or G_B"
MODEL_HELP = "a run, a checkpoint folder or a published file"
TILES_HELP = "auto (default): whole pictures, or exact tiles if memory is too small; exact, fast: always tiles"
TRUST_HELP = "import the user's own classes and functions that the run names; importing runs their code"


def command_parser(command: str, function: Callable[[list[str]], int]) -> argparse.ArgumentParser:
    """Make a parser whose description is the docstring of the command's function."""
    return argparse.ArgumentParser(prog=f"fastnce {command}", description=function.__doc__)
