"""`python -m fastnce ...`, the same as `fastnce ...`."""

import os
import sys
from contextlib import suppress

from .cli import main

if __name__ == "__main__":
    code = main()
    if os.environ.get("WORLD_SIZE", "1") != "1":
        # One of several ranks: gloo's threads may still be ending, and the C++ library then aborts a finished process.
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):  # nobody reads it any more
                stream.flush()
        os._exit(code)
    sys.exit(code)
