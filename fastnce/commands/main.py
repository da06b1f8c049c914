"""The command line: dispatch to the commands, one-sentence errors and exit codes.

A mistake of the user is reported as one sentence on stderr with exit code 2. Training that cannot continue gives exit
code 1.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable

from .. import __version__
from ..common.imports import place_in_own_code
from ..common.messages import nearest
from ..common.streams import flush, flush_stdout, open_streams, report_error, sentence_of
from ..engine.distributed import RankLost
from ..engine.loop import TrainingFailed
from ..engine.memory import out_of_memory
from ..engine.stop import Stopped, raising
from . import (
    bench,
    cache,
    demo,
    doctor,
    evaluate,
    export,
    import_options,
    methods,
    models,
    push,
    rain,
    report,
    runs,
    train,
    translate,
    unpair,
)

COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "train": train.main,
    "translate": translate.main,
    "evaluate": evaluate.main,
    "import-options": import_options.main,
    "report": report.main,
    "rain": rain.main,
    "unpair": unpair.main,
    "cache": cache.main,
    "export": export.main,
    "push": push.main,
    "demo": demo.main,
    "doctor": doctor.main,
    "bench": bench.main,
    "methods": methods.main,
    "models": models.main,
    "runs": runs.main,
}


def main(arguments: list[str] | None = None) -> int:
    """Run a command line (default `sys.argv`) and return the exit code."""
    open_streams()
    arguments = sys.argv[1:] if arguments is None else arguments
    before = warnings.formatwarning
    warnings.formatwarning = _one_line  # type: ignore[assignment]
    try:
        return _main(arguments)
    finally:
        warnings.formatwarning = before


def _one_line(message: Warning | str, *_: object) -> str:
    """Format a warning as one sentence, without the location in the code."""
    return f"fastnce: warning: {message}\n"


def _main(arguments: list[str]) -> int:
    try:
        with raising():
            code = run(arguments)
    except SystemExit as end:  # argparse, after it has printed its message
        raise SystemExit(flush(int(end.code or 0))) from None
    except Stopped as stop:
        code = report_error(str(stop), 128 + stop.number)
    except KeyboardInterrupt:
        code = report_error("stopped by Ctrl-C", 130)
    except ValueError as error:  # a mistake of the user; DataError is one of these
        code = report_error(f"{error}{place_in_own_code(error)}", 2)
    except OSError as error:
        code = 2
        if error.filename is None and isinstance(error, BrokenPipeError):
            # The reader of stdout, such as head, has stopped. A command that does more than print may not have finished
            # its work: give the exit code of a program that SIGPIPE ends.
            code = 0 if arguments[:1] in (["methods"], ["models"], ["runs"]) else 141
        elif error.filename is not None:
            report_error(sentence_of(error), code)
        elif getattr(sys.stdout, "write_through", False):  # unbuffered: flushing cannot reveal the error again
            report_error(f"standard output: {sentence_of(error)}", code)
        elif flush_stdout():
            report_error(sentence_of(error), code)
    except TrainingFailed as error:
        code = report_error(str(error), 1)
    except RankLost as error:
        flush(report_error(str(error), 1))
        os._exit(1)  # without its peer, a normal exit would be aborted by threads of the communication library
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        code = report_error(
            f"there is not enough memory ({str(error).partition(chr(10))[0] or type(error).__name__})", 1
        )
    return flush(code)


def run(arguments: list[str]) -> int:
    """Run the command that the first argument names; return its exit code."""
    command = arguments[0] if arguments else "--help"
    if command in ("-h", "--help", "help"):
        print("usage: fastnce COMMAND ...   (fastnce COMMAND --help shows its options)\n")
        for name, function in COMMANDS.items():
            print(f"  {name:<14} {(function.__doc__ or '').splitlines()[0]}")
        print("\n  --version  print the version")
        return 0
    if command == "--version":
        print(__version__)
        return 0
    if command not in COMMANDS:
        return report_error(f"unknown command {command!r}{nearest(command, COMMANDS)}; one of {', '.join(COMMANDS)}", 2)
    for argument in arguments[1:]:  # some versions of argparse read the value -- as an empty list
        if argument.startswith("--") and argument.endswith("=--"):
            return report_error(
                f"{argument.removesuffix('=--')} needs a value, and -- is not one: for a file of this name, write ./--",
                2,
            )
    return COMMANDS[command](arguments[1:])
