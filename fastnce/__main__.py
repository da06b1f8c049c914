"""`python -m fastnce ...` is `fastnce ...`."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
