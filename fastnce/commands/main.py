"""The command line: `fastnce train`, `fastnce translate` and so on.

A mistake of the user is one sentence on stderr and exit code 2; training that cannot go on is exit code 1.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable

from .. import __version__
from ..common.streams import flush, open_streams, sentence_of, stdout_takes, tell
from ..engine.distributed import RankLost
from ..engine.loop import TrainingFailed
from ..engine.memory import out_of_memory
from ..engine.stop import Stopped, raising
from . import bench, cache, demo, doctor, evaluate, export, methods, rain, train, translate, unpair

COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "train": train.main,
    "translate": translate.main,
    "evaluate": evaluate.main,
    "rain": rain.main,
    "unpair": unpair.main,
    "cache": cache.main,
    "export": export.main,
    "demo": demo.main,
    "doctor": doctor.main,
    "bench": bench.main,
    "methods": methods.main,
}


def main(arguments: list[str] | None = None) -> int:
    """The entry point; returns the exit code."""
    open_streams()
    arguments = sys.argv[1:] if arguments is None else arguments
    before = warnings.formatwarning
    warnings.formatwarning = _one_line  # type: ignore[assignment]
    try:
        return _main(arguments)
    finally:
        warnings.formatwarning = before


def _one_line(message: Warning | str, *_: object) -> str:
    """A warning as a sentence of the command, without the place in our code."""
    return f"fastnce: warning: {message}\n"


def _main(arguments: list[str]) -> int:
    try:
        with raising():
            code = run(arguments)
    except SystemExit as end:  # argparse, after what it had to say
        raise SystemExit(flush(int(end.code or 0))) from None
    except Stopped as stop:
        code = tell(str(stop), 128 + stop.number)
    except KeyboardInterrupt:
        code = tell("stopped by Ctrl-C", 130)
    except ValueError as error:  # DataError among them: the user's to mend
        code = tell(str(error), 2)
    except OSError as error:
        code = 2
        if error.filename is None and isinstance(error, BrokenPipeError):
            # the reader, such as head, has seen enough: as of a program that this ends, not all may be done
            code = 0 if arguments[:1] == ["methods"] else 141
        elif error.filename is not None:
            tell(sentence_of(error), code)
        elif getattr(sys.stdout, "write_through", False):  # nothing waits there to fail once more
            tell(f"standard output: {sentence_of(error)}", code)
        elif stdout_takes():
            tell(sentence_of(error), code)
    except TrainingFailed as error:
        code = tell(str(error), 1)
    except RankLost as error:
        flush(tell(str(error), 1))
        os._exit(1)  # the library's threads abort a process that ends in order without its peer
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        code = tell(f"memory does not suffice ({str(error).partition(chr(10))[0] or type(error).__name__})", 1)
    return flush(code)


def run(arguments: list[str]) -> int:
    """Hand over to a command; returns its exit code."""
    command = arguments[0] if arguments else "--help"
    if command in ("-h", "--help", "help"):
        print("usage: fastnce COMMAND ...   (fastnce COMMAND --help tells more)\n")
        for name, function in COMMANDS.items():
            print(f"  {name:<10} {(function.__doc__ or '').splitlines()[0]}")
        print("\n  --version  print the version")
        return 0
    if command == "--version":
        print(__version__)
        return 0
    if command not in COMMANDS:
        return tell(f"unknown command {command!r}; one of {', '.join(COMMANDS)}", 2)
    for argument in arguments[1:]:  # some versions of argparse make an empty list of it
        if argument.startswith("--") and argument.endswith("=--"):
            return tell(
                f"{argument.removesuffix('=--')} needs a value, and -- is none: name a file of that name ./--", 2
            )
    return COMMANDS[command](arguments[1:])
