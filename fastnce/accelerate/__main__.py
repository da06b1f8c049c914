"""`python -m fastnce.accelerate`."""

import sys

from .errors import show_as_python
from .script import main

try:
    code = main()
except SystemExit:
    raise
except BaseException:  # an error of the script, which Python prints
    show_as_python()
    raise
sys.exit(code)
