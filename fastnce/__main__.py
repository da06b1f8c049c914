"""`python -m fastnce ...`, the same as `fastnce ...`."""

import os
import sys
from contextlib import suppress

SPINS = "10000"
"""Turns of a thread that waits for the others of an operation, before it sleeps.

The default of GNU OpenMP is 30 times that. On a machine that others use too, a waiting thread then takes the core from
the one that it waits for.
"""


def entry() -> None:
    """Run the command line and end the process with its exit code."""
    if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = SPINS  # read when PyTorch is loaded
    try:
        from .commands.main import main  # imports PyTorch, which takes seconds

        code = main()
    except KeyboardInterrupt:
        print("fastnce: stopped by Ctrl-C", file=sys.stderr)
        code = 130
    if code >= 128 or os.environ.get("WORLD_SIZE", "1") != "1":
        # Everything is saved, but PyTorch's compilers may still be running. With several ranks, gloo's threads may
        # still be ending, and the C++ library would then abort a finished process.
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):  # the reader has closed it
                stream.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    entry()
