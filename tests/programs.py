"""Programs as `python` runs them, in forks of the test's process: importing PyTorch anew takes seconds each time."""

from __future__ import annotations

import os
import runpy
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from tests.forked import Forked

ROOT = Path(__file__).resolve().parents[1]


class Finished(NamedTuple):
    """What a program left, as `subprocess.CompletedProcess` names it."""

    returncode: int
    stdout: str
    stderr: str


def run_program(
    arguments: Sequence[object],
    *,
    cwd: Path = ROOT,
    environment: Mapping[str, str] | None = None,
    anew: Sequence[str] = (),
    seconds: float = 120.0,
) -> Finished:
    """Run `python ARGUMENTS`: a script and its arguments, `-m MODULE ...` or `-c CODE`.

    Modules that the test's process has imported are there already, except for those that `anew` names.

    Args:
        cwd: the folder that it starts in.
        environment: the whole environment; None: that of this process.
        anew: packages that the program imports again. fastnce cannot be one: it registers operators once.
        seconds: after which it is ended, and the test fails.
    """
    words = [str(argument) for argument in arguments]
    process = Forked(lambda: _run(words, cwd, environment, anew))
    code = process.end(seconds)
    return Finished(code, process.out.read_text(), process.err.read_text())


def _run(words: list[str], cwd: Path, environment: Mapping[str, str] | None, anew: Sequence[str]) -> int:
    os.chdir(cwd)
    if environment is not None:
        os.environ.clear()
        os.environ.update(environment)
    # a script finds what is beside it and what is installed, not what pytest has added
    sys.path[:] = [place for place in sys.path if Path(place or ".").resolve() != ROOT]
    for name in list(sys.modules):
        if name.partition(".")[0] in anew:
            del sys.modules[name]
    try:
        if words[0] == "-c":
            sys.argv = ["-c", *words[2:]]
            sys.path.insert(0, "")
            exec(compile(words[1], "<string>", "exec"), {"__name__": "__main__"})
        elif words[0] == "-m":
            sys.argv = words[1:]
            sys.path.insert(0, str(cwd))
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = words
            sys.path.insert(0, str((cwd / words[0]).parent))
            runpy.run_path(str(cwd / words[0]), run_name="__main__")
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0
