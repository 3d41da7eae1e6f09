"""Puts the working folder last on Python's path: a file there, such as sqlalchemy.py, must not replace an installed package.

`python -m` puts it first, and `hpo` not at all; trainables are imported from it. The command line imports this module before
all others that are not part of Python.
"""

import contextlib
import os
import sys

with contextlib.suppress(OSError):  # the folder was deleted
    here = os.getcwd()  # noqa: PTH109 # pathlib may not be loaded yet
    sys.path[:] = [*(path for path in sys.path if path not in {"", here}), here]
