"""Keeps the working folder off Python's path: a file there, such as sqlalchemy.py, must not replace or complete a package.

`python -m` puts it first. Only `load_trainable` puts it back, at the end: a trainable may be a file there. `hpo/__init__.py`
imports this module before all others, so it imports only what Python has loaded by then.
"""

import os
import sys


def leave() -> None:
    """Take the working folder off the path. If hpo itself is in it, as in a clone that is not installed, it becomes last."""
    try:
        here = os.getcwd()  # noqa: PTH109
    except OSError:  # the folder was deleted
        return
    others = [path for path in sys.path if path not in {"", here}]
    is_home = os.path.realpath(here) == os.path.dirname(os.path.dirname(os.path.realpath(__file__)))  # noqa: PTH120
    sys.path[:] = [*others, here] if is_home else others


def is_run_as_module() -> bool:
    """Return whether Python is about to run a module of hpo, by `python -m hpo...`."""
    if sys.argv[:1] != ["-m"]:
        return False
    words = iter(sys.orig_argv[1:])
    for word in words:
        if word.startswith("-") and word.endswith("m"):  # -m, or flags before it: -um
            return next(words, "").split(".")[0] == "hpo"
        if word.startswith("-m"):
            return word[2:].split(".")[0] == "hpo"
    return False
